"""Gradient descent along transformed gradients; the natural gradient is one."""

import dataclasses
from collections.abc import Callable

from ibaml import tree
from ibaml.solvers.inner.base import Geometry, check_momentum, check_steps, iterate, required
from ibaml.types import InnerSolution, Loss, PyTree, Tensor


@dataclasses.dataclass(frozen=True, kw_only=True)
class NaturalGradient:
    """Steps along the natural gradient of the prior's family, for variational problems (Khan and Rue 2023).

    The mean moves in units of the posterior variance, the log-variance in its own.

    Attributes:
        num_steps: Number of steps ``K``.
        learning_rate: Step size; 1 is a Newton step where the problem is quadratic.
        momentum: In ``[0, 1)``.
    """

    num_steps: int = 5
    learning_rate: float = 0.3
    momentum: float = 0.0

    def __post_init__(self) -> None:
        """Refuses settings out of range."""
        check_steps(self.num_steps, self.learning_rate)
        check_momentum(self.momentum)

    def __call__(
        self,
        loss: Loss,
        init: PyTree,
        /,
        *,
        geometry: Geometry | None = None,
        num_differentiable_steps: int | None = None,
        with_grad_norm: bool = True,
    ) -> InnerSolution:
        """Runs the steps; see ``InnerSolver``."""
        return preconditioned_gradient_descent(
            loss,
            init,
            num_steps=self.num_steps,
            learning_rate=self.learning_rate,
            preconditioner=required(geometry, self).natural_direction,
            momentum=self.momentum,
            num_differentiable_steps=num_differentiable_steps,
            with_grad_norm=with_grad_norm,
        )


def preconditioned_gradient_descent(
    loss: Loss,
    init: PyTree,
    *,
    num_steps: int,
    learning_rate: float | Tensor,
    preconditioner: Callable[[PyTree, PyTree], PyTree],
    momentum: float = 0.0,
    num_differentiable_steps: int | None = None,
    with_grad_norm: bool = True,
) -> InnerSolution:
    """Runs ``u <- momentum * u + grad``, ``x <- x - learning_rate * P(x, u)``.

    Args:
        loss: Scalar function to minimise.
        init: Starting point.
        num_steps: Number of steps, at least 0.
        learning_rate: Positive; about 1 is a Newton-like step when ``P`` approximates the inverse Hessian.
        preconditioner: ``P``: maps the current value and the gradient to a direction of ascent.
        momentum: In ``[0, 1)``.
        num_differentiable_steps: Let derivatives flow through the last so many steps only. None: through all.
        with_grad_norm: False spares the gradient at the last iterate; its norm is then NaN.

    Raises:
        ValueError: If an argument is out of range.

    Cost:
        ``num_steps + 1`` gradients.
    """
    check_momentum(momentum)

    def update(velocity: PyTree, gradient: PyTree, value: PyTree, step: int) -> tuple[PyTree, PyTree]:
        del step
        if momentum == 0:
            return tree.axpy(-learning_rate, preconditioner(value, gradient), value), ()
        velocity = tree.axpy(momentum, velocity, gradient)
        return tree.axpy(-learning_rate, preconditioner(value, velocity), value), velocity

    return iterate(
        loss,
        init,
        update,
        tree.zeros_like(init) if momentum else (),
        num_steps=num_steps,
        learning_rate=learning_rate,
        num_differentiable_steps=num_differentiable_steps,
        with_grad_norm=with_grad_norm,
    )
