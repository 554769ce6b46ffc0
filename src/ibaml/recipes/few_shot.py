"""Recipes for Table 1 and Fig. 3 of the paper: five methods on miniImageNet and on its stand-in, at two scales.

The paper's settings (Zhang et al. 2023) are those of scale ``"paper"``: Conv4 with 32 channels and max-pooling on
84 x 84 images, 40,000 meta-steps of two tasks, Adam with rate 1e-3, inner steps of size 1e-2, temperature 0.01, five
weight samples in training and ten in prediction, initial log-variances from U[-10, -9], five plain conjugate-gradient
steps, the hyper-prior N(0, 1) on means and Gamma(1, 0.01) on precisions, 15 query images a class.
"""

from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

from ibaml.algorithms import Algorithm, make_algorithm
from ibaml.data.sources import MiniImagenet, TinyImagenet
from ibaml.networks import NetworkSettings
from ibaml.priors import DiagonalPrior
from ibaml.recipes.settings import Recipe
from ibaml.solvers.inner import GradientDescent
from ibaml.solvers.linear import CG
from ibaml.train import TrainerSettings

Scale = Literal["paper", "laptop"]
METHODS: Mapping[str, tuple[str, int]] = {
    "maml_k5": ("maml", 5),
    "abml_k5": ("abml", 5),
    "ibaml_k5": ("ibaml", 5),
    "ibaml_k10": ("ibaml", 10),
    "ibaml_k15": ("ibaml", 15),
}
"""The rows of Table 1: algorithm and number of inner steps."""

_SOURCES = {"mini_imagenet": (MiniImagenet, "miniImageNet"), "tiny_imagenet": (TinyImagenet, "Tiny-ImageNet")}
_NUM_WAYS = 5
_NUM_QUERIES = 15
_TEMPERATURE = 0.01
_PAPER_NUM_STEPS = 40_000


class _Size(NamedTuple):
    """What differs between the scales; all else is the paper's."""

    image_size: int
    network: Mapping[str, Any]
    inner_learning_rate: float
    num_samples: int
    initial_log_var: tuple[float, float]
    trainer: TrainerSettings


_SIZES: Mapping[Scale, _Size] = {
    "paper": _Size(
        image_size=84,
        network={"channels": 32, "downsample": "max_pool"},
        inner_learning_rate=1e-2,
        num_samples=5,
        initial_log_var=(-10.0, -9.0),
        trainer=TrainerSettings(
            output_temperature=False,
            num_steps=_PAPER_NUM_STEPS,
            tasks_per_step=2,
            learning_rate=1e-3,
            validate_every=1000,
            num_validation_tasks=200,
            checkpoint_every=100,
            log_every=20,
        ),
    ),
    # Inner steps of 1e-2 and a random head learn next to nothing in a few hundred meta-steps (MAML, 5-shot: 22% on
    # validation tasks after 200, with 20% by chance). With the larger steps the prior variances are larger too: the
    # product of the step size and lam / D has to stay below 2, also in 1-shot tasks. Strided convolutions cost a
    # fraction of pooling here and batch well over tasks.
    "laptop": _Size(
        image_size=32,
        network={"channels": 16, "downsample": "stride", "zero_head": True},
        inner_learning_rate=5e-2,
        num_samples=2,
        initial_log_var=(-9.0, -8.0),
        trainer=TrainerSettings(
            output_temperature=False,
            num_steps=800,
            tasks_per_step=2,
            learning_rate=3e-3,
            log_var_learning_rate=1e-3,
            validate_every=100,
            num_validation_tasks=40,
            checkpoint_every=50,
            log_every=10,
        ),
    ),
}


def recipe_name(source: str, num_shots: int, method: str, scale: Scale) -> str:
    """Returns the name of a recipe of this family, such as ``tiny_imagenet_5way_5shot_ibaml_k10_laptop``."""
    return f"{source}_{_NUM_WAYS}way_{num_shots}shot_{method}{'_laptop' if scale == 'laptop' else ''}"


def _few_shot(source: str, num_shots: int, method: str, scale: Scale) -> Recipe:
    source_class, display_name = _SOURCES[source]
    size = _SIZES[scale]
    what = "the paper's settings" if scale == "paper" else "LAPTOP SCALE, not the paper's network and steps"
    algorithm, num_inner_steps = METHODS[method]
    return Recipe(
        name=recipe_name(source, num_shots, method, scale),
        description=(
            f"{algorithm} on the whole network, K={num_inner_steps}, {display_name}, 5-way {num_shots}-shot; {what}"
        ),
        data=source_class(
            num_ways=_NUM_WAYS,
            num_shots=num_shots,
            num_queries=_NUM_QUERIES,
            num_test_queries=_NUM_QUERIES,
            image_size=size.image_size,
        ),
        network=NetworkSettings(
            name="Conv4",
            arguments={"num_outputs": _NUM_WAYS, "in_channels": 3, "image_size": size.image_size, **size.network},
        ),
        algorithm=_algorithm(algorithm, num_inner_steps, num_shots, size),
        trainer=size.trainer,
        num_test_tasks=1000,
    )


def _algorithm(name: str, num_inner_steps: int, num_shots: int, size: _Size) -> Algorithm:
    inner = GradientDescent(num_steps=num_inner_steps, learning_rate=size.inner_learning_rate)
    if name == "maml":
        return make_algorithm(name, inner=inner)
    # The objective of ABML counts the hyper-prior once over all of training, with the temperature of the other terms;
    # the loss of a task is here a mean over its examples.
    num_examples = _NUM_WAYS * (num_shots + _NUM_QUERIES)
    settings: dict[str, Any] = {
        "inner": inner,
        "prior": DiagonalPrior(initial_log_var=size.initial_log_var),
        "temperature": _TEMPERATURE,
        "num_samples": size.num_samples,
        "num_evaluation_samples": 10,
        "hyper_prior_weight": _TEMPERATURE / (num_examples * _PAPER_NUM_STEPS),
    }
    if name == "ibaml":
        settings |= {"outer": "elbo", "linear": CG(max_steps=5), "precondition": False}
    return make_algorithm(name, **settings)


def _recipes() -> dict[str, Callable[[], Recipe]]:
    recipes: dict[str, Callable[[], Recipe]] = {}
    for source in _SOURCES:
        for scale in _SIZES:
            for num_shots in (1, 5):
                for method in METHODS:
                    name = recipe_name(source, num_shots, method, scale)
                    recipes[name] = lambda s=source, k=num_shots, m=method, c=scale: _few_shot(s, k, m, c)
    return recipes


RECIPES: Mapping[str, Callable[[], Recipe]] = _recipes()
"""The recipes of this family by name."""
