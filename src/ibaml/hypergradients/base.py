"""What all hypergradients share: the shape of a bilevel problem, and the diagnostics."""

from collections.abc import Callable
from typing import Any, TypeAlias

import torch

from ibaml import tree
from ibaml.solvers.curvature import vjp
from ibaml.types import HypergradientInfo, InnerSolution, LinearSolution, PyTree, Tensor

BilevelLoss: TypeAlias = Callable[[PyTree, PyTree], Tensor]
"""``(inner_params, meta_params) -> scalar``."""

InnerRun: TypeAlias = Callable[..., InnerSolution]
"""``(loss, init, *, num_differentiable_steps=None) -> InnerSolution``: an ``InnerSolver``, or one of its functions with
the settings bound by ``functools.partial``."""


def gradients_and_value(function: Callable[..., Any], *arguments: PyTree, has_aux: bool = False) -> tuple[Any, ...]:
    """Returns the gradients in all arguments and the value, like ``torch.func.grad_and_value``, in less memory.

    ``grad`` goes back inside its own level of differentiation and so records the way back as well, which keeps alive
    what it has used; the pullback of ``vjp`` records nothing unless somebody differentiates it in turn.

    Args:
        function: Scalar function, or ``(scalar, aux)`` with ``has_aux``.
        *arguments: Its arguments.
        has_aux: Whether it returns more than the scalar.

    Returns:
        A tuple with a gradient for each argument, the value, and what else the function returned.
    """
    value, pullback, *aux = vjp(function, *arguments, has_aux=has_aux)
    return pullback(torch.ones_like(value)), value, *aux


def require_residual(solution: LinearSolution) -> LinearSolution:
    """Returns the solution, as NaN where its residual is not finite.

    Of a right-hand side that is not finite a solver returns where it started, zero, and a hypergradient would take that
    for an outer loss that does not depend on the inner parameters.
    """
    has_residual = torch.isfinite(solution.residual_norm)
    return solution._replace(value=tree.map(lambda leaf: torch.where(has_residual, leaf, torch.nan), solution.value))


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
