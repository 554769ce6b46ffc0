"""Frozen dataclass records as JSON and back.

A record becomes an object with the name of its class under ``"type"`` and its fields beside it, records within records
likewise: ``{"type": "GradientDescent", "num_steps": 5, "learning_rate": 0.01, "momentum": 0.0}``. Records hold tuples
and no lists, so that every list of the JSON is read as a tuple.
"""

import dataclasses
import difflib
import functools
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

TYPE = "type"
"""Key of the name of the record's class."""


def to_json(value: Any) -> Any:
    """Returns a record, or plain values with records in them, as JSON values.

    Args:
        value: A dataclass instance, mapping, tuple, list, string, number, bool or None.

    Raises:
        TypeError: If a value is none of these.

    Examples:
        >>> @dataclasses.dataclass(frozen=True)
        ... class Size:
        ...     sides: tuple[int, int]
        >>> to_json(Size((2, 3)))
        {'type': 'Size', 'sides': [2, 3]}
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: to_json(getattr(value, field.name)) for field in dataclasses.fields(value)}
        return {TYPE: type(value).__name__, **fields}
    if isinstance(value, Mapping):
        return {str(key): to_json(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [to_json(item) for item in value]
    if value is None or isinstance(value, str | int | float | bool):
        return value
    raise TypeError(
        f"a setting is a {type(value).__name__} ({value!r}), which JSON cannot hold: use a frozen dataclass."
    )


def from_json(value: Any, records: Iterable[type]) -> Any:
    """Returns what ``to_json`` was given.

    Args:
        value: JSON values.
        records: The classes that may occur; none other is ever called.

    Raises:
        ValueError: If a class is not among them, or has no field of a name, or refuses a value; if a value is of
            another kind than its field, such as text in place of a number; if records are nested too deeply.
    """
    try:
        return _read(value, {record.__name__: record for record in records})
    except RecursionError as error:
        raise ValueError("the settings are nested too deeply") from error


def _read(value: Any, known: Mapping[str, type]) -> Any:
    if isinstance(value, list):
        return tuple(_read(item, known) for item in value)
    if not isinstance(value, dict):
        return value
    items = {key: _read(item, known) for key, item in value.items() if key != TYPE}
    if TYPE not in value:
        return items
    name = value[TYPE]
    if not isinstance(name, str) or name not in known:
        raise ValueError(f"there is no record of type {name!r}; there are {', '.join(sorted(known))}.")
    fields = [field.name for field in dataclasses.fields(known[name])]
    for key in items:
        if key not in fields:
            nearest = difflib.get_close_matches(key, fields, n=1, cutoff=0.0)
            hint = f"; did you mean {nearest[0]!r}?" if nearest else "."
            raise ValueError(f"{name} has no setting {key!r}{hint}")
    for key, kind in _kinds(known[name]).items():
        if key in items and not _fits(items[key], kind):
            raise ValueError(f"{name} has {key} = {items[key]!r}, which is of another kind than that setting")
    try:
        return known[name](**items)
    except TypeError as error:
        raise ValueError(f"{name} cannot be built from {items}: {error}") from error


@functools.cache
def _kinds(record: type) -> dict[str, Any]:
    """Returns the types of the fields of a record; none where one is only known to a type checker."""
    try:
        return typing.get_type_hints(record)
    except NameError:
        return {}


def _fits(value: Any, kind: Any) -> bool:
    """Tells whether a value is of a kind, as far as kinds are plain values and tuples of them."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, one) for one in arguments)
    if origin is Literal:
        return value in arguments
    if origin is tuple:
        each = arguments[:1] * len(value) if arguments[1:] == (...,) and isinstance(value, tuple) else arguments
        return isinstance(value, tuple) and len(value) == len(each) and all(map(_fits, value, each))
    if kind in (int, float):
        return isinstance(value, (int, kind)) and not isinstance(value, bool)
    return isinstance(value, kind) if kind in (str, bool, types.NoneType) else True


def replace(record: Any, changes: Mapping[str, Any]) -> Any:
    """Returns a record with some fields changed, also those of records and mappings within it.

    Args:
        record: A dataclass instance.
        changes: Dotted name of a field to its value, such as ``{"trainer.num_steps": 10}``.

    Raises:
        ValueError: If there is no such field, with the nearest name, or a record refuses a value.

    Examples:
        >>> @dataclasses.dataclass(frozen=True)
        ... class Size:
        ...     height: int
        >>> @dataclasses.dataclass(frozen=True)
        ... class Image:
        ...     size: Size
        >>> replace(Image(Size(2)), {"size.height": 3}).size
        Size(height=3)
    """
    return _replace(record, [(path.split("."), value) for path, value in changes.items()], ())


def _replace(owner: Any, changes: Sequence[tuple[Sequence[str], Any]], above: tuple[str, ...]) -> Any:
    """Returns the owner, which stands at a path, with all its changes at once, which a record checks together."""
    is_mapping = isinstance(owner, Mapping)
    names = [field.name for field in dataclasses.fields(owner)] if dataclasses.is_dataclass(owner) else []
    changed: dict[str, Any] = {}
    for name in dict.fromkeys(path[0] for path, _ in changes):
        own = [(path[1:], value) for path, value in changes if path[0] == name]
        if not is_mapping and name not in names:
            path = ".".join((*above, name, *own[0][0]))
            nearest = difflib.get_close_matches(name, names, n=1, cutoff=0.0)
            hint = f"; did you mean {'.'.join((*above, nearest[0], *own[0][0]))!r}?" if nearest else "."
            raise ValueError(f"there is no setting {path!r}{hint}")
        if own[-1][0]:
            before = owner.get(name) if is_mapping else getattr(owner, name)
            changed[name] = _replace(before, own, (*above, name))
        else:
            changed[name] = own[-1][1]
    if is_mapping:
        return {**owner, **changed}
    replaced: Any = dataclasses.replace(owner, **changed)  # pyright: ignore[reportArgumentType]
    return replaced
