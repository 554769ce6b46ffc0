"""Curvature products against dense matrices and finite differences."""

from typing import Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ibaml import tree
from ibaml.solvers import curvature
from ibaml.solvers.curvature import DifferentiatedLoss, at_fixed, differentiated, gradient, hvp
from ibaml.types import Params, Tensor

ALGEBRA = 1e-10
MODES = ("reverse", "forward")
Mode = Literal["reverse", "forward"]


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def parameters(seed: int) -> Params:
    return {"first": draw(3, 2, seed=seed), "second": draw(2, 3, seed=seed + 1), "bias": draw(2, seed=seed + 2)}


INPUTS = draw(5, 2, seed=100)
LABELS = torch.tensor([0, 1, 1, 0, 1])


def outputs(p: Params) -> Tensor:
    return torch.tanh(INPUTS @ p["first"].T) @ p["second"].T + p["bias"]


def cross_entropy(logits: Tensor) -> Tensor:
    return torch.nn.functional.cross_entropy(logits, LABELS)


def loss(p: Params) -> Tensor:
    return cross_entropy(outputs(p))


def dense_hessian(point: Params) -> Tensor:
    vector, unravel = tree.ravel(point)
    return torch.func.hessian(lambda x: loss(unravel(x)))(vector)


def dense_gauss_newton(point: Params) -> Tensor:
    vector, unravel = tree.ravel(point)
    jacobian = torch.func.jacrev(lambda x: outputs(unravel(x)).reshape(-1))(vector)
    loss_hessian = torch.func.hessian(lambda f: cross_entropy(f.reshape(5, 2)))(outputs(point).reshape(-1))
    return jacobian.T @ loss_hessian @ jacobian


def apply(matrix: Tensor, vector: Params) -> Params:
    flat, unravel = tree.ravel(vector)
    return unravel(matrix @ flat)


