"""What all hypergradients share: the shape of a bilevel problem, and the diagnostics."""

from collections.abc import Callable
from typing import TypeAlias

import torch

from ibaml import tree
from ibaml.types import HypergradientInfo, InnerSolution, LinearSolution, PyTree, Tensor

BilevelLoss: TypeAlias = Callable[[PyTree, PyTree], Tensor]
"""``(inner_params, meta_params) -> scalar``."""

InnerRun: TypeAlias = Callable[..., InnerSolution]
"""``(loss, init, *, num_differentiable_steps=None) -> InnerSolution``: an ``InnerSolver``, or one of its functions with
the settings bound by ``functools.partial``."""


def diagnostics(
    outer_loss: Tensor,
    grad_norm: Tensor,
    inner_params: PyTree,
    solution: LinearSolution | None = None,
    rhs: PyTree | None = None,
) -> HypergradientInfo:
    """Collects the diagnostics of a hypergradient.

    Args:
        outer_loss: Outer loss.
        grad_norm: Norm of the inner gradient.
        inner_params: Where both were taken.
        solution: Solution of the linear system, if there was one.
        rhs: Its right-hand side, to which the residual is relative.
    """
    inner_params = tree.detach(inner_params)
    if solution is None:
        no_residual, always = torch.zeros_like(grad_norm), torch.ones_like(grad_norm, dtype=torch.bool)
        return HypergradientInfo(outer_loss, grad_norm, no_residual, always, inner_params)
    scale = tree.norm(rhs)
    relative = solution.residual_norm / torch.where(scale > 0, scale, torch.ones_like(scale))
    return HypergradientInfo(outer_loss, grad_norm, relative, solution.converged, inner_params)
