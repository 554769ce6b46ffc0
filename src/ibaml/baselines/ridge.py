"""One ridge regression for each task, on its support set alone: what meta-learning has to beat."""

import dataclasses
from pathlib import Path
from typing import ClassVar

from ibaml.algorithms.heads import LinearGaussian
from ibaml.baselines.base import FittedBaseline, Problem
from ibaml.baselines.choosing import choose_penalty
from ibaml.priors import DiagonalColumnPrior

RIDGE = LinearGaussian(prior=DiagonalColumnPrior(learn_mean=False))
"""Ridge regression of each task, with noise of variance 1."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RidgeRegression:
    """Ridge regression on the inputs with a penalty ``r |w|^2``, the same for all tasks.

    The prediction is ``N(mean, s2 (1 + z^T (Z^T Z + R)^-1 z))``, ridge regression read as Bayes' rule, with the ``s2``
    that the residuals on the validation tasks make likeliest (``ibaml.baselines.choosing``).

    Attributes:
        strengths: The values of ``1 / r`` times the mean squared distance of inputs to their mean, tried on the
            validation tasks: the prior variance of an output, in units of the noise.
    """

    strengths: tuple[float, ...] = (0.01, 0.1, 1.0, 10.0, 100.0, 1000.0)

    name: ClassVar[str] = "ridge"

    def suits(self, problem: Problem) -> bool:
        """Whether targets are numbers."""
        return problem.is_regression

    def fit(self, problem: Problem, *, seconds: float, folder: Path | None = None) -> FittedBaseline:
        """Chooses ``r``, and whether the constant has a penalty too; see ``Baseline``."""
        del seconds, folder
        return choose_penalty(
            problem, RIDGE, self.strengths, lambda weight, bias: f"r = {1 / weight:.2g}, of the constant {1 / bias:g}"
        )
