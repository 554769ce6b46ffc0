"""Gradient descent."""

import dataclasses

import torch

from ibaml import tree
from ibaml.solvers.inner.base import Geometry, check_momentum, check_steps, required
from ibaml.solvers.inner.preconditioned import preconditioned_gradient_descent
from ibaml.types import InnerSolution, Loss, PyTree, Tensor


@dataclasses.dataclass(frozen=True, kw_only=True)
class GradientDescent:
    """Gradient descent with heavy-ball momentum.

    Attributes:
        num_steps: Number of steps ``K``.
        learning_rate: Step size. On a Gaussian the KL term alone makes it diverge above ``2 D / lam``, with ``D`` the
            smallest prior variance and ``lam`` the KL weight.
        momentum: In ``[0, 1)``.
        curvature_rate: Coordinates whose curvature the prior sets (the log-variances of a diagonal Gaussian) take
            steps of so many times its inverse; 0.1 to 0.4 suits most problems. None: of ``learning_rate``, with which
            the variances hardly move.
    """

    num_steps: int = 5
    learning_rate: float = 0.01
    momentum: float = 0.0
    curvature_rate: float | None = None

    def __post_init__(self) -> None:
        """Refuses settings out of range."""
        check_steps(self.num_steps, self.learning_rate)
        check_momentum(self.momentum)
        if self.curvature_rate is not None and not self.curvature_rate > 0:
            raise ValueError(f"curvature_rate must be positive or None, but is {self.curvature_rate}.")

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
        rate, learning_rate = self.curvature_rate, self.learning_rate
        factors = None
        if rate is not None:
            # The step multiplies by learning_rate again.
            curvature = required(geometry, self).curvature()
            factors = tree.map(lambda c: torch.where(c > 0, rate / (learning_rate * c), 1.0), curvature)
        return preconditioned_gradient_descent(
            loss,
            init,
            num_steps=self.num_steps,
            learning_rate=self.learning_rate,
            preconditioner=lambda _, gradient: gradient if factors is None else tree.mul(factors, gradient),
            momentum=self.momentum,
            num_differentiable_steps=num_differentiable_steps,
            with_grad_norm=with_grad_norm,
        )


def gradient_descent(
    loss: Loss,
    init: PyTree,
    *,
    num_steps: int,
    learning_rate: float | Tensor,
    momentum: float = 0.0,
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
        num_differentiable_steps=num_differentiable_steps,
        with_grad_norm=with_grad_norm,
    )
