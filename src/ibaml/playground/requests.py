"""What a page asks, checked: fields of a JSON object by name and kind."""

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias, TypeVar

Asked: TypeAlias = Mapping[str, Any]
"""A JSON object as the page sends it."""

Answered: TypeAlias = dict[str, Any]
"""What the page shows, as JSON."""

Answer: TypeAlias = Callable[[Asked], Answered]
"""What a tab answers. Refusals are ValueErrors, whose sentence the page shows."""

_Kind = TypeVar("_Kind")


def field(asked: Asked, name: str, kind: type[_Kind]) -> _Kind:
    """Returns a field of a request.

    Args:
        asked: The request.
        name: Name of the field.
        kind: Its type; an int serves as a float.

    Raises:
        ValueError: If it is missing or of another type.
    """
    value = asked.get(name)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return kind(value)
    if not isinstance(value, kind):
        raise ValueError(f"{name} is {'missing' if value is None else repr(value)}; expected a {kind.__name__}.")
    return value
