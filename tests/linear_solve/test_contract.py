"""What every linear solver promises, over all of them."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ibaml import tree
from ibaml.priors import DiagonalGaussian
from ibaml.solvers.linear import cg, dense, minres, neumann
from ibaml.types import LinearSolution, PyTree, Tensor

RTOL = 1e-10
SOLVED = 1e-6
LARGEST_EIGENVALUE = 4.0

Solver = Callable[..., LinearSolution]


def neumann_with_suited_step(matvec: Any, rhs: PyTree, *, max_steps: int, **options: Any) -> LinearSolution:
    """The best step for eigenvalues in [1, 4], or [0.5, 2] when preconditioned; slower than the other solvers."""
    step_size = 0.8 if options.get("preconditioner") else 2 / (1 + LARGEST_EIGENVALUE)
    return neumann(matvec, rhs, max_steps=10 * max_steps, step_size=step_size, **options)


SOLVERS: dict[str, Solver] = {"cg": cg, "minres": minres, "neumann": neumann_with_suited_step, "dense": dense}
ITERATIVE = {name: solver for name, solver in SOLVERS.items() if name != "dense"}

every_solver = pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS.keys())
every_iterative_solver = pytest.mark.parametrize("solver", ITERATIVE.values(), ids=ITERATIVE.keys())


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def definite_matrix(size: int, seed: int = 0) -> Tensor:
    """A dense symmetric matrix with eigenvalues from 1 to 4."""
    basis = torch.linalg.qr(draw(size, size, seed=seed))[0]
    spectrum = torch.linspace(1, LARGEST_EIGENVALUE, size, dtype=torch.float64)
    matrix = basis @ torch.diag(spectrum) @ basis.T
    return 0.5 * (matrix + matrix.T)


def assert_solves(solution: LinearSolution, oracle: Tensor, tolerance: float = SOLVED) -> None:
    assert solution.converged
    assert not solution.negative_curvature
    torch.testing.assert_close(tree.ravel(solution.value)[0], oracle, rtol=tolerance, atol=tolerance)


@every_solver
@settings(deadline=None, max_examples=15)
@given(size=st.integers(1, 12), seed=st.integers(0, 2**20))
def test_definite_system_equals_the_direct_solution(solver: Solver, size: int, seed: int) -> None:
    matrix, rhs = definite_matrix(size, seed), draw(size, seed=seed + 1)
    solution = solver(lambda x: matrix @ x, rhs, max_steps=30, rtol=RTOL)
    assert_solves(solution, torch.linalg.solve(matrix, rhs), 1e-8)
    assert torch.linalg.vector_norm(rhs - matrix @ solution.value) <= 10 * RTOL * torch.linalg.vector_norm(rhs)


@every_solver
def test_records_are_scalar_tensors_of_the_stated_types(solver: Solver) -> None:
    matrix, rhs = definite_matrix(5), draw(5, seed=1)
    solution = solver(lambda x: matrix @ x, rhs, max_steps=2, rtol=RTOL)
    assert solution.residual_norm.dtype == torch.float64
    assert solution.num_steps.dtype == torch.int64
    assert solution.converged.dtype == solution.negative_curvature.dtype == torch.bool
    assert all(record.shape == () for record in solution[1:])
    torch.testing.assert_close(
        solution.residual_norm, torch.linalg.vector_norm(rhs - matrix @ solution.value), rtol=0, atol=1e-10
    )


@every_solver
@pytest.mark.parametrize("structure", ["dict", "DiagonalGaussian", "matrix"])
def test_rhs_may_be_any_pytree(solver: Solver, structure: str) -> None:
    rhs = {
        "dict": {"w": draw(2, 3, seed=1), "b": draw(2, seed=2)},
        "DiagonalGaussian": DiagonalGaussian({"w": draw(4, seed=1)}, {"w": draw(4, seed=2)}),
        "matrix": draw(4, 2, seed=1),
    }[structure]
    flat, unravel = tree.ravel(rhs)
    matrix = definite_matrix(8)
    solution = solver(lambda x: unravel(matrix @ tree.ravel(x)[0]), rhs, max_steps=30, rtol=RTOL)
    assert type(solution.value) is type(rhs)
    for leaf, like in zip(tree.leaves(solution.value), tree.leaves(rhs), strict=True):
        assert leaf.shape == like.shape
    assert_solves(solution, torch.linalg.solve(matrix, flat), 1e-8)


@every_solver
def test_zero_rhs_gives_zero(solver: Solver) -> None:
    matrix = definite_matrix(4)
    rhs = {"w": torch.zeros(4).double()}
    solution = solver(lambda x: {"w": matrix @ x["w"]}, rhs, max_steps=5)
    assert solution.converged
    assert torch.equal(solution.value["w"], torch.zeros(4).double())
    assert solution.residual_norm == 0


@every_iterative_solver
def test_zero_rhs_takes_no_step(solver: Solver) -> None:
    calls = []
    solution = solver(lambda x: calls.append(x) or x, torch.zeros(4).double(), max_steps=5)
    assert solution.num_steps == 0
    assert len(calls) <= 1


@every_iterative_solver
def test_start_at_the_solution_takes_no_step(solver: Solver) -> None:
    matrix, rhs = definite_matrix(6), draw(6, seed=1)
    oracle = torch.linalg.solve(matrix, rhs)
    solution = solver(lambda x: matrix @ x, rhs, max_steps=30, rtol=RTOL, x0=oracle)
    assert solution.num_steps == 0
    assert_solves(solution, oracle)


@every_solver
def test_start_does_not_change_the_solution(solver: Solver) -> None:
    matrix, rhs = definite_matrix(6), draw(6, seed=1)
    solution = solver(lambda x: matrix @ x, rhs, max_steps=30, rtol=RTOL, x0=draw(6, seed=2))
    assert_solves(solution, torch.linalg.solve(matrix, rhs), 1e-8)


@every_iterative_solver
def test_near_start_saves_steps(solver: Solver) -> None:
    matrix, rhs = definite_matrix(12), draw(12, seed=1)
    near = torch.linalg.solve(matrix, rhs) + 1e-5 * draw(12, seed=2)
    cold = solver(lambda x: matrix @ x, rhs, max_steps=30)
    warm = solver(lambda x: matrix @ x, rhs, max_steps=30, x0=near)
    assert cold.converged and warm.converged
    assert warm.num_steps < cold.num_steps


@every_solver
def test_preconditioner_does_not_change_the_solution(solver: Solver) -> None:
    matrix, rhs = definite_matrix(8), draw(8, seed=1)
    solution = solver(lambda x: matrix @ x, rhs, max_steps=30, rtol=RTOL, preconditioner=lambda x: 0.5 * x)
    assert_solves(solution, torch.linalg.solve(matrix, rhs), 1e-8)


@pytest.mark.parametrize("solver", [cg, minres, neumann], ids=["cg", "minres", "neumann"])
def test_exact_inverse_as_preconditioner_takes_one_step(solver: Solver) -> None:
    matrix, rhs = definite_matrix(8), draw(8, seed=1)
    inverse = torch.linalg.inv(matrix)
    solution = solver(lambda x: matrix @ x, rhs, max_steps=5, rtol=RTOL, preconditioner=lambda x: inverse @ x)
    assert solution.num_steps == 1
    assert_solves(solution, inverse @ rhs)


@pytest.mark.parametrize("solver", [cg, minres, neumann], ids=["cg", "minres", "neumann"])
def test_identity_takes_one_step(solver: Solver) -> None:
    rhs = draw(9, seed=1)
    solution = solver(lambda x: x, rhs, max_steps=9, rtol=RTOL)
    assert solution.num_steps == 1
    assert_solves(solution, rhs, 1e-10)


@every_solver
@pytest.mark.parametrize("preconditioned", [False, True], ids=["plain", "preconditioned"])
def test_batch_under_vmap_equals_the_loop(solver: Solver, preconditioned: bool) -> None:
    # Eigenvalue counts of 1, 2 and 12, and a zero right-hand side: members finish at very different steps.
    basis = torch.linalg.qr(draw(12, 12))[0]
    spectra = torch.ones(4, 12, dtype=torch.float64)
    spectra[1, ::2] = LARGEST_EIGENVALUE
    spectra[2:] = torch.linspace(1, LARGEST_EIGENVALUE, 12)
    matrices = basis @ torch.diag_embed(spectra) @ basis.T
    rhs = draw(4, 12, seed=1)
    rhs[3] = 0
    options: dict[str, Any] = {"max_steps": 30, "rtol": RTOL}
    if preconditioned:
        options["preconditioner"] = lambda x: {"w": 0.5 * x["w"]}

    def solve(matrix: Tensor, b: Tensor) -> LinearSolution:
        return solver(lambda x: {"w": matrix @ x["w"]}, {"w": b}, **options)

    batched = torch.func.vmap(solve)(matrices, rhs)
    singles = [solve(matrix, b) for matrix, b in zip(matrices, rhs, strict=True)]
    assert batched.converged.all()
    if solver is not dense:
        assert len(set(batched.num_steps.tolist())) >= 2
    for index, single in enumerate(singles):
        torch.testing.assert_close(batched.value["w"][index], single.value["w"], rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(batched.residual_norm[index], single.residual_norm, rtol=0, atol=1e-9)
        assert batched.num_steps[index] == single.num_steps


@every_solver
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_matvec_that_is_not_finite_is_reported_and_does_not_raise(solver: Solver, bad: float) -> None:
    solution = solver(lambda x: bad * x, draw(4), max_steps=5)
    assert not solution.converged
    assert not solution.negative_curvature


@every_solver
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_rhs_that_is_not_finite_is_reported_and_does_not_raise(solver: Solver, bad: float) -> None:
    rhs = torch.tensor([1.0, bad], dtype=torch.float64)
    solution = solver(lambda x: 2 * x, rhs, max_steps=5)
    assert not solution.converged
    assert not torch.isfinite(solution.residual_norm)


@every_solver
def test_start_does_not_hide_an_infinite_rhs(solver: Solver) -> None:
    rhs = torch.tensor([1.0, math.inf], dtype=torch.float64)
    assert not solver(lambda x: 2 * x, rhs, max_steps=5, x0=torch.zeros(2).double()).converged


@every_iterative_solver
def test_overflow_of_the_norm_is_not_a_solution(solver: Solver) -> None:
    rhs = torch.full((3,), 1e25)
    solution = solver(lambda x: 2 * x, rhs, max_steps=5)
    assert solution.value.dtype == torch.float32
    assert not solution.converged


@every_solver
def test_one_bad_member_of_a_batch_leaves_the_others_alone(solver: Solver) -> None:
    matrix, rhs = definite_matrix(6), draw(6, seed=1)
    factors = torch.tensor([1.0, math.nan, 1.0], dtype=torch.float64)
    batched = torch.func.vmap(lambda f: solver(lambda x: f * (matrix @ x), rhs, max_steps=30, rtol=RTOL))(factors)
    assert batched.converged.tolist() == [True, False, True]
    for index in (0, 2):
        torch.testing.assert_close(batched.value[index], torch.linalg.solve(matrix, rhs), rtol=1e-8, atol=1e-8)


@every_solver
def test_float32_stays_float32_and_solves_to_its_precision(solver: Solver) -> None:
    matrix, rhs = definite_matrix(8), draw(8, seed=1)
    narrow = matrix.float()
    solution = solver(lambda x: narrow @ x, rhs.float(), max_steps=30, rtol=1e-5)
    assert solution.value.dtype == solution.residual_norm.dtype == torch.float32
    assert_solves(solution._replace(value=solution.value.double()), torch.linalg.solve(matrix, rhs), 1e-4)


@every_iterative_solver
def test_cut_off_run_reports_that_it_did_not_converge(solver: Solver) -> None:
    matrix, rhs = definite_matrix(30), draw(30, seed=1)
    calls = []
    solution = solver(lambda x: calls.append(x) or matrix @ x, rhs, max_steps=1, rtol=1e-14)
    assert not solution.converged
    assert 1 <= solution.num_steps <= 10
    assert 0 < solution.residual_norm < torch.linalg.vector_norm(rhs)


@every_iterative_solver
@pytest.mark.parametrize("max_steps", [0, -3])
def test_too_few_steps_are_refused(solver: Solver, max_steps: int) -> None:
    with pytest.raises(ValueError, match=r"max_steps must be at least 1, but is (0|-3|-30)\."):
        solver(lambda x: x, draw(2), max_steps=max_steps)


@every_iterative_solver
@pytest.mark.parametrize("rtol", [-1e-3, 1.0, math.nan])
def test_tolerance_out_of_range_is_refused(solver: Solver, rtol: float) -> None:
    expected = f"rtol is relative to the norm of the right-hand side: expected 0 <= rtol < 1, got {rtol}."
    with pytest.raises(ValueError, match=expected):
        solver(lambda x: x, draw(2), max_steps=3, rtol=rtol)
