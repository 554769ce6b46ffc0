"""Hypergradients by the implicit function theorem, for any inner problem."""

import torch

from ibaml import tree
from ibaml.hypergradients.base import BilevelLoss, diagnostics, gradients_and_value, require_residual
from ibaml.solvers.curvature import at_fixed, value_gradient_and_hvp, vjp
from ibaml.solvers.curvature import gradient as gradient_of
from ibaml.solvers.linear import LinearSolver
from ibaml.types import HypergradientInfo, PyTree


@torch.no_grad()
def implicit_hypergradient(
    inner_loss: BilevelLoss,
    outer_loss: BilevelLoss,
    inner_params: PyTree,
    meta_params: PyTree,
    solver: LinearSolver,
) -> tuple[PyTree, HypergradientInfo]:
    """Implicit function theorem at the point that an inner solver returned.

    Solves ``(d2F/dv2) u = dO/dv`` and returns ``dO/dtheta - (d2F/dtheta dv) u`` (Zhang et al. 2023, eq. (14)). Exact
    when ``dF/dv = 0`` and the system is solved; the error is of the order of the distance to the stationary point plus
    the residual of the system (Theorem 2). How the point was found does not matter, and its solver's settings cannot
    be learned this way. This is also the interface for tuning hyper-parameters by gradients.

    Args:
        inner_loss: ``F(v, theta)``, twice differentiable.
        outer_loss: ``O(v, theta)``.
        inner_params: ``v``, a (nearly) stationary point of ``F`` in its first argument.
        meta_params: ``theta``.
        solver: Linear solver, for example ``CG(max_steps=10)``.

    Returns:
        The gradient in the structure of ``meta_params`` and its diagnostics. The gradient is NaN where ``dO/dv`` is not
        finite.

    Cost:
        Three gradients and one Hessian-vector product per solver step. Memory does not depend on how many steps the
        inner solver took.

    Examples:
        Ridge regression of one weight: ``v = x y / (x^2 + theta)``, so ``dv/dtheta = -v / (x^2 + theta)``.

        >>> from ibaml.solvers.linear import CG
        >>> inner = lambda v, theta: 0.5 * (2 * v - 3) ** 2 + 0.5 * theta * v**2
        >>> gradient, info = implicit_hypergradient(
        ...     inner, lambda v, theta: v, torch.tensor(6 / 5.0), torch.tensor(1.0), CG(max_steps=3)
        ... )
        >>> gradient
        tensor(-0.2400)
    """
    (outer_v, outer_meta), value = gradients_and_value(outer_loss, inner_params, meta_params)
    _, inner_gradient, curvature = value_gradient_and_hvp(at_fixed(inner_loss, meta_params), inner_params)
    solution = require_residual(solver(curvature, outer_v))
    pullback = vjp(lambda meta: gradient_of(inner_loss)(inner_params, meta), meta_params)[1]
    gradient = tree.sub(outer_meta, pullback(solution.value)[0])
    return gradient, diagnostics(value, tree.norm(inner_gradient), inner_params, solution, outer_v)
