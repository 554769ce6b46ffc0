"""Adam, in the units of the weights or in those of the prior."""

import dataclasses

import torch

from ibaml import tree
from ibaml.solvers.inner.base import Geometry, check_steps, iterate, required
from ibaml.types import InnerSolution, Loss, PyTree, Tensor


@dataclasses.dataclass(frozen=True, kw_only=True)
class Adam:
    """Adam (Kingma and Ba 2015).

    Attributes:
        num_steps: Number of steps ``K``.
        learning_rate: Step size: about how far a step moves every coordinate.
        betas: Decay of the first and second moment, each in ``[0, 1)``.
        epsilon: Positive; in the units of the gradient.
    """

    num_steps: int = 5
    learning_rate: float = 0.01
    betas: tuple[float, float] = (0.9, 0.999)
    epsilon: float = 1e-8

    def __post_init__(self) -> None:
        """Refuses settings out of range."""
        check_steps(self.num_steps, self.learning_rate)
        _check_moments(self.betas, self.epsilon)

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
        del geometry
        return adam(
            loss,
            init,
            num_steps=self.num_steps,
            learning_rate=self.learning_rate,
            betas=self.betas,
            epsilon=self.epsilon,
            num_differentiable_steps=num_differentiable_steps,
            with_grad_norm=with_grad_norm,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class RelativeAdam:
    """Adam with steps in units of the prior.

    For a diagonal Gaussian a step of a mean is measured in the prior's standard deviation: however narrow training
    makes the prior of a weight, the inner problem stays as easy.

    Attributes:
        num_steps: Number of steps ``K``.
        learning_rate: Step size in units of ``Geometry.scale``.
        betas: Decay of the first and second moment, each in ``[0, 1)``.
        epsilon: Positive; in the units of the gradient.
    """

    num_steps: int = 20
    learning_rate: float = 0.2
    betas: tuple[float, float] = (0.9, 0.999)
    epsilon: float = 1e-8

    def __post_init__(self) -> None:
        """Refuses settings out of range."""
        check_steps(self.num_steps, self.learning_rate)
        _check_moments(self.betas, self.epsilon)

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
        return adam(
            loss,
            init,
            num_steps=self.num_steps,
            learning_rate=self.learning_rate,
            betas=self.betas,
            epsilon=self.epsilon,
            scale=required(geometry, self).scale(),
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
    num_differentiable_steps: int | None = None,
    with_grad_norm: bool = True,
) -> InnerSolution:
    """Runs Adam (Kingma and Ba 2015), differentiable.

    Args:
        loss: Scalar function to minimise.
        init: Starting point.
        num_steps: Number of steps, at least 0.
        learning_rate: Positive step size.
        betas: Decay of the first and second moment, each in ``[0, 1)``.
        epsilon: Positive; in the units of the gradient.
        scale: Units of the steps, in the structure of ``init``: a step moves a coordinate by about ``learning_rate``
            times its entry. None: 1.
        num_differentiable_steps: Let derivatives flow through the last so many steps only. None: through all.
        with_grad_norm: False spares the gradient at the last iterate; its norm is then NaN.

    Raises:
        ValueError: If an argument is out of range.

    Cost:
        ``num_steps + 1`` gradients.
    """
    _check_moments(betas, epsilon)
    first_decay, second_decay = betas

    def update(
        moments: tuple[PyTree, PyTree], gradient: PyTree, value: PyTree, step: int
    ) -> tuple[PyTree, tuple[PyTree, PyTree]]:
        first = tree.map(lambda m, g: first_decay * m + (1 - first_decay) * g, moments[0], gradient)
        second = tree.map(lambda v, g: second_decay * v + (1 - second_decay) * g**2, moments[1], gradient)
        first_correction = 1 - first_decay ** (step + 1)
        second_correction = 1 - second_decay ** (step + 1)
        # epsilon stands under the root: the derivative of the square root at a gradient that is exactly zero would
        # otherwise be infinite. Where gradients are far above epsilon the two agree.
        direction = tree.map(
            lambda m, v: (m / first_correction) / torch.sqrt(v / second_correction + epsilon**2), first, second
        )
        if scale is not None:
            direction = tree.mul(scale, direction)
        return tree.axpy(-learning_rate, direction, value), (first, second)

    return iterate(
        loss,
        init,
        update,
        (tree.zeros_like(init), tree.zeros_like(init)),
        num_steps=num_steps,
        learning_rate=learning_rate,
        num_differentiable_steps=num_differentiable_steps,
        with_grad_norm=with_grad_norm,
    )


def _check_moments(betas: tuple[float, float], epsilon: float) -> None:
    if not all(0 <= beta < 1 for beta in betas):
        raise ValueError(f"betas must both be in [0, 1), but are {betas}.")
    if not epsilon > 0:
        raise ValueError(f"epsilon must be positive, but is {epsilon}.")
