"""Direct solution, for small systems and as the reference for the iterative solvers."""

import dataclasses
import math

import torch

from ibaml import tree
from ibaml.solvers.linear.base import check
from ibaml.types import LinearSolution, MatVec, PyTree


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dense:
    """Direct solution by the whole matrix, for few unknowns; see ``dense``.

    Attributes:
        rtol: Relative tolerance of ``converged``.
    """

    rtol: float = 1e-6

    def __post_init__(self) -> None:
        """Refuses settings out of range."""
        check(1, self.rtol)

    def __call__(self, matvec: MatVec, rhs: PyTree, /, *, preconditioner: MatVec | None = None) -> LinearSolution:
        """Solves the system; see ``LinearSolver``."""
        return dense(matvec, rhs, rtol=self.rtol, preconditioner=preconditioner)


def dense(
    matvec: MatVec,
    rhs: PyTree,
    *,
    max_steps: int | None = None,
    rtol: float = 1e-6,
    preconditioner: MatVec | None = None,
    x0: PyTree | None = None,
) -> LinearSolution:
    """Solves ``A x = b`` for symmetric ``A`` by building the matrix and its eigendecomposition.

    Eigenvalues below ``n * eps * max|eigenvalue|`` count as zero, so that a singular system gets its minimum-norm
    least-squares (pseudo-inverse) solution. It is refined once by its residual in float64, where that makes the
    residual smaller: in float32 the solution of a regular system is then right to the last digits up to a condition of
    1e4, say.

    Args:
        matvec: Product with ``A``; called under ``torch.func.vmap`` on all unit vectors at once.
        rhs: Right-hand side ``b`` with ``n`` numbers in all.
        max_steps: Has no effect; accepted so that solvers can be exchanged. So are ``preconditioner`` and ``x0``.
        rtol: ``converged`` says whether ``||b - A x|| <= rtol ||b||`` or ``||A r|| <= rtol ||A|| ||r||``.
        preconditioner: Has no effect.
        x0: Has no effect.

    Cost:
        ``n`` products, ``n^2`` memory and ``n^3`` time: for up to a few thousand unknowns.

    Examples:
        >>> dense(lambda x: {"w": 4 * x["w"]}, {"w": torch.tensor([2.0])}).value
        {'w': tensor([0.5000])}
    """
    del max_steps, preconditioner, x0
    vector, unravel = tree.ravel(rhs)
    size = vector.shape[0]
    basis = torch.eye(size, dtype=vector.dtype, device=vector.device)
    columns = torch.func.vmap(lambda unit: tree.ravel(matvec(unravel(unit)))[0])(basis)
    # The eigensolver raises on NaN, while a numerical failure is to be reported as data.
    finite = torch.isfinite(columns).all() & torch.isfinite(vector).all()
    matrix = torch.where(finite, 0.5 * (columns + columns.transpose(-1, -2)), basis)
    eigenvalues, eigenvectors = torch.linalg.eigh(matrix)
    largest = eigenvalues.abs().amax(-1)
    nonzero = eigenvalues.abs() > size * torch.finfo(vector.dtype).eps * largest
    inverse = torch.where(nonzero, 1 / torch.where(nonzero, eigenvalues, 1), 0)

    def apply_pseudo_inverse(b: torch.Tensor) -> torch.Tensor:
        return eigenvectors @ (inverse * (eigenvectors.transpose(-1, -2) @ b))

    # In float64 whatever the system is in: a residual in float32 is mostly rounding, and so would be the refinement.
    exact = matrix.double()

    def residual_of(candidate: torch.Tensor) -> torch.Tensor:
        return vector.double() - exact @ candidate.double()

    solution = apply_pseudo_inverse(vector)
    residual = residual_of(solution)
    # One step of iterative refinement brings back the digits that the eigendecomposition lost, if it lost some.
    refined = solution + apply_pseudo_inverse(residual.to(vector.dtype))
    residual_of_refined = residual_of(refined)
    better = torch.linalg.vector_norm(residual_of_refined) < torch.linalg.vector_norm(residual)
    solution = torch.where(better, refined, solution)
    residual = torch.where(better, residual_of_refined, residual)
    residual_norm = torch.linalg.vector_norm(residual)
    stationary = torch.linalg.vector_norm(exact @ residual) <= rtol * largest * residual_norm
    # Where the matrix had to be replaced the residual is unknown, not zero.
    residual_norm = torch.where(finite, residual_norm, math.nan).to(vector.dtype)
    solved = residual_norm <= rtol * torch.linalg.vector_norm(vector)
    return LinearSolution(
        value=unravel(solution),
        residual_norm=residual_norm,
        num_steps=torch.full_like(residual_norm, size, dtype=torch.int64),
        converged=finite & (solved | stationary),
        negative_curvature=(eigenvalues < 0).any(-1) & (eigenvalues.amin(-1) < -largest * 1e-10),
    )
