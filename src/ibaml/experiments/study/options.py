"""What the study compares: the data sets with the defaults on them, and one table of options for each kind of target.

An option is the default with some settings changed; one that changes nothing on a data set is left out there.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from ibaml.algorithms import make_algorithm
from ibaml.data.augmentation import UNCHANGED
from ibaml.data.sources import Mixtures, RandomSlopes, Sinusoid, TaskSource
from ibaml.learner.defaults import TABLE_TRAINER, default_network, find_algorithm
from ibaml.likelihoods import find_likelihood
from ibaml.networks import network_settings
from ibaml.priors import DiagonalColumnPrior, FullColumnPrior, LowRankColumnPrior
from ibaml.recipes import Recipe, get_recipe
from ibaml.types import ClassScope

DEFAULT = "default"
"""Name of the factor, and of the option, that changes nothing."""

_POSTERIOR = "algorithm.posterior_temperature"


class Option(NamedTuple):
    """One way to differ from the default.

    Attributes:
        factor: What differs.
        name: How.
        changes: Dotted setting of a recipe to its value.
    """

    factor: str
    name: str
    changes: Mapping[str, Any]


class DataSet(NamedTuple):
    """A data set of the study.

    Attributes:
        recipe: Makes the default on it: the library's, with what fits a study of ten seconds a cell.
        num_steps: Meta-steps that take the default about ten seconds of one core.
    """

    recipe: Callable[[], Recipe]
    num_steps: int


class Cell(NamedTuple):
    """One training of the study.

    Attributes:
        data_set: Name of the data set.
        option: What differs from the default.
        recipe: The whole configuration; its name is that of the run's folder.
        trained_as: The default, if training does not see what differs.
    """

    data_set: str
    option: Option
    recipe: Recipe
    trained_as: Recipe | None = None


def _images(name: str, **arguments: Any) -> Callable[[], Recipe]:
    """Returns a recipe of images, with a network of 32 channels and strides."""
    network = {"network.arguments.channels": 32, "network.arguments.downsample": "stride"}
    return lambda: get_recipe(name).replace({**network, **arguments})


def _table(source: TaskSource, likelihood: str, classes: ClassScope) -> Callable[[], Recipe]:
    """Returns what ``MetaLearner`` does with tables of a source."""

    def recipe() -> Recipe:
        tasks = source.sampler("train")
        found = find_likelihood(likelihood)
        num_outputs = found.num_outputs(tasks.num_outputs)
        network = default_network(tasks.input_shape, num_outputs, is_image=False, norm="none", seed=0)
        settings = network_settings(network)
        assert settings is not None
        return Recipe(
            name=source.name,
            description="the default for tables",
            network=settings,
            data=source,
            algorithm=find_algorithm("head", found, classes),
            likelihood=likelihood,
            adapt=("head.*",),
            classes=classes,
            trainer=TABLE_TRAINER,
        )

    return recipe


# Recipes have tasks of more classes, too slow for ten seconds, and heads that are options here; that of Omniglot has
# easier tests as well.
_OMNIGLOT: Mapping[str, Any] = {
    "data.rotated_tests": False,
    "data.num_train_ways": 20,
    "trainer.tasks_per_step": 2,
    "trainer.learning_rate": 2e-3,
    "algorithm": make_algorithm("softmax"),
}
_TINY_IMAGENET: Mapping[str, Any] = {
    "algorithm": make_algorithm("softmax"),
    "data.num_train_ways": None,
    "data.augmentation": UNCHANGED,
    "trainer.tasks_per_step": 2,
    "trainer.learning_rate": 2e-3,
}

DATA_SETS: Mapping[str, DataSet] = {
    "glyphs_5shot": DataSet(_images("glyphs_5way_5shot"), 220),
    "mixtures": DataSet(_table(Mixtures(), "categorical", "per_task"), 150),
    "sinusoid": DataSet(_table(Sinusoid(num_shots=10, noise_std=0.1), "gaussian", "shared"), 400),
    "random_slopes": DataSet(_table(RandomSlopes(), "gaussian", "shared"), 300),
    "glyphs_1shot": DataSet(_images("glyphs_5way_1shot"), 250),
    "fsmol": DataSet(lambda: get_recipe("fsmol").replace({"trainer.tasks_per_step": 4}), 60),
    "omniglot_1shot": DataSet(_images("omniglot_5way_1shot", **_OMNIGLOT), 150),
    "tiny_imagenet_5shot": DataSet(_images("tiny_imagenet_5way_5shot", **_TINY_IMAGENET), 200),
}
"""Name to data set, in the order in which they are run."""


def options(default: Recipe) -> list[Option]:
    """Returns the options on a data set, the default first.

    Args:
        default: The recipe of the default.
    """
    classes = default.algorithm.name == "softmax"
    found = [Option(DEFAULT, DEFAULT, {}), *(_for_classes(default) if classes else _for_numbers())]
    found += _for_all(default)
    return [one for one in found if one.factor == DEFAULT or default.replace(one.changes) != default]


def cells(name: str, *, scale: float, seed: int) -> list[Cell]:
    """Returns the cells of a data set, the default first.

    Args:
        name: Name of the data set.
        scale: Multiple of its ten seconds of training.
        seed: Seed of training.
    """
    data_set = DATA_SETS[name]
    num_steps = max(1, round(scale * data_set.num_steps))
    # One validation, at the end, which fits the output temperature.
    trainer = {"num_steps": num_steps, "validate_every": num_steps, "seed": seed}
    default = data_set.recipe().replace({f"trainer.{field}": value for field, value in trainer.items()})
    found: list[Cell] = []
    for option in options(default):
        title = f"{name}-{option.factor}-{option.name}".replace(" ", "_")
        text = f"the study: {option.factor} {option.name} on {name}"
        recipe = default.replace({**option.changes, "name": title, "description": text})
        # The outer loss at the mode knows no posterior.
        is_unseen = {*option.changes} == {_POSTERIOR} and getattr(recipe.algorithm, "outer", None) == "map_nll"
        found.append(Cell(name, option, recipe, found[0].recipe if is_unseen else None))
    return found


def _for_classes(default: Recipe) -> list[Option]:
    tied = default.classes == "per_task"
    return [
        Option("head", "gaussian classes", {"algorithm": make_algorithm("gaussian_classes", tied=tied)}),
        Option("head", "prototypes", {"algorithm": make_algorithm("prototypes")}),
        Option("head", "ridge", {"algorithm": make_algorithm("ridge", tied=tied)}),
        *_priors(default),
        *(Option("posterior temperature", f"{value:g}", {_POSTERIOR: value}) for value in (0.0, 0.01, 0.03, 0.1, 1.0)),
        *(Option("outer loss", value, {"algorithm.outer": value}) for value in ("map_nll", "predictive_nll")),
    ]


def _for_numbers() -> list[Option]:
    gp = make_algorithm("gp")
    return [
        Option("head", "gp", {"algorithm": gp}),
        Option("head", "gp on inputs", {"algorithm": gp, **_on_inputs()}),
        Option("head", "linear on inputs", _on_inputs()),
        *_priors(_table(RandomSlopes(), "gaussian", "shared")()),
        Option("covariance", "diagonal", {"algorithm.covariance": "diagonal"}),
        *(Option("temperature", f"{value:g}", {"algorithm.temperature": value}) for value in (0.1, 0.3, 3.0)),
        *(
            Option("outer loss", value, {"algorithm.outer": value})
            for value in ("predictive_nll", "expected_nll", "marginal")
        ),
    ]


def _on_inputs() -> dict[str, Any]:
    return {"network.arguments.hidden_sizes": (), "network.arguments.skip_inputs": False}


def _priors(default: Recipe) -> list[Option]:
    of_default: Any = default.algorithm
    own = {field.name: getattr(of_default.prior, field.name) for field in dataclasses.fields(of_default.prior)}
    families = {"diagonal": DiagonalColumnPrior, "low rank": LowRankColumnPrior, "full": FullColumnPrior}
    return [Option("prior", name, {"algorithm.prior": family(**own)}) for name, family in families.items()]


def _for_all(default: Recipe) -> list[Option]:
    norm = "network.arguments.norm"
    return [
        *(Option("normalisation", value, {norm: value}) for value in ("running", "batch", "group", "none")),
        Option("support mean", "subtracted", {"algorithm.centre": True}),
        *(
            Option("initial variance", f"{value:g}", {"algorithm.prior.initial_variance": value})
            for value in (0.1, 1.0, 10.0, 100.0)
        ),
        *(
            Option("log-variance rate", f"{value:g}", {"trainer.log_var_learning_rate": value})
            for value in (1e-3, 1e-2, 3e-2)
        ),
        # The default again: what differs between trainings, and so between any two options, by chance alone.
        *(
            Option("seed", str(value), {"trainer.seed": value})
            for value in (default.trainer.seed + 1, default.trainer.seed + 2)
        ),
    ]
