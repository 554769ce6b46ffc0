"""Recipes: named, complete, frozen configurations. A result's recipe name and seed reproduce it."""

import dataclasses
import difflib
import json
import types
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import torch

from ibaml.algorithms import Algorithm, make_algorithm
from ibaml.data import (
    EpisodeSampler,
    LinearRegressionTasks,
    SinusoidTasks,
    load_glyphs,
    load_image_folder,
    load_omniglot,
)
from ibaml.likelihoods import make_likelihood
from ibaml.model import Model, build_model
from ibaml.networks import NetworkSettings
from ibaml.trainer import TrainerSettings
from ibaml.types import TaskSampler

Split = Literal["train", "validation", "test"]
IMAGE_SOURCES = ("glyphs", "omniglot", "image_folder")
SOURCES = (*IMAGE_SOURCES, "sinusoid", "bayesian_linear_regression")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataSettings:
    """Which tasks.

    Attributes:
        source: One of ``SOURCES``.
        num_ways: Classes per task (image sources).
        num_shots: Support examples per class, or per task in regression.
        num_queries: Query examples per class, or per task in regression.
        num_test_queries: The same in validation and test tasks.
        image_size: Height and width in pixels (image sources).
        path: Folder or zip of ``image_folder``, relative to the data folder.
        protocol: Split of Omniglot.
        rotations: Omniglot: rotated training characters count as further classes.
        num_features: Inputs of ``bayesian_linear_regression``.
        noise_std: Noise of the regression sources.
    """

    source: str
    num_ways: int = 5
    num_shots: int = 1
    num_queries: int = 15
    num_test_queries: int = 15
    image_size: int = 28
    path: str | None = None
    protocol: Literal["vinyals", "official"] = "vinyals"
    rotations: bool = True
    num_features: int = 4
    noise_std: float = 0.0

    def __post_init__(self) -> None:
        """Refuses unknown sources."""
        if self.source not in SOURCES:
            raise ValueError(f"source must be one of {', '.join(SOURCES)}, but is {self.source!r}.")

    def build(self, split: Split, *, data: Path | None = None) -> TaskSampler:
        """Loads the data of a split and returns its task sampler.

        Args:
            split: ``"train"``, ``"validation"`` or ``"test"``.
            data: Folder with data files, searched before ``$IBAML_DATA`` and the per-user cache.

        Raises:
            FileNotFoundError: If a data file is not found.
            ValueError: If a data file is damaged, or holds too few classes or images.
        """
        num_queries = self.num_queries if split == "train" else self.num_test_queries
        if self.source == "sinusoid":
            return SinusoidTasks(num_shots=self.num_shots, num_queries=num_queries, noise_std=self.noise_std)
        if self.source == "bayesian_linear_regression":
            return LinearRegressionTasks(
                prior_mean=torch.linspace(-1, 1, self.num_features),
                prior_variance=torch.logspace(-1, 0, self.num_features),
                noise_variance=max(self.noise_std, 0.1) ** 2,
                num_shots=self.num_shots,
                num_queries=num_queries,
            )
        if self.source == "glyphs":
            images = load_glyphs(split, image_size=self.image_size)
        elif self.source == "omniglot":
            rotations = self.rotations and split == "train"
            images = load_omniglot(
                split, root=data, protocol=self.protocol, image_size=self.image_size, rotations=rotations
            )
        else:
            if self.path is None:
                raise ValueError(
                    "path is not set: source 'image_folder' needs the folder or zip with split/class/image."
                )
            path = Path(self.path) if data is None else data / self.path
            images = load_image_folder(path, split, image_size=self.image_size)
        return EpisodeSampler(images, num_ways=self.num_ways, num_shots=self.num_shots, num_queries=num_queries)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """A complete configuration of a training run and its evaluation.

    Attributes:
        name: Name on the command line.
        description: One sentence for a reader.
        data: Which tasks.
        network: Which network.
        algorithm: Which algorithm, with all settings.
        trainer: Settings of the outer loop.
        likelihood: ``"categorical"`` or ``"gaussian"``.
        adapt: Name patterns of the parameters that each task adapts.
        freeze: Name patterns of parameters that never change.
        num_test_tasks: Tasks of an evaluation.
    """

    name: str
    description: str
    data: DataSettings
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
        return json.dumps(dataclasses.asdict(self), indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "Recipe":
        """Rebuilds a recipe from ``to_json``.

        Raises:
            ValueError: If the text is no recipe.
        """
        try:
            values = json.loads(text)
            algorithm = values["algorithm"] | {"initial_log_var": tuple(values["algorithm"]["initial_log_var"])}
            # JSON has lists only, while the settings hold tuples.
            arguments = {
                name: tuple(value) if isinstance(value, list) else value
                for name, value in values["network"]["arguments"].items()
            }
            return cls(
                **values
                | {
                    "data": DataSettings(**values["data"]),
                    "network": NetworkSettings(**values["network"] | {"arguments": arguments}),
                    "algorithm": Algorithm(**algorithm),
                    "trainer": TrainerSettings(**values["trainer"]),
                    "adapt": tuple(values["adapt"]),
                    "freeze": tuple(values["freeze"]),
                }
            )
        except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
            raise ValueError(f"this is no recipe of this version of ibaml: {error!r}.") from error

    def override(self, changes: Mapping[str, str]) -> "Recipe":
        """Returns the recipe with some settings changed.

        Args:
            changes: Dotted setting to its value as JSON, such as ``{"algorithm.num_inner_steps": "10"}``; what is no
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
    if get_origin(hint) is types.UnionType:
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
    if get_origin(hint) is types.UnionType:
        return " or ".join(_describe(option) for option in get_args(hint))
    if get_origin(hint) is tuple:
        return "a JSON list such as " + ("[-7, -7]" if float in get_args(hint) else '["head.*"]')
    names = {int: "a whole number", float: "a number", bool: "true or false", types.NoneType: "null"}
    return names.get(hint, "a name")


def get_recipe(name: str) -> Recipe:
    """Returns a recipe by name.

    Raises:
        ValueError: If there is none, with the nearest name.

    Examples:
        >>> get_recipe("glyphs_5way_5shot_ibaml").algorithm.name
        'ibaml'
    """
    if name not in RECIPES:
        nearest = difflib.get_close_matches(name, RECIPES, n=1, cutoff=0.0)[0]
        raise ValueError(f"there is no recipe {name!r}; did you mean {nearest!r}? `ibaml recipes` lists all.")
    return RECIPES[name]()


# An implicit gradient is as good as the inner problem is solved, and it does not see the inner solver: with larger
# steps or a weaker prior these runs ended where the inner loss was too sharp for gradient descent, with fewer steps
# they learned less. A KL weight of 1.7e-4 and log-variances of -8 hold the weights with a strength of 0.5. In so few
# steps the variances stay far from stationary, where the free preconditioner does not help.
_KL_WEIGHT = 1.7e-4
_IMAGE_ALGORITHMS: dict[str, dict[str, Any]] = {
    "maml": {"inner_learning_rate": 0.4, "num_inner_steps": 3},
    "imaml": {"inner_learning_rate": 0.1, "num_inner_steps": 12, "proximal_strength": 0.5, "num_linear_steps": 4},
    "abml": {
        "inner_learning_rate": 0.4,
        "num_inner_steps": 3,
        "num_samples": 1,
        "initial_log_var": (-8.0, -8.0),
    },
    "ibaml": {
        "inner_learning_rate": 0.1,
        "num_inner_steps": 12,
        "num_samples": 1,
        "num_linear_steps": 4,
        "precondition": False,
        "initial_log_var": (-8.0, -8.0),
    },
}


def _image_algorithm(name: str, num_support: int, **overrides: Any) -> Algorithm:
    """Returns the algorithm of an image recipe, with the same KL weight whatever the size of the support set."""
    algorithm = make_algorithm(name, **{**_IMAGE_ALGORITHMS[name], **overrides})
    if not algorithm.is_bayesian:
        return algorithm
    return dataclasses.replace(algorithm, temperature=round(num_support * _KL_WEIGHT, 6))


def _glyphs(algorithm: str) -> Recipe:
    return Recipe(
        name=f"glyphs_5way_5shot_{algorithm}",
        description=f"{algorithm} on rendered characters, 5-way 5-shot; no Georgian or Armenian is seen in training",
        data=DataSettings(source="glyphs", num_ways=5, num_shots=5, num_queries=5, num_test_queries=15),
        network=NetworkSettings(
            name="Conv4", arguments={"num_outputs": 5, "channels": 32, "downsample": "stride", "zero_head": True}
        ),
        algorithm=_image_algorithm(algorithm, num_support=25),
        trainer=TrainerSettings(
            num_steps=220,
            tasks_per_step=4,
            learning_rate=3e-3,
            log_var_learning_rate=2e-2,
            schedule="cosine",
            validate_every=110,
            num_validation_tasks=40,
        ),
        num_test_tasks=200,
    )


# The network of Finn et al. 2017, appendix A.1 (strided convolutions with 64 channels), and their inner learning rates.
def _omniglot(num_ways: int, num_shots: int, algorithm: str) -> Recipe:
    overrides = {"inner_learning_rate": 0.1} if num_ways == 20 else {}
    return Recipe(
        name=f"omniglot_{num_ways}way_{num_shots}shot_{algorithm}",
        description=f"{algorithm} on Omniglot, {num_ways}-way {num_shots}-shot, split of Vinyals et al. 2016",
        data=DataSettings(
            source="omniglot", num_ways=num_ways, num_shots=num_shots, num_queries=num_shots, num_test_queries=15
        ),
        network=NetworkSettings(
            name="Conv4", arguments={"num_outputs": num_ways, "channels": 64, "downsample": "stride", "zero_head": True}
        ),
        algorithm=_image_algorithm(algorithm, num_ways * num_shots, **overrides),
        trainer=TrainerSettings(
            num_steps=60_000,
            tasks_per_step=8,
            learning_rate=2e-3,
            log_var_learning_rate=1e-2,
            validate_every=200,
            num_validation_tasks=60,
            checkpoint_every=50,
            log_every=20,
        ),
        num_test_tasks=1000,
    )


def _sinusoid(num_shots: int, algorithm: str) -> Recipe:
    settings: dict[str, Any] = {"inner_learning_rate": 0.01, "num_inner_steps": 5}
    if algorithm in ("abml", "ibaml", "vampire"):
        settings |= {"num_samples": 2, "antithetic": True, "temperature": 0.1, "initial_log_var": (-7.0, -7.0)}
    return Recipe(
        name=f"sinusoid_{num_shots}shot_{algorithm}",
        description=f"{algorithm} on sinusoid regression, {num_shots}-shot",
        data=DataSettings(source="sinusoid", num_shots=num_shots, num_queries=10, num_test_queries=100),
        network=NetworkSettings(name="MLP", arguments={"num_outputs": 1, "input_shape": 1, "hidden_sizes": (40, 40)}),
        algorithm=make_algorithm(algorithm, **settings),
        trainer=TrainerSettings(num_steps=10_000, tasks_per_step=16, validate_every=1000, log_every=50),
        likelihood="gaussian",
    )


def _all_recipes() -> dict[str, Callable[[], Recipe]]:
    recipes: dict[str, Callable[[], Recipe]] = {}
    for algorithm in _IMAGE_ALGORITHMS:
        recipes[f"glyphs_5way_5shot_{algorithm}"] = lambda a=algorithm: _glyphs(a)
    for num_ways, num_shots in ((5, 1), (5, 5), (20, 1)):
        for algorithm in _IMAGE_ALGORITHMS:
            name = f"omniglot_{num_ways}way_{num_shots}shot_{algorithm}"
            recipes[name] = lambda w=num_ways, k=num_shots, a=algorithm: _omniglot(w, k, a)
    for num_shots in (5, 10):
        for algorithm in ("maml", "abml", "ibaml"):
            recipes[f"sinusoid_{num_shots}shot_{algorithm}"] = lambda k=num_shots, a=algorithm: _sinusoid(k, a)
    return recipes


RECIPES: Mapping[str, Callable[[], Recipe]] = _all_recipes()
"""All recipes by name."""
