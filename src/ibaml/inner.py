"""Inner solvers: ``(loss, init) -> InnerSolution``. They know nothing of Bayes, tasks or networks.

Each is a fixed number of steps of a first-order method on a pytree, written so that reverse-mode differentiation
passes through it (unrolled hypergradients) and so that it runs under ``torch.func.vmap``. Outside a differentiation
transform no graph is kept, so memory does not grow with the number of steps.
"""

import math
from collections.abc import Callable

import torch

from ibaml import tree
from ibaml.curvature import gradient as gradient_of
from ibaml.types import InnerSolution, Loss, PyTree, Tensor


def gradient_descent(
    loss: Loss,
    init: PyTree,
    *,
    num_steps: int,
    learning_rate: float | Tensor,
    momentum: float = 0.0,
    loss_at: Callable[[int], Loss] | None = None,
    num_differentiable_steps: int | None = None,
    with_grad_norm: bool = True,
) -> InnerSolution:
    """Runs gradient descent with heavy-ball momentum, ``u <- momentum * u + grad``, ``x <- x - learning_rate * u``.

    Args:
        loss: Scalar function to minimise.
        init: Starting point.
        num_steps: Number of steps, at least 0.
        learning_rate: Positive step size. A tensor may carry a derivative of its own (unrolled estimators only: an
            implicit gradient cannot learn it).
        momentum: In ``[0, 1)``.
        loss_at: Loss whose gradient step ``k`` uses, when it changes from step to step.
        num_differentiable_steps: Let derivatives flow through the last so many steps only; before those the iterate
            counts as ``init`` plus a constant. None: through all.
        with_grad_norm: False spares the gradient at the last iterate; its norm is then NaN.

    Returns:
        The last iterate and the norm of the gradient of ``loss`` there.

    Raises:
        ValueError: If an argument is out of range.

    Cost:
        ``num_steps + 1`` gradients.

    Examples:
        >>> solution = gradient_descent(
        ...     lambda x: ((x - 3.0) ** 2).sum(), torch.zeros(1), num_steps=50, learning_rate=0.4
        ... )
        >>> solution.value
        tensor([3.])
    """
    return preconditioned_gradient_descent(
        loss,
        init,
        num_steps=num_steps,
        learning_rate=learning_rate,
        preconditioner=lambda _, gradient: gradient,
        momentum=momentum,
        loss_at=loss_at,
        num_differentiable_steps=num_differentiable_steps,
        with_grad_norm=with_grad_norm,
    )


def adam(
    loss: Loss,
    init: PyTree,
    *,
    num_steps: int,
    learning_rate: float | Tensor,
    betas: tuple[float, float] = (0.9, 0.999),
    epsilon: float = 1e-8,
    scale: PyTree | None = None,
    loss_at: Callable[[int], Loss] | None = None,
    num_differentiable_steps: int | None = None,
    with_grad_norm: bool = True,
) -> InnerSolution:
    """Runs Adam (Kingma and Ba 2015), differentiable.

    ``epsilon`` stands under the root, ``sqrt(second_moment + epsilon^2)``: the derivative of the square root at a
    gradient that is exactly zero would otherwise be infinite. Where gradients are far above ``epsilon`` the two agree.

    Args:
        loss: Scalar function to minimise.
        init: Starting point.
        num_steps: Number of steps, at least 0.
        learning_rate: Positive step size.
        betas: Decay of the first and second moment, each in ``[0, 1)``.
        epsilon: Positive; in the units of the gradient.
        scale: Units of the steps, in the structure of ``init``: a step moves a coordinate by about ``learning_rate``
            times its entry. None: 1.
        loss_at: As in ``gradient_descent``.
        num_differentiable_steps: As in ``gradient_descent``.
        with_grad_norm: As in ``gradient_descent``.

    Raises:
        ValueError: If an argument is out of range.

    Cost:
        ``num_steps + 1`` gradients.
    """
    if not all(0 <= beta < 1 for beta in betas):
        raise ValueError(f"betas must both be in [0, 1), but are {betas}.")
    if epsilon <= 0:
        raise ValueError(f"epsilon must be positive, but is {epsilon}.")
    first_decay, second_decay = betas

    def update(
        moments: tuple[PyTree, PyTree], gradient: PyTree, value: PyTree, step: int
    ) -> tuple[PyTree, tuple[PyTree, PyTree]]:
        first = tree.map(lambda m, g: first_decay * m + (1 - first_decay) * g, moments[0], gradient)
        second = tree.map(lambda v, g: second_decay * v + (1 - second_decay) * g**2, moments[1], gradient)
        first_correction = 1 - first_decay ** (step + 1)
        second_correction = 1 - second_decay ** (step + 1)
        direction = tree.map(
            lambda m, v: (m / first_correction) / torch.sqrt(v / second_correction + epsilon**2), first, second
        )
        if scale is not None:
            direction = tree.mul(scale, direction)
        return tree.axpy(-learning_rate, direction, value), (first, second)

    start = (tree.zeros_like(init), tree.zeros_like(init))
    return _iterate(
        loss, init, update, start, num_steps, learning_rate, loss_at, num_differentiable_steps, with_grad_norm
    )


