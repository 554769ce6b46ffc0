"""One logistic regression for each task, on its support set alone: what meta-learning has to beat."""

import dataclasses
from pathlib import Path
from typing import ClassVar

from ibaml.algorithms.heads import Softmax
from ibaml.baselines.base import FittedBaseline, Problem
from ibaml.baselines.choosing import choose_penalty
from ibaml.priors import DiagonalColumnPrior

LOGISTIC = Softmax(prior=DiagonalColumnPrior(tied=True, learn_mean=False), posterior_temperature=0.0)
"""One prior of mean zero for all classes, so that there may be any number of them; the mode alone, no posterior."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LogisticRegression:
    """Softmax regression on the inputs with a penalty ``|w|^2 / (2 C)``, the same for all tasks.

    Attributes:
        strengths: The values of ``C`` times the mean squared distance of inputs to their mean, tried on the validation
            tasks: the prior variance of a logit.
    """

    strengths: tuple[float, ...] = (0.01, 0.1, 1.0, 10.0, 100.0, 1000.0)

    name: ClassVar[str] = "logistic_regression"

    def suits(self, problem: Problem) -> bool:
        """Whether targets are classes."""
        return not problem.is_regression

    def fit(self, problem: Problem, *, seconds: float, folder: Path | None = None) -> FittedBaseline:
        """Chooses ``C``, and whether the constant has a penalty too; see ``Baseline``."""
        del seconds, folder
        return choose_penalty(
            problem, LOGISTIC, self.strengths, lambda weight, bias: f"C = {weight:.2g}, of the constant {bias:g}"
        )
