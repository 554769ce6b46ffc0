"""Reptile: the initial weights move towards where the tasks' own training leads."""

import dataclasses
from functools import partial
from typing import ClassVar

from ibaml import tree
from ibaml.algorithms.base import Estimator, MetaParameters
from ibaml.algorithms.gradient_based import Hypergradient, TaskProblem
from ibaml.algorithms.on_weights import OnWeights
from ibaml.hypergradients.base import diagnostics, gradients_and_value


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reptile(OnWeights):
    """Reptile (Nichol et al. 2018): the difference of initial and adapted weights takes the place of a gradient.

    Initial weights learn from the support set alone; the query set serves for the diagnostics and for the gradient of
    shared parameters. No derivative goes through the inner steps.

    Cost:
        The inner steps, and one gradient.
    """

    name: ClassVar[str] = "reptile"
    estimator: ClassVar[Estimator] = "first_order"

    def _differentiate(self, problem: TaskProblem) -> Hypergradient:
        solution = self.adapt(problem.nll, problem.meta, problem.episode.support, problem.noise)
        (of_theta,), outer_loss = gradients_and_value(partial(problem.outer_loss, solution.value), problem.meta)
        gradient = MetaParameters(tree.sub(problem.meta.prior, solution.value), of_theta.shared)
        return gradient, diagnostics(outer_loss, solution.grad_norm, solution.value)
