"""What inner solvers share: the Protocol, what they may be told of an inner problem, and the loop over steps."""

import math
from collections.abc import Callable
from typing import Protocol

import torch

from ibaml import tree
from ibaml.solvers.curvature import gradient as gradient_of
from ibaml.types import InnerSolution, Loss, PyTree, Tensor


class Geometry(Protocol):
    """What is known of the coordinates of an inner problem before any example is seen.

    A family of priors provides it (``ibaml.priors``); solvers that ask for nothing ignore it.
    """

    def scale(self) -> PyTree:
        """Returns the natural unit of each coordinate, in the structure of the inner variable."""
        ...

    def curvature(self) -> PyTree:
        """Returns the curvature along each coordinate where it is known, else 0."""
        ...

    def natural_direction(self, value: PyTree, gradient: PyTree, /) -> PyTree:
        """Maps a gradient at ``value`` to a direction of ascent, along which a step of about 1 is Newton's."""
        ...


class InnerSolver(Protocol):
    """Minimises a scalar function of a pytree from a starting point."""

    @property
    def num_steps(self) -> int:
        """Number of steps of a call."""
        ...

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
        """Returns the point where minimising ``loss`` from ``init`` ended.

        Args:
            loss: Scalar function to minimise.
            init: Starting point.
            geometry: What is known of the coordinates; None if nothing is.
            num_differentiable_steps: Let derivatives flow through the last so many steps only; before those the
                iterate counts as ``init`` plus a constant. None: through all.
            with_grad_norm: False spares the gradient at the last iterate; its norm is then NaN.

        Raises:
            ValueError: If the solver needs a geometry and gets none.
        """
        ...


def check_steps(num_steps: int, learning_rate: float, *, smallest: int = 1) -> None:
    """Refuses a number of steps that is too small and a step size that is not positive and finite.

    Raises:
        ValueError: Naming the argument and what came.
    """
    if num_steps < smallest:
        raise ValueError(f"num_steps must be at least {smallest}, but is {num_steps}.")
    if not 0 < learning_rate < math.inf:
        raise ValueError(f"learning_rate must be positive and finite, but is {learning_rate}.")


def check_momentum(momentum: float) -> None:
    """Refuses a momentum outside ``[0, 1)``.

    Raises:
        ValueError: Naming what came.
    """
    if not 0 <= momentum < 1:
        raise ValueError(f"momentum must be in [0, 1), but is {momentum}.")


def required(geometry: Geometry | None, solver: object) -> Geometry:
    """Returns the geometry of a solver that cannot do without.

    Raises:
        ValueError: If there is none.
    """
    if geometry is None:
        raise ValueError(
            f"{type(solver).__name__} takes its steps in units of a prior, but plain weights have none: use "
            "GradientDescent or Adam, or a prior that is a distribution."
        )
    return geometry


def iterate(
    loss: Loss,
    init: PyTree,
    update: Callable[[PyTree, PyTree, PyTree, int], tuple[PyTree, PyTree]],
    state: PyTree,
    *,
    num_steps: int,
    learning_rate: float | Tensor,
    num_differentiable_steps: int | None,
    with_grad_norm: bool,
) -> InnerSolution:
    """Runs ``value, state = update(state, gradient, value, step)`` for a fixed number of steps.

    Args:
        loss: Scalar function to minimise.
        init: Starting point.
        update: One step.
        state: What ``update`` carries from step to step, at the start.
        num_steps: Number of steps, at least 0.
        learning_rate: Step size, checked here unless it is a tensor.
        num_differentiable_steps: As in ``InnerSolver``.
        with_grad_norm: As in ``InnerSolver``.

    Raises:
        ValueError: If an argument is out of range.

    Cost:
        ``num_steps + 1`` gradients.
    """
    check_steps(num_steps, 1.0 if isinstance(learning_rate, Tensor) else learning_rate, smallest=0)
    if num_differentiable_steps is not None and num_differentiable_steps < 0:
        raise ValueError(f"num_differentiable_steps must be at least 0 or None, but is {num_differentiable_steps}.")
    cut = 0 if num_differentiable_steps is None else max(0, num_steps - num_differentiable_steps)
    gradient = gradient_of(loss)
    value = init
    for step in range(num_steps):
        value, state = update(state, gradient(value), value, step)
        if step < cut:
            # Detaching at every step, not only at the last of them, frees each step's graph at once.
            value, state = tree.detach(value), tree.detach(state)
        if step + 1 == cut:
            value = tree.add(value, tree.sub(init, tree.detach(init)))
    if with_grad_norm:
        with torch.no_grad():
            grad_norm = tree.norm(gradient(tree.detach(value)))
    else:
        grad_norm = torch.full_like(tree.leaves(value)[0].flatten()[0], math.nan)
    return InnerSolution(value=value, grad_norm=grad_norm, num_steps=num_steps)
