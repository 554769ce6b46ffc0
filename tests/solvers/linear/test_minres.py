"""MINRES against the pseudo-inverse and against scipy."""

import numpy as np
import pytest
import scipy.sparse.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ibaml.solvers.linear import minres
from ibaml.types import Tensor

SOLVER = 1e-6


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def matrix_with(spectrum: list[float] | Tensor, seed: int = 0) -> Tensor:
    spectrum = torch.as_tensor(spectrum, dtype=torch.float64)
    basis = torch.linalg.qr(draw(len(spectrum), len(spectrum), seed=seed))[0]
    matrix = basis @ torch.diag(spectrum) @ basis.T
    return 0.5 * (matrix + matrix.T)


def pseudo_inverse(matrix: Tensor) -> Tensor:
    return torch.linalg.pinv(matrix, hermitian=True, rtol=1e-10)


INDEFINITE = [-3.0, -1.0, -0.2, 0.5, 2.0, 4.0]
SINGULAR = [0.0, 0.0, 0.5, 1.0, 2.0, 4.0]
SINGULAR_INDEFINITE = [-2.0, -0.5, 0.0, 0.0, 1.0, 3.0]


@pytest.mark.parametrize("reorthogonalize", [True, False])
@pytest.mark.parametrize("seed", range(3))
def test_indefinite_system_equals_the_direct_solution(seed: int, reorthogonalize: bool) -> None:
    matrix, rhs = matrix_with(INDEFINITE, seed), draw(6, seed=seed + 1)
    solution = minres(lambda x: matrix @ x, rhs, max_steps=30, rtol=1e-10, reorthogonalize=reorthogonalize)
    assert solution.converged
    torch.testing.assert_close(solution.value, torch.linalg.solve(matrix, rhs), rtol=0, atol=1e-8)


@pytest.mark.parametrize("spectrum", [SINGULAR, SINGULAR_INDEFINITE], ids=["semi-definite", "indefinite"])
@pytest.mark.parametrize("consistent", [True, False], ids=["consistent", "inconsistent"])
@pytest.mark.parametrize("seed", range(5))
def test_singular_system_gets_the_pseudo_inverse_solution(spectrum: list[float], consistent: bool, seed: int) -> None:
    matrix, rhs = matrix_with(spectrum, seed), draw(6, seed=seed + 1)
    if consistent:
        rhs = matrix @ rhs
    solution = minres(lambda x: matrix @ x, rhs, max_steps=30, rtol=1e-10)
    oracle = pseudo_inverse(matrix) @ rhs
    assert solution.converged
    torch.testing.assert_close(solution.value, oracle, rtol=0, atol=SOLVER)
    true_norm = torch.linalg.vector_norm(rhs - matrix @ oracle)
    torch.testing.assert_close(solution.residual_norm, true_norm, rtol=1e-6, atol=1e-8)
    assert (true_norm < 1e-8) == consistent


@settings(deadline=None, max_examples=50)
@given(
    spectrum=st.lists(st.one_of(st.just(0.0), st.floats(0.05, 20.0), st.floats(-20.0, -0.05)), min_size=1, max_size=9),
    seed=st.integers(0, 2**20),
    consistent=st.booleans(),
)
def test_any_spectrum_gives_the_pseudo_inverse_solution(spectrum: list[float], seed: int, consistent: bool) -> None:
    matrix, rhs = matrix_with(spectrum, seed), draw(len(spectrum), seed=seed + 1)
    if consistent:
        rhs = matrix @ rhs
    solution = minres(lambda x: matrix @ x, rhs, max_steps=4 * len(spectrum), rtol=1e-10)
    oracle = pseudo_inverse(matrix) @ rhs
    assert solution.converged
    scale = float(torch.linalg.vector_norm(oracle))
    torch.testing.assert_close(solution.value, oracle, rtol=0, atol=SOLVER * max(scale, 1e-6))


