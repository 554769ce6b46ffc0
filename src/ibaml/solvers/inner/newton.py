"""Newton's method with halved steps, for inner problems of few weights."""

import dataclasses

import torch

from ibaml import tree
from ibaml.solvers.curvature import gradient as gradient_of
from ibaml.solvers.inner.base import Geometry, check_steps, iterate
from ibaml.types import InnerSolution, Loss, PyTree, Tensor

_SUFFICIENT_DECREASE = 1e-4
"""Share of the predicted decrease that a step must bring (Armijo's rule; Nocedal and Wright 2006, section 3.1)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Newton:
    """Newton's method: a strictly convex problem is solved to rounding in a few steps.

    A step solves ``(H + damping I) direction = gradient`` and moves by the first of 1, 1/2, 1/4, ... times the
    direction that lowers the loss enough; where the direction does not lead down (``H`` is indefinite), by the gradient
    instead.

    Attributes:
        num_steps: Number of steps ``K``.
        damping: Multiple of the identity that is added to the Hessian, at least 0.
        num_halvings: How often a step may be halved; a step that still does not lower the loss is not taken.

    Cost:
        A step: one Hessian (``n`` gradients at once and ``n^2`` memory for ``n`` weights), one solve of ``n^3``, and
        ``num_halvings + 2`` values of the loss.
    """

    num_steps: int = 10
    damping: float = 0.0
    num_halvings: int = 10

    def __post_init__(self) -> None:
        """Refuses settings out of range."""
        check_steps(self.num_steps, 1.0)
        if not self.damping >= 0:
            raise ValueError(f"damping must be at least 0, but is {self.damping}.")
        if self.num_halvings < 0:
            raise ValueError(f"num_halvings must be at least 0, but is {self.num_halvings}.")

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

        def update(state: PyTree, gradient: PyTree, value: PyTree, step: int) -> tuple[PyTree, PyTree]:
            del step
            direction = self._direction(loss, gradient, value)
            return tree.axpy(-self._step_size(loss, gradient, direction, value), direction, value), state

        return iterate(
            loss,
            init,
            update,
            (),
            num_steps=self.num_steps,
            learning_rate=1.0,
            num_differentiable_steps=num_differentiable_steps,
            with_grad_norm=with_grad_norm,
        )

    def _direction(self, loss: Loss, gradient: PyTree, value: PyTree) -> PyTree:
        """Returns ``(H + damping I)^-1 gradient`` if it leads up, else the gradient."""
        point, unravel = tree.ravel(value)
        slope = tree.ravel(gradient)[0]
        hessian = torch.func.jacrev(lambda at: tree.ravel(gradient_of(loss)(unravel(at)))[0])(point)
        identity = torch.eye(len(point), dtype=point.dtype, device=point.device)
        # solve_ex reports a singular matrix by infinities, which the comparison below refuses, instead of raising.
        newton = torch.linalg.solve_ex(hessian + self.damping * identity, slope)[0]
        leads_up = (slope @ newton > 0) & torch.isfinite(newton).all()
        return unravel(torch.where(leads_up, newton, slope))

    def _step_size(self, loss: Loss, gradient: PyTree, direction: PyTree, value: PyTree) -> Tensor:
        """Returns the first of 1, 1/2, 1/4, ... that lowers the loss enough; 0 if none does."""
        here, decrease = tree.detach(loss(value)), tree.detach(tree.dot(gradient, direction))
        size = torch.zeros_like(here)
        # From the smallest to the largest, so that the largest good one stays; no branch on a tensor under vmap.
        for halvings in reversed(range(self.num_halvings + 1)):
            candidate = 0.5**halvings
            lowered = tree.detach(loss(tree.axpy(-candidate, direction, value)))
            # Near the solution the decrease is below the rounding of the loss.
            rounding = 8 * torch.finfo(here.dtype).eps * here.abs()
            is_good = lowered <= here - _SUFFICIENT_DECREASE * candidate * decrease + rounding
            size = torch.where(is_good, candidate, size)
        return size
