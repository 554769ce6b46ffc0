"""The traced nll under torch.func, against the model's own nll."""

import logging
from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
from torch import fx, nn

from ibaml import tree
from ibaml.algorithms.model import Model, build_model
from ibaml.algorithms.objectives import expected_nll
from ibaml.fast import ProgramNll, channels_last, flatten, unflatten
from ibaml.fast.flat import FLAT
from ibaml.fast.programs import trace_product
from ibaml.likelihoods import Categorical
from ibaml.networks import MLP, Conv4
from ibaml.priors import DiagonalGaussian, DiagonalPrior
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
    traced = ProgramNll(model, num_kept=num_kept)
    return flatten(model.adapted), *mean_losses(traced, batch)


def mean_losses(traced: ProgramNll, batch: Batch) -> tuple[Loss, Loss]:
    return lambda w: traced.mean(batch)(w, {}), lambda w: traced.per_example(w, {}, batch).mean()


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
    traced, point = ProgramNll(model), flatten(model.adapted)
    direction = tree.map(torch.cos, point)
    with caplog.at_level(logging.WARNING):
        found = product(mean_losses(traced, batch)[0], point, direction)
    assert "Hessian-vector products are computed step by step" in caplog.text
    assert_close(found, product(mean_losses(traced, batch)[1], point, direction))
    several, directions = members(point, 3), tree.map(torch.sin, members(point, 3))
    mapped = [
        torch.func.vmap(lambda w, u, f=loss: product(f, w, u))(several, directions)
        for loss in mean_losses(traced, batch)
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
    traced = ProgramNll(model, num_kept=2)
    point = flatten(model.adapted)
    pullbacks = [
        torch.func.vjp(torch.func.grad(mean_losses(traced, batch)[0]), {FLAT: point[FLAT] + shift})[1]
        for shift in (0.0, 0.1, 0.2)
    ]
    for pullback in pullbacks:
        pullback(point)
    kept = [each() for each in traced._kept]
    assert len(kept) == 2
    assert all(each is not None and each.residuals is not None for each in kept)


def test_programs_are_written_once_for_each_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    from ibaml.fast import derivatives as module

    count = 0
    write = module.trace_gradient

    def counted(*args: object, **kwargs: object) -> object:
        nonlocal count
        count += 1
        return write(*args, **kwargs)  # pyright: ignore

    monkeypatch.setattr(module, "trace_gradient", counted)
    model, batch = mlp()
    traced = ProgramNll(model)
    point = flatten(model.adapted)
    for _ in range(3):
        traced.mean(batch)(point, {})
    assert count == 1
    traced.mean(Batch(batch.x[:4], batch.y[:4]))(point, {})
    assert count == 2


def test_third_derivative_is_refused() -> None:
    point, traced, _ = losses(mlp)

    def curvature(w: Params) -> Tensor:
        return tree.dot(product(traced, w, w), w)

    with pytest.raises(RuntimeError, match=r"has two derivatives, and the third was asked for: .* fast=False"):
        torch.func.grad(curvature)(point)


@pytest.mark.parametrize("is_small", [True, False])
@pytest.mark.parametrize("problem", [conv, mlp])
def test_mean_over_weight_samples(
    problem: Callable[[], tuple[Model, Batch]], is_small: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    # In order: value, gradient, and the derivative of the gradient.
    model, batch = problem()
    if is_small and batch.x.ndim == 4:
        pytest.skip("a convolutional network passes its samples one by one")
    traced = ProgramNll(model, num_kept=3)
    monkeypatch.setattr("ibaml.algorithms.model._LARGEST_SMALL", 1000 if is_small else 0)
    mean = flatten(model.adapted)
    posterior = DiagonalGaussian(mean, {FLAT: -3 + torch.cos(mean[FLAT])})
    noise = members({FLAT: torch.zeros_like(mean[FLAT])}, 3)

    def plain(at: DiagonalGaussian) -> Tensor:
        return expected_nll(lambda w, examples: traced.per_example(w, {}, examples), at, noise, batch)

    def of(at: DiagonalGaussian, twice: bool = True) -> tuple[Tensor, DiagonalGaussian]:
        return traced.expected(DiagonalPrior(), batch, noise, twice=twice).value_and_gradient(at, {})

    gradient, value = torch.func.grad_and_value(plain)(posterior)
    direction = tree.map(torch.sin, posterior)
    expected = torch.func.vjp(torch.func.grad(plain), posterior)[1](direction)[0]
    for twice in (True, False):
        torch.testing.assert_close(of(posterior, twice), (value, gradient), rtol=1e-10, atol=1e-12)
        pullback = torch.func.vjp(lambda at, twice=twice: of(at, twice)[1], posterior)[1]
        for _ in range(2):
            torch.testing.assert_close(pullback(direction)[0], expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(torch.func.grad(lambda at: of(at)[0])(posterior), gradient, rtol=1e-10, atol=1e-12)


def test_mean_over_weight_samples_of_several_posteriors() -> None:
    model, batch = mlp()
    traced = ProgramNll(model)
    means = members(flatten(model.adapted), 2)
    posteriors = DiagonalGaussian(means, {FLAT: -2 + 0 * means[FLAT]})
    noises = {FLAT: torch.stack([members(tree.zeros_like(tree.map(lambda x: x[0], means)), 3)[FLAT]] * 2)}

    def derivatives(of: Callable[[DiagonalGaussian, Params], DiagonalGaussian]) -> tuple[Any, Any]:
        def product_with_sine(at: DiagonalGaussian, noise: Params) -> Any:
            return torch.func.vjp(lambda p: of(p, noise), at)[1](tree.map(torch.sin, at))[0]

        return torch.func.vmap(of)(posteriors, noises), torch.func.vmap(product_with_sine)(posteriors, noises)

    def plain(at: DiagonalGaussian, noise: Params) -> DiagonalGaussian:
        return torch.func.grad(lambda p: expected_nll(lambda w, b: traced.per_example(w, {}, b), p, noise, batch))(at)

    found = derivatives(lambda at, noise: traced.expected(DiagonalPrior(), batch, noise, twice=True).gradient(at, {}))
    torch.testing.assert_close(found, derivatives(plain), rtol=1e-10, atol=1e-12)


def test_residuals_of_one_point_do_not_serve_many_directions_at_once() -> None:
    point, traced, plain = losses(mlp)
    found, expected = (torch.func.jacrev(torch.func.grad(loss))(point) for loss in (traced, plain))
    assert_close(found[FLAT], expected[FLAT])


def test_an_announced_second_derivative_spares_a_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    from ibaml.fast import derivatives as module

    count = 0
    linearize = module.TracedLoss.linearize

    def counted(*arguments: Any) -> list[Tensor]:
        nonlocal count
        count += 1
        return linearize(*arguments)

    monkeypatch.setattr(module.TracedLoss, "linearize", counted)
    model, batch = mlp()
    point = flatten(model.adapted)
    for twice, num_before in ((True, 1), (False, 0)):
        traced, count = ProgramNll(model), 0
        gradient, pullback = torch.func.vjp(
            lambda w, t=traced, twice=twice: t.mean(batch, twice=twice).gradient(w, {}), point
        )
        assert count == num_before
        pullback(gradient)
        assert count == 1


def test_a_single_channel_is_stored_last() -> None:
    image = torch.arange(18.0).reshape(2, 1, 3, 3)
    stored = channels_last(image)
    torch.testing.assert_close(stored, image, rtol=0, atol=0)
    assert stored.stride() == (9, 1, 3, 1)
    output = torch.nn.functional.conv2d(stored, channels_last(torch.ones(4, 1, 3, 3)), padding=1)
    assert output.is_contiguous(memory_format=torch.channels_last)
    assert channels_last(torch.ones(3, 2)).stride() == (2, 1)


@pytest.mark.parametrize("problem", [conv, mlp])
def test_programs_add_no_zeros(problem: Callable[[], tuple[Model, Batch]]) -> None:
    model, batch = problem()

    def mean(point: list[Tensor], constants: list[Tensor]) -> Tensor:
        return model.per_example(unflatten({FLAT: point[0]}, model.adapted), {}, Batch(*constants)).mean()

    for program in trace_product(mean, [flatten(model.adapted)[FLAT]], list(batch)):
        for node in cast(fx.GraphModule, program).graph.nodes:
            operands = [str(each.target) for each in node.all_input_nodes]
            # The tangent of the images is zero, and so is what most derivatives begin with.
            if str(node.target) in ("aten.add.Tensor", "aten.mm.default", "aten.convolution.default"):
                assert not any("zeros" in each for each in operands)