@pytest.mark.parametrize("spectrum", [INDEFINITE, SINGULAR, SINGULAR_INDEFINITE])
@pytest.mark.parametrize("seed", range(3))
def test_scipy_agrees_on_consistent_systems(spectrum: list[float], seed: int) -> None:
    matrix = matrix_with(spectrum, seed)
    rhs = matrix @ draw(6, seed=seed + 1)
    solution = minres(lambda x: matrix @ x, rhs, max_steps=30, rtol=1e-10)
    reference, failure = scipy.sparse.linalg.minres(matrix.numpy(), rhs.numpy(), rtol=1e-12)
    assert failure == 0
    np.testing.assert_allclose(solution.value.numpy(), reference, rtol=0, atol=SOLVER)


@pytest.mark.parametrize("num_steps", [1, 2, 3, 4])
def test_every_iterate_has_the_smallest_residual_in_its_krylov_space(num_steps: int) -> None:
    matrix, rhs = matrix_with(INDEFINITE), draw(6, seed=1)
    powers = [rhs]
    while len(powers) < num_steps:
        powers.append(matrix @ powers[-1])
    krylov = torch.linalg.qr(torch.stack(powers, dim=1))[0]
    coefficients = torch.linalg.lstsq(matrix @ krylov, rhs.unsqueeze(1)).solution.squeeze(1)
    oracle = torch.linalg.vector_norm(rhs - matrix @ krylov @ coefficients)
    solution = minres(lambda x: matrix @ x, rhs, max_steps=num_steps)
    assert solution.num_steps == num_steps
    torch.testing.assert_close(solution.residual_norm, oracle, rtol=0, atol=1e-10)


def test_run_that_is_cut_off_does_not_claim_convergence() -> None:
    matrix, rhs = matrix_with(INDEFINITE), draw(6, seed=1)
    assert not minres(lambda x: matrix @ x, rhs, max_steps=4).converged


@pytest.mark.parametrize("consistent", [True, False], ids=["consistent", "inconsistent"])
@pytest.mark.parametrize("seed", range(3))
def test_preconditioned_solution_has_the_smallest_norm_in_the_preconditioners_metric(
    consistent: bool, seed: int
) -> None:
    # min (x^T M^-1 x) over the minimisers of (b - A x)^T M (b - A x) is R pinv(R A R) R b with M = R R, R diagonal.
    matrix, rhs = matrix_with(SINGULAR_INDEFINITE, seed), draw(6, seed=seed + 1)
    if consistent:
        rhs = matrix @ rhs
    metric = torch.tensor([1.0, 3.0, 0.5, 2.0, 4.0, 0.7], dtype=torch.float64)
    root = torch.diag(metric.sqrt())
    solution = minres(lambda x: matrix @ x, rhs, max_steps=40, rtol=1e-10, preconditioner=lambda x: metric * x)
    oracle = root @ (pseudo_inverse(root @ matrix @ root) @ (root @ rhs))
    assert solution.converged
    torch.testing.assert_close(solution.value, oracle, rtol=0, atol=SOLVER)
    plain = pseudo_inverse(matrix) @ rhs
    assert torch.linalg.vector_norm(oracle - plain) > 1e-2, "the metric made no difference to this system"


@settings(deadline=None, max_examples=20)
@given(size=st.integers(1, 12), seed=st.integers(0, 2**20))
def test_definite_system_needs_no_reorthogonalisation(size: int, seed: int) -> None:
    matrix, rhs = matrix_with(torch.logspace(-1, 1, size, dtype=torch.float64), seed), draw(size, seed=seed + 1)
    solution = minres(lambda x: matrix @ x, rhs, max_steps=10 * size, rtol=1e-10, reorthogonalize=False)
    assert solution.converged
    torch.testing.assert_close(solution.value, torch.linalg.solve(matrix, rhs), rtol=1e-7, atol=1e-7)


def test_reorthogonalisation_ends_an_ill_conditioned_system_in_as_many_steps_as_unknowns() -> None:
    matrix, rhs = matrix_with(torch.logspace(-6, 0, 40, dtype=torch.float64)), draw(40, seed=1)
    kept = minres(lambda x: matrix @ x, rhs, max_steps=400, rtol=1e-8)
    free = minres(lambda x: matrix @ x, rhs, max_steps=400, rtol=1e-8, reorthogonalize=False)
    assert kept.converged
    assert kept.num_steps <= 40 < free.num_steps


