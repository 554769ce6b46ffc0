"""One logistic regression for each task, on its support set alone: what meta-learning has to beat."""

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
        spread = training_rows(problem).spread
        return choose(
            problem,
            (
                Candidate(f"C = {strength / spread:.2g}, of the constant {bias:g}", learner)
                for strength, bias in itertools.product(self.strengths, BIAS_VARIANCES)
                for learner in [logistic_regression(problem, strength / spread, bias)]
            ),
        )


def logistic_regression(problem: Problem, variance: float, bias_variance: float) -> MetaLearner:
    """Returns logistic regression for each task.

    Args:
        problem: The tasks.
        variance: ``C``, the prior variance of weights.
        bias_variance: That of the constant's weight.
    """
    # One prior of mean zero for all classes, so that there may be any number of them; the mode alone, no posterior.
    head = make_algorithm("softmax", prior=DiagonalColumnPrior(tied=True, learn_mean=False), posterior_temperature=0.0)
    learner = problem.linear(head)
    prior, shared = initial_meta(learner)
    log_var = prior.log_var.new_full(prior.log_var.shape, math.log(variance))
    log_var[:, -1] = math.log(bias_variance)
    return problem.with_meta_parameters(learner, MetaParameters(prior._replace(log_var=log_var), shared))
