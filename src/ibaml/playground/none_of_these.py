"""From which out-of-task score on a drawing is none of the classes: a threshold found on validation tasks.

The scale of the score hangs on how many classes and examples a task has, so that there is a threshold for each size.
"""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ibaml.atomic import write_text
from ibaml.data.images import ClassImages
from ibaml.learner import MetaLearner
from ibaml.likelihoods import ClassPrediction

FILE = "none_of_these.json"
WAYS = (2, 3, 5, 7, 10)
SHOTS = (1, 2, 3, 5)
_NUM_QUERIES = 5


@dataclasses.dataclass(frozen=True)
class Thresholds:
    """Thresholds for tasks of some sizes.

    Attributes:
        false_alarms: Share of the queries of a task's own classes that are called foreign.
        ways: Numbers of classes.
        shots: Numbers of examples of a class.
        scores: Threshold of the out-of-task score, ``[ways][shots]``.
        detected: Share of the foreign queries that are noticed, ``[ways][shots]``.
    """

    false_alarms: float
    ways: Sequence[int]
    shots: Sequence[int]
    scores: Sequence[Sequence[float]]
    detected: Sequence[Sequence[float]]

    def at(self, num_ways: int, mean_shots: float) -> float:
        """Returns the threshold of a task, linearly between those that were found.

        Args:
            num_ways: Classes of the task.
            mean_shots: Examples of a class, on average.
        """
        by_ways = [np.interp(mean_shots, self.shots, row) for row in self.scores]
        return float(np.interp(num_ways, self.ways, by_ways))

    def save(self, folder: Path) -> None:
        """Writes the thresholds beside a model.

        Raises:
            OSError: If the folder cannot be written.
        """
        write_text(folder / FILE, json.dumps(dataclasses.asdict(self), indent=2) + "\n")

    @classmethod
    def load(cls, folder: Path) -> "Thresholds":
        """Reads what ``save`` wrote.

        Raises:
            FileNotFoundError: If there are none.
        """
        found: dict[str, Any] = json.loads((folder / FILE).read_text())
        return cls(**found)


def find_thresholds(
    learner: MetaLearner,
    images: ClassImages,
    *,
    false_alarms: float = 0.1,
    ways: Sequence[int] = WAYS,
    shots: Sequence[int] = SHOTS,
    num_tasks: int = 100,
    seed: int = 0,
) -> Thresholds:
    """Finds the thresholds above which a given share of the queries of a task's own classes lies.

    Each task has one class more than its support: the queries of that one are foreign.

    Args:
        learner: A fitted learner of classes that each task has of its own.
        images: Validation classes, more than the largest of ``ways``.
        false_alarms: Share of own queries above the threshold.
        ways: Numbers of classes.
        shots: Numbers of examples of a class.
        num_tasks: Tasks of each size.
        seed: Names the tasks.
    """
    scores: list[list[float]] = []
    detected: list[list[float]] = []
    for num_ways in ways:
        scores.append([])
        detected.append([])
        for num_shots in shots:
            own, foreign = _scores(learner, images, num_ways, num_shots, num_tasks, seed)
            threshold = torch.quantile(own, 1 - false_alarms)
            scores[-1].append(round(float(threshold), 4))
            detected[-1].append(round(float((foreign > threshold).double().mean()), 4))
    return Thresholds(false_alarms, tuple(ways), tuple(shots), scores, detected)


def _scores(
    learner: MetaLearner, images: ClassImages, num_ways: int, num_shots: int, num_tasks: int, seed: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the scores of queries of a task's own classes and of one other class, over all tasks."""
    generator = torch.Generator().manual_seed(seed)
    labels = np.arange(num_ways).repeat(num_shots)
    own: list[torch.Tensor] = []
    foreign: list[torch.Tensor] = []
    for _ in range(num_tasks):
        chosen = torch.randperm(len(images.class_names), generator=generator)[: num_ways + 1]
        pictures = torch.stack([_shuffled(images, int(number), generator) for number in chosen])
        support, queries = pictures[:num_ways, :num_shots], pictures[:, num_shots : num_shots + _NUM_QUERIES]
        posterior = learner.adapt(support.flatten(0, 1).numpy(), labels)
        prediction = posterior.predict(queries.flatten(0, 1).numpy())
        assert isinstance(prediction, ClassPrediction)
        found = torch.from_numpy(prediction.out_of_task).double()
        own.append(found[: num_ways * _NUM_QUERIES])
        foreign.append(found[num_ways * _NUM_QUERIES :])
    return torch.cat(own), torch.cat(foreign)


def _shuffled(images: ClassImages, number: int, generator: torch.Generator) -> torch.Tensor:
    """Returns the images of a class in random order."""
    of_class = images.images[images.class_start[number] : images.class_start[number + 1]]
    return of_class[torch.randperm(len(of_class), generator=generator)]
