"""The Neumann series against its explicit sum, and against truncated backpropagation."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ibaml.solvers.inner import gradient_descent
from ibaml.solvers.linear import neumann
from ibaml.types import Tensor

ALGEBRA = 1e-10


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def matrix_with(spectrum: list[float], seed: int = 0) -> Tensor:
    basis = torch.linalg.qr(draw(len(spectrum), len(spectrum), seed=seed))[0]
    matrix = basis @ torch.diag(torch.tensor(spectrum, dtype=torch.float64)) @ basis.T
    return 0.5 * (matrix + matrix.T)


MATRIX = matrix_with([0.2, 0.5, 1.0, 1.7])


def series(matrix: Tensor, rhs: Tensor, num_terms: int, step_size: float, start: Tensor) -> Tensor:
    """``start + step_size * sum_k (I - step_size A)^k (b - A start)``."""
    contraction = torch.eye(len(rhs)).double() - step_size * matrix
    powers = [torch.linalg.matrix_power(contraction, k) for k in range(num_terms)]
    return start + step_size * torch.stack(powers).sum(0) @ (rhs - matrix @ start)


@settings(deadline=None, max_examples=25)
@given(
    num_steps=st.integers(1, 12),
    step_size=st.floats(0.05, 1.0),
    seed=st.integers(0, 2**20),
    started=st.booleans(),
)
def test_value_is_the_truncated_series(num_steps: int, step_size: float, seed: int, started: bool) -> None:
    rhs = draw(4, seed=seed)
    start = draw(4, seed=seed + 1) if started else torch.zeros(4).double()
    x0 = start if started else None
    solution = neumann(lambda x: MATRIX @ x, rhs, max_steps=num_steps, rtol=0, step_size=step_size, x0=x0)
    oracle = series(MATRIX, rhs, num_steps, step_size, start)
    torch.testing.assert_close(solution.value, oracle, rtol=ALGEBRA, atol=ALGEBRA)
    true_norm = torch.linalg.vector_norm(rhs - MATRIX @ oracle)
    torch.testing.assert_close(solution.residual_norm, true_norm, rtol=ALGEBRA, atol=ALGEBRA)
    assert solution.num_steps == num_steps


def test_preconditioned_value_is_the_series_of_the_preconditioned_matrix() -> None:
    rhs, scales = draw(4, seed=1), torch.tensor([0.5, 1.0, 0.7, 0.9], dtype=torch.float64)
    solution = neumann(
        lambda x: MATRIX @ x, rhs, max_steps=5, rtol=0, step_size=0.6, preconditioner=lambda x: scales * x
    )
    contraction = torch.eye(4).double() - 0.6 * torch.diag(scales) @ MATRIX
    powers = [torch.linalg.matrix_power(contraction, k) for k in range(5)]
    oracle = 0.6 * torch.stack(powers).sum(0) @ (scales * rhs)
    torch.testing.assert_close(solution.value, oracle, rtol=ALGEBRA, atol=ALGEBRA)


@pytest.mark.parametrize("step_size", [1.99 / 1.7, 1.0, 0.5])
def test_converges_below_two_over_the_largest_eigenvalue(step_size: float) -> None:
    rhs = draw(4, seed=1)
    solution = neumann(lambda x: MATRIX @ x, rhs, max_steps=3000, rtol=1e-9, step_size=step_size)
    assert solution.converged
    torch.testing.assert_close(solution.value, torch.linalg.solve(MATRIX, rhs), rtol=0, atol=1e-7)


@pytest.mark.parametrize("step_size", [2.05 / 1.7, 10.0])
@pytest.mark.parametrize("max_steps", [20, 3000])
def test_divergence_is_reported_with_the_best_iterate(step_size: float, max_steps: int) -> None:
    rhs = draw(4, seed=1)
    solution = neumann(lambda x: MATRIX @ x, rhs, max_steps=max_steps, step_size=step_size)
    assert not solution.converged
    assert torch.isfinite(solution.value).all()
    candidates = [torch.zeros(4).double()]
    candidates += [series(MATRIX, rhs, k, step_size, candidates[0]) for k in range(1, 80)]
    oracle = torch.stack([torch.linalg.vector_norm(rhs - MATRIX @ x) for x in candidates[: max_steps + 1]]).min()
    torch.testing.assert_close(solution.residual_norm, oracle, rtol=1e-8, atol=0)
    recomputed = torch.linalg.vector_norm(rhs - MATRIX @ solution.value)
    torch.testing.assert_close(solution.residual_norm, recomputed, rtol=1e-8, atol=0)


@pytest.mark.parametrize("num_steps", [1, 3, 8])
def test_equals_backpropagation_through_the_last_gradient_steps_at_a_stationary_point(num_steps: int) -> None:
    # Inner loss x^T A x / 2 - theta^T x, outer loss c^T x. At x* = A^-1 theta the k last steps contribute
    # step_size * sum_j (I - step_size A)^j c to the gradient in theta; the start itself does not depend on theta.
    step_size, theta, outer = 0.4, draw(4, seed=1), draw(4, seed=2)
    stationary = torch.linalg.solve(MATRIX, theta)

    def unrolled(theta: Tensor) -> Tensor:
        solution = gradient_descent(
            lambda x: 0.5 * x @ MATRIX @ x - theta @ x,
            stationary,
            num_steps=20,
            learning_rate=step_size,
            num_differentiable_steps=num_steps,
        )
        return outer @ solution.value

    solution = neumann(lambda x: MATRIX @ x, outer, max_steps=num_steps, rtol=0, step_size=step_size)
    torch.testing.assert_close(solution.value, torch.func.grad(unrolled)(theta), rtol=ALGEBRA, atol=ALGEBRA)


@pytest.mark.parametrize("step_size", [0.0, -1.0])
def test_step_size_that_is_not_positive_is_refused(step_size: float) -> None:
    with pytest.raises(ValueError, match=f"step_size must be positive, but is {step_size}."):
        neumann(lambda x: x, draw(2), max_steps=1, step_size=step_size)
