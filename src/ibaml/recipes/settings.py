"""What a recipe consists of, how it is stored as JSON, and how single settings of it are changed by name."""

import dataclasses
import difflib
import json
import types
from collections.abc import Mapping
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import torch

from ibaml import records
from ibaml.algorithms import RECORDS, Algorithm
from ibaml.data.sources import SOURCES, TaskSource
from ibaml.likelihoods import make_likelihood
from ibaml.model import Model, build_model
from ibaml.networks import NetworkSettings
from ibaml.train.trainer import TrainerSettings

# Before Python 3.14, ``Literal["a"] | None`` is of the second kind.
_UNIONS = (types.UnionType, Union)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """A complete configuration of a training run and its evaluation.

    Attributes:
        name: Name on the command line.
        description: One sentence for a reader.
        data: Which tasks: one of ``ibaml.data.sources``.
        network: Which network.
        algorithm: Which algorithm, with all settings.
        trainer: Settings of the outer loop.
        likelihood: ``"categorical"``, ``"gaussian"`` or ``"unit_gaussian"``.
        adapt: Name patterns of the parameters that each task adapts.
        freeze: Name patterns of parameters that never change.
        num_test_tasks: Tasks of an evaluation.
    """

    name: str
    description: str
    data: TaskSource
    network: NetworkSettings
    algorithm: Algorithm
    trainer: TrainerSettings
    likelihood: str = "categorical"
    adapt: tuple[str, ...] = ("*",)
    freeze: tuple[str, ...] = ()
    num_test_tasks: int = 600

    def build_model(self) -> Model:
        """Builds the network, with initial weights from the trainer's seed, and its likelihood."""
        network = self.network.build(generator=torch.Generator().manual_seed(self.trainer.seed))
        num_outputs = int(self.network.arguments["num_outputs"])
        likelihood = make_likelihood(self.likelihood, num_outputs)
        return build_model(network, likelihood, adapt=self.adapt, freeze=self.freeze)

    def to_json(self) -> str:
        """Returns the recipe as JSON."""
        return json.dumps(records.to_json(self), indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "Recipe":
        """Rebuilds a recipe from ``to_json``.

        Raises:
            ValueError: If the text is no recipe.
        """
        try:
            recipe = records.from_json(
                json.loads(text), (cls, NetworkSettings, TrainerSettings, *SOURCES.values(), *RECORDS)
            )
        except ValueError as error:
            raise ValueError(f"this is no recipe of this version of ibaml: {error}") from error
        if not isinstance(recipe, cls):
            raise ValueError(f"this is no recipe of this version of ibaml, but {type(recipe).__name__}.")
        return recipe

    def override(self, changes: Mapping[str, str]) -> "Recipe":
        """Returns the recipe with some settings changed.

        Args:
            changes: Dotted setting to its value as JSON, such as ``{"algorithm.inner.num_steps": "10"}``; what is no
                JSON counts as a string.

        Raises:
            ValueError: If there is no such setting (with the nearest name) or a value is refused.
        """
        recipe = self
        for key, text in changes.items():
            recipe = _replace(recipe, key.split("."), text, key)
        return recipe


def _replace(owner: Any, path: list[str], text: str, key: str) -> Any:
    name, *rest = path
    if isinstance(owner, Mapping):
        if rest:
            raise ValueError(f"setting {key!r}: {name} is a plain value without settings of its own.")
        return {**owner, name: _parse(text)}
    names = [field.name for field in dataclasses.fields(owner)]
    if name not in names:
        nearest = difflib.get_close_matches(name, names, n=1, cutoff=0.0)[0]
        parts = key.split(".")
        parts[len(parts) - len(path)] = nearest
        raise ValueError(f"there is no setting {key!r}; did you mean {'.'.join(parts)!r}?")
    if rest:
        child = getattr(owner, name)
        if not (dataclasses.is_dataclass(child) or isinstance(child, Mapping)):
            raise ValueError(f"setting {key!r}: {name} is a plain value ({child!r}) without settings of its own.")
        value = _replace(child, rest, text, key)
    elif dataclasses.is_dataclass(getattr(owner, name)):
        inner = ", ".join(field.name for field in dataclasses.fields(getattr(owner, name)))
        raise ValueError(f"setting {key!r} is a group; set one of its members: {inner}.")
    else:
        hint = get_type_hints(type(owner))[name]
        # A name may look like a number, and a list of one name needs no brackets.
        candidates = [value for value in (_parse(text), text, (text,)) if _fits(value, hint)]
        if not candidates:
            raise ValueError(f"setting {key!r} must be {_describe(hint)}, but is {text!r}.")
        value = candidates[0]
    return dataclasses.replace(owner, **{name: value})


def _parse(text: str) -> Any:
    """Returns the value of a JSON text, lists as tuples; what is no JSON is a string."""
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        return text
    return tuple(value) if isinstance(value, list) else value


def _fits(value: Any, hint: Any) -> bool:
    """Tells whether a value has the type of a setting; a whole number is a number."""
    options = get_args(hint)
    if get_origin(hint) is Literal:
        return isinstance(value, str)
    if get_origin(hint) in _UNIONS:
        return any(_fits(value, option) for option in options)
    if get_origin(hint) is tuple:
        if not isinstance(value, tuple):
            return False
        parts = [options[0]] * len(value) if options[-1] is Ellipsis else options
        return len(parts) == len(value) and all(map(_fits, value, parts))
    if isinstance(value, bool) or hint is bool:
        return isinstance(value, bool) and hint is bool
    return isinstance(value, int | float if hint is float else get_origin(hint) or hint)


def _describe(hint: Any) -> str:
    if get_origin(hint) in _UNIONS:
        return " or ".join(_describe(option) for option in get_args(hint))
    if get_origin(hint) is tuple:
        return "a JSON list such as " + ("[-7, -7]" if float in get_args(hint) else '["head.*"]')
    names = {int: "a whole number", float: "a number", bool: "true or false", types.NoneType: "null"}
    return names.get(hint, "a name")
