"""Hypergradients by backpropagation through the steps of the inner solver, or past them."""

from collections.abc import Callable

import torch

from ibaml import tree
from ibaml.hypergradients.base import BilevelLoss, InnerRun, diagnostics, gradients_and_value
from ibaml.solvers.curvature import at_fixed, vjp
from ibaml.types import HypergradientInfo, PyTree, Tensor


@torch.no_grad()
def unrolled_hypergradient(
    inner_loss: BilevelLoss,
    outer_loss: BilevelLoss,
    init: Callable[[PyTree], PyTree],
    meta_params: PyTree,
    inner_solver: InnerRun,
    *,
    truncation: int | None = None,
) -> tuple[PyTree, HypergradientInfo]:
    """Differentiates through the steps of the inner solver (Zhang et al. 2023: explicit; eq. (10)).

    Args:
        inner_loss: ``F(v, theta)``.
        outer_loss: ``O(v, theta)``.
        init: Starting point of the inner solver as a function of ``theta``.
        meta_params: ``theta``.
        inner_solver: Differentiable inner solver, for example ``GradientDescent(num_steps=5)``.
        truncation: Go back through the last so many steps only. Before them ``dv/dtheta`` counts as ``d init/dtheta``,
            so that 0 is the first-order estimator and the number of steps is the full one.

    Returns:
        The gradient and its diagnostics.

    Cost:
        For K steps: K + 1 gradients forward, about 2 K + 1 backward. Memory grows with the steps that are
        differentiated.

    Examples:
        One step of size 0.1 on ``v^2 / 2`` from ``theta``, judged by ``v^2 / 2``: the factor is ``0.9 * 0.9``.

        >>> from ibaml.solvers.inner import GradientDescent
        >>> half_square = lambda v, theta: 0.5 * (v**2).sum()
        >>> solver = GradientDescent(num_steps=1, learning_rate=0.1)
        >>> unrolled_hypergradient(half_square, half_square, lambda theta: theta, torch.ones(1), solver)[0]
        tensor([0.8100])
    """

    def objective(meta: PyTree) -> tuple[Tensor, tuple[Tensor, PyTree]]:
        solution = inner_solver(
            at_fixed(inner_loss, meta),
            init(meta),
            num_differentiable_steps=truncation,
        )
        return outer_loss(solution.value, meta), (solution.grad_norm, solution.value)

    (gradient,), value, (grad_norm, adapted) = gradients_and_value(objective, meta_params, has_aux=True)
    return gradient, diagnostics(value, grad_norm, adapted)


@torch.no_grad()
def first_order_hypergradient(
    inner_loss: BilevelLoss,
    outer_loss: BilevelLoss,
    init: Callable[[PyTree], PyTree],
    meta_params: PyTree,
    inner_solver: InnerRun,
) -> tuple[PyTree, HypergradientInfo]:
    """Treats ``dv/dtheta`` as ``d init/dtheta``, the identity on matching coordinates (Finn et al. 2017, FOMAML).

    The arguments are those of ``unrolled_hypergradient``. The bias is of the order of the inner learning rate times the
    curvature, per step.

    Cost:
        K + 1 gradients for the inner steps and one for the outer loss. Memory does not depend on K.
    """
    meta_params = tree.detach(meta_params)
    solution = inner_solver(at_fixed(inner_loss, meta_params), init(meta_params))
    (outer_v, outer_meta), value = gradients_and_value(outer_loss, solution.value, meta_params)
    through_init = vjp(init, meta_params)[1](outer_v)[0]
    return tree.add(outer_meta, through_init), diagnostics(value, solution.grad_norm, solution.value)
