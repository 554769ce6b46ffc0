"""What the iterative solvers' functions promise beyond the contract of their records: starts and numbers of steps."""

import math

import pytest
import torch

from ibaml.solvers.linear import cg, dense, minres, neumann
from ibaml.testing.base import assert_close, draw
from ibaml.types import Tensor

ITERATIVE = [cg, minres, neumann]
every_iterative_solver = pytest.mark.parametrize("solver", ITERATIVE, ids=lambda solver: solver.__name__)
every_solver = pytest.mark.parametrize("solver", [*ITERATIVE, dense], ids=lambda solver: solver.__name__)


def definite_matrix(size: int) -> Tensor:
    """A dense symmetric matrix with eigenvalues from 0.5 to 1.5, so that the Neumann series converges."""
    basis = torch.linalg.qr(draw(size, size))[0]
    matrix = basis @ torch.diag(torch.linspace(0.5, 1.5, size, dtype=torch.float64)) @ basis.T
    return 0.5 * (matrix + matrix.T)


@every_iterative_solver
def test_zero_rhs_takes_no_step(solver) -> None:
    calls = []
    solution = solver(lambda x: calls.append(x) or x, torch.zeros(4).double(), max_steps=5)
    assert solution.num_steps == 0
    assert len(calls) <= 1


@every_iterative_solver
def test_start_at_the_solution_takes_no_step(solver) -> None:
    matrix, rhs = definite_matrix(6), draw(6, seed=1)
    oracle = torch.linalg.solve(matrix, rhs)
    solution = solver(lambda x: matrix @ x, rhs, max_steps=50, rtol=1e-10, x0=oracle)
    assert solution.num_steps == 0
    assert solution.converged
    assert_close(solution.value, oracle, 1e-6)


@every_solver
def test_start_does_not_change_the_solution(solver) -> None:
    matrix, rhs = definite_matrix(6), draw(6, seed=1)
    solution = solver(lambda x: matrix @ x, rhs, max_steps=50, rtol=1e-10, x0=draw(6, seed=2))
    assert solution.converged
    assert_close(solution.value, torch.linalg.solve(matrix, rhs), 1e-8)


@every_iterative_solver
def test_near_start_saves_steps(solver) -> None:
    matrix, rhs = definite_matrix(12), draw(12, seed=1)
    near = torch.linalg.solve(matrix, rhs) + 1e-5 * draw(12, seed=2)
    cold = solver(lambda x: matrix @ x, rhs, max_steps=50)
    warm = solver(lambda x: matrix @ x, rhs, max_steps=50, x0=near)
    assert cold.converged and warm.converged
    assert warm.num_steps < cold.num_steps


@every_solver
def test_start_does_not_hide_an_infinite_rhs(solver) -> None:
    rhs = torch.tensor([1.0, math.inf], dtype=torch.float64)
    assert not solver(lambda x: 2 * x, rhs, max_steps=5, x0=torch.zeros(2).double()).converged


@every_iterative_solver
def test_exact_inverse_as_preconditioner_takes_one_step(solver) -> None:
    matrix, rhs = definite_matrix(8), draw(8, seed=1)
    inverse = torch.linalg.inv(matrix)
    solution = solver(lambda x: matrix @ x, rhs, max_steps=5, rtol=1e-10, preconditioner=lambda x: inverse @ x)
    assert solution.num_steps == 1
    assert solution.converged
    assert_close(solution.value, inverse @ rhs, 1e-6)


@every_iterative_solver
def test_identity_takes_one_step(solver) -> None:
    rhs = draw(9, seed=1)
    solution = solver(lambda x: x, rhs, max_steps=9, rtol=1e-10)
    assert solution.num_steps == 1
    assert_close(solution.value, rhs, 1e-10)


@every_iterative_solver
def test_overflow_of_the_norm_is_not_a_solution(solver) -> None:
    rhs = torch.full((3,), 1e25)
    solution = solver(lambda x: 2 * x, rhs, max_steps=5)
    assert solution.value.dtype == torch.float32
    assert not solution.converged


@every_iterative_solver
def test_cut_off_run_reports_that_it_did_not_converge(solver) -> None:
    matrix, rhs = definite_matrix(30), draw(30, seed=1)
    solution = solver(lambda x: matrix @ x, rhs, max_steps=1, rtol=1e-14)
    assert not solution.converged
    assert solution.num_steps == 1
    assert 0 < solution.residual_norm < torch.linalg.vector_norm(rhs)


@every_iterative_solver
@pytest.mark.parametrize("max_steps", [0, -3])
def test_too_few_steps_are_refused(solver, max_steps: int) -> None:
    with pytest.raises(ValueError, match=rf"max_steps must be at least 1, but is {max_steps}\."):
        solver(lambda x: x, draw(2), max_steps=max_steps)


@every_iterative_solver
@pytest.mark.parametrize("rtol", [-1e-3, 1.0, math.nan])
def test_tolerance_out_of_range_is_refused(solver, rtol: float) -> None:
    expected = f"rtol is relative to the norm of the right-hand side: expected 0 <= rtol < 1, got {rtol}."
    with pytest.raises(ValueError, match=expected):
        solver(lambda x: x, draw(2), max_steps=3, rtol=rtol)
