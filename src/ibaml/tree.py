"""Vector-space operations on pytrees of tensors.

Every solver is written with these, so that it works on a tensor, a parameter dict or a DiagonalGaussian alike. This is
the only module that imports ``torch.utils._pytree``; what torch may rename is renamed here.
"""

from collections.abc import Callable, Iterable

import torch
from torch.utils import _pytree

from ibaml.types import PyTree, Tensor


def leaves(tree: PyTree) -> list[Tensor]:
    """Lists the tensors of a pytree in its fixed flattening order."""
    # Torch takes ten times as long for what trees are made of here.
    if isinstance(tree, Tensor):
        return [tree]
    if type(tree) is dict:
        return [leaf for child in tree.values() for leaf in leaves(child)]
    if type(tree) is tuple or hasattr(tree, "_fields"):
        return [leaf for child in tree for leaf in leaves(child)]
    return _pytree.tree_leaves(tree)


def flatten(tree: PyTree) -> tuple[list[Tensor], Callable[[Iterable[Tensor]], PyTree]]:
    """Returns the tensors of a pytree and the function that makes such a tree of others."""
    found, structure = _pytree.tree_flatten(tree)
    return found, lambda others: _pytree.tree_unflatten(list(others), structure)


def named_leaves(tree: PyTree) -> dict[str, Tensor]:
    """Returns the tensors of nested dicts and NamedTuples by the path to each, in their flattening order.

    Examples:
        >>> named_leaves({"prior": {"head.weight": torch.ones(1)}, "shared": {}})
        {'prior/head.weight': tensor([1.])}
    """
    with_paths, _ = _pytree.tree_flatten_with_path(tree)
    return {
        "/".join(str(getattr(key, "key", getattr(key, "name", key))) for key in path): leaf for path, leaf in with_paths
    }


def map(function: Callable[..., Tensor], tree: PyTree, *others: PyTree) -> PyTree:  # noqa: A001
    """Applies a function leaf by leaf over one or more pytrees of the same structure."""
    if others:
        return _pytree.tree_map(function, tree, *others)
    if isinstance(tree, Tensor):
        return function(tree)
    if type(tree) is dict:
        return {key: map(function, child) for key, child in tree.items()}
    if hasattr(tree, "_fields"):
        return type(tree)(*[map(function, child) for child in tree])
    return _pytree.tree_map(function, tree)


def add(a: PyTree, b: PyTree) -> PyTree:
    """Returns ``a + b``."""
    return map(torch.add, a, b)


def sub(a: PyTree, b: PyTree) -> PyTree:
    """Returns ``a - b``."""
    return map(torch.sub, a, b)


def mul(a: PyTree, b: PyTree) -> PyTree:
    """Returns the elementwise product ``a * b``."""
    return map(torch.mul, a, b)


def scale(factor: Tensor | float, a: PyTree) -> PyTree:
    """Returns ``factor * a``."""
    return map(lambda leaf: factor * leaf, a)


def axpy(factor: Tensor | float, a: PyTree, b: PyTree) -> PyTree:
    """Returns ``factor * a + b``.

    Examples:
        >>> axpy(2.0, {"w": torch.tensor([1.0, 2.0])}, {"w": torch.tensor([0.5, 0.5])})
        {'w': tensor([2.5000, 4.5000])}
    """
    if isinstance(factor, Tensor):
        return map(lambda x, y: torch.addcmul(y, factor, x), a, b)
    return map(lambda x, y: torch.add(y, x, alpha=factor), a, b)


def where(condition: Tensor, a: PyTree, b: PyTree) -> PyTree:
    """Chooses ``a`` where the scalar tensor ``condition`` is true and ``b`` elsewhere; copies nothing if it may ask."""
    if holds(condition):
        return a
    return map(lambda x, y: torch.where(condition, x, y), a, b)


def dot(a: PyTree, b: PyTree) -> Tensor:
    """Returns the Euclidean inner product, a scalar tensor.

    Examples:
        >>> dot([torch.tensor([1.0, 2.0]), torch.tensor(3.0)], [torch.tensor([1.0, 1.0]), torch.tensor(2.0)])
        tensor(9.)
    """
    products = [torch.dot(x.reshape(-1), y.reshape(-1)) for x, y in zip(leaves(a), leaves(b), strict=True)]
    if not products:
        raise ValueError("tree has no tensors: an inner product needs at least one leaf.")
    return torch.stack(products).sum()


def norm(a: PyTree) -> Tensor:
    """Returns the Euclidean norm over all leaves, a scalar tensor."""
    return dot(a, a).sqrt()


def zeros_like(a: PyTree) -> PyTree:
    """Returns a tree of zeros."""
    return map(torch.zeros_like, a)


def detach(a: PyTree) -> PyTree:
    """Returns the tree cut from every differentiation graph."""
    return map(lambda leaf: leaf.detach(), a)


def all_finite(a: PyTree) -> Tensor:
    """Returns a scalar bool tensor: whether no leaf has a NaN or an infinity."""
    # A NaN or infinity is left in a sum, which takes a twentieth of the time. Of sums that overflow it has to be asked.
    in_sums = torch.isfinite(torch.stack([leaf.sum().double() for leaf in leaves(a)])).all()
    if holds(in_sums):
        return in_sums
    return torch.stack([torch.isfinite(leaf).all() for leaf in leaves(a)]).all()


def ravel(tree: PyTree) -> tuple[Tensor, Callable[[Tensor], PyTree]]:
    """Concatenates all leaves into one vector and returns it with the inverse map.

    Examples:
        >>> vector, unravel = ravel({"a": torch.zeros(2), "b": torch.ones(1, 2)})
        >>> vector
        tensor([0., 0., 1., 1.])
        >>> unravel(vector)["b"].shape
        torch.Size([1, 2])
    """
    flat, structure = _pytree.tree_flatten(tree)
    shapes = [leaf.shape for leaf in flat]
    sizes = [leaf.numel() for leaf in flat]

    def unravel(vector: Tensor) -> PyTree:
        pieces = torch.split(vector, sizes)
        return _pytree.tree_unflatten(
            [piece.reshape(shape) for piece, shape in zip(pieces, shapes, strict=True)], structure
        )

    return torch.cat([leaf.reshape(-1) for leaf in flat]), unravel


def holds(condition: Tensor) -> bool:
    """Tells whether a scalar bool tensor is true *and may be asked*.

    Under ``torch.func.vmap`` a tensor has one value per batch member and torch refuses a Python branch on it with a
    RuntimeError; the answer is then False. Iterative solvers use this to stop early outside vmap while they run a
    fixed number of masked steps inside it, and while a CUDA graph is captured, which must not wait for a value.
    """
    if condition.is_cuda and torch.cuda.is_current_stream_capturing():
        return False
    try:
        return bool(condition)
    except RuntimeError:
        return False
