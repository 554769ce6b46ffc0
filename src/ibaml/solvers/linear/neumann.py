"""Truncated Neumann series."""

import dataclasses

import torch

from ibaml import tree
from ibaml.solvers.linear.base import check
from ibaml.types import LinearSolution, MatVec, PyTree


@dataclasses.dataclass(frozen=True, kw_only=True)
class Neumann:
    """Truncated Neumann series; see ``neumann``.

    Attributes:
        max_steps: Largest number of terms ``L``.
        rtol: Relative tolerance.
        step_size: Positive factor of each correction.
    """

    max_steps: int = 5
    rtol: float = 1e-6
    step_size: float = 1.0

    def __post_init__(self) -> None:
        """Refuses settings out of range."""
        check(self.max_steps, self.rtol)
        if not self.step_size > 0:
            raise ValueError(f"step_size must be positive, but is {self.step_size}.")

    def __call__(self, matvec: MatVec, rhs: PyTree, /, *, preconditioner: MatVec | None = None) -> LinearSolution:
        """Solves the system; see ``LinearSolver``."""
        return neumann(
            matvec,
            rhs,
            max_steps=self.max_steps,
            rtol=self.rtol,
            preconditioner=preconditioner,
            step_size=self.step_size,
        )


def neumann(
    matvec: MatVec,
    rhs: PyTree,
    *,
    max_steps: int,
    rtol: float = 1e-6,
    preconditioner: MatVec | None = None,
    x0: PyTree | None = None,
    step_size: float = 1.0,
) -> LinearSolution:
    """Solves ``A x = b`` by ``x <- x + step_size * M (b - A x)``, the truncated Neumann series.

    Lorraine, Vicol and Duvenaud 2020. The series converges when the spectral radius of ``I - step_size * M A`` is below
    one; for positive definite ``A`` and no preconditioner that is ``step_size < 2 / largest eigenvalue``. Otherwise it
    diverges: the iterate with the smallest residual is returned and ``converged`` is false.

    Args:
        matvec: Product with ``A``.
        rhs: Right-hand side ``b``.
        max_steps: Largest number of terms, each one product.
        rtol: Stop when ``||b - A x|| <= rtol ||b||``.
        preconditioner: Product with ``M``, an approximation of ``A^-1`` (identity if None).
        x0: Starting point (zero if None). A start costs one more product.
        step_size: Positive factor of each correction; about the inner learning rate makes the series equal to
            backpropagation through the last ``max_steps`` gradient steps at a stationary point.

    Raises:
        ValueError: If ``max_steps``, ``rtol`` or ``step_size`` is out of range.

    Cost:
        One product per step; three vectors of memory.

    Examples:
        >>> solution = neumann(lambda x: 0.5 * x, torch.tensor([1.0]), max_steps=3)
        >>> solution.value, bool(solution.converged)
        (tensor([1.7500]), False)
    """
    check(max_steps, rtol)
    if step_size <= 0:
        raise ValueError(f"step_size must be positive, but is {step_size}.")
    precondition = preconditioner if preconditioner is not None else lambda vector: vector

    x = tree.zeros_like(rhs) if x0 is None else x0
    residual = rhs if x0 is None else tree.sub(rhs, matvec(x0))
    threshold = rtol * tree.norm(rhs)
    best, best_norm = x, tree.norm(residual)
    # An infinite norm (overflow, or an infinity in the right-hand side) would satisfy its own infinite threshold.
    broken = ~torch.isfinite(best_norm + threshold)
    done = (best_norm <= threshold) & ~broken
    num_steps = torch.zeros_like(done, dtype=torch.int64)

    for _ in range(max_steps):
        if tree.holds(done | broken):
            break
        running = ~(done | broken)
        num_steps = num_steps + running
        correction = tree.scale(step_size, precondition(residual))
        next_residual = tree.sub(residual, matvec(correction))
        next_norm = tree.norm(next_residual)
        healthy = running & torch.isfinite(next_norm)
        broken = broken | (running & ~healthy)
        x = tree.where(healthy, tree.add(x, correction), x)
        residual = tree.where(healthy, next_residual, residual)
        better = healthy & (next_norm < best_norm)
        best = tree.where(better, x, best)
        best_norm = torch.where(better, next_norm, best_norm)
        done = done | (healthy & (next_norm <= threshold))

    return LinearSolution(
        value=best,
        residual_norm=best_norm,
        num_steps=num_steps,
        converged=done,
        negative_curvature=torch.zeros_like(done),
    )