def preconditioned_gradient_descent(
    loss: Loss,
    init: PyTree,
    *,
    num_steps: int,
    learning_rate: float | Tensor,
    preconditioner: Callable[[PyTree, PyTree], PyTree],
    momentum: float = 0.0,
    loss_at: Callable[[int], Loss] | None = None,
    num_differentiable_steps: int | None = None,
    with_grad_norm: bool = True,
) -> InnerSolution:
    """Runs ``u <- momentum * u + grad``, ``x <- x - learning_rate * P(x, u)``.

    With ``ibaml.objectives.natural_gradient`` as the preconditioner this is natural-gradient variational inference: the
    mean moves in units of the posterior variance, the log-variance in its own.

    Args:
        loss: Scalar function to minimise.
        init: Starting point.
        num_steps: Number of steps, at least 0.
        learning_rate: Positive; about 1 is a Newton-like step when ``P`` approximates the inverse Hessian.
        preconditioner: ``P``: maps the current value and the gradient to a direction of ascent.
        momentum: In ``[0, 1)``.
        loss_at: As in ``gradient_descent``.
        num_differentiable_steps: As in ``gradient_descent``.
        with_grad_norm: As in ``gradient_descent``.

    Raises:
        ValueError: If an argument is out of range.

    Cost:
        ``num_steps + 1`` gradients.
    """
    if not 0 <= momentum < 1:
        raise ValueError(f"momentum must be in [0, 1), but is {momentum}.")

    def update(velocity: PyTree, gradient: PyTree, value: PyTree, step: int) -> tuple[PyTree, PyTree]:
        del step
        if momentum == 0:
            return tree.axpy(-learning_rate, preconditioner(value, gradient), value), ()
        velocity = tree.axpy(momentum, velocity, gradient)
        return tree.axpy(-learning_rate, preconditioner(value, velocity), value), velocity

    start = tree.zeros_like(init) if momentum else ()
    return _iterate(
        loss, init, update, start, num_steps, learning_rate, loss_at, num_differentiable_steps, with_grad_norm
    )


def _iterate(
    loss: Loss,
    init: PyTree,
    update: Callable[[PyTree, PyTree, PyTree, int], tuple[PyTree, PyTree]],
    state: PyTree,
    num_steps: int,
    learning_rate: float | Tensor,
    loss_at: Callable[[int], Loss] | None,
    num_differentiable_steps: int | None,
    with_grad_norm: bool,
) -> InnerSolution:
    """Runs ``update`` for a fixed number of steps, cutting derivatives before the last ``num_differentiable_steps``."""
    if num_steps < 0:
        raise ValueError(f"num_steps must be at least 0, but is {num_steps}.")
    if isinstance(learning_rate, float | int) and not 0 < learning_rate < math.inf:
        raise ValueError(f"learning_rate must be positive and finite, but is {learning_rate}.")
    if num_differentiable_steps is not None and num_differentiable_steps < 0:
        raise ValueError(f"num_differentiable_steps must be at least 0 or None, but is {num_differentiable_steps}.")
    cut = 0 if num_differentiable_steps is None else max(0, num_steps - num_differentiable_steps)
    value = init
    for step in range(num_steps):
        gradient = gradient_of(loss if loss_at is None else loss_at(step))(value)
        value, state = update(state, gradient, value, step)
        if step < cut:
            # Detaching at every step, not only at the last of them, frees each step's graph at once.
            value, state = tree.detach(value), tree.detach(state)
        if step + 1 == cut:
            value = tree.add(value, tree.sub(init, tree.detach(init)))
    if with_grad_norm:
        grad_norm = tree.norm(tree.detach(gradient_of(loss)(tree.detach(value)))).detach()
    else:
        grad_norm = torch.full_like(tree.leaves(value)[0].flatten()[0], math.nan)
    return InnerSolution(value=value, grad_norm=grad_norm, num_steps=num_steps)
