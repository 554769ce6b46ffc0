"""Small trainings, what they leave, and how two of them are compared."""

import signal
from pathlib import Path

import torch

from ibaml import tree
from ibaml.algorithms import MetaParameters, make_algorithm
from ibaml.algorithms.model import Model, build_model
from ibaml.data import ClassImages, EpisodeSampler
from ibaml.likelihoods import Categorical, make_likelihood
from ibaml.networks import MLP
from ibaml.solvers.inner import GradientDescent
from ibaml.solvers.linear import CG
from ibaml.train.checkpoint import CHECKPOINT, load_tensors
from ibaml.train.log import METRICS, read_metrics
from ibaml.train.trainer import (
    Trainer,
    TrainerSettings,
    TrainingResult,
)
from ibaml.types import Episode, TaskSampler, Tensor

TIMINGS = ("seconds", "tasks_per_second")
ALGORITHMS = {
    "maml": make_algorithm("maml", inner=GradientDescent(num_steps=2, learning_rate=0.1)),
    "ibaml": make_algorithm(
        "ibaml",
        inner=GradientDescent(num_steps=2, learning_rate=0.1),
        num_samples=2,
        linear=CG(max_steps=2),
        temperature=0.1,
    ),
}
SMALL = TrainerSettings(
    num_steps=6,
    tasks_per_step=3,
    learning_rate=1e-2,
    validate_every=2,
    num_validation_tasks=3,
    checkpoint_every=1,
    log_every=1,
    fast=False,  # networks of a few weights are not worth tracing
)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def image_tasks(seed: int = 0) -> EpisodeSampler:
    """2-way 2-shot tasks over six classes of 2 x 2 images, each class about a brightness pattern of its own."""
    source = generator(seed)
    patterns = torch.randint(40, 216, (6, 1, 1, 2, 2), generator=source)
    images = patterns + torch.randint(-40, 40, (6, 6, 1, 2, 2), generator=source)
    data = ClassImages(
        images=images.reshape(36, 1, 2, 2).to(torch.uint8),
        class_start=torch.arange(7) * 6,
        class_names=tuple("abcdef"),
    )
    return EpisodeSampler(data, num_ways=2, num_shots=2, num_queries=3)


def image_model(seed: int = 0, num_outputs: int = 2) -> Model:
    network = MLP(num_outputs, input_shape=(1, 2, 2), hidden_sizes=(4, 4), activation="tanh", generator=generator(seed))
    return build_model(network, Categorical())


def sinusoid_model(seed: int = 0, width: int = 8) -> Model:
    network = MLP(1, input_shape=1, hidden_sizes=(width, width), activation="tanh", generator=generator(seed))
    return build_model(network, make_likelihood("gaussian", 1))


def make(
    folder: Path | None, name: str = "maml", settings: TrainerSettings = SMALL, kind: type[Trainer] = Trainer
) -> Trainer:
    return kind(image_model(), ALGORITHMS[name], settings, run_folder=folder)


def fit(folder: Path | None, name: str = "maml", settings: TrainerSettings = SMALL) -> TrainingResult:
    return make(folder, name, settings).fit(image_tasks(0), image_tasks(1))


class Interrupted(Trainer):
    """Gets a signal during the steps named by ``signals``."""

    signals: dict[int, list[int]] = {}

    def _train_step(self, tasks: TaskSampler) -> dict[str, float]:
        row = super()._train_step(tasks)
        for number in self.signals.get(self._step, []):
            signal.raise_signal(number)
        return row


class Spoilt:
    """Image tasks of which one call returns something else."""

    def __init__(self, call: int, spoil) -> None:
        self.tasks, self.call, self.spoil, self.count = image_tasks(0), call, spoil, 0
        self.input_shape, self.num_outputs = self.tasks.input_shape, self.tasks.num_outputs
        self.has_equal_sizes = True

    def sample(self, num_tasks: int, *, generator: torch.Generator) -> Episode:
        episode = self.tasks.sample(num_tasks, generator=generator)
        self.count += 1
        return self.spoil(episode) if self.count == self.call else episode


def rows_of(folder: Path) -> list[dict[str, float]]:
    rows = read_metrics(folder / METRICS)
    return [{name: value for name, value in row.items() if name not in TIMINGS} for row in rows]


def state_of(folder: Path) -> tuple[dict[str, Tensor], dict]:
    tensors, metadata = load_tensors(folder / CHECKPOINT)
    # The checksum of the rows, which hold times; ``rows_of`` compares the rest of them.
    del metadata["seconds"]
    metadata["running"].pop("written", {}).pop("sha256", None)
    return tensors, metadata


def assert_identical(first: Path, second: Path) -> None:
    """Every bit of both checkpoints and every logged number but times agree."""
    one, other = load_tensors(first / CHECKPOINT)[0], load_tensors(second / CHECKPOINT)[0]
    assert one.keys() == other.keys()
    for key in one:
        assert torch.equal(one[key], other[key]), key
    assert state_of(first)[1] == state_of(second)[1]
    assert rows_of(first) == rows_of(second)


def assert_same_meta(first: MetaParameters, second: MetaParameters) -> None:
    for one, other in zip(tree.leaves(first), tree.leaves(second), strict=True):
        assert torch.equal(one, other)
