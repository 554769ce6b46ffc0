"""Recipes for characters: rendered glyphs, which need no download, and Omniglot."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from ibaml.algorithms import Algorithm, make_algorithm
from ibaml.data.sources import Glyphs, Omniglot
from ibaml.networks import NetworkSettings
from ibaml.priors import DiagonalPrior
from ibaml.recipes.settings import Recipe
from ibaml.solvers.inner import GradientDescent
from ibaml.solvers.linear import CG
from ibaml.train import TrainerSettings

# An implicit gradient is as good as the inner problem is solved, and it does not see the inner solver: with larger
# steps or a weaker prior these runs ended where the inner loss was too sharp for gradient descent, with fewer steps
# they learned less. A KL weight of 1.7e-4 and log-variances of -8 hold the weights with a strength of 0.5. In so few
# steps the variances stay far from stationary, where the free preconditioner does not help.
_KL_WEIGHT = 1.7e-4
_PRIOR = DiagonalPrior(initial_log_var=(-8.0, -8.0))
_IMAGE_ALGORITHMS: dict[str, dict[str, Any]] = {
    "maml": {"inner": GradientDescent(num_steps=3, learning_rate=0.4)},
    "imaml": {
        "inner": GradientDescent(num_steps=12, learning_rate=0.1),
        "linear": CG(max_steps=4),
        "proximal_strength": 0.5,
    },
    "abml": {"inner": GradientDescent(num_steps=3, learning_rate=0.4), "prior": _PRIOR, "num_samples": 1},
    "ibaml": {
        "inner": GradientDescent(num_steps=12, learning_rate=0.1),
        "prior": _PRIOR,
        "num_samples": 1,
        "linear": CG(max_steps=4),
        "precondition": False,
    },
}


def _image_algorithm(name: str, num_support: int, learning_rate: float | None = None) -> Algorithm:
    """Returns the algorithm of an image recipe, with the same KL weight whatever the size of the support set."""
    settings = _IMAGE_ALGORITHMS[name]
    if learning_rate is not None:
        settings = settings | {"inner": dataclasses.replace(settings["inner"], learning_rate=learning_rate)}
    if "prior" in settings:
        settings = settings | {"temperature": round(num_support * _KL_WEIGHT, 6)}
    return make_algorithm(name, **settings)


def _glyphs(algorithm: str) -> Recipe:
    return Recipe(
        name=f"glyphs_5way_5shot_{algorithm}",
        description=(
            f"{algorithm} on the whole network; rendered characters, 5-way 5-shot; no Georgian or Armenian is seen in "
            "training"
        ),
        data=Glyphs(num_ways=5, num_shots=5, num_queries=5, num_test_queries=15),
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
    return Recipe(
        name=f"omniglot_{num_ways}way_{num_shots}shot_{algorithm}",
        description=(
            f"{algorithm} on the whole network; Omniglot, {num_ways}-way {num_shots}-shot, split of Vinyals et al. 2016"
        ),
        data=Omniglot(num_ways=num_ways, num_shots=num_shots, num_queries=num_shots, num_test_queries=15),
        network=NetworkSettings(
            name="Conv4", arguments={"num_outputs": num_ways, "channels": 64, "downsample": "stride", "zero_head": True}
        ),
        algorithm=_image_algorithm(algorithm, num_ways * num_shots, learning_rate=0.1 if num_ways == 20 else None),
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


def _recipes() -> dict[str, Callable[[], Recipe]]:
    recipes: dict[str, Callable[[], Recipe]] = {}
    for algorithm in _IMAGE_ALGORITHMS:
        recipes[f"glyphs_5way_5shot_{algorithm}"] = lambda a=algorithm: _glyphs(a)
    for num_ways, num_shots in ((5, 1), (5, 5), (20, 1)):
        for algorithm in _IMAGE_ALGORITHMS:
            name = f"omniglot_{num_ways}way_{num_shots}shot_{algorithm}"
            recipes[name] = lambda w=num_ways, k=num_shots, a=algorithm: _omniglot(w, k, a)
    return recipes


RECIPES: Mapping[str, Callable[[], Recipe]] = _recipes()
"""The recipes of this family by name."""
