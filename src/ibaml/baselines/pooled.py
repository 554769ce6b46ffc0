"""One model for all tasks: logistic or ridge regression on the rows of all training tasks, blind to the support set."""

import dataclasses
from pathlib import Path
from typing import ClassVar

import torch
from torch.nn import functional

from ibaml.algorithms import MetaParameters, make_algorithm
from ibaml.algorithms.heads.least_squares import least_squares
from ibaml.baselines.base import FittedBaseline, Problem, initial_meta
from ibaml.baselines.choosing import Candidate, Rows, choose, training_rows
from ibaml.learner import MetaLearner
from ibaml.priors import DiagonalColumnPrior
from ibaml.types import Tensor

_NONE = -60.0
"""Logarithm of a variance that leaves the prior's mean as it is."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pooled:
    """A linear model of all training rows together, with a penalty ``|w|^2 / (2 C)`` (numbers: ``r |w|^2``).

    The constant has no penalty. For classes that mean the same in all tasks, and for numbers.

    Attributes:
        strengths: The values of ``C``, or ``1 / r``, times the mean squared distance of inputs to their mean, tried on
            the validation tasks.
    """

    strengths: tuple[float, ...] = (0.01, 0.1, 1.0, 10.0, 100.0)

    name: ClassVar[str] = "pooled"

    def suits(self, problem: Problem) -> bool:
        """Whether targets mean the same in all tasks."""
        return problem.is_regression or problem.has_shared_classes

    def fit(self, problem: Problem, *, seconds: float, folder: Path | None = None) -> FittedBaseline:
        """Fits all rows for each strength; see ``Baseline``."""
        del seconds, folder
        rows = training_rows(problem)
        fit, letter = (pooled_ridge, "1 / r") if problem.is_regression else (pooled_logistic, "C")
        strengths = [strength / rows.spread for strength in self.strengths]
        return choose(
            problem,
            (
                Candidate(f"{letter} = {one:.2g}, {len(rows.y):,} rows", _fixed(problem, fit(problem, rows, one)))
                for one in strengths
            ),
        )


def pooled_ridge(problem: Problem, rows: Rows, variance: float) -> Tensor:
    """Returns the weights of ridge regression, the constant's last, ``[num_targets, num_features + 1]``, float64.

    Those of each target are of the rows where it was measured.

    Args:
        problem: The tasks.
        rows: Their rows.
        variance: ``1 / r``.
    """
    del problem

    def of_rows(x: Tensor, y: Tensor) -> Tensor:
        weights = least_squares(x - x.mean(0), y - y.mean(0), x.new_tensor(1 / variance)).weights.mT
        return torch.cat([weights, (y.mean(0) - weights @ x.mean(0)).unsqueeze(-1)], -1)

    x, y = rows.x.double(), rows.y.double()
    measured = ~y.isnan()
    if bool(measured.all()):
        return of_rows(x, y)
    each = zip(measured.unbind(1), y.unbind(1), strict=True)
    return torch.cat([of_rows(x[where], target[where].unsqueeze(-1)) for where, target in each])


def pooled_logistic(problem: Problem, rows: Rows, variance: float) -> Tensor:
    """Returns the weights of logistic regression, the constant's last, ``[num_classes, num_features + 1]``, float64.

    Args:
        problem: The tasks.
        rows: Their rows.
        variance: ``C``.
    """
    middle = rows.x.double().mean(0)
    x = rows.x.double() - middle
    weights = x.new_zeros(problem.num_outputs, x.shape[1] + 1, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [weights], max_iter=500, tolerance_grad=1e-7, tolerance_change=1e-12, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        logits = x @ weights[:, :-1].mT + weights[:, -1]
        # Of the mean, so that tolerances mean the same for any number of rows.
        penalty = (weights[:, :-1] ** 2).sum() / (2 * variance * len(x))
        loss = functional.cross_entropy(logits, rows.y) + penalty
        loss.backward()  # pyright: ignore[reportUnknownMemberType]
        return loss

    with torch.enable_grad():
        optimizer.step(closure)  # pyright: ignore[reportArgumentType]
    found = weights.detach()
    found[:, -1] -= found[:, :-1] @ middle
    return found


def _fixed(problem: Problem, weights: Tensor) -> MetaLearner:
    """Returns a learner with these weights in every task."""
    settings = {} if problem.is_regression else {"prior": DiagonalColumnPrior(), "posterior_temperature": 0.0}
    head = make_algorithm("linear_gaussian" if problem.is_regression else "softmax", **settings)
    learner = problem.linear(head)
    prior, shared = initial_meta(learner)
    prior = prior._replace(mean=weights.to(prior.mean), log_var=torch.full_like(prior.log_var, _NONE))
    return problem.with_meta_parameters(learner, MetaParameters(prior, shared))
