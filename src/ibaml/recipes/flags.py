"""Settings of a recipe as flags of the command line, such as ``--trainer.num-steps 10``.

The parser is tyro's. It makes flags of a dataclass by the types of its fields; here a field that admits several records
(a source of tasks, an inner solver) gets the type of the record that the recipe has, and the arguments of a network get
the names and types of its constructor.
"""

import dataclasses
import inspect
import re
from collections.abc import Collection, Sequence
from typing import Annotated, Any, TypeVar, get_type_hints

import tyro

from ibaml.networks.settings import NETWORKS, NetworkSettings
from ibaml.recipes.settings import Recipe

Options = TypeVar("Options")
MaybeRecipe = TypeVar("MaybeRecipe", Recipe, Recipe | None)
_NO_FLAGS = ("name", "description", "generator")
"""Fields that say which recipe or network it is."""


def parse_flags(
    options: Options,
    recipe: MaybeRecipe,
    flags: Sequence[str],
    *,
    command: str,
    description: str,
    only: Collection[str] | None = None,
) -> tuple[Options, MaybeRecipe]:
    """Returns options of a command, and a recipe, with what flags change in them.

    Args:
        options: A dataclass of options by default.
        recipe: The recipe; None if there is none.
        flags: Flags and values, such as ``["--trainer.num-steps", "10"]``; ``--help`` shows all and exits.
        command: What was typed before them, for the help and the messages.
        description: What the command does, for the help.
        only: Settings of the recipe that have flags. None: all.

    Raises:
        ValueError: If a record refuses a value.
        SystemExit: If there is no such flag (the nearest ones are shown), a value is of the wrong type, or help was
            asked for.
    """
    kinds: list[Any] = [("options", type(options))]
    values: dict[str, Any] = {"options": options}
    if recipe is not None:
        kind, values["recipe"] = _with_own_types(recipe, only)
        kinds.append(("recipe", kind))
    # An empty name: the flags of both are on one level.
    fields = [(name, Annotated[kind, tyro.conf.arg(name="")]) for name, kind in kinds]
    both = dataclasses.make_dataclass("Flags", fields)
    parsed: Any = tyro.cli(both, default=both(**values), args=list(flags), prog=command, description=description)
    changed: Any = None if recipe is None else _as_before(parsed.recipe, recipe)
    return parsed.options, changed


def _with_own_types(record: Any, only: Collection[str] | None = None) -> tuple[type, Any]:
    """Returns a dataclass whose fields have the types of a record's values, and an instance with these values."""
    hints = get_type_hints(type(record))
    fields: dict[str, tuple[Any, Any]] = {}
    for field in dataclasses.fields(record):
        hint, value = hints[field.name], getattr(record, field.name)
        if field.name in _NO_FLAGS or (only is not None and field.name not in only):
            continue
        if isinstance(record, NetworkSettings) and field.name == "arguments":
            hint, value = _arguments(record)
        elif dataclasses.is_dataclass(value):
            hint, value = _with_own_types(value)
        fields[field.name] = (hint, value)
    return _make(type(record), fields)


def _arguments(network: NetworkSettings) -> tuple[type, Any]:
    constructor = NETWORKS[network.name]
    hints = get_type_hints(constructor.__init__)
    fields = {
        name: (hints[name], network.arguments.get(name, parameter.default))
        for name, parameter in inspect.signature(constructor).parameters.items()
        if name not in _NO_FLAGS
    }
    return _make(constructor, fields)


def _make(like: type, fields: dict[str, tuple[Any, Any]]) -> tuple[type, Any]:
    described = _descriptions(like)
    annotated = [
        (name, Annotated[hint, tyro.conf.arg(help=described.get(name))])  # pyright: ignore[reportInvalidTypeForm]
        for name, (hint, _) in fields.items()
    ]
    kind = dataclasses.make_dataclass(like.__name__, annotated, frozen=True, kw_only=True)
    return kind, kind(**{name: value for name, (_, value) in fields.items()})


def _descriptions(kind: type) -> dict[str, str]:
    """Returns what the docstrings of a class and its bases say of its fields, under Attributes or Args."""
    found: dict[str, str] = {}
    for base in reversed(kind.__mro__):
        text = inspect.cleandoc(base.__doc__ or "")
        found |= dict(re.findall(r"^    (\w+): (.*(?:\n        .*)*)", text, re.MULTILINE))
    return {name: re.sub(r"\s+", " ", text.replace("``", "")) for name, text in found.items()}


def _as_before(parsed: Any, record: Any) -> Any:
    """Returns the record with the values of its typed likeness."""
    changed: dict[str, Any] = {}
    for field in dataclasses.fields(parsed):
        value, before = getattr(parsed, field.name), getattr(record, field.name)
        if isinstance(record, NetworkSettings) and field.name == "arguments":
            defaults = inspect.signature(NETWORKS[record.name]).parameters
            # Records hold tuples, where a constructor admits any sequence.
            arguments = {
                key: tuple(one) if isinstance(one, list) else one for key, one in dataclasses.asdict(value).items()
            }
            value = {key: one for key, one in arguments.items() if key in before or one != defaults[key].default}
        elif dataclasses.is_dataclass(value):
            value = _as_before(value, before)
        changed[field.name] = value
    return dataclasses.replace(record, **changed)
