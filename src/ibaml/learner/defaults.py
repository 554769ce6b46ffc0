"""What a learner uses where it is not told: an algorithm, and for data a network with sizes from the data.

A task adapts the last linear layer, the head, on features that all tasks share. So the inner problem is Bayesian linear
or logistic regression, or a generalised linear model, on learned features, which is solved exactly where the likelihood
allows. The network for tables is a small perceptron whose head sees the inputs as well as the learned features, that
for images is Conv4. For numbers, and for classes, there are up to four candidates, among which held-out tasks choose
(``ibaml.learner.choice``); for numbers with Gaussian noise on few inputs they are hierarchical models that are
estimated from the whole table at once (``ibaml.learner.hierarchical``). On the features of a backbone no network is
learned where each task has classes of its own.

Where a likelihood has no head, or another algorithm is asked for by name, a few steps of Adam nearly solve the
same convex problem. For regression the temperature is then 1, Bayes' rule, and a diagonal Gaussian describes the
posterior well enough. For classes it is 0.1: the exact posterior is narrow in the directions that the examples span, a
diagonal one cannot be, and at temperature 1 its samples blur every prediction.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from ibaml.algorithms import Algorithm, make_algorithm
from ibaml.algorithms.heads import gaussian, generalized_linear
from ibaml.algorithms.model import num_outputs_of
from ibaml.data.fixed_episodes import FixedEpisodes
from ibaml.data.prepare import Source
from ibaml.data.ragged import TaskSplits
from ibaml.likelihoods import Gaussian, Likelihood, find_likelihood
from ibaml.networks import MLP, Conv4, NormPolicy
from ibaml.priors import DiagonalColumnPrior, DiagonalPrior, FullColumnPrior
from ibaml.solvers.inner import Adam, RelativeAdam
from ibaml.train import TrainerSettings
from ibaml.train.whole_tasks import HasMarginal
from ibaml.types import ClassScope, TaskSampler, Tensor

HEAD = "head"
"""Name of the algorithm that is chosen by the likelihood."""

HEAD_PATTERN = "head.*"
"""Parameters that a task adapts in a default network."""

LINE, CORRELATED = "a line in the inputs", "a line with correlated weights"
CURVES, LEARNED_CURVES = "common and own curves", "curves with correlated weights"
BOTH, CLUSTERS = "learned features and inputs", "Gaussian classes in learned features"
"""Names of the candidates for tables."""

ON_FEATURES = "a line in the features"
"""Name of the candidate for classes of each task's own on the features of a backbone."""

LEAST_TASKS = 10
"""With fewer tasks nothing is held out: the first candidate is taken, for classes learned features."""

MOST_STEPS = 200
"""Of an estimation in closed form, which ends long before."""

_NUM_FEATURES = 16
_MOST_CORRELATED = 12  # Inputs; so many have 78 covariances.
_MOST_CORRELATED_OF_CLASSES, _TASKS_AN_INPUT = 24, 2
"""Inputs with correlated weights of classes, whose weak prior about independence bears more, if tasks are many."""
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

SHORT_TRAINER = dataclasses.replace(TABLE_TRAINER, num_steps=100, learning_rate=3e-2, log_var_learning_rate=0.1)
"""Outer loop for few parameters, and to tell candidates apart."""

FEATURE_TRAINER = dataclasses.replace(
    TABLE_TRAINER, num_steps=150, tasks_per_step=4, validate_every=150, num_validation_tasks=60
)
"""Outer loop for the prior over many given features: too short to choose among its states."""

IMAGE_TRAINER = TrainerSettings(
    num_steps=600,
    tasks_per_step=4,
    learning_rate=6e-3,
    log_var_learning_rate=1e-3,
    schedule="cosine",
    validate_every=200,
    num_validation_tasks=60,
    checkpoint_every=100,
)
"""Outer loop for heads on images."""


