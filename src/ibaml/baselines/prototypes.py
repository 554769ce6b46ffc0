"""Prototypical networks on the learner's network (Snell et al. 2017)."""

import dataclasses
from pathlib import Path
from typing import ClassVar

from ibaml.algorithms import make_algorithm
from ibaml.baselines.base import FittedBaseline, Problem
from ibaml.baselines.training import Setting, train


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrototypicalNetwork:
    """Distances to class means in the feature space of the learner's network, trained as long as the learner.

    Attributes:
        learning_rates: Tried in short trials.
    """

    learning_rates: tuple[float, ...] = (1e-3, 3e-3, 1e-2)

    name: ClassVar[str] = "prototypes"

    def suits(self, problem: Problem) -> bool:
        """Whether targets are classes."""
        return not problem.is_regression

    def settings(self, problem: Problem) -> list[Setting]:
        """Returns one for each learning rate; see ``TrainedBaseline``."""
        return [
            Setting(
                f"learning rate {rate:g}",
                problem.same_network(make_algorithm("prototypes")),
                dataclasses.replace(problem.settings, learning_rate=rate, log_var_learning_rate=None),
            )
            for rate in self.learning_rates
        ]

    def fit(self, problem: Problem, *, seconds: float, folder: Path | None = None) -> FittedBaseline:
        """Trains; see ``Baseline``."""
        return train(problem, self.settings(problem), seconds=seconds, folder=folder)