def test_zero_matrix_gives_zero() -> None:
    rhs = draw(3)
    solution = minres(lambda x: 0 * x, rhs, max_steps=5)
    assert solution.converged
    assert torch.equal(solution.value, torch.zeros(3).double())
    torch.testing.assert_close(solution.residual_norm, torch.linalg.vector_norm(rhs), rtol=1e-12, atol=0)


def test_singular_inconsistent_float32_system_gets_the_pseudo_inverse_solution() -> None:
    matrix, rhs = matrix_with(SINGULAR), draw(6, seed=1)
    narrow = matrix.float()
    solution = minres(lambda x: narrow @ x, rhs.float(), max_steps=30, rtol=1e-5)
    assert solution.converged
    torch.testing.assert_close(solution.value.double(), pseudo_inverse(matrix) @ rhs, rtol=0, atol=1e-3)


def test_batch_of_regular_singular_and_inconsistent_members_equals_the_loop() -> None:
    matrices = torch.stack([matrix_with(s) for s in (INDEFINITE, SINGULAR, SINGULAR_INDEFINITE, [0.0] * 6)])
    rhs = draw(4, 6, seed=1)
    rhs[1] = matrices[1] @ rhs[1]
    batched = torch.func.vmap(lambda a, b: minres(lambda x: a @ x, b, max_steps=20, rtol=1e-10))(matrices, rhs)
    assert batched.converged.all()
    for index, (matrix, b) in enumerate(zip(matrices, rhs, strict=True)):
        torch.testing.assert_close(batched.value[index], pseudo_inverse(matrix) @ b, rtol=0, atol=SOLVER)
        single = minres(lambda x, a=matrix: a @ x, b, max_steps=20, rtol=1e-10)
        torch.testing.assert_close(batched.value[index], single.value, rtol=0, atol=1e-7)
        torch.testing.assert_close(batched.residual_norm[index], single.residual_norm, rtol=0, atol=1e-7)


@pytest.mark.parametrize("reorthogonalize", [True, False])
@pytest.mark.parametrize("seed", [0, 1, 3])
def test_an_eigenvalue_of_rounding_size_counts_as_zero(seed: int, reorthogonalize: bool) -> None:
    """A right-hand side along it would otherwise be divided by it, or by what rounding leaves of it."""
    matrix, rhs = matrix_with([1e-9, 1.0, 2.0, 3.0], seed), draw(4, seed=seed + 9)
    solution = minres(lambda x: matrix @ x, rhs, max_steps=60, rtol=1e-10, reorthogonalize=reorthogonalize)
    oracle = torch.linalg.pinv(matrix, hermitian=True, rtol=1e-7) @ rhs
    assert solution.converged
    torch.testing.assert_close(solution.value, oracle, rtol=0, atol=1e-5)


@pytest.mark.parametrize("seed", [1, 2])
def test_a_run_without_reorthogonalisation_goes_back_to_its_iterate_of_least_squares(seed: int) -> None:
    """Past it the null space grows in; the residual stays the same, up to rounding."""
    spectrum = [0.0] * 5 + torch.logspace(-5, 0, 15).tolist()
    matrix, rhs = matrix_with(spectrum, seed), draw(20, seed=seed + 9)
    solution = minres(lambda x: matrix @ x, rhs, max_steps=60, rtol=1e-10, reorthogonalize=False)
    oracle = torch.linalg.pinv(matrix, hermitian=True, rtol=1e-7) @ rhs
    assert solution.converged
    assert torch.linalg.vector_norm(solution.value - oracle) < 1e-4 * torch.linalg.vector_norm(oracle)


@pytest.mark.parametrize(("diagonal", "num_steps"), [((1.0, 1.0, 1.0, 1.0), 1), ((1.0, 1.0, 2.0, 2.0), 2)])
def test_a_krylov_space_that_is_used_up_ends_the_run(diagonal: tuple[float, ...], num_steps: int) -> None:
    """As many steps as there are different eigenvalues, also at a tolerance that rounding does not let it meet."""
    scales, rhs = torch.tensor(diagonal, dtype=torch.float64), draw(4, seed=3)
    solution = minres(lambda x: scales * x, rhs, max_steps=9, rtol=0.0)
    assert solution.num_steps == num_steps
    torch.testing.assert_close(solution.value, rhs / scales, rtol=1e-14, atol=0)
