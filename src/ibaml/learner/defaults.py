"""What a learner uses when it is given data and no network: sizes from the data, settings that suit small tasks.

The network is a small perceptron whose last layer, which sees the inputs as well as the learned features, adapts to
each task; the features are shared. So the inner problem is Bayesian linear (or logistic) regression on learned
features: convex, and nearly solved by a few steps of Adam. For regression the temperature is 1, Bayes' rule, and a
diagonal Gaussian describes the posterior well enough. For classes it is 0.1: the exact posterior is narrow in the
directions that the examples span, a diagonal one cannot be, and at temperature 1 its samples blur every prediction.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from ibaml.algorithms import Algorithm, make_algorithm
from ibaml.likelihoods import Likelihood, find_likelihood
from ibaml.networks import MLP, Conv4
from ibaml.priors import DiagonalPrior
from ibaml.solvers.inner import Adam, RelativeAdam
from ibaml.train import TrainerSettings
from ibaml.types import TaskSampler, Tensor

HEAD = "head.*"
"""Parameters that a task adapts in a default network for tables."""

_NUM_FEATURES = 16
_NUM_TASKS_TO_START_FROM = 32

TABLE_TRAINER = TrainerSettings(
    num_steps=300,
    tasks_per_step=16,
    learning_rate=1e-2,
    log_var_learning_rate=5e-2,
    schedule="cosine",
    validate_every=50,
    num_validation_tasks=40,
    checkpoint_every=50,
)
"""Outer loop for tables. Sixteen such small tasks cost hardly more time than one."""


class Suited(NamedTuple):
    """What suits some data.

    Attributes:
        network: The network.
        algorithm: What adapts.
        likelihood: The likelihood, with initial values near those of the targets.
        adapt: Name patterns of the parameters that each task adapts.
    """

    network: nn.Module
    algorithm: Algorithm
    likelihood: Likelihood
    adapt: str | Sequence[str]


def suited_to(tasks: TaskSampler, parameters: Mapping[str, Any], *, is_image: bool) -> Suited:
    """Returns the network that suits tasks, and what else a learner leaves open.

    Args:
        tasks: The training tasks.
        parameters: Arguments of the learner; names of an algorithm or a likelihood stand for what suits the data.
        is_image: Whether inputs are ``[channels, height, width]``.

    Raises:
        ValueError: If a name is unknown.
    """
    algorithm, adapt, seed = parameters["algorithm"], parameters["adapt"], parameters["seed"]
    likelihood = find_likelihood(parameters["likelihood"])
    if not is_image:
        adapt = HEAD if adapt == "*" else adapt
        if isinstance(algorithm, str):
            is_regression = likelihood.target_kind != "classes"
            algorithm = table_algorithm(algorithm, tasks.input_shape, is_regression=is_regression)
    if isinstance(parameters["likelihood"], str):
        likelihood = likelihood.suited_to(_some_targets(tasks, seed=seed))
    num_outputs = likelihood.num_outputs(tasks.num_outputs)
    network = default_network(tasks.input_shape, num_outputs, is_image=is_image, seed=seed)
    return Suited(network, make_algorithm(algorithm) if isinstance(algorithm, str) else algorithm, likelihood, adapt)


def _some_targets(tasks: TaskSampler, *, seed: int) -> Tensor:
    """Returns the targets of some tasks, one task at a time because their sizes may differ."""
    generator = torch.Generator().manual_seed(seed)
    drawn = [tasks.sample(1, generator=generator) for _ in range(_NUM_TASKS_TO_START_FROM)]
    return torch.cat([batch.y[0] for episode in drawn for batch in episode])


def default_network(input_shape: Sequence[int], num_outputs: int, *, is_image: bool, seed: int) -> nn.Module:
    """Builds the network: a perceptron for tables, Conv4 for images.

    Args:
        input_shape: Shape of one input.
        num_outputs: Number of outputs.
        is_image: Whether inputs are ``[channels, height, width]``.
        seed: Seed of the initial weights.
    """
    generator = torch.Generator().manual_seed(seed)
    if is_image:
        channels, height, width = input_shape
        return Conv4(
            num_outputs,
            in_channels=channels,
            image_size=(height, width),
            norm="group",
            downsample="stride",
            zero_head=True,
            generator=generator,
        )
    return MLP(
        num_outputs,
        input_shape=tuple(input_shape),
        hidden_sizes=(32, _NUM_FEATURES),
        activation="tanh",
        zero_head=True,
        skip_inputs=True,
        generator=generator,
    )


def table_algorithm(name: str, input_shape: Sequence[int], *, is_regression: bool) -> Algorithm:
    """Returns an algorithm with settings for a default network on scaled tables.

    The prior starts with a variance that gives outputs of about unit variance, which is that of the scaled targets.

    Args:
        name: Name of an algorithm.
        input_shape: Shape of one input.
        is_regression: Whether targets are real.

    Raises:
        ValueError: If the name is unknown.
    """
    log_var = -math.log(math.prod(input_shape) + _NUM_FEATURES // 4)
    prior = DiagonalPrior(initial_log_var=(log_var, log_var))
    algorithm = make_algorithm(name)
    if algorithm.uses_features:
        return algorithm
    if not algorithm.is_bayesian:
        return make_algorithm(name, inner=Adam(num_steps=20, learning_rate=0.1))
    return make_algorithm(
        name,
        # With steps of one size, training that narrows the prior of some weights makes the inner problem diverge.
        inner=RelativeAdam(num_steps=20, learning_rate=0.2),
        prior=prior,
        temperature=1.0 if is_regression else 0.1,
        num_samples=8,
        antithetic=True,
        num_evaluation_samples=50,
        # ABML is its outer loss.
        **({} if name == "abml" else {"outer": "predictive_nll"}),
    )
