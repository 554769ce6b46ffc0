"""Recipes for sinusoid regression.

MAML has the settings of Finn et al. 2017: one inner step of size 0.01 on the squared error, which is 0.02 on the nll of
unit Gaussian noise, 25 tasks a meta-step, Adam with rate 1e-3, 70,000 meta-steps, ten query points. The Bayesian
methods learn the noise variance, which takes up what the posterior does not explain.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from ibaml.algorithms import make_algorithm
from ibaml.data.sources import Sinusoid
from ibaml.networks import NetworkSettings
from ibaml.priors import DiagonalPrior
from ibaml.recipes.settings import Recipe
from ibaml.solvers.inner import GradientDescent
from ibaml.train import TrainerSettings

_INNER: Mapping[str, GradientDescent] = {
    "maml": GradientDescent(num_steps=1, learning_rate=0.02),
    "abml": GradientDescent(num_steps=5, learning_rate=0.01),
    # Momentum and many steps, because an implicit gradient asks for a nearly solved inner problem: with ten steps the
    # learned noise shrinks, which sharpens the inner loss, until the run falls apart after some 2,000 meta-steps.
    "ibaml": GradientDescent(num_steps=20, learning_rate=0.002, momentum=0.8),
}
_BAYESIAN: Mapping[str, Any] = {"num_samples": 1, "prior": DiagonalPrior(initial_log_var=(-8.5, -8.5))}
_KL_WEIGHT = 0.005
_MAML_TRAINER = TrainerSettings(
    output_temperature=False,
    num_steps=70_000,
    tasks_per_step=25,
    learning_rate=1e-3,
    gradient_clip=None,
    validate_every=5000,
    num_validation_tasks=200,
    checkpoint_every=1000,
    log_every=500,
)
# With a rate of 3e-3 for them, single log-variances rose to -0.2 and the linear residual above 1.
_BAYESIAN_TRAINER = dataclasses.replace(
    _MAML_TRAINER,
    num_steps=10_000,
    learning_rate=3e-3,
    log_var_learning_rate=3e-4,
    gradient_clip=10.0,
    validate_every=500,
    checkpoint_every=200,
    log_every=50,
)


def _sinusoid(num_shots: int, algorithm: str) -> Recipe:
    bayesian = algorithm != "maml"
    settings: dict[str, Any] = {"inner": _INNER[algorithm]}
    if bayesian:
        settings |= {**_BAYESIAN, "temperature": num_shots * _KL_WEIGHT}
    return Recipe(
        name=f"sinusoid_{num_shots}shot_{algorithm}",
        description=f"{algorithm} on the whole network; sinusoid regression, {num_shots}-shot",
        data=Sinusoid(num_shots=num_shots, num_queries=10, num_test_queries=100),
        network=NetworkSettings(name="MLP", arguments={"num_outputs": 1, "input_shape": 1, "hidden_sizes": (40, 40)}),
        algorithm=make_algorithm(algorithm, **settings),
        trainer=_BAYESIAN_TRAINER if bayesian else _MAML_TRAINER,
        likelihood="gaussian" if bayesian else "unit_gaussian",
        num_test_tasks=1000,
    )


def _recipes() -> dict[str, Callable[[], Recipe]]:
    recipes: dict[str, Callable[[], Recipe]] = {}
    for num_shots in (5, 10):
        for algorithm in _INNER:
            recipes[f"sinusoid_{num_shots}shot_{algorithm}"] = lambda k=num_shots, a=algorithm: _sinusoid(k, a)
    return recipes


RECIPES: Mapping[str, Callable[[], Recipe]] = _recipes()
"""The recipes of this family by name."""
