"""Rows of flat vectors start at aligned addresses, and no number knows of it."""

import pytest
import torch

from ibaml import tree
from ibaml.fast import flat as module
from ibaml.fast.flat import FLAT, flatten, unflatten
from ibaml.priors import DiagonalGaussian, DiagonalPrior
from ibaml.types import Params

BYTES = 128


def parameters(*axes: int, dtype: torch.dtype = torch.float32) -> Params:
    generator = torch.Generator().manual_seed(0)
    shapes = {"a": (2, 3), "b": (), "c": (70,)}
    return {name: torch.randn(*axes, *shape, generator=generator, dtype=dtype) for name, shape in shapes.items()}


def test_flatten_and_unflatten_are_inverse() -> None:
    values = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.tensor(7.0)}
    flat = flatten(values)
    assert flat[FLAT].tolist() == [0, 1, 2, 3, 4, 5, 7]
    restored = unflatten(flat, values)
    assert all(torch.equal(restored[name], value) for name, value in values.items())
    assert flatten({}) == {}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("axes", [(3,), (2, 3)])
def test_every_row_starts_at_an_aligned_address(axes: tuple[int, ...], dtype: torch.dtype) -> None:
    values = parameters(*axes, dtype=dtype)
    flat = flatten(values, num_axes=len(axes))[FLAT]
    assert flat.shape == (*axes, 77)
    rows = flat.flatten(0, -2) if len(axes) == 1 else [row for matrix in flat for row in matrix]
    first = flat.data_ptr()
    for row in rows:
        assert (row.data_ptr() - first) % BYTES == 0 and row.is_contiguous()
    for name, piece in zip(values, flat.split([6, 1, 70], dim=-1), strict=True):
        torch.testing.assert_close(piece, values[name].reshape(*axes, -1), rtol=0, atol=0)


def test_no_memory_is_added_where_rows_are_aligned_already() -> None:
    assert flatten({"a": torch.ones(3, 64)}, num_axes=1)[FLAT].stride() == (64, 1)


def test_parameters_that_start_elsewhere_are_copied_on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    values = {"a": torch.ones(32), "b": torch.ones(5), "c": torch.ones(2)}
    flat = flatten(values)
    monkeypatch.setattr(module, "_needs_alignment", lambda _: True)
    pieces = unflatten(flat, values)
    start = flat[FLAT].data_ptr()
    in_place = {name: start <= piece.data_ptr() < start + 4 * 39 for name, piece in pieces.items()}
    assert in_place == {"a": True, "b": True, "c": False}
    gradient = torch.func.grad(lambda f: sum((piece**2).sum() for piece in unflatten(f, values).values()))(flat)
    torch.testing.assert_close(gradient[FLAT], 2 * flat[FLAT], rtol=0, atol=0)


def test_what_lies_between_rows_enters_no_sum() -> None:
    """KL, hyper-prior, samples and gradients of flat members are those of the parameters themselves."""
    family = DiagonalPrior()
    several = DiagonalGaussian(parameters(2, dtype=torch.float64), tree.scale(0.3, parameters(2, dtype=torch.float64)))
    flat = family.map(lambda each: flatten(each, num_axes=1), several)
    noise = parameters(3, dtype=torch.float64)
    flat_noise = flatten(noise, num_axes=1)
    one, other, flat_one, flat_other = (
        tree.map(lambda leaf, i=index: leaf[i], member) for member in (several, flat) for index in (0, 1)
    )
    for function in (family.divergence, lambda a, b: family.hyper_prior_nll(a) + family.hyper_prior_nll(b)):
        torch.testing.assert_close(function(flat_one, flat_other), function(one, other), rtol=1e-12, atol=1e-12)
        gradient = torch.func.grad(function)(flat_one, flat_other)
        expected = family.map(flatten, torch.func.grad(function)(one, other))
        torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(tree.norm(gradient), tree.norm(expected), rtol=1e-12, atol=1e-12)
    samples = family.sample(flat_one, flat_noise)[FLAT]
    torch.testing.assert_close(samples, flatten(family.sample(one, noise), num_axes=1)[FLAT], rtol=1e-12, atol=1e-12)
