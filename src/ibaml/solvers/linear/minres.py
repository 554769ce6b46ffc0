"""MINRES for symmetric systems that may be indefinite or singular."""

import dataclasses
import math

import torch

from ibaml import tree
from ibaml.solvers.linear.base import check
from ibaml.types import LinearSolution, MatVec, PyTree


@dataclasses.dataclass(frozen=True, kw_only=True)
class MINRES:
    """MINRES, for any symmetric system; see ``minres``.

    Attributes:
        max_steps: Largest number of products ``L``.
        rtol: Relative tolerance.
        reorthogonalize: Whether to keep every Lanczos vector, which singular systems need.
    """

    max_steps: int = 5
    rtol: float = 1e-6
    reorthogonalize: bool = True

    def __post_init__(self) -> None:
        """Refuses settings out of range."""
        check(self.max_steps, self.rtol)

    def __call__(self, matvec: MatVec, rhs: PyTree, /, *, preconditioner: MatVec | None = None) -> LinearSolution:
        """Solves the system; see ``LinearSolver``."""
        return minres(
            matvec,
            rhs,
            max_steps=self.max_steps,
            rtol=self.rtol,
            preconditioner=preconditioner,
            reorthogonalize=self.reorthogonalize,
        )


def minres(
    matvec: MatVec,
    rhs: PyTree,
    *,
    max_steps: int,
    rtol: float = 1e-6,
    preconditioner: MatVec | None = None,
    x0: PyTree | None = None,
    reorthogonalize: bool = True,
) -> LinearSolution:
    """Minimises ``||b - A x||`` for any symmetric ``A``; gives the pseudo-inverse solution if ``A`` is singular.

    Paige and Saunders 1975: the Lanczos process builds an orthonormal basis in which ``A`` is tridiagonal, and Givens
    reflections solve the least-squares problem there, one column a step.

    If ``A`` is singular and ``b`` lies in its range, the iterates from a zero start stay in the range, so the limit is
    the solution of minimum norm. If ``b`` does not lie in the range, the residual tends to the null-space part of
    ``b`` and the iterate is a least-squares solution whose null-space part is parallel to that residual; taking it
    out gives the pseudo-inverse solution (Liu, Milzarek and Roosta 2023). This is eq. (12) of Zhang et al. 2023
    (Remark 1).

    Args:
        matvec: Product with ``A``.
        rhs: Right-hand side ``b``.
        max_steps: Largest number of iterations, each one product.
        rtol: Stop when ``||b - A x|| <= rtol ||b||``, or when ``||A r|| <= rtol ||A|| ||r||`` (least-squares solution).
        preconditioner: Product with a symmetric positive definite ``M``, an approximation of ``A^-1`` in size. Minimum
            norm then means minimum ``x^T M^-1 x``.
        x0: Starting point (zero if None). A start costs one more product, and the minimum-norm property is lost.
        reorthogonalize: Keep every Lanczos vector and project each new one against all of them. Without it rounding
            destroys the basis after some steps, and an inconsistent singular system can end far from its solution.

    Returns:
        The solution. ``converged`` is also true for a least-squares solution; its ``residual_norm`` is then not small.
        The residual is computed anew at the end, and ``converged`` is withdrawn if it is far above the tolerance.

    Raises:
        ValueError: If ``max_steps`` or ``rtol`` is out of range.

    Cost:
        One product and one preconditioner product per step, and one more product at the end, three if the tolerance was
        not met and under vmap.
        Memory: ten vectors, with reorthogonalisation two more per step.

    Examples:
        >>> singular = torch.tensor([2.0, 0.0])
        >>> solution = minres(lambda x: singular * x, torch.tensor([1.0, 1.0]), max_steps=5)
        >>> torch.allclose(solution.value, torch.tensor([0.5, 0.0]), atol=1e-6), bool(solution.converged)
        (True, True)
    """
    check(max_steps, rtol)
    precondition = preconditioner if preconditioner is not None else lambda vector: vector

    x = tree.zeros_like(rhs) if x0 is None else x0
    residual = rhs if x0 is None else tree.sub(rhs, matvec(x0))
    residual_norm = tree.norm(residual)
    threshold = rtol * tree.norm(rhs)
    zero = torch.zeros_like(residual_norm)
    one = torch.ones_like(residual_norm)

    # Lanczos vectors, unnormalised: q_k in the space of residuals, v_k = M q_k in the space of solutions, with
    # beta_k^2 = q_k^T v_k. The normalised v_k / beta_k are orthonormal in the inner product of M^-1.
    q_previous = tree.zeros_like(rhs)
    q = residual
    v = precondition(q)
    beta = tree.dot(q, v).clamp_min(0).sqrt()
    beta_previous = one
    start_norm = tree.norm(v)
    # The remaining right-hand side of the projected least-squares problem, and the last reflection.
    projected_rhs = beta
    cosine, sine = -one, zero
    above_diagonal, carried = zero, zero
    # The last two columns of V R^-1 and their images under A, which keep the residual vector up to date.
    w, w_previous = tree.zeros_like(rhs), tree.zeros_like(rhs)
    image, image_previous = tree.zeros_like(rhs), tree.zeros_like(rhs)
    squared_size = zero
    lanczos_vectors: list[tuple[PyTree, PyTree]] = []

    # The iterate that is nearest to a least-squares solution, by ||A r|| / ||r||.
    best, best_gradient = x, torch.full_like(zero, math.inf)
    # An infinite norm (overflow, or an infinity in the right-hand side) would satisfy its own infinite threshold.
    ended = ~torch.isfinite(residual_norm + threshold)
    done = (residual_norm <= threshold) & ~ended
    num_steps = torch.zeros_like(done, dtype=torch.int64)
    rounding = torch.finfo(residual_norm.dtype).eps

    for _ in range(max_steps):
        if tree.holds(done | ended):
            break
        running = ~(done | ended)
        num_steps = num_steps + running
        safe_beta = torch.where(beta > 0, beta, one)
        basis = tree.scale(1 / safe_beta, v)
        product = matvec(basis)
        alpha = tree.dot(basis, product)
        next_q = tree.axpy(-alpha / safe_beta, q, tree.axpy(-beta / beta_previous, q_previous, product))
        if reorthogonalize:
            lanczos_vectors.append((tree.scale(1 / safe_beta, q), basis))
            for earlier_q, earlier_v in lanczos_vectors:
                next_q = tree.axpy(-tree.dot(earlier_v, next_q), earlier_q, next_q)
        next_v = precondition(next_q)
        next_beta = tree.dot(next_q, next_v).clamp_min(0).sqrt()

        # Apply the previous reflection to the new column (.., beta_k, alpha_k, beta_k+1) of the tridiagonal matrix.
        second_above = above_diagonal
        off_diagonal = cosine * carried + sine * alpha
        diagonal_before = sine * carried - cosine * alpha
        above_diagonal_next = sine * next_beta
        carried_next = -cosine * next_beta
        squared_size_next = squared_size + alpha**2 + next_beta**2

        # ||A r_(k-1)|| in the M-norm is projected_rhs * ||(diagonal_before, carried_next)||: when it vanishes beside
        # ||A|| ||r|| the previous iterate already solved the least-squares problem.
        size = squared_size_next.sqrt()
        gradient = torch.hypot(diagonal_before, carried_next)
        stationary = gradient <= max(rtol, 10 * rounding) * size

        diagonal = torch.hypot(diagonal_before, next_beta)
        safe_diagonal = torch.where(diagonal > 0, diagonal, one)
        next_cosine, next_sine = diagonal_before / safe_diagonal, next_beta / safe_diagonal
        step = next_cosine * projected_rhs

        def new_column(
            start: PyTree,
            two_back: PyTree,
            one_back: PyTree,
            second: torch.Tensor = second_above,
            first: torch.Tensor = off_diagonal,
            diagonal: torch.Tensor = safe_diagonal,
        ) -> PyTree:
            return tree.scale(1 / diagonal, tree.axpy(-first, one_back, tree.axpy(-second, two_back, start)))

        next_w = new_column(basis, w_previous, w)
        next_image = new_column(product, image_previous, image)
        # When the residual has a null-space part, rounding keeps the gradient near sqrt(eps) ||A||, and the column that
        # ought to be zero then throws the iterate away by a factor near 1/eps: stop before that.
        leap = step.abs() * tree.norm(next_w) * math.sqrt(rounding) > torch.maximum(tree.norm(x), start_norm / size)
        healthy = running & ~stationary & ~leap & torch.isfinite(diagonal) & (diagonal > 0)
        better = running & (gradient < best_gradient)
        best = tree.where(better, x, best)
        best_gradient = torch.where(better, gradient, best_gradient)
        x = tree.where(healthy, tree.axpy(step, next_w, x), x)
        residual = tree.where(healthy, tree.axpy(-step, next_image, residual), residual)
        residual_norm = torch.where(healthy, tree.norm(residual), residual_norm)
        w_previous, w = tree.where(healthy, w, w_previous), tree.where(healthy, next_w, w)
        image_previous = tree.where(healthy, image, image_previous)
        image = tree.where(healthy, next_image, image)

        done = done | (healthy & (residual_norm <= threshold))
        # An invariant Krylov space ends the process: what can be solved has been solved.
        exhausted = healthy & ~done & (next_beta <= rounding * size)
        ended = ended | (running & ~healthy) | exhausted

        q_previous, q = tree.where(healthy, q, q_previous), tree.where(healthy, next_q, q)
        v = tree.where(healthy, next_v, v)
        beta_previous, beta = torch.where(healthy, safe_beta, beta_previous), torch.where(healthy, next_beta, beta)
        above_diagonal = torch.where(healthy, above_diagonal_next, above_diagonal)
        carried = torch.where(healthy, carried_next, carried)
        cosine, sine = torch.where(healthy, next_cosine, cosine), torch.where(healthy, next_sine, sine)
        projected_rhs = torch.where(healthy, next_sine * projected_rhs, projected_rhs)
        squared_size = torch.where(healthy, squared_size_next, squared_size)

    residual = tree.sub(rhs, matvec(x))
    residual_norm = tree.norm(residual)
    consistent = done & (residual_norm <= 10 * threshold)
    if not tree.holds(consistent):
        # Not solved within the tolerance: see whether the least-squares problem is, and take out the null-space part.
        best_residual = tree.sub(rhs, matvec(best))
        # A least-squares solution has the smallest residual of all, so an iterate with a smaller one is nearer to it.
        keep = tree.norm(best_residual) < (1 + math.sqrt(rounding)) * residual_norm
        best = tree.where(keep, best, x)
        best_residual = tree.where(keep, best_residual, residual)
        null_direction = precondition(best_residual)
        null_image = matvec(null_direction)
        best_gradient = tree.norm(precondition(null_image)) / tree.norm(null_direction)
        squared_null = tree.dot(best_residual, null_direction)
        excess = tree.dot(best_residual, best) / torch.where(squared_null > 0, squared_null, one)
        lifted = tree.axpy(-excess, null_direction, best)
        lifted_norm = tree.norm(tree.axpy(excess, null_image, best_residual))
        attainable = max(rtol, 10 * math.sqrt(rounding)) * squared_size.sqrt()
        least_squares = ~consistent & (best_gradient <= attainable)
        x = tree.where(consistent, x, tree.where(least_squares, lifted, best))
        best_norm = torch.where(least_squares, lifted_norm, tree.norm(best_residual))
        residual_norm = torch.where(consistent, residual_norm, best_norm)
        consistent = consistent | least_squares
    return LinearSolution(
        value=x,
        residual_norm=residual_norm,
        num_steps=num_steps,
        converged=consistent,
        negative_curvature=torch.zeros_like(done),
    )