def assert_trees_close(value: Params, oracle: Params, tolerance: float = ALGEBRA) -> None:
    assert value.keys() == oracle.keys()
    for name in value:
        torch.testing.assert_close(value[name], oracle[name], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("mode", MODES)
@settings(deadline=None, max_examples=10)
@given(seed=st.integers(0, 2**20))
def test_hvp_equals_the_dense_hessian(mode: Mode, seed: int) -> None:
    point, vector = parameters(seed), parameters(seed + 10)
    assert_trees_close(curvature.hvp(loss, point, mode=mode)(vector), apply(dense_hessian(point), vector))


@pytest.mark.parametrize("mode", MODES)
def test_hvp_equals_a_central_difference_of_the_gradient(mode: Mode) -> None:
    point, vector = parameters(0), parameters(10)
    step = 1e-5
    ahead, behind = (torch.func.grad(loss)(tree.axpy(sign * step, vector, point)) for sign in (1, -1))
    difference = tree.scale(1 / (2 * step), tree.sub(ahead, behind))
    assert_trees_close(curvature.hvp(loss, point, mode=mode)(vector), difference, tolerance=1e-7)


@pytest.mark.parametrize("mode", MODES)
def test_gradient_comes_with_the_product(mode: Mode) -> None:
    point, vector = parameters(0), parameters(10)
    value, gradient, product = curvature.value_gradient_and_hvp(loss, point, mode=mode)
    assert_trees_close(gradient, torch.func.grad(loss)(point))
    once = product(vector)
    assert_trees_close(product(vector), once, tolerance=0)
    assert_trees_close(once, apply(dense_hessian(point), vector))


@pytest.mark.parametrize("mode", MODES)
def test_hvp_under_vmap_equals_the_loop(mode: Mode) -> None:
    points = [parameters(seed) for seed in (0, 20, 40)]
    vectors = [parameters(seed) for seed in (10, 30, 50)]
    stacked = [tree.map(lambda *leaves: torch.stack(leaves), *group) for group in (points, vectors)]
    batched = torch.func.vmap(lambda p, v: curvature.hvp(loss, p, mode=mode)(v))(*stacked)
    for index, (point, vector) in enumerate(zip(points, vectors, strict=True)):
        member = tree.map(lambda leaf, index=index: leaf[index], batched)
        assert_trees_close(member, apply(dense_hessian(point), vector))


@pytest.mark.parametrize("mode", MODES)
def test_many_vectors_at_once_under_vmap_build_the_dense_hessian(mode: Mode) -> None:
    point = parameters(0)
    vector, unravel = tree.ravel(point)
    product = curvature.hvp(loss, point, mode=mode)
    rows = torch.func.vmap(lambda unit: tree.ravel(product(unravel(unit)))[0])(torch.eye(len(vector)).double())
    torch.testing.assert_close(rows, dense_hessian(point), rtol=ALGEBRA, atol=ALGEBRA)


@pytest.mark.parametrize("mode", MODES)
def test_hvp_is_itself_differentiable(mode: Mode) -> None:
    # d/dx of v^T H(x) v for f = sum x^4 / 24 is x v^2.
    def quadratic_form(x: Tensor) -> Tensor:
        return tree.dot(vector, curvature.hvp(lambda z: (z**4).sum() / 24, x, mode=mode)(vector))

    x, vector = draw(3, seed=0), draw(3, seed=1)
    torch.testing.assert_close(torch.func.grad(quadratic_form)(x), x * vector**2, rtol=ALGEBRA, atol=ALGEBRA)


def test_hvp_refuses_an_unknown_mode() -> None:
    with pytest.raises(ValueError, match="mode must be 'reverse' or 'forward', but is 'backward'."):
        curvature.hvp(loss, parameters(0), mode="backward")


@pytest.mark.parametrize("damping", [0.0, 0.3])
@settings(deadline=None, max_examples=10)
@given(seed=st.integers(0, 2**20))
def test_gauss_newton_equals_the_explicit_matrix(damping: float, seed: int) -> None:
    point, vector = parameters(seed), parameters(seed + 10)
    product = curvature.gauss_newton_vp(outputs, cross_entropy, point, damping=damping)
    matrix = dense_gauss_newton(point) + damping * torch.eye(14, dtype=torch.float64)
    assert_trees_close(product(vector), apply(matrix, vector))


@pytest.mark.parametrize("seed", range(5))
def test_gauss_newton_is_positive_semi_definite_where_the_hessian_is_not(seed: int) -> None:
    point = parameters(seed)
    vector, unravel = tree.ravel(point)
    product = curvature.gauss_newton_vp(outputs, cross_entropy, point)
    rows = torch.stack([tree.ravel(product(unravel(unit)))[0] for unit in torch.eye(len(vector)).double()])
    torch.testing.assert_close(rows, rows.T, rtol=ALGEBRA, atol=ALGEBRA)
    assert torch.linalg.eigvalsh(rows).min() >= -ALGEBRA
    assert torch.linalg.eigvalsh(dense_hessian(point)).min() < -1e-6


def test_gauss_newton_of_linear_outputs_is_the_hessian() -> None:
    design, point, vector = draw(5, 3, seed=0), {"w": draw(2, 3, seed=1)}, {"w": draw(2, 3, seed=2)}

    def linear(p: Params) -> Tensor:
        return design @ p["w"].T

    product = curvature.gauss_newton_vp(linear, cross_entropy, point)
    exact = curvature.hvp(lambda p: cross_entropy(linear(p)), point)
    assert_trees_close(product(vector), exact(vector))


def test_gauss_newton_under_vmap_equals_the_loop() -> None:
    points = [parameters(0), parameters(20)]
    vectors = [parameters(10), parameters(30)]
    stacked = [tree.map(lambda *leaves: torch.stack(leaves), *group) for group in (points, vectors)]
    batched = torch.func.vmap(lambda p, v: curvature.gauss_newton_vp(outputs, cross_entropy, p)(v))(*stacked)
    for index, (point, vector) in enumerate(zip(points, vectors, strict=True)):
        member = tree.map(lambda leaf, index=index: leaf[index], batched)
        assert_trees_close(member, apply(dense_gauss_newton(point), vector))


def test_gauss_newton_refuses_a_negative_damping() -> None:
    with pytest.raises(ValueError, match="damping must be at least 0, but is -0.1."):
        curvature.gauss_newton_vp(outputs, cross_entropy, parameters(0), damping=-0.1)


def test_a_loss_may_bring_its_own_gradient() -> None:
    def value_and_gradient(p: Params, factor: Tensor) -> tuple[Tensor, Params]:
        derivative, value = torch.func.grad_and_value(loss)(p)
        return factor * value, tree.scale(factor, derivative)

    def only_gradient(p: Params, factor: Tensor) -> Params:
        return value_and_gradient(p, factor)[1]

    def only_value(p: Params, factor: Tensor) -> Tensor:
        return factor * loss(p)

    point, factor = parameters(seed=0), torch.tensor(2.0, dtype=torch.float64)
    double = at_fixed(DifferentiatedLoss(value_and_gradient, only_gradient, only_value), factor)
    plain = at_fixed(only_value, factor)
    assert differentiated(double) is double
    vector = parameters(seed=1)
    for mine, theirs in (
        (double(point), plain(point)),
        (gradient(double)(point), gradient(plain)(point)),
        (hvp(double, point)(vector), hvp(plain, point)(vector)),
        (hvp(double, point, mode="forward")(vector), hvp(plain, point)(vector)),
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-12)


def scaled_loss(p: Params, factor: Tensor) -> Tensor:
    return factor * loss(p) + (factor**2 * p["bias"]).sum()


def test_pullbacks_are_those_of_torch_func() -> None:
    point, cotangent = parameters(3), draw(5, 2, seed=4)
    value, pullback, aux = curvature.vjp(lambda p: (outputs(p), p["bias"].sum()), point, has_aux=True)
    expected, expected_pullback = torch.func.vjp(outputs, point)[:2]
    torch.testing.assert_close(
        (value, pullback(cotangent)), (expected, expected_pullback(cotangent)), rtol=1e-12, atol=0
    )
    assert aux == point["bias"].sum()
    assert not any(leaf.requires_grad for leaf in tree.leaves((value, aux, pullback(cotangent))))


def test_arguments_that_do_not_matter_have_no_gradient() -> None:
    point = parameters(3)
    value, pullback = curvature.vjp(lambda p, q: 2 * p["bias"], point, point["first"])
    assert all(bool((leaf == 0).all()) for leaf in tree.leaves(pullback(torch.zeros_like(value))))
    constant, pullback = curvature.vjp(lambda p: torch.ones(2), point)
    torch.testing.assert_close(pullback(constant)[0], tree.zeros_like(point))


def test_gradients_are_differentiable_where_gradients_are_enabled() -> None:
    """Through the point, a further argument and a tensor of the surrounding function; under ``no_grad`` not at all."""
    point, factor = parameters(3), torch.tensor(1.3, dtype=torch.float64, requires_grad=True)

    def slope(derivative: Params) -> Tensor:
        return sum((leaf**2).sum() for leaf in derivative.values())  # pyright: ignore[reportReturnType]

    expected = torch.func.grad(lambda f: slope(torch.func.grad(scaled_loss)(point, f)))(factor.detach())
    by_argument = slope(gradient(scaled_loss)(point, factor))
    by_closure = slope(gradient(lambda p: scaled_loss(p, factor))(point))
    for each in (by_argument, by_closure):
        torch.testing.assert_close(torch.autograd.grad(each, factor)[0], expected, rtol=1e-12, atol=0)
    leaves = {name: leaf.clone().requires_grad_() for name, leaf in point.items()}
    found = torch.autograd.grad(slope(gradient(loss)(leaves)), list(leaves.values()))
    expected_leaves = torch.func.grad(lambda p: slope(torch.func.grad(loss)(p)))(point)
    torch.testing.assert_close(found, tuple(expected_leaves.values()), rtol=1e-10, atol=1e-14)
    with torch.no_grad():
        assert not any(leaf.requires_grad for leaf in tree.leaves(gradient(scaled_loss)(leaves, factor)))


def test_a_derivative_is_partial_where_two_arguments_are_one_tensor() -> None:
    both = torch.tensor([2.0], dtype=torch.float64, requires_grad=True)
    derivative = gradient(lambda x, y: (x * y**2).sum())(both, both)
    assert derivative.item() == 4.0
    # d/dz of y^2 at x = y = z.
    assert torch.autograd.grad(derivative.sum(), both)[0].item() == 4.0


def test_transforms_are_seen() -> None:
    seen: list[bool] = []

    def look(x: Tensor) -> Tensor:
        seen.append(curvature.is_transformed())
        return x.sum()

    look(torch.ones(2))
    torch.func.grad(look)(torch.ones(2))
    torch.func.vmap(look)(torch.ones(2, 2))
    torch.func.jvp(look, (torch.ones(2),), (torch.ones(2),))
    assert seen == [False, True, True, True]


def test_inference_mode_changes_no_derivative() -> None:
    point, direction = parameters(3), parameters(7)
    expected = gradient(loss)(point), hvp(loss, point)(direction)
    with torch.inference_mode():
        found = gradient(loss)(tree.map(torch.clone, point)), hvp(loss, tree.map(torch.clone, point))(direction)
    torch.testing.assert_close(tree.map(torch.clone, found), expected, rtol=1e-12, atol=0)
