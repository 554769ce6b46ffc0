"""The contract of linear solvers accepts a foreign one and finds what is wrong with a broken one."""

import dataclasses
from typing import Any

import pytest
import torch

from ibaml import tree
from ibaml.solvers.linear import CG, Dense
from ibaml.testing import LinearSolverContract, failures
from ibaml.types import LinearSolution


@dataclasses.dataclass(frozen=True, kw_only=True)
class Richardson:
    """A linear solver of one's own: ``x <- x + b - A x``, always so many steps."""

    max_steps: int = 5

    def __post_init__(self) -> None:
        if self.max_steps < 1:
            raise ValueError(f"max_steps must be at least 1, but is {self.max_steps}.")

    def __call__(self, matvec: Any, rhs: Any, /, *, preconditioner: Any = None) -> LinearSolution:
        value = tree.zeros_like(rhs)
        for _ in range(self.max_steps):
            residual = tree.sub(rhs, matvec(value))
            value = tree.add(value, residual if preconditioner is None else preconditioner(residual))
        norm, size = tree.norm(tree.sub(rhs, matvec(value))), tree.norm(rhs)
        converged = (norm <= 1e-6 * size) & torch.isfinite(norm)
        steps = torch.full_like(norm, self.max_steps, dtype=torch.int64)
        return LinearSolution(value, norm, steps, converged, torch.zeros_like(converged))


def test_linear_solver_of_ones_own() -> None:
    class Mine(LinearSolverContract):
        make = Richardson
        tolerance = 1e-5

    assert failures(Mine) == {}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Boasting(CG):
    def __call__(self, *arguments: Any, **options: Any) -> LinearSolution:
        solution = super().__call__(*arguments, **options)
        return solution._replace(converged=torch.ones_like(solution.converged))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scaled(Dense):
    def __call__(self, *arguments: Any, **options: Any) -> LinearSolution:
        solution = super().__call__(*arguments, **options)
        return solution._replace(value=tree.scale(1.001, solution.value))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Branching(CG):
    """Asks a tensor a question that has no answer under vmap."""

    def __call__(self, matvec: Any, rhs: Any, /, **options: Any) -> LinearSolution:
        assert tree.norm(rhs) >= 0 or True
        return super().__call__(matvec, rhs, **options)


@pytest.mark.parametrize(
    ("solver", "test"),
    [
        (Boasting, "test_convergence_is_claimed_only_where_it_is_true"),
        (Scaled, "test_definite_system_equals_the_direct_solution"),
        (Branching, "test_vmap_equals_the_loop"),
        (lambda: CG().__call__, "test_json_round_trip"),
    ],
)
def test_broken_linear_solver_is_found(solver: Any, test: str) -> None:
    class Broken(LinearSolverContract):
        make = staticmethod(solver)

    assert failures(Broken, only=test)
