"""What every baseline is, and what it may know: training and validation tasks, never those of the test."""

import copy
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
from torch import nn

from ibaml import tree
from ibaml.algorithms import Algorithm, MetaParameters
from ibaml.data.episodes import EpisodeSampler
from ibaml.data.prepare import is_raw, prepare
from ibaml.learner import MetaLearner, defaults
from ibaml.learner.known_rows import columns_of
from ibaml.likelihoods import Categorical, Gaussian, Likelihood
from ibaml.networks import MLP, network_settings
from ibaml.posterior import FittedModel
from ibaml.train import TrainerSettings
from ibaml.train.evaluate import Evaluation, evaluate
from ibaml.types import TaskSampler

_MOST_TASKS = 100
"""Validation tasks that settings are chosen on, all of which pass a dozen times."""


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Problem:
    """What a baseline is fitted on: the tasks as the learner takes them, scaled and numbered.

    Attributes:
        learner: The fitted learner that baselines are put beside.
        train: Training tasks.
        validation: Validation tasks, on which everything is chosen.
        settings: Outer loop of baselines that train; the number of steps is found from the time.
        say: Called with a line about what is being done.
    """

    learner: MetaLearner
    train: TaskSampler
    validation: TaskSampler
    settings: TrainerSettings
    say: Callable[[str], None] = lambda line: None

    @property
    def is_regression(self) -> bool:
        """Whether targets are numbers."""
        return self.learner.likelihood.target_kind != "classes"

    @property
    def has_shared_classes(self) -> bool:
        """Whether targets are classes that mean the same in all tasks."""
        scope = getattr(self.train, "class_scope", self.learner.classes)
        return not self.is_regression and scope == "shared"

    @property
    def has_unmeasured_targets(self) -> bool:
        """Whether some of several targets were not measured in some training task."""
        return self.is_regression and any(bool(task.y.isnan().any()) for task in getattr(self.train, "tasks", ()))

    @property
    def num_outputs(self) -> int:
        """Numbers to predict, or classes of a task."""
        if self.is_regression:
            return self.train.num_outputs
        return max(self.train.num_outputs, self.learner.model.num_outputs)

    def linear(self, algorithm: Algorithm, *, noise_variance: float = 1.0) -> MetaLearner:
        """Returns an unfitted learner of classes, or numbers with Gaussian noise, whose features are the inputs.

        Args:
            algorithm: A head.
            noise_variance: Of numbers, at first.
        """
        network = MLP(self.num_outputs, input_shape=self.train.input_shape, hidden_sizes=(), zero_head=True)
        gaussian = Gaussian(num_targets=self.num_outputs, initial_noise_variance=noise_variance)
        return self._learner(network, algorithm, gaussian if self.is_regression else Categorical(), "head.*")

    def same_network(self, algorithm: Algorithm, *, adapt: str = "*", **changes: Any) -> MetaLearner:
        """Returns an unfitted learner with the learner's network and likelihood, afresh.

        A network of ``ibaml.networks`` gets new initial weights from the learner's seed; any other starts from the
        weights that the learner was given, as the learner did.

        Args:
            algorithm: What adapts.
            adapt: Name pattern of what each task adapts.
            **changes: Other constructor arguments of a network of ``ibaml.networks``.

        Raises:
            ValueError: If the network does not suit the algorithm.
        """
        own = self.learner
        network = fresh_network(own, **changes)
        return self._learner(network, algorithm, own.likelihood, adapt, freeze=own.freeze_patterns)

    def with_ways(self, num_ways: int) -> "Problem":
        """Returns the problem with training tasks of so many classes, where they are drawn from many."""
        tasks = self.train
        if not isinstance(tasks, EpisodeSampler) or tasks.num_ways == num_ways:
            return self
        tasks = EpisodeSampler(
            tasks.images,
            num_ways=num_ways,
            num_shots=tasks.num_shots,
            num_queries=tasks.num_queries,
            augmentation=tasks.augmentation,
        )
        return dataclasses.replace(self, train=tasks)

    def with_meta_parameters(self, learner: MetaLearner, meta: MetaParameters) -> MetaLearner:
        """Returns a learner fitted by other means than training.

        Args:
            learner: The unfitted learner.
            meta: What was fitted.
        """
        return learner.with_fitted(
            FittedModel(
                model=learner.model, algorithm=learner.algorithm, meta=meta, preprocessing=None, device=learner.device
            )
        )

    def validate(self, learner: MetaLearner) -> Evaluation:
        """Evaluates a fitted learner on the validation tasks, always the same ones."""
        number, seed = min(self.settings.num_validation_tasks, _MOST_TASKS), self.settings.seed + 10**6
        return evaluate(learner.fitted_model, self.validation, num_tasks=number, seed=seed)

    def _learner(
        self, network: nn.Module, algorithm: Algorithm, likelihood: Likelihood, adapt: str, **settings: Any
    ) -> MetaLearner:
        own = self.learner
        network = network.to(tree.leaves(own.model.adapted)[0].dtype)
        where: dict[str, Any] = {"classes": own.classes, "device": own.device, "seed": own.seed}
        return MetaLearner(network, algorithm, likelihood, adapt, **settings, **where)


