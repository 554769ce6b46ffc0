"""What linear solvers share: the Protocol and the checks of their arguments."""

from typing import Protocol

from ibaml.types import LinearSolution, MatVec, PyTree


class LinearSolver(Protocol):
    """Solves ``A x = b`` given only products with a symmetric ``A``."""

    def __call__(self, matvec: MatVec, rhs: PyTree, /, *, preconditioner: MatVec | None = None) -> LinearSolution:
        """Returns ``x`` for ``matvec`` as ``A`` and ``rhs`` as ``b``; ``preconditioner`` approximates ``A^-1``."""
        ...


def check(max_steps: int, rtol: float) -> None:
    """Refuses a step limit below one and a tolerance outside ``[0, 1)``.

    Raises:
        ValueError: Naming the argument and what came.
    """
    if max_steps < 1:
        raise ValueError(f"max_steps must be at least 1, but is {max_steps}.")
    if not 0 <= rtol < 1:
        raise ValueError(f"rtol is relative to the norm of the right-hand side: expected 0 <= rtol < 1, got {rtol}.")
