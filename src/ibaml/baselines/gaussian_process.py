"""A Gaussian process for each task, on the inputs as they are, with hyper-parameters that all tasks share."""

import dataclasses
from pathlib import Path
from typing import ClassVar

from ibaml.algorithms import make_algorithm
from ibaml.baselines.base import FittedBaseline, Problem
from ibaml.baselines.training import Setting, train

_NOISE_VARIANCE = 0.1
"""Where training starts: a tenth of the variance that scaled targets have."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SharedGaussianProcess:
    """The head ``gp`` on the inputs; its kernel, mean and noise are trained as long as the learner.

    Attributes:
        learning_rates: Of the mean function, and of what is on a log scale; pairs, tried in short trials.
    """

    learning_rates: tuple[tuple[float, float], ...] = ((1e-2, 5e-2), (3e-2, 1e-1))

    name: ClassVar[str] = "gp"

    def suits(self, problem: Problem) -> bool:
        """Whether targets are numbers."""
        return problem.is_regression

    def settings(self, problem: Problem) -> list[Setting]:
        """Returns one for each pair of learning rates; see ``TrainedBaseline``."""
        return [
            Setting(
                f"learning rates {rate:g} and {log_rate:g}",
                problem.linear(make_algorithm("gp"), noise_variance=_NOISE_VARIANCE),
                dataclasses.replace(problem.settings, learning_rate=rate, log_var_learning_rate=log_rate),
            )
            for rate, log_rate in self.learning_rates
        ]

    def fit(self, problem: Problem, *, seconds: float, folder: Path | None = None) -> FittedBaseline:
        """Trains; see ``Baseline``."""
        return train(problem, self.settings(problem), seconds=seconds, folder=folder)
