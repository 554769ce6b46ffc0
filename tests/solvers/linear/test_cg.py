"""Conjugate gradients: the theory of the method, and honesty where it fails."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ibaml.solvers.linear import cg
from ibaml.types import Tensor


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def matrix_with(spectrum: list[float] | Tensor, seed: int = 0) -> Tensor:
    spectrum = torch.as_tensor(spectrum, dtype=torch.float64)
    basis = torch.linalg.qr(draw(len(spectrum), len(spectrum), seed=seed))[0]
    matrix = basis @ torch.diag(spectrum) @ basis.T
    return 0.5 * (matrix + matrix.T)


def energy_norm(matrix: Tensor, error: Tensor) -> float:
    return float((error @ matrix @ error).sqrt())


@settings(deadline=None, max_examples=25)
@given(size=st.integers(2, 15), condition=st.floats(1.5, 1e4), seed=st.integers(0, 2**20))
def test_error_in_the_energy_norm_falls_within_its_classical_bound(size: int, condition: float, seed: int) -> None:
    matrix = matrix_with(torch.logspace(0, math.log10(condition), size, dtype=torch.float64), seed)
    rhs = draw(size, seed=seed + 1)
    oracle = torch.linalg.solve(matrix, rhs)
    start = energy_norm(matrix, oracle)
    rate = (condition**0.5 - 1) / (condition**0.5 + 1)
    previous = start
    for num_steps in range(1, size + 1):
        error = energy_norm(matrix, oracle - cg(lambda x: matrix @ x, rhs, max_steps=num_steps, rtol=0).value)
        assert error <= previous + 1e-10 * start
        assert error <= 2 * rate**num_steps * start + 1e-10 * start
        previous = error


@pytest.mark.parametrize("num_distinct", [1, 2, 4])
def test_takes_as_many_steps_as_there_are_distinct_eigenvalues(num_distinct: int) -> None:
    spectrum = (1.0 + torch.arange(12) % num_distinct).double()
    matrix, rhs = matrix_with(spectrum), draw(12, seed=1)
    solution = cg(lambda x: matrix @ x, rhs, max_steps=12, rtol=1e-10)
    assert solution.converged
    assert solution.num_steps == num_distinct


def test_each_step_is_one_product_and_the_check_of_convergence_one_more() -> None:
    matrix, rhs = matrix_with([1.0, 2.0, 3.0, 4.0]), draw(4, seed=1)
    calls = []
    solution = cg(lambda x: calls.append(x) or matrix @ x, rhs, max_steps=20, rtol=1e-10)
    assert len(calls) == int(solution.num_steps) + 1


@pytest.mark.parametrize("spectrum", [[-1.0, 1.0, 2.0, 3.0], [-5.0, -1.0, 2.0, 4.0], [-1.0, -2.0, -3.0, -4.0]])
def test_indefinite_system_is_flagged_and_returns_the_iterate_of_lowest_energy(spectrum: list[float]) -> None:
    matrix, rhs = matrix_with(spectrum), draw(4, seed=1)
    solution = cg(lambda x: matrix @ x, rhs, max_steps=20)
    assert solution.negative_curvature
    assert not solution.converged
    iterates = [torch.zeros(4).double()]
    for num_steps in range(1, int(solution.num_steps)):
        iterates.append(cg(lambda x: matrix @ x, rhs, max_steps=num_steps).value)
    energies = torch.stack([0.5 * x @ matrix @ x - rhs @ x for x in iterates])
    best = iterates[int(energies.argmin())]
    torch.testing.assert_close(solution.value, best, rtol=0, atol=1e-10)
    torch.testing.assert_close(
        solution.residual_norm, torch.linalg.vector_norm(rhs - matrix @ best), rtol=0, atol=1e-10
    )


@settings(deadline=None, max_examples=40)
@given(
    spectrum=st.lists(st.sampled_from([-2.0, -0.5, 0.0, 0.3, 1.0, 3.0]), min_size=1, max_size=8),
    seed=st.integers(0, 2**20),
)
def test_whatever_the_spectrum_a_claim_of_convergence_is_true(spectrum: list[float], seed: int) -> None:
    matrix, rhs = matrix_with(spectrum, seed), draw(len(spectrum), seed=seed + 1)
    solution = cg(lambda x: matrix @ x, rhs, max_steps=30)
    true_norm = torch.linalg.vector_norm(rhs - matrix @ solution.value)
    if solution.converged:
        assert true_norm <= 1e-5 * torch.linalg.vector_norm(rhs)
    if min(spectrum) > 0:
        assert solution.converged and not solution.negative_curvature
    if max(spectrum) <= 0:
        assert not solution.converged


@pytest.mark.parametrize("seed", range(5))
def test_singular_inconsistent_system_does_not_claim_convergence(seed: int) -> None:
    matrix = matrix_with([0.0, 0.0, 1.0, 2.0, 3.0], seed)
    solution = cg(lambda x: matrix @ x, draw(5, seed=seed + 1), max_steps=50)
    assert not solution.converged
    assert torch.isfinite(solution.value).all()


@pytest.mark.parametrize("seed", range(5))
def test_singular_consistent_system_gets_the_minimum_norm_solution(seed: int) -> None:
    matrix = matrix_with([0.0, 0.0, 1.0, 2.0, 3.0], seed)
    rhs = matrix @ draw(5, seed=seed + 1)
    solution = cg(lambda x: matrix @ x, rhs, max_steps=50, rtol=1e-10)
    assert solution.converged
    oracle = torch.linalg.pinv(matrix, hermitian=True, rtol=1e-12) @ rhs
    torch.testing.assert_close(solution.value, oracle, rtol=0, atol=1e-8)


def test_claim_of_convergence_is_withdrawn_when_the_true_residual_is_far_above() -> None:
    # The solution is about 1e8 times as long as the right-hand side, so rounding keeps the true residual near 1e-8 of
    # it, while the recurrence of the residual goes on shrinking.
    matrix = matrix_with(torch.logspace(-8, 0, 30, dtype=torch.float64))
    rhs = draw(30, seed=1)
    solution = cg(lambda x: matrix @ x, rhs, max_steps=20_000, rtol=1e-13)
    true_norm = torch.linalg.vector_norm(rhs - matrix @ solution.value)
    assert solution.num_steps < 20_000, "the recurrence never met the tolerance, so nothing was withdrawn"
    assert true_norm > 10 * 1e-13 * torch.linalg.vector_norm(rhs)
    assert not solution.converged
    torch.testing.assert_close(solution.residual_norm, true_norm, rtol=1e-10, atol=0)


def test_ill_conditioned_system_is_solved_to_a_tolerance_that_can_be_met() -> None:
    matrix = matrix_with(torch.logspace(-8, 0, 30, dtype=torch.float64))
    rhs = draw(30, seed=1)
    solution = cg(lambda x: matrix @ x, rhs, max_steps=20_000, rtol=1e-6)
    assert solution.converged
    assert torch.linalg.vector_norm(rhs - matrix @ solution.value) <= 1e-5 * torch.linalg.vector_norm(rhs)


def test_preconditioning_takes_fewer_steps() -> None:
    scales = torch.logspace(0, 4, 40, dtype=torch.float64)
    matrix = torch.diag(scales.sqrt()) @ matrix_with(torch.linspace(1, 2, 40)) @ torch.diag(scales.sqrt())
    rhs = draw(40, seed=1)
    plain = cg(lambda x: matrix @ x, rhs, max_steps=500, rtol=1e-8)
    preconditioned = cg(lambda x: matrix @ x, rhs, max_steps=500, rtol=1e-8, preconditioner=lambda x: x / scales)
    assert plain.converged and preconditioned.converged
    assert 3 * preconditioned.num_steps < plain.num_steps
    oracle = torch.linalg.solve(matrix, rhs)
    torch.testing.assert_close(preconditioned.value, oracle, rtol=1e-6, atol=1e-8)


def test_preconditioned_iterates_are_those_of_the_transformed_system() -> None:
    matrix, rhs = matrix_with([1.0, 2.0, 5.0, 9.0, 20.0]), draw(5, seed=1)
    scales = torch.tensor([1.0, 4.0, 9.0, 2.0, 3.0], dtype=torch.float64)
    root = scales.sqrt()
    for num_steps in (1, 2, 3):
        direct = cg(lambda x: matrix @ x, rhs, max_steps=num_steps, preconditioner=lambda x: scales * x).value
        transformed = cg(lambda x: root * (matrix @ (root * x)), root * rhs, max_steps=num_steps).value
        torch.testing.assert_close(direct, root * transformed, rtol=0, atol=1e-10)


def test_indefinite_member_of_a_batch_leaves_its_neighbours_alone() -> None:
    definite, indefinite = matrix_with([1.0, 2.0, 3.0, 4.0]), matrix_with([-3.0, 1.0, 2.0, 4.0])
    matrices = torch.stack([definite, indefinite, torch.eye(4).double(), torch.zeros(4, 4).double()])
    rhs = draw(4, seed=1)
    batched = torch.func.vmap(lambda a: cg(lambda x: a @ x, rhs, max_steps=20, rtol=1e-10))(matrices)
    assert batched.converged.tolist() == [True, False, True, False]
    assert batched.negative_curvature.tolist() == [False, True, False, True]
    for index, matrix in enumerate(matrices):
        single = cg(lambda x, a=matrix: a @ x, rhs, max_steps=20, rtol=1e-10)
        torch.testing.assert_close(batched.value[index], single.value, rtol=0, atol=1e-9)
        torch.testing.assert_close(batched.residual_norm[index], single.residual_norm, rtol=0, atol=1e-9)
        assert batched.num_steps[index] == single.num_steps


def test_a_direction_that_the_matrix_takes_to_rounding_is_not_followed() -> None:
    """Its curvature may be positive by chance; a step along it would be 1e16 long."""
    diagonal = torch.tensor([1.0, 1e-16], dtype=torch.float64)
    solution = cg(lambda x: diagonal * x, torch.ones(2, dtype=torch.float64), max_steps=5)
    assert solution.value.tolist() == [2.0, 2.0]
    assert solution.negative_curvature and not solution.converged


def test_claim_of_convergence_is_withdrawn_in_a_batch_where_rounding_alone_exceeds_it() -> None:
    diagonal = torch.tensor([[1e-10, 1.0, 2.0], [0.5, 1.0, 2.0]], dtype=torch.float64)
    solve = torch.vmap(lambda one: cg(lambda x: one * x, torch.ones(3, dtype=torch.float64), max_steps=30, rtol=1e-10))
    solution = solve(diagonal)
    assert (solution.residual_norm <= 1e-10 * 3**0.5).all(), "the recurrence met the tolerance in both"
    assert solution.converged.tolist() == [False, True]
