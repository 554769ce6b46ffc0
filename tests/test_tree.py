"""Pytree operations against the same operations on the flattened vector."""

import math
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils import _pytree

from ibaml import tree
from ibaml.priors import DiagonalGaussian
from ibaml.types import Batch, PyTree, Tensor

ALGEBRA = 1e-10


def random_tree(structure: str, seed: int) -> PyTree:
    source = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=source, dtype=torch.float64)

    return {
        "tensor": lambda: draw(3, 2),
        "scalar": lambda: draw(),
        "dict": lambda: {"weight": draw(2, 3), "bias": draw(2)},
        "nested": lambda: [draw(2), (draw(), {"a": draw(1, 2)})],
        "gaussian": lambda: DiagonalGaussian({"w": draw(2, 2), "b": draw(3)}, {"w": draw(2, 2), "b": draw(3)}),
    }[structure]()


structures = st.sampled_from(["tensor", "scalar", "dict", "nested", "gaussian"])
seeds = st.integers(0, 2**20)
factors = st.floats(-10, 10)


def flat(a: PyTree) -> Tensor:
    return tree.ravel(a)[0]


@settings(deadline=None, max_examples=60)
@given(structure=structures, seed=seeds, factor=factors)
def test_every_operation_equals_the_one_on_the_flattened_vector(structure: str, seed: int, factor: float) -> None:
    a, b = random_tree(structure, seed), random_tree(structure, seed + 1)
    expected = {
        "add": (tree.add(a, b), flat(a) + flat(b)),
        "sub": (tree.sub(a, b), flat(a) - flat(b)),
        "mul": (tree.mul(a, b), flat(a) * flat(b)),
        "scale": (tree.scale(factor, a), factor * flat(a)),
        "scale by a tensor": (tree.scale(torch.tensor(factor, dtype=torch.float64), a), factor * flat(a)),
        "axpy": (tree.axpy(factor, a, b), factor * flat(a) + flat(b)),
        "zeros_like": (tree.zeros_like(a), torch.zeros_like(flat(a))),
        "map": (tree.map(lambda x, y: x.exp() - y, a, b), flat(a).exp() - flat(b)),
    }
    for name, (value, oracle) in expected.items():
        assert type(value) is type(a), name
        torch.testing.assert_close(flat(value), oracle, rtol=0, atol=ALGEBRA, msg=name)
    torch.testing.assert_close(tree.dot(a, b), flat(a) @ flat(b), rtol=0, atol=ALGEBRA)
    torch.testing.assert_close(tree.norm(a), torch.linalg.vector_norm(flat(a)), rtol=0, atol=ALGEBRA)


@settings(deadline=None, max_examples=30)
@given(structure=structures, seed=seeds)
def test_ravel_and_its_inverse_undo_each_other(structure: str, seed: int) -> None:
    a = random_tree(structure, seed)
    vector, unravel = tree.ravel(a)
    assert vector.shape == (sum(leaf.numel() for leaf in tree.leaves(a)),)
    restored = unravel(vector)
    assert type(restored) is type(a)
    for before, after in zip(tree.leaves(a), tree.leaves(restored), strict=True):
        assert torch.equal(before, after)
    other = torch.arange(vector.numel(), dtype=torch.float64)
    assert torch.equal(flat(unravel(other)), other)


def test_leaves_keep_the_order_of_ravel() -> None:
    a = {"b": torch.tensor([1.0, 2.0]), "a": [torch.tensor([3.0]), torch.tensor(4.0)]}
    assert torch.equal(torch.cat([leaf.reshape(-1) for leaf in tree.leaves(a)]), tree.ravel(a)[0])
    assert len(tree.leaves(a)) == 3


@pytest.mark.parametrize("condition", [True, False])
def test_where_takes_one_tree_whole(condition: bool) -> None:
    a, b = random_tree("nested", 0), random_tree("nested", 1)
    assert torch.equal(flat(tree.where(torch.tensor(condition), a, b)), flat(a if condition else b))


def test_where_keeps_out_the_nan_of_the_tree_not_chosen() -> None:
    a, b = torch.ones(2), torch.full((2,), math.nan)
    assert torch.equal(tree.where(torch.tensor(True), a, b), a)


def test_where_chooses_member_by_member_under_vmap() -> None:
    a, b = torch.ones(3, 2), torch.zeros(3, 2)
    chosen = torch.func.vmap(tree.where)(torch.tensor([True, False, True]), {"w": a}, {"w": b})
    assert torch.equal(chosen["w"], torch.tensor([[1.0, 1.0], [0.0, 0.0], [1.0, 1.0]]))


def test_detach_cuts_the_graph_and_keeps_the_values() -> None:
    a = {"w": torch.ones(2, requires_grad=True) * 2}
    cut = tree.detach(a)
    assert a["w"].requires_grad and not cut["w"].requires_grad
    assert torch.equal(cut["w"], torch.full((2,), 2.0))


def test_detach_is_a_constant_for_every_level_of_nested_derivatives() -> None:
    def inner(x: Tensor, y: Tensor) -> Tensor:
        return (tree.detach({"w": x * y})["w"] * x).sum()

    x, y = torch.tensor([2.0]), torch.tensor([3.0])
    assert torch.equal(torch.func.grad(inner)(x, y), torch.tensor([6.0]))
    outer = torch.func.grad(lambda y: torch.func.grad(inner)(x, y).sum())(y)
    assert torch.equal(outer, torch.zeros(1))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_all_finite_sees_one_bad_number_in_any_leaf(bad: float) -> None:
    good = {"a": torch.zeros(3), "b": torch.zeros(2, 2)}
    assert tree.all_finite(good)
    for name in good:
        spoiled = {**good, name: good[name].clone()}
        spoiled[name].view(-1)[-1] = bad
        assert not tree.all_finite(spoiled)


def test_dot_refuses_a_tree_without_tensors() -> None:
    with pytest.raises(ValueError, match=re.escape("tree has no tensors: an inner product needs at least one leaf.")):
        tree.dot({}, {})


def test_dot_refuses_trees_with_different_numbers_of_leaves() -> None:
    with pytest.raises(ValueError, match="zip"):
        tree.dot([torch.ones(1)], [torch.ones(1), torch.ones(1)])


def test_holds_reads_a_scalar_and_answers_no_under_vmap() -> None:
    assert tree.holds(torch.tensor(True))
    assert not tree.holds(torch.tensor(False))
    answers = []

    def member(condition: Tensor) -> Tensor:
        answers.append(tree.holds(condition))
        return condition

    torch.func.vmap(member)(torch.tensor([True, True]))
    assert answers == [False]


def test_sums_that_overflow_do_not_make_numbers_infinite() -> None:
    assert tree.all_finite([torch.full((3,), 3e38), torch.tensor([1, 2])])
    assert not tree.all_finite([torch.tensor([math.inf, -math.inf])])


def test_trees_are_walked_as_torch_walks_them() -> None:
    batch = Batch(torch.ones(1), {"b": torch.ones(2), "a": (torch.ones(3), [torch.ones(4)])})
    found = tree.leaves(batch)
    assert [len(leaf) for leaf in found] == [1, 2, 3, 4] == [len(leaf) for leaf in _pytree.tree_leaves(batch)]
    doubled = tree.map(lambda leaf: 2 * leaf, batch)
    assert isinstance(doubled, Batch) and list(doubled.y) == ["b", "a"] and isinstance(doubled.y["a"], tuple)
    assert all(bool((leaf == 2).all()) for leaf in tree.leaves(doubled))
