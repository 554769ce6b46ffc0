"""The functions behind the inner solvers against torch.optim and by hand; the contract has the rest."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ibaml import tree
from ibaml.solvers import inner
from ibaml.types import InnerSolution, Loss, PyTree, Tensor

ALGEBRA = 1e-10
CENTRAL_DIFFERENCE = 1e-6

MATRIX = torch.tensor([[2.0, 0.5, 0.0], [0.5, 1.0, 0.2], [0.0, 0.2, 1.5]], dtype=torch.float64)
DIAGONAL = torch.diagonal(MATRIX)

Solver = Callable[..., InnerSolution]


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def newton_like(loss: Loss, init: PyTree, **options: Any) -> InnerSolution:
    return inner.preconditioned_gradient_descent(
        loss, init, preconditioner=lambda value, gradient: tree.map(lambda g: g / DIAGONAL, gradient), **options
    )


def heavy_ball(loss: Loss, init: PyTree, **options: Any) -> InnerSolution:
    return inner.gradient_descent(loss, init, momentum=0.5, **options)


SOLVERS: dict[str, Solver] = {
    "gradient_descent": inner.gradient_descent,
    "momentum": heavy_ball,
    "adam": inner.adam,
    "preconditioned": newton_like,
}
every_solver = pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS.keys())


def quadratic(target: Tensor) -> Loss:
    """``(x - target)^T MATRIX (x - target) / 2``, with the minimum at the target."""
    return lambda x: 0.5 * (x - target) @ MATRIX @ (x - target)


def quartic(parameter: Tensor) -> Loss:
    """A loss whose Hessian changes from place to place, so that derivatives through the steps are not constant."""
    return lambda x: quadratic(parameter)(x) + 0.1 * ((x * parameter) ** 4).sum()


def central_difference(function: Callable[[Tensor], Tensor], at: Tensor, step: float = 1e-6) -> Tensor:
    units = torch.eye(at.numel(), dtype=at.dtype)
    return torch.stack([(function(at + step * unit) - function(at - step * unit)) / (2 * step) for unit in units])


@every_solver
def test_no_step_returns_the_start(solver: Solver) -> None:
    init = draw(3)
    solution = solver(quartic(draw(3, seed=1)), init, num_steps=0, learning_rate=0.1)
    assert torch.equal(solution.value, init)
    assert solution.num_steps == 0


@every_solver
def test_derivative_with_respect_to_the_learning_rate_equals_a_central_difference(solver: Solver) -> None:
    loss, init, weights = quartic(draw(3, seed=1)), draw(3), draw(3, seed=2)

    def outer(rate: Tensor) -> Tensor:
        return weights @ solver(loss, init, num_steps=3, learning_rate=rate[0]).value

    rate = torch.tensor([0.1], dtype=torch.float64)
    gradient = torch.func.grad(outer)(rate)
    torch.testing.assert_close(gradient, central_difference(outer, rate), rtol=0, atol=CENTRAL_DIFFERENCE)
    assert gradient.abs() > 1e-3


@pytest.mark.parametrize("momentum", [0.0, 0.7])
@pytest.mark.parametrize("num_differentiable_steps", [0, 1, 2, 4])
def test_truncation_equals_the_derivative_written_out_by_hand(num_differentiable_steps: int, momentum: float) -> None:
    # Recurrences of the tangents: before the cut the iterate counts as the start plus a constant and the velocity as a
    # constant; after it x' = x - a u', u' = mu u + g(x, p) with their derivatives.
    num_steps, rate = 4, 0.1
    init, parameter, weights = draw(3), draw(3, seed=1), draw(3, seed=2)
    cut = num_steps - num_differentiable_steps

    def gradient_at(x: Tensor, p: Tensor) -> Tensor:
        return torch.func.grad(quartic(p))(x)

    identity, zero = torch.eye(3).double(), torch.zeros(3, 3).double()
    x, velocity = init, torch.zeros(3).double()
    x_init, x_parameter, velocity_init, velocity_parameter = identity, zero, zero, zero
    for step in range(num_steps):
        if step == cut:
            x_init, x_parameter, velocity_init, velocity_parameter = identity, zero, zero, zero
        curvature, mixed = torch.func.jacrev(gradient_at, (0, 1))(x, parameter)
        velocity_init = momentum * velocity_init + curvature @ x_init
        velocity_parameter = momentum * velocity_parameter + curvature @ x_parameter + mixed
        velocity = momentum * velocity + gradient_at(x, parameter)
        x = x - rate * velocity
        x_init, x_parameter = x_init - rate * velocity_init, x_parameter - rate * velocity_parameter
    if cut == num_steps:
        x_init, x_parameter = identity, zero

    def outer(init: Tensor, p: Tensor) -> Tensor:
        solution = inner.gradient_descent(
            quartic(p),
            init,
            num_steps=num_steps,
            learning_rate=rate,
            momentum=momentum,
            num_differentiable_steps=num_differentiable_steps,
        )
        torch.testing.assert_close(tree.detach(solution.value), x, rtol=ALGEBRA, atol=ALGEBRA)
        return weights @ solution.value

    by_init, by_parameter = torch.func.grad(outer, (0, 1))(init, parameter)
    torch.testing.assert_close(by_init, weights @ x_init, rtol=ALGEBRA, atol=ALGEBRA)
    torch.testing.assert_close(by_parameter, weights @ x_parameter, rtol=ALGEBRA, atol=ALGEBRA)


@settings(deadline=None, max_examples=15)
@given(momentum=st.sampled_from([0.0, 0.5, 0.9]), rate=st.floats(0.01, 0.2), seed=st.integers(0, 2**20))
def test_gradient_descent_equals_torch_sgd(momentum: float, rate: float, seed: int) -> None:
    loss, init = quadratic(draw(3, seed=seed)), draw(3, seed=seed + 1)
    x = init.clone().requires_grad_()
    optimizer = torch.optim.SGD([x], lr=rate, momentum=momentum)
    for _ in range(10):
        optimizer.zero_grad()
        loss(x).backward()
        optimizer.step()
    solution = inner.gradient_descent(loss, init, num_steps=10, learning_rate=rate, momentum=momentum)
    torch.testing.assert_close(solution.value, x.detach(), rtol=ALGEBRA, atol=ALGEBRA)


@settings(deadline=None, max_examples=15)
@given(
    betas=st.tuples(st.sampled_from([0.0, 0.5, 0.9]), st.sampled_from([0.0, 0.9, 0.999])),
    rate=st.floats(1e-3, 0.2),
    seed=st.integers(0, 2**20),
)
def test_adam_equals_torch_adam_where_gradients_are_far_above_epsilon(
    betas: tuple[float, float], rate: float, seed: int
) -> None:
    # A linear loss: its gradients stay where they are, at least 0.1 in size.
    slope = 0.1 + draw(3, seed=seed).abs()

    def loss(x: Tensor) -> Tensor:
        return slope @ x + 0.01 * (slope @ torch.sin(x))

    init = draw(3, seed=seed + 1)
    x = init.clone().requires_grad_()
    optimizer = torch.optim.Adam([x], lr=rate, betas=betas, eps=1e-8)
    for _ in range(10):
        optimizer.zero_grad()
        loss(x).backward()
        optimizer.step()
    solution = inner.adam(loss, init, num_steps=10, learning_rate=rate, betas=betas)
    # epsilon stands elsewhere: relative difference of a step below epsilon / gradient = 1e-7.
    torch.testing.assert_close(solution.value, x.detach(), rtol=0, atol=1e-7 * max(1.0, 10 * rate))


def test_derivative_of_adam_is_finite_where_a_gradient_is_exactly_zero() -> None:
    # The second coordinate starts at its minimum, where the moments stay 0 and with them the argument of the root.
    def outer(init: Tensor) -> Tensor:
        return inner.adam(lambda x: (x**4).sum(), init, num_steps=3, learning_rate=0.1).value.sum()

    gradient = torch.func.grad(outer)(torch.tensor([1.0, 0.0], dtype=torch.float64))
    assert torch.isfinite(gradient).all()
    assert gradient[1] == 1


def test_preconditioner_gets_the_value_and_the_gradient() -> None:
    target, init = draw(3, seed=1), draw(3)
    seen = []

    def newton(value: Tensor, gradient: Tensor) -> Tensor:
        seen.append((value, gradient))
        return torch.linalg.solve(MATRIX, gradient)

    solution = inner.preconditioned_gradient_descent(
        quadratic(target), init, num_steps=1, learning_rate=1.0, preconditioner=newton
    )
    torch.testing.assert_close(solution.value, target, rtol=0, atol=ALGEBRA)
    assert len(seen) == 1
    assert torch.equal(seen[0][0], init)
    torch.testing.assert_close(seen[0][1], MATRIX @ (init - target), rtol=0, atol=ALGEBRA)


def test_iterates_before_the_cut_carry_no_graph() -> None:
    has_graph = []

    def watch(value: Tensor, gradient: Tensor) -> Tensor:
        has_graph.append(value.grad_fn is not None)
        return gradient

    inner.preconditioned_gradient_descent(
        lambda x: (x**4).sum(),
        draw(3).requires_grad_(),
        num_steps=5,
        learning_rate=0.01,
        preconditioner=watch,
        num_differentiable_steps=2,
    )
    assert has_graph == [False, False, False, True, True]


@every_solver
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_steps": -1}, "num_steps must be at least 0, but is -1."),
        ({"learning_rate": 0.0}, "learning_rate must be positive and finite, but is 0.0."),
        ({"learning_rate": -0.1}, "learning_rate must be positive and finite, but is -0.1."),
        ({"learning_rate": float("nan")}, "learning_rate must be positive and finite, but is nan."),
        ({"learning_rate": float("inf")}, "learning_rate must be positive and finite, but is inf."),
        ({"num_differentiable_steps": -1}, "num_differentiable_steps must be at least 0 or None, but is -1."),
    ],
)
def test_arguments_out_of_range_are_refused(solver: Solver, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        solver(quadratic(draw(3)), draw(3), **{"num_steps": 2, "learning_rate": 0.1, **options})


def test_scaled_adam_is_adam_in_other_units() -> None:
    # In z = x / scale, up to epsilon, which is in the units of the gradient.
    loss, init = quadratic(draw(3)), draw(3)
    scale = torch.tensor([0.1, 1.0, 7.0], dtype=torch.float64)
    settings: dict[str, Any] = {"num_steps": 6, "learning_rate": 0.2, "epsilon": 1e-14}
    scaled = inner.adam(loss, init, scale=scale, **settings)
    other_units = inner.adam(lambda z: loss(scale * z), init / scale, **settings)
    torch.testing.assert_close(scaled.value, scale * other_units.value, rtol=1e-9, atol=0)


@pytest.mark.parametrize("momentum", [-0.1, 1.0, float("nan")])
def test_momentum_out_of_range_is_refused(momentum: float) -> None:
    with pytest.raises(ValueError, match=rf"momentum must be in \[0, 1\), but is {momentum}."):
        inner.gradient_descent(quadratic(draw(3)), draw(3), num_steps=1, learning_rate=0.1, momentum=momentum)


@pytest.mark.parametrize("betas", [(-0.1, 0.9), (0.9, 1.0)])
def test_adam_refuses_decays_out_of_range(betas: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match=r"betas must both be in \[0, 1\), but are \("):
        inner.adam(quadratic(draw(3)), draw(3), num_steps=1, learning_rate=0.1, betas=betas)


@pytest.mark.parametrize("epsilon", [0.0, -1e-8])
def test_adam_refuses_an_epsilon_that_is_not_positive(epsilon: float) -> None:
    with pytest.raises(ValueError, match=f"epsilon must be positive, but is {epsilon}."):
        inner.adam(quadratic(draw(3)), draw(3), num_steps=1, learning_rate=0.1, epsilon=epsilon)
