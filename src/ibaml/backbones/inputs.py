"""Inputs of a backbone in the forms that people have: arrays, tuples and mappings of arrays, lists of strings."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias, cast

import torch

from ibaml.data.columns import is_table
from ibaml.data.tables import to_array
from ibaml.types import Tensor

Inputs: TypeAlias = Tensor | dict[str, Tensor] | list[str]
"""A tensor or a mapping of tensors with a leading axis of inputs, or text. Names that are numbers are positions."""


def read_backbone_inputs(argument: str, x: Any) -> Inputs:
    """Returns inputs as a tensor, a mapping of tensors or a list of strings.

    Args:
        argument: How messages call them.
        x: An array, a tensor, nested lists of numbers, a mapping of such, or a sequence of strings.

    Raises:
        TypeError: If they are none of these.
        ValueError: If rows differ in length, or the members of a mapping in their number of inputs.

    Examples:
        >>> read_backbone_inputs("X", ("a text", "another"))
        ['a text', 'another']
    """
    if is_table(x):
        raise TypeError(
            f"{argument} is a table, but the backbone was given none in training, and takes arrays or lists of "
            "strings: give a column of it, such as table['text'].tolist()."
        )
    if isinstance(x, str | bytes):
        raise TypeError(f"{argument} is a single string; expected a list of them: use [text].")
    if isinstance(x, Mapping):
        named = {str(name): _as_tensor(f"{argument}[{name!r}]", value) for name, value in x.items()}
        sizes = {name: len(value) for name, value in named.items()}
        if len(set(sizes.values())) != 1:
            raise ValueError(
                f"{argument} is a mapping of {sizes or 'nothing'}; expected arrays with as many inputs each."
            )
        return named
    if isinstance(x, torch.Tensor):
        return _as_tensor(argument, x)
    values = to_array(x)
    if values.ndim == 1 and (values.dtype.kind == "U" or values.dtype == object):
        texts = values.tolist()
        for row, text in enumerate(texts):
            if not isinstance(text, str):
                raise TypeError(
                    f"{argument} holds a {type(text).__name__} in row {row}; expected arrays of numbers or strings."
                )
        return cast("list[str]", texts)
    return _as_tensor(argument, values)


def by_position(members: Sequence[Any]) -> dict[str, Any]:
    """Returns inputs side by side as a mapping from their positions, as names, to them."""
    return {str(position): value for position, value in enumerate(members)}


def call_with(function: Callable[..., Any], named: Mapping[str, Any]) -> Any:
    """Calls a function with several inputs: those whose names are numbers by position, in their order, others by name.

    Args:
        function: The function.
        named: The inputs.

    Examples:
        >>> call_with(lambda first, second, last: (first, second, last), {"1": "b", "last": "c", "0": "a"})
        ('a', 'b', 'c')
    """
    positions = sorted((name for name in named if name.isdigit()), key=int)
    return function(
        *(named[name] for name in positions), **{name: value for name, value in named.items() if not name.isdigit()}
    )


def shape_of(inputs: Inputs) -> str:
    """Returns in words what inputs are, for messages."""
    if isinstance(inputs, list):
        return f"{len(inputs)} strings"
    if isinstance(inputs, dict):
        return ", ".join(f"{name!r} {_shape_and_type(value)}" for name, value in inputs.items())
    return _shape_and_type(inputs)


def num_inputs_of(inputs: Inputs) -> int:
    """Returns the number of inputs."""
    return len(next(iter(inputs.values())) if isinstance(inputs, dict) else inputs)


def signature(inputs: Inputs) -> tuple[Any, ...]:
    """Returns what inputs must agree in to be parts of one batch."""
    if isinstance(inputs, list):
        return ("text",)
    named = inputs if isinstance(inputs, dict) else {"": inputs}
    return tuple((name, value.dtype, tuple(value.shape[1:])) for name, value in named.items())


def take(inputs: Inputs, rows: Sequence[int]) -> Inputs:
    """Returns some of the inputs."""
    if isinstance(inputs, torch.Tensor):
        return inputs[list(rows)]
    if isinstance(inputs, dict):
        return {name: value[list(rows)] for name, value in inputs.items()}
    return [inputs[row] for row in rows]


def concatenate(parts: Sequence[Inputs]) -> Inputs:
    """Returns inputs that agree in their ``signature`` as one batch."""
    first = parts[0]
    if isinstance(first, list):
        return [text for part in parts for text in cast("list[str]", part)]
    if isinstance(first, dict):
        return {name: torch.cat([cast("dict[str, Tensor]", part)[name] for part in parts]) for name in first}
    return torch.cat([cast("Tensor", part) for part in parts])


def digests(inputs: Inputs) -> list[bytes]:
    """Returns the SHA-256 of each input: of its type, its shape and its values."""
    if isinstance(inputs, list):
        return [hashlib.sha256(b"text" + text.encode()).digest() for text in inputs]
    named = inputs if isinstance(inputs, dict) else {"": inputs}
    head = repr(signature(inputs)).encode()
    columns = [value.detach().cpu().contiguous() for value in named.values()]
    return [
        hashlib.sha256(
            b"".join([head, *(column[row].reshape(-1).view(torch.uint8).numpy().tobytes() for column in columns)])
        ).digest()
        for row in range(num_inputs_of(inputs))
    ]


def _shape_and_type(value: Tensor) -> str:
    return f"of shape {tuple(value.shape)} and dtype {value.dtype}"


def _as_tensor(argument: str, x: Any) -> Tensor:
    if isinstance(x, torch.Tensor):
        values = x.detach()
    else:
        array = to_array(x)
        if array.dtype.kind not in "biuf":
            raise TypeError(
                f"{argument} has dtype {array.dtype}; expected numbers, or a list of strings for a backbone of text."
            )
        # torch knows no unsigned types beside uint8, refuses negative strides and warns about read-only arrays.
        if array.dtype.kind == "u" and array.dtype.itemsize > 1:
            array = array.astype("int64")
        values = torch.from_numpy(array.copy())
    if values.ndim < 1:
        raise ValueError(f"{argument} is a single number; expected [num_inputs, *shape].")
    if values.is_floating_point() and not bool(torch.isfinite(values).all()):
        row = int(torch.nonzero(~torch.isfinite(values.flatten(1) if values.ndim > 1 else values[:, None]))[0, 0])
        raise ValueError(f"{argument} has missing (NaN) or infinite values, the first in row {row}: drop those rows.")
    return values
