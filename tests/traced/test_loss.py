"""The traced nll under torch.func, against the model's own nll."""

import logging
from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
from torch import nn

from ibaml import tree
from ibaml.likelihoods import Categorical
from ibaml.model import Model, build_model
from ibaml.networks import MLP, Conv4
from ibaml.traced import TracedNll, flatten, unflatten
from ibaml.traced.loss import FLAT
from ibaml.types import Batch, Params, Tensor

Loss = Callable[[Params], Tensor]


def conv() -> tuple[Model, Batch]:
    network = Conv4(3, image_size=8, channels=4, generator=torch.Generator().manual_seed(0)).double()
    x = torch.randn(6, 1, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return build_model(network, Categorical()), Batch(x, torch.arange(6) % 3)


def group_norm_conv() -> tuple[Model, Batch]:
    generator = torch.Generator().manual_seed(0)
    network = Conv4(3, image_size=16, channels=8, norm="group", downsample="stride", generator=generator).double()
    x = torch.randn(6, 1, 16, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return build_model(network, Categorical()), Batch(x, torch.arange(6) % 3)


def mlp() -> tuple[Model, Batch]:
    network = MLP(3, input_shape=4, hidden_sizes=(5,), generator=torch.Generator().manual_seed(0)).double()
    x = torch.randn(6, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return build_model(network, Categorical()), Batch(x, torch.arange(6) % 3)


def losses(problem: Callable[[], tuple[Model, Batch]], num_kept: int = 1) -> tuple[Params, Loss, Loss]:
    """Returns a point, the traced loss and the plain one."""
    model, batch = problem()
    traced = TracedNll(model, num_kept=num_kept)
    return flatten(model.adapted), lambda w: traced.mean(w, {}, batch), lambda w: traced(w, {}, batch).mean()


def members(point: Params, number: int) -> Params:
    generator = torch.Generator().manual_seed(5)
    noise = torch.randn(number, *point[FLAT].shape, generator=generator, dtype=torch.float64)
    return {FLAT: point[FLAT] + 0.1 * noise}


def assert_close(found: Params, expected: Params) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


def product(loss: Loss, point: Params, direction: Params) -> Params:
    return torch.func.vjp(torch.func.grad(loss), point)[1](direction)[0]


def two_steps(loss: Loss, point: Params) -> Tensor:
    for _ in range(2):
        point = tree.axpy(-0.1, torch.func.grad(loss)(point), point)
    return loss(point)


@pytest.mark.parametrize("problem", [conv, group_norm_conv, mlp])
def test_value_gradient_and_product(problem: Callable[[], tuple[Model, Batch]]) -> None:
    point, traced, plain = losses(problem)
    torch.testing.assert_close(traced(point), plain(point), rtol=1e-12, atol=0)
    assert_close(torch.func.grad(traced)(point), torch.func.grad(plain)(point))
    direction = tree.map(torch.cos, point)
    assert_close(product(traced, point, direction), product(plain, point, direction))


@pytest.mark.parametrize("problem", [conv, mlp])
def test_derivative_through_steps(problem: Callable[[], tuple[Model, Batch]]) -> None:
    point, traced, plain = losses(problem)
    found, expected = (torch.func.grad(lambda w, f=loss: two_steps(f, w))(point) for loss in (traced, plain))
    assert_close(found, expected)


@pytest.mark.parametrize("problem", [conv, mlp])
def test_maps_over_members_and_over_members_of_members(problem: Callable[[], tuple[Model, Batch]]) -> None:
    point, traced, plain = losses(problem)
    several = members(point, 3)
    shifts = members(point, 2)[FLAT] - point[FLAT]
    for function in (
        lambda f: torch.func.vmap(torch.func.grad(f))(several),
        lambda f: torch.func.vmap(lambda w: product(f, w, tree.map(torch.sin, w)))(several),
        lambda f: torch.func.vmap(torch.func.grad(lambda w: two_steps(f, w)))(several),
        lambda f: torch.func.grad(lambda w: torch.func.vmap(f)(tree.add(w, several)).sum())(point),
        lambda f: torch.func.vmap(torch.func.grad(lambda w: torch.func.vmap(f)({FLAT: w[FLAT] + shifts}).mean()))(
            several
        ),
    ):
        assert_close(function(traced), function(plain))


class _SquareWithoutTangent(torch.autograd.Function):
    """Differentiable twice in reverse mode, and not at all in forward mode."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x**2

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return 2 * ctx.saved_tensors[0] * gradients[0]


class _OnlyBackwards(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, _SquareWithoutTangent.apply(self.linear(x)))


def test_operations_without_a_tangent_are_differentiated_backwards(caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    model = build_model(_OnlyBackwards().double(), Categorical())
    batch = mlp()[1]
    traced, point = TracedNll(model), flatten(model.adapted)
    direction = tree.map(torch.cos, point)
    with caplog.at_level(logging.WARNING):
        found = product(lambda w: traced.mean(w, {}, batch), point, direction)
    assert "Hessian-vector products are computed step by step" in caplog.text
    assert_close(found, product(lambda w: traced(w, {}, batch).mean(), point, direction))
    several, directions = members(point, 3), tree.map(torch.sin, members(point, 3))
    mapped = [
        torch.func.vmap(lambda w, u, f=loss: product(f, w, u))(several, directions)
        for loss in (lambda w: traced.mean(w, {}, batch), lambda w: traced(w, {}, batch).mean())
    ]
    assert_close(*mapped)


@pytest.mark.parametrize("num_kept", [1, 2, 5])
def test_products_at_several_points_in_turn(num_kept: int) -> None:
    point, traced, plain = losses(mlp, num_kept)
    pullbacks, expected = (
        [torch.func.vjp(torch.func.grad(loss), {FLAT: point[FLAT] + shift})[1] for shift in (0.0, 0.3, -0.2)]
        for loss in (traced, plain)
    )
    direction = tree.map(torch.cos, point)
    for _ in range(2):
        for mine, theirs in zip(pullbacks, expected, strict=True):
            assert_close(mine(direction)[0], theirs(direction)[0])


def test_residuals_are_kept_for_so_many_points_only(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = mlp()
    traced = TracedNll(model, num_kept=2)
    point = flatten(model.adapted)
    pullbacks = [
        torch.func.vjp(torch.func.grad(lambda w: traced.mean(w, {}, batch)), {FLAT: point[FLAT] + shift})[1]
        for shift in (0.0, 0.1, 0.2)
    ]
    for pullback in pullbacks:
        pullback(point)
    kept = [each() for each in traced._kept]
    assert len(kept) == 2
    assert all(each is not None and each.residuals is not None for each in kept)


def test_programs_are_written_once_for_each_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    from ibaml.traced import derivatives as module

    count = 0
    write = module.trace_gradient

    def counted(*args: object, **kwargs: object) -> object:
        nonlocal count
        count += 1
        return write(*args, **kwargs)  # pyright: ignore

    monkeypatch.setattr(module, "trace_gradient", counted)
    model, batch = mlp()
    traced = TracedNll(model)
    point = flatten(model.adapted)
    for _ in range(3):
        traced.mean(point, {}, batch)
    assert count == 1
    traced.mean(point, {}, Batch(batch.x[:4], batch.y[:4]))
    assert count == 2


def test_third_derivative_is_refused() -> None:
    point, traced, _ = losses(mlp)

    def curvature(w: Params) -> Tensor:
        return tree.dot(product(traced, w, w), w)

    with pytest.raises(RuntimeError, match=r"has two derivatives, and the third was asked for: .* fast=False"):
        torch.func.grad(curvature)(point)


def test_flatten_and_unflatten_are_inverse() -> None:
    parameters = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.tensor(7.0)}
    flat = flatten(parameters)
    assert flat[FLAT].tolist() == [0, 1, 2, 3, 4, 5, 7]
    restored = unflatten(flat, parameters)
    assert all(torch.equal(restored[name], value) for name, value in parameters.items())
    assert flatten({name: value.expand(4, *value.shape) for name, value in parameters.items()}, num_axes=1)[
        FLAT
    ].shape == (4, 7)
    assert flatten({}) == {}
