"""The direct solver against torch.linalg."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ibaml import tree
from ibaml.solvers import curvature
from ibaml.solvers.linear import dense
from ibaml.types import Tensor

ALGEBRA = 1e-10


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def matrix_with(spectrum: list[float] | Tensor, seed: int = 0) -> Tensor:
    spectrum = torch.as_tensor(spectrum, dtype=torch.float64)
    basis = torch.linalg.qr(draw(len(spectrum), len(spectrum), seed=seed))[0]
    matrix = basis @ torch.diag(spectrum) @ basis.T
    return 0.5 * (matrix + matrix.T)


@settings(deadline=None, max_examples=50)
@given(
    spectrum=st.lists(st.one_of(st.just(0.0), st.floats(0.1, 10), st.floats(-10, -0.1)), min_size=1, max_size=8),
    seed=st.integers(0, 2**20),
)
def test_any_spectrum_gives_the_pseudo_inverse_solution(spectrum: list[float], seed: int) -> None:
    matrix, rhs = matrix_with(spectrum, seed), draw(len(spectrum), seed=seed + 1)
    solution = dense(lambda x: matrix @ x, rhs)
    oracle = torch.linalg.pinv(matrix, hermitian=True, rtol=1e-10) @ rhs
    assert solution.converged
    torch.testing.assert_close(solution.value, oracle, rtol=ALGEBRA, atol=ALGEBRA)
    residual = torch.linalg.vector_norm(rhs - matrix @ oracle)
    torch.testing.assert_close(solution.residual_norm, residual, rtol=ALGEBRA, atol=1e-9)
    assert solution.num_steps == len(spectrum)
    assert bool(solution.negative_curvature) == (min(spectrum) < 0)


def test_ill_conditioned_system_keeps_the_digits_that_a_direct_solution_keeps() -> None:
    matrix, rhs = matrix_with(torch.logspace(-8, 0, 20, dtype=torch.float64)), draw(20, seed=1)
    solution = dense(lambda x: matrix @ x, rhs)
    oracle = torch.linalg.solve(matrix, rhs)
    assert solution.converged
    error = torch.linalg.vector_norm(solution.value - oracle) / torch.linalg.vector_norm(oracle)
    assert error <= 1e8 * 100 * torch.finfo(torch.float64).eps


def test_tolerance_that_cannot_be_met_is_not_claimed() -> None:
    matrix, rhs = matrix_with(torch.logspace(-8, 0, 20, dtype=torch.float64)), draw(20, seed=1)
    solution = dense(lambda x: matrix @ x, rhs, rtol=1e-15)
    assert not solution.converged


def test_solves_with_a_hessian_vector_product_over_a_parameter_dict() -> None:
    features = draw(7, 3, seed=2)

    def loss(p: dict[str, Tensor]) -> Tensor:
        return torch.nn.functional.softplus(features @ p["w"] + p["b"]).sum() + (p["w"] ** 2).sum() + p["b"] ** 2

    point = {"w": draw(3, seed=0), "b": draw(seed=1)}
    rhs = {"w": draw(3, seed=3), "b": draw(seed=4)}
    flat, unravel = tree.ravel(point)
    hessian = torch.func.hessian(lambda v: loss(unravel(v)))(flat)
    solution = dense(curvature.hvp(loss, point), rhs)
    oracle = unravel(torch.linalg.solve(hessian, tree.ravel(rhs)[0]))
    for name in point:
        torch.testing.assert_close(solution.value[name], oracle[name], rtol=ALGEBRA, atol=ALGEBRA)


def test_product_is_called_once_on_all_unit_vectors() -> None:
    calls = []
    dense(lambda x: calls.append(x) or 2 * x, draw(5))
    assert len(calls) == 1


def test_arguments_of_iterative_solvers_are_accepted_without_effect() -> None:
    matrix, rhs = matrix_with([1.0, 2.0, 3.0]), draw(3, seed=1)
    plain = dense(lambda x: matrix @ x, rhs)
    dressed = dense(lambda x: matrix @ x, rhs, max_steps=1, preconditioner=lambda x: 7 * x, x0=draw(3, seed=2))
    assert torch.equal(plain.value, dressed.value)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_residual_of_a_matrix_that_is_not_finite_is_unknown_not_zero(bad: float) -> None:
    solution = dense(lambda x: bad * x, draw(3))
    assert not solution.converged
    assert solution.residual_norm.isnan()


def test_refinement_leaves_a_smaller_residual_than_the_decomposition_alone() -> None:
    matrix, rhs = matrix_with(torch.logspace(-3, 0, 200, dtype=torch.float64)), draw(200, seed=1)
    eigenvalues, eigenvectors = torch.linalg.eigh(matrix)
    plain = eigenvectors @ ((eigenvectors.T @ rhs) / eigenvalues)
    # A third, as measured on 20 matrices.
    assert dense(lambda x: matrix @ x, rhs).residual_norm < 0.6 * torch.linalg.vector_norm(rhs - matrix @ plain)


@pytest.mark.parametrize("sign", [1.0, -1.0], ids=["definite", "indefinite"])
def test_solutions_in_float32_are_right_to_the_last_digits(sign: float) -> None:
    """Without a residual in float64 the errors are 1e-5, and 1e-4 at worst."""
    spectrum = torch.logspace(-3, 0, 30, dtype=torch.float64)
    spectrum[::2] *= sign
    for seed in range(5):
        matrix, rhs = matrix_with(spectrum, seed).float(), draw(30, seed=seed + 1).float()
        solution = dense(lambda x, matrix=matrix: matrix @ x, rhs)
        oracle = torch.linalg.solve(matrix.double(), rhs.double())
        error = torch.linalg.vector_norm(solution.value - oracle) / torch.linalg.vector_norm(oracle)
        assert error < 1e-7
        residual = rhs.double() - matrix.double() @ solution.value.double()
        torch.testing.assert_close(solution.residual_norm, torch.linalg.vector_norm(residual).float())
        assert solution.residual_norm.dtype == solution.value.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_refinement_never_leaves_a_larger_residual(dtype: torch.dtype) -> None:
    """Taken whatever comes of it, it would in a tenth of these systems, up to eightfold."""
    for seed in range(60):
        matrix, rhs = matrix_with([1e-3, -1.0 if seed % 2 else 1.0], seed).to(dtype), draw(2, seed=seed + 1).to(dtype)
        eigenvalues, eigenvectors = torch.linalg.eigh(matrix)
        plain = eigenvectors @ ((1 / eigenvalues) * (eigenvectors.T @ rhs))
        residual = torch.linalg.vector_norm(rhs.double() - matrix.double() @ plain.double())
        found = dense(lambda x, matrix=matrix: matrix @ x, rhs).residual_norm.double()
        assert found <= residual * (1 + torch.finfo(dtype).eps)