class FittedBaseline(NamedTuple):
    """What a baseline has come to.

    Attributes:
        learner: It predicts as any learner does.
        chosen: What was chosen on the validation tasks, in words.
        seconds: Seconds of training, or of fitting if there is no training; choosing before training not included.
    """

    learner: MetaLearner
    chosen: str
    seconds: float


class Baseline(Protocol):
    """A simple or well-known method beside a learner: a frozen dataclass with its settings.

    Attributes:
        name: Name for tables and on the command line.
    """

    name: ClassVar[str]

    def suits(self, problem: Problem) -> bool:
        """Whether it makes sense for such tasks."""
        ...

    def fit(self, problem: Problem, *, seconds: float, folder: Path | None = None) -> FittedBaseline:
        """Fits the baseline on training tasks and chooses its settings on validation tasks.

        Args:
            problem: The tasks, as tensors.
            seconds: Time of training, for baselines that train.
            folder: Where training is stored, to be resumed from there.

        Raises:
            TrainingDivergedError: If training fails with all settings.
            ValueError: If a task does not suit the baseline.
        """
        ...


def pose(
    learner: MetaLearner,
    train_tasks: Any,
    validation_tasks: Any,
    *,
    settings: TrainerSettings | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> Problem:
    """Turns tasks into tensors as a fitted learner does.

    Args:
        learner: The fitted learner.
        train_tasks: Training tasks in any form that ``MetaLearner.fit`` takes.
        validation_tasks: Likewise, or a share of the training tasks.
        settings: Outer loop of baselines that train. None: those that ``fit`` would take.
        say: Called with a line about what is being done.

    Raises:
        NotFittedError: If the learner has not been fitted.
        TypeError: If tasks are of no accepted form.
        ValueError: If there are no validation tasks, or tasks do not fit the learner.
    """
    if validation_tasks is None:
        raise ValueError("validation_tasks is None, but baselines are tuned on such tasks: give some, or a share.")
    preprocessing = learner.fitted_model.preprocessing
    if preprocessing is None and not is_raw(train_tasks):
        raise TypeError(
            f"the learner was fitted on tensors, but train_tasks is a {type(train_tasks).__name__}: give a sampler or "
            "a sequence of Episodes."
        )
    source = prepare(
        train_tasks,
        validation_tasks,
        target_kind=learner.likelihood.target_kind,
        classes=learner.classes,
        splits=learner.splits,
        seed=learner.seed,
        dtype=tree.leaves(learner.model.adapted)[0].dtype,
        columns={} if preprocessing is None else columns_of(preprocessing, train_tasks),
        preprocessing=preprocessing,
    )
    assert source.validation is not None
    if settings is None:
        settings = defaults.trainer_settings(learner.algorithm, source, seed=learner.seed)
    return Problem(learner=learner, train=source.train, validation=source.validation, settings=settings, say=say)


def initial_meta(learner: MetaLearner) -> MetaParameters:
    """Returns the meta-parameters from which an unfitted learner would start."""
    model = learner.model
    return learner.algorithm.init(model.adapted, model.shared, generator=torch.Generator().manual_seed(learner.seed))


def fresh_network(learner: MetaLearner, **changes: Any) -> nn.Module:
    """Returns a learner's network with initial weights; see ``Problem.same_network``."""
    network = learner.network
    assert network is not None
    known = network_settings(network)
    if known is None:
        return copy.deepcopy(network)
    known = dataclasses.replace(known, arguments={**known.arguments, **changes})
    return known.build(generator=torch.Generator().manual_seed(learner.seed))
