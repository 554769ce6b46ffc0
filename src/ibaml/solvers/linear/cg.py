"""Conjugate gradients for symmetric positive definite systems."""

import dataclasses

import torch

from ibaml import tree
from ibaml.solvers.linear.base import check
from ibaml.types import LinearSolution, MatVec, PyTree


@dataclasses.dataclass(frozen=True, kw_only=True)
class CG:
    """Conjugate gradients, for positive definite systems; see ``cg``.

    Attributes:
        max_steps: Largest number of products ``L``.
        rtol: Relative tolerance.
    """

    max_steps: int = 5
    rtol: float = 1e-6

    def __post_init__(self) -> None:
        """Refuses settings out of range."""
        check(self.max_steps, self.rtol)

    def __call__(self, matvec: MatVec, rhs: PyTree, /, *, preconditioner: MatVec | None = None) -> LinearSolution:
        """Solves the system; see ``LinearSolver``."""
        return cg(matvec, rhs, max_steps=self.max_steps, rtol=self.rtol, preconditioner=preconditioner)


def cg(
    matvec: MatVec,
    rhs: PyTree,
    *,
    max_steps: int,
    rtol: float = 1e-6,
    preconditioner: MatVec | None = None,
    x0: PyTree | None = None,
) -> LinearSolution:
    """Solves ``A x = b`` for symmetric positive definite ``A`` by preconditioned conjugate gradients.

    Hestenes and Stiefel 1952. Along a direction of positive curvature a step lowers the energy
    ``x^T A x / 2 - b^T x``, and on a definite system the error ``||x_k - x||``, although the residual may rise: the
    best iterate is the last one. A run that meets a direction with ``p^T A p <= 0`` (up to rounding), or a number that
    is not finite, stops before that step and reports ``converged=False``. Choosing by residual instead would often
    return the starting point, zero, and with it a hypergradient of zero.

    Args:
        matvec: Product with ``A``.
        rhs: Right-hand side ``b``.
        max_steps: Largest number of iterations, each one product.
        rtol: Stop when ``||b - A x|| <= rtol ||b||``.
        preconditioner: Product with a symmetric positive definite approximation of ``A^-1``.
        x0: Starting point (zero if None). A start costs one more product.

    Returns:
        The solution. When the tolerance was met, ``residual_norm`` is the residual computed anew, and ``converged`` is
        withdrawn if that is more than ten times the tolerance; otherwise, and under vmap, it is the residual of the
        recurrence, and under vmap ``converged`` is withdrawn where rounding alone could exceed that limit.

    Raises:
        ValueError: If ``max_steps`` or ``rtol`` is out of range.

    Cost:
        One product and one preconditioner product per step, one more product when converged (not under vmap);
        four vectors of memory.

    Examples:
        >>> diagonal = torch.tensor([1.0, 4.0])
        >>> solution = cg(lambda x: diagonal * x, torch.tensor([1.0, 2.0]), max_steps=5)
        >>> solution.value, bool(solution.converged)
        (tensor([1.0000, 0.5000]), True)
    """
    check(max_steps, rtol)
    precondition = preconditioner if preconditioner is not None else lambda vector: vector

    x = tree.zeros_like(rhs) if x0 is None else x0
    residual = rhs if x0 is None else tree.sub(rhs, matvec(x0))
    residual_norm = tree.norm(residual)
    threshold = rtol * tree.norm(rhs)
    direction = precondition(residual)
    descent = tree.dot(residual, direction)
    rounding = 10 * torch.finfo(residual_norm.dtype).eps
    largest_curvature = torch.zeros_like(residual_norm)

    # An infinite norm (overflow, or an infinity in the right-hand side) would satisfy its own infinite threshold.
    broken = ~torch.isfinite(residual_norm + threshold)
    done = (residual_norm <= threshold) & ~broken
    negative_curvature = torch.zeros_like(done)
    num_steps = torch.zeros_like(done, dtype=torch.int64)

    for _ in range(max_steps):
        if tree.holds(done | broken):
            break
        running = ~(done | broken)
        product = matvec(direction)
        curvature = tree.dot(direction, product)
        squared_length = tree.dot(direction, direction)
        num_steps = num_steps + running
        # A null direction of a singular matrix has a curvature of rounding size and either sign: the Rayleigh quotient
        # is compared with the largest one seen. The comparison is also false for NaN.
        largest_curvature = torch.where(
            running, torch.maximum(largest_curvature, (curvature / squared_length).abs()), largest_curvature
        )
        positive = curvature > rounding * largest_curvature * squared_length
        negative_curvature = negative_curvature | (running & ~positive & torch.isfinite(curvature))
        step_size = descent / torch.where(positive, curvature, torch.ones_like(curvature))
        next_x = tree.axpy(step_size, direction, x)
        next_residual = tree.axpy(-step_size, product, residual)
        next_norm = tree.norm(next_residual)

        healthy = running & positive & torch.isfinite(next_norm)
        broken = broken | (running & ~healthy)
        x = tree.where(healthy, next_x, x)
        residual = tree.where(healthy, next_residual, residual)
        residual_norm = torch.where(healthy, next_norm, residual_norm)
        done = done | (healthy & (residual_norm <= threshold))

        preconditioned = precondition(residual)
        next_descent = tree.dot(residual, preconditioned)
        conjugation = torch.where(healthy, next_descent / descent, torch.zeros_like(descent))
        direction = tree.where(healthy, tree.axpy(conjugation, direction, preconditioned), direction)
        descent = torch.where(healthy, next_descent, descent)

    # On an ill-conditioned system the recurrence goes on shrinking after the true residual has stopped at about
    # eps ||A|| ||x||, so a claim of convergence is checked against the residual itself; in a batch, where that product
    # would have to be paid for every member whether it has converged or not, against the estimate.
    if tree.holds(done):
        residual_norm = tree.norm(tree.sub(rhs, matvec(x)))
        done = residual_norm <= 10 * threshold
    elif not tree.holds(~done):
        done = done & (rounding / 10 * largest_curvature * tree.norm(x) <= 10 * threshold)
    return LinearSolution(
        value=x,
        residual_norm=residual_norm,
        num_steps=num_steps,
        converged=done,
        negative_curvature=negative_curvature,
    )
