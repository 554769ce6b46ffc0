"""What every source of tasks offers, and what the sources of images share."""

import abc
import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol, TypeAlias

import torch

from ibaml import records
from ibaml.checks import require_positive_int
from ibaml.data.augmentation import UNCHANGED, Augmentation
from ibaml.data.episodes import EpisodeSampler
from ibaml.data.images import ClassImages
from ibaml.data.preprocessing import Preprocessing, image_preprocessing
from ibaml.types import TaskSampler

Split: TypeAlias = Literal["train", "validation", "test"]
"""Meta-training tasks, those that choose a checkpoint, and those that results are reported on."""


class TaskSource(Protocol):
    """A record of which tasks: it loads the data of a split and samples tasks from it.

    Sources are frozen dataclasses, so that a recipe which holds one can be stored as JSON.

    Attributes:
        name: Its name in ``SOURCES``.
        is_image: Whether inputs are images, ``[channels, height, width]``.
    """

    name: ClassVar[str]
    is_image: ClassVar[bool]

    @property
    def num_queries(self) -> int:
        """Query examples of a training task: of each class, for images."""
        ...

    @property
    def num_test_queries(self) -> int:
        """The same of a validation or test task."""
        ...

    def sampler(self, split: Split, *, data: Path | None = None, device: torch.device | str = "cpu") -> TaskSampler:
        """Loads the data of a split and returns its task sampler.

        Args:
            split: ``"train"``, ``"validation"`` or ``"test"``.
            data: Folder with data files, searched before ``$IBAML_DATA`` and the per-user cache.
            device: Where images are kept, as uint8; tasks made of them need no transfer.

        Raises:
            FileNotFoundError: If a data file is not found.
            ValueError: If a data file is damaged, or holds too few classes or examples.
        """
        ...

    def preprocessing(self) -> Preprocessing | None:
        """Returns how files of a user become inputs of a model trained on these tasks; None if they cannot."""
        ...


def queries_in(source: TaskSource, split: Split) -> int:
    """Returns the number of query examples of a task of a split."""
    return source.num_queries if split == "train" else source.num_test_queries


OF_TRAINING_ALONE: Mapping[str, bool] = {"of_training_alone": True}
"""Metadata of a source's field that changes no validation or test task."""


def settings_of_tests(source: TaskSource) -> dict[str, Any]:
    """Returns the settings of a source that decide its test tasks, as JSON."""
    fields: Any = dataclasses.fields(source)  # pyright: ignore[reportArgumentType]
    left_out = {field.name for field in fields if field.metadata.get("of_training_alone")}
    return {name: value for name, value in records.to_json(source).items() if name not in left_out}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImageSource(abc.ABC):
    """N-way K-shot classification of images; a source has a ``name`` and ``num_channels`` and loads ``images``.

    Attributes:
        num_ways: Classes of a task.
        num_shots: Support images of each class.
        num_queries: Query images of each class in training tasks.
        num_test_queries: Query images of each class in validation and test tasks.
        image_size: Height and width in pixels.
        num_train_ways: Classes of a training task. None: as many as of others.
        num_train_shots: Support images of each class in training tasks. None: as many as in others.
        augmentation: How images of training tasks change at every draw.

    Raises:
        TypeError: If a count is not an int.
        ValueError: If a count is below one.
    """

    num_ways: int = 5
    num_shots: int = 1
    num_queries: int = dataclasses.field(default=15, metadata=OF_TRAINING_ALONE)
    num_test_queries: int = 15
    image_size: int = 28
    num_train_ways: int | None = dataclasses.field(default=None, metadata=OF_TRAINING_ALONE)
    num_train_shots: int | None = dataclasses.field(default=None, metadata=OF_TRAINING_ALONE)
    augmentation: Augmentation = dataclasses.field(default=UNCHANGED, metadata=OF_TRAINING_ALONE)
    name: ClassVar[str]
    is_image: ClassVar[bool] = True
    num_channels: ClassVar[int] = 3

    def __post_init__(self) -> None:
        """Checks the counts."""
        for name in ("num_ways", "num_shots", "num_queries", "num_test_queries", "image_size"):
            require_positive_int(name, getattr(self, name))
        for name in ("num_train_ways", "num_train_shots"):
            if getattr(self, name) is not None:
                require_positive_int(name, getattr(self, name))

    @abc.abstractmethod
    def images(self, split: Split, *, data: Path | None = None) -> ClassImages:
        """Loads the classes of a split; see ``TaskSource.sampler``."""

    def sampler(self, split: Split, *, data: Path | None = None, device: torch.device | str = "cpu") -> EpisodeSampler:
        """Loads the images of a split and returns their task sampler; see ``TaskSource.sampler``."""
        is_training = split == "train"
        return EpisodeSampler(
            self.images(split, data=data).to(device),
            num_ways=(is_training and self.num_train_ways) or self.num_ways,
            num_shots=(is_training and self.num_train_shots) or self.num_shots,
            num_queries=queries_in(self, split),
            augmentation=self.augmentation if is_training else UNCHANGED,
        )

    def preprocessing(self) -> Preprocessing | None:
        """Returns how image files become inputs: resized, in [0, 1]."""
        return image_preprocessing((self.num_channels, self.image_size, self.image_size), self.num_ways)
