"""Matrix-free solvers for symmetric systems, all of the shape ``(matvec, rhs) -> LinearSolution``.

They work on any pytree and under ``torch.func.vmap``: there every batch member runs the same number of steps, and
members that have finished are masked. Outside vmap they stop as soon as they are done. None raises on a numerical
failure: ``converged`` says so. Each is a function, and a record of its settings that can be called likewise.
"""

from collections.abc import Mapping

from ibaml.solvers.linear.base import LinearSolver
from ibaml.solvers.linear.cg import CG, cg
from ibaml.solvers.linear.dense import Dense, dense
from ibaml.solvers.linear.minres import MINRES, minres
from ibaml.solvers.linear.neumann import Neumann, neumann

LINEAR_SOLVERS: Mapping[str, type[LinearSolver]] = {"cg": CG, "minres": MINRES, "neumann": Neumann, "dense": Dense}

__all__ = ["CG", "LINEAR_SOLVERS", "MINRES", "Dense", "LinearSolver", "Neumann", "cg", "dense", "minres", "neumann"]
