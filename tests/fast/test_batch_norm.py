"""Batch normalisation with fused second derivatives, against torch's own."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from ibaml.fast.batch_norm import fused_batch_norm
from ibaml.types import Tensor


def arguments(shape: tuple[int, ...]) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    generator = torch.Generator().manual_seed(0)

    def draw(size: tuple[int, ...]) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64)

    point = (2 + 3 * draw(shape), draw((shape[1],)), draw((shape[1],)))
    return point, tuple(draw(tuple(leaf.shape)) for leaf in point)


def loss(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    outputs = functional.batch_norm(x, None, None, weight, bias, training=True, eps=1e-3)
    return (torch.sin(outputs) * torch.linspace(-1, 2, outputs.numel(), dtype=x.dtype).reshape(outputs.shape)).sum()


@pytest.mark.parametrize("shape", [(7, 3), (4, 3, 5), (4, 3, 5, 2), (4, 3, 2, 3, 2)])
@pytest.mark.parametrize("zero_weight", [False, True])
def test_first_and_second_derivatives_are_those_of_torch(shape: tuple[int, ...], zero_weight: bool) -> None:
    point, direction = arguments(shape)
    if zero_weight:
        # A scale that starts at zero is common in residual networks, and must not be divided by.
        point = (point[0], torch.zeros_like(point[1]), point[2])
    gradient_of = torch.func.grad(loss, argnums=(0, 1, 2))
    expected = torch.func.jvp(gradient_of, point, direction)
    with fused_batch_norm():
        found = torch.func.jvp(gradient_of, point, direction)
    for mine, theirs in zip((*found[0], *found[1]), (*expected[0], *expected[1]), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-11, atol=1e-11 * float(theirs.abs().max() + 1))


def test_second_derivatives_are_those_of_finite_differences() -> None:
    point, direction = arguments((5, 2, 3, 3))
    gradient_of = torch.func.grad(loss, argnums=(0, 1, 2))
    step = 1e-5
    ahead, behind = (
        gradient_of(*(leaf + sign * step * along for leaf, along in zip(point, direction, strict=True)))
        for sign in (1, -1)
    )
    with fused_batch_norm():
        product = torch.func.jvp(gradient_of, point, direction)[1]
    for mine, a, b in zip(product, ahead, behind, strict=True):
        torch.testing.assert_close(mine, (a - b) / (2 * step), rtol=1e-6, atol=1e-6)


def test_other_normalisation_is_left_alone() -> None:
    x = torch.randn(4, 3, 2, generator=torch.Generator().manual_seed(0))
    tracked = nn.BatchNorm1d(3)
    plain = nn.BatchNorm1d(3, affine=False, track_running_stats=False)
    with fused_batch_norm():
        assert "_BatchNorm" not in str(tracked(x).grad_fn)
        torch.testing.assert_close(plain(x).mean((0, 2)), torch.zeros(3), rtol=0, atol=1e-6)
    assert int(tracked.num_batches_tracked) == 1


def test_it_can_be_switched_off() -> None:
    point, _ = arguments((4, 3, 5))
    x = point[0].requires_grad_()
    weight, bias = point[1:]
    with fused_batch_norm(enabled=False):
        assert "_BatchNorm" not in str(functional.batch_norm(x, None, None, weight, bias, training=True).grad_fn)
    with fused_batch_norm():
        assert "_BatchNorm" in str(functional.batch_norm(x, None, None, weight, bias, training=True).grad_fn)
