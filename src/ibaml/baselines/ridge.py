"""One ridge regression for each task, on its support set alone: what meta-learning has to beat."""

import dataclasses
import itertools
import math
from pathlib import Path
from typing import ClassVar

from ibaml.algorithms import MetaParameters, make_algorithm
from ibaml.baselines.base import FittedBaseline, Problem, initial_meta
from ibaml.baselines.choosing import BIAS_VARIANCES, Candidate, choose, training_rows
from ibaml.learner import MetaLearner
from ibaml.priors import DiagonalColumnPrior


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
        spread = training_rows(problem).spread
        return choose(
            problem,
            (
                Candidate(f"r = {spread / strength:.2g}, of the constant {1 / bias:g}", learner)
                for strength, bias in itertools.product(self.strengths, BIAS_VARIANCES)
                for learner in [ridge_regression(problem, strength / spread, bias)]
            ),
        )


def ridge_regression(problem: Problem, variance: float, bias_variance: float) -> MetaLearner:
    """Returns ridge regression for each task with noise of variance 1.

    Args:
        problem: The tasks.
        variance: ``1 / r``, the prior variance of weights in units of the noise.
        bias_variance: That of the constant's weight.
    """
    learner = problem.linear(make_algorithm("linear_gaussian", prior=DiagonalColumnPrior(learn_mean=False)))
    prior, shared = initial_meta(learner)
    log_var = prior.log_var.new_full(prior.log_var.shape, math.log(variance))
    log_var[:, -1] = math.log(bias_variance)
    return problem.with_meta_parameters(learner, MetaParameters(prior._replace(log_var=log_var), shared))
