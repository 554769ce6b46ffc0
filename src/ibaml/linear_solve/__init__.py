"""Matrix-free solvers for symmetric systems, all of the shape ``(matvec, rhs) -> LinearSolution``.

They work on any pytree and under ``torch.func.vmap``: there every batch member runs the same number of steps, and
members that have finished are masked. Outside vmap they stop as soon as they are done. None raises on a numerical
failure: ``converged`` says so.
"""

from ibaml.linear_solve.cg import cg
from ibaml.linear_solve.dense import dense
from ibaml.linear_solve.minres import minres
from ibaml.linear_solve.neumann import neumann

__all__ = ["cg", "dense", "minres", "neumann"]