def further_trainer() -> TrainerSettings:
    """Returns the outer loop for tables after a comparison: half as many steps, from what that has learned."""
    num_steps = max(1, TABLE_TRAINER.num_steps // 2)
    return dataclasses.replace(TABLE_TRAINER, num_steps=num_steps, validate_every=max(1, num_steps // 2))


def trainer_settings(algorithm: Algorithm, source: Source, *, seed: int) -> TrainerSettings:
    """Returns settings of the outer loop that suit tasks.

    Args:
        algorithm: What adapts.
        source: The tasks.
        seed: Seed of training.
    """
    settings = TrainerSettings()
    if _is_image(source.train):
        settings = IMAGE_TRAINER if algorithm.uses_features else settings
    elif source.preprocessing is not None or algorithm.uses_features:
        settings = TABLE_TRAINER
    if isinstance(source.train, FixedEpisodes) and not source.train.has_equal_sizes:
        settings = dataclasses.replace(settings, tasks_per_step=1)
    return dataclasses.replace(settings, seed=seed)


def _is_image(tasks: TaskSampler) -> bool:
    """Whether inputs are ``[channels, height, width]``."""
    return len(tasks.input_shape) == 3


class Suited(NamedTuple):
    """What suits some data.

    Attributes:
        network: The network.
        algorithm: What adapts.
        likelihood: The likelihood, with initial values near those of the targets.
        adapt: Name patterns of the parameters that each task adapts.
        trainer: Outer loop, if not the usual one.
        in_whole: Whether the prior is over given features, so that it is estimated from whole tasks
            (``ibaml.train.whole_tasks``) unless settings of an outer loop are given.
    """

    network: nn.Module
    algorithm: Algorithm
    likelihood: Likelihood
    adapt: str | Sequence[str]
    trainer: TrainerSettings | None = None
    in_whole: bool = False


def find_algorithm(algorithm: str | Algorithm, likelihood: Likelihood, scope: ClassScope) -> Algorithm:
    """Returns the algorithm of a name; ``"head"`` stands for the head that suits a likelihood.

    Args:
        algorithm: A name, or an algorithm, which is returned.
        likelihood: Of the targets.
        scope: Whether classes are the same in all tasks.

    Raises:
        ValueError: If the name is unknown.
    """
    if not isinstance(algorithm, str):
        return algorithm
    if algorithm != HEAD:
        return make_algorithm(algorithm)
    if likelihood.target_kind == "classes":
        is_tied = scope == "per_task"
        return make_algorithm("softmax", prior=DiagonalColumnPrior(tied=is_tied, learn_mean=not is_tied))
    if gaussian.solves(likelihood):
        return make_algorithm("linear_gaussian")
    if generalized_linear.solves(likelihood):
        return make_algorithm("generalized_linear")
    return convex_algorithm("ibaml", 2 * _NUM_FEATURES, is_regression=True)


def suited_to(tasks: TaskSampler, parameters: Mapping[str, Any], algorithm: Algorithm) -> Mapping[str, Suited]:
    """Returns what suits tasks where a learner leaves it open, by name; simplest first if held-out tasks are to choose.

    Args:
        tasks: The training tasks.
        parameters: Arguments of the learner; names of an algorithm or a likelihood stand for what suits the data.
        algorithm: What the name of an algorithm stands for.

    Raises:
        ValueError: If a name is unknown.
    """
    adapt, seed, is_image = parameters["adapt"], parameters["seed"], _is_image(tasks)
    likelihood = find_likelihood(parameters["likelihood"])
    if algorithm.uses_features or not is_image:
        adapt = HEAD_PATTERN if adapt == "*" else adapt
    if not is_image and isinstance(parameters["algorithm"], str) and not algorithm.uses_features:
        name = algorithm.name if parameters["algorithm"] == HEAD else parameters["algorithm"]
        num_features = math.prod(tasks.input_shape) + _NUM_FEATURES // 4
        algorithm = convex_algorithm(name, num_features, is_regression=likelihood.target_kind != "classes")
    targets = _some_targets(tasks, seed=seed)
    if isinstance(parameters["likelihood"], str):
        likelihood = likelihood.suited_to(targets)
    num_outputs = likelihood.num_outputs(tasks.num_outputs)
    norm = "running" if algorithm.uses_features else "group"
    network = default_network(tasks.input_shape, num_outputs, is_image=is_image, norm=norm, seed=seed)
    scope = getattr(tasks, "class_scope", parameters["classes"])
    if likelihood.target_kind == "classes" and scope == "shared":
        likelihood.check_targets("y of the training tasks", targets, num_outputs)
        _start_from_base_rates(network, targets)
    both = Suited(network, algorithm, likelihood, adapt)
    has_own_classes = likelihood.target_kind == "classes" and scope == "per_task"
    if parameters.get("backbone") is not None and algorithm.uses_features and has_own_classes:
        return {ON_FEATURES: _on_features(both, tasks, is_open=parameters["algorithm"] == HEAD)}
    # Names of layers are those of the network with learned features.
    is_open = parameters["algorithm"] == HEAD and algorithm.uses_features and not parameters["freeze"]
    if is_image or not is_open or not isinstance(tasks, TaskSplits):
        return {BOTH: both}
    if tasks.num_ways is not None:
        # New classes in each task leave nothing to say of a line beforehand.
        return {**_clusters(both, tied=True), BOTH: both}
    return _candidates(tasks, both)


def _clusters(both: Suited, *, tied: bool) -> dict[str, Suited]:
    """Returns Gaussian classes in the features of the same network."""
    return {CLUSTERS: both._replace(algorithm=make_algorithm("gaussian_classes", tied=tied))}


def is_hierarchical(tasks: TaskSampler, candidates: Mapping[str, Suited]) -> bool:
    """Whether the candidates can be estimated in closed form from whole tasks (``ibaml.learner.hierarchical``).

    Args:
        tasks: The training tasks.
        candidates: What ``suited_to`` returned for them: with correlated weights where there are few inputs.
    """
    if CORRELATED not in candidates or not isinstance(tasks, TaskSplits):
        return False
    likelihood = candidates[CORRELATED].likelihood
    return isinstance(likelihood, Gaussian) and gaussian.solves(likelihood)


def _candidates(tasks: TaskSplits, both: Suited) -> dict[str, Suited]:
    """Returns lines in the inputs, and learned features beside them, simplest first.

    Those for numbers maximise the marginal likelihood of whole tasks, which needs fewer tasks than the density of their
    queries.
    """
    of_classes = both.likelihood.target_kind == "classes"
    if of_classes and len(tasks) < LEAST_TASKS:
        return {BOTH: both}
    num_inputs = math.prod(tasks.input_shape)
    most = min(_MOST_CORRELATED_OF_CLASSES, len(tasks) // _TASKS_AN_INPUT) if of_classes else 0
    is_narrow = num_inputs <= max(_MOST_CORRELATED, most)

    def on_inputs(algorithm: Algorithm) -> Suited:
        network = MLP(
            num_outputs_of(both.network), input_shape=tuple(tasks.input_shape), hidden_sizes=(), zero_head=True
        )
        if of_classes:
            network.get_parameter("head.bias").data.copy_(both.network.get_parameter("head.bias"))
        in_whole = isinstance(algorithm, HasMarginal)
        return both._replace(network=network, algorithm=algorithm, trainer=SHORT_TRAINER, in_whole=in_whole)

    if of_classes:
        # Bayes' rule as it is: few weights on given inputs, whose prior can be right.
        line = functools.partial(make_algorithm, "softmax", posterior_temperature=1.0, outer="predictive_nll")
        independent, correlated = (line(prior=prior(tied=False)) for prior in (DiagonalColumnPrior, FullColumnPrior))
    else:
        line = functools.partial(make_algorithm, both.algorithm.name, outer="marginal")
        independent, correlated = line(), line(prior=FullColumnPrior())
    found = {LINE: on_inputs(independent)}
    if is_narrow:
        found[CORRELATED] = on_inputs(correlated)
    if of_classes:
        return {**found, **_clusters(both, tied=False), BOTH: both}
    return {**found, BOTH: both._replace(algorithm=correlated if is_narrow else independent)}


def _on_features(both: Suited, tasks: TaskSampler, *, is_open: bool) -> Suited:
    """Returns a head on the features of a backbone as they are; if open, Gaussian classes.

    Few tasks tell what a backbone has learned from millions of examples, so that no layer is learned beside it: of each
    feature the prior learns how it varies between classes and within one. That needs no output temperature, and softmax
    regression, whose variances say what tells the classes of training apart, learned too much of these in 150 steps
    (``benchmarks/results/2026-11-28-backbones.md``).
    """
    inputs = tuple(tasks.input_shape)
    network = MLP(num_outputs_of(both.network), input_shape=inputs, hidden_sizes=(), zero_head=True)
    found = both._replace(network=network, trainer=FEATURE_TRAINER)
    return found._replace(algorithm=make_algorithm("gaussian_classes")) if is_open else found


def _some_targets(tasks: TaskSampler, *, seed: int) -> Tensor:
    """Returns the targets of some tasks, one task at a time because their sizes may differ."""
    generator = torch.Generator().manual_seed(seed)
    drawn = [tasks.sample(1, generator=generator) for _ in range(_NUM_TASKS_TO_START_FROM)]
    return torch.cat([batch.y[0] for episode in drawn for batch in episode])


def _start_from_base_rates(network: nn.Module, targets: Tensor) -> None:
    """Sets the biases of the last layer to the logarithms of how frequent classes are, one example of each added."""
    bias: Tensor = network.get_parameter("head.bias")
    counts = torch.bincount(targets, minlength=len(bias)) + 1
    with torch.no_grad():
        bias.copy_(torch.log(counts / counts.sum()))


def default_network(
    input_shape: Sequence[int], num_outputs: int, *, is_image: bool, norm: NormPolicy, seed: int
) -> nn.Module:
    """Builds the network: a perceptron for tables, Conv4 for images.

    Args:
        input_shape: Shape of one input.
        num_outputs: Number of outputs.
        is_image: Whether inputs are ``[channels, height, width]``.
        norm: How Conv4 normalises.
        seed: Seed of the initial weights.
    """
    generator = torch.Generator().manual_seed(seed)
    if is_image:
        channels, height, width = input_shape
        return Conv4(
            num_outputs,
            in_channels=channels,
            image_size=(height, width),
            norm=norm,
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


def convex_algorithm(name: str, num_features: int, *, is_regression: bool) -> Algorithm:
    """Returns an algorithm of the grid with settings for a linear layer on features of about unit scale.

    The prior starts with a variance that gives outputs of about unit variance, which is that of scaled targets.

    Args:
        name: Name of an algorithm.
        num_features: Features of an example.
        is_regression: Whether targets are real.

    Raises:
        ValueError: If the name is unknown.
    """
    algorithm = make_algorithm(name)
    if not algorithm.is_bayesian:
        return make_algorithm(name, inner=Adam(num_steps=20, learning_rate=0.1))
    log_var = -math.log(num_features)
    return make_algorithm(
        name,
        # With steps of one size, training that narrows the prior of some weights makes the inner problem diverge.
        inner=RelativeAdam(num_steps=20, learning_rate=0.2),
        prior=DiagonalPrior(initial_log_var=(log_var, log_var)),
        temperature=1.0 if is_regression else 0.1,
        num_samples=8,
        antithetic=True,
        num_evaluation_samples=50,
        # ABML is its outer loss.
        **({} if name == "abml" else {"outer": "predictive_nll"}),
    )
