"""Samplers of tasks whose inputs are features, scaled, in the place of samplers of what these were computed from."""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch

from ibaml.data.augmentation import UNCHANGED, Augmentation
from ibaml.data.episodes import EpisodeSampler
from ibaml.types import Batch, Episode, PyTree, TaskSampler, Tensor


class FeatureEpisodes(EpisodeSampler):
    """Draws the tasks of another sampler, with the features of its images.

    Args:
        sampler: Which classes, and how many examples of each.
        features: Of each of its images, ``[num_images, num_features]``, or as a backbone takes them.
        augmentation: How these images are changed at every draw.
    """

    def __init__(self, sampler: EpisodeSampler, features: Tensor, augmentation: Augmentation = UNCHANGED) -> None:
        # Pixels are not needed any more: one for each image keeps the classes.
        images = dataclasses.replace(sampler.images, images=torch.zeros(len(features), 1, 1, 1, dtype=torch.uint8))
        super().__init__(
            images,
            num_ways=sampler.num_ways,
            num_shots=sampler.num_shots,
            num_queries=sampler.num_queries,
            augmentation=augmentation,
        )
        self.features = features

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Number of features."""
        return tuple(self.features.shape[1:])

    def content(self) -> PyTree:
        """Returns what decides the draws."""
        return self.features, *super().content()[1:]

    def inputs_at(self, positions: Tensor) -> Tensor:
        """Returns the features at some positions, ``[*positions.shape, num_features]``."""
        return self.features[positions]


class FeatureTasks:
    """Draws the tasks of any sampler and computes their features.

    Args:
        sampler: The sampler.
        to_features: Features of inputs ``[num_inputs, *input_shape]``, scaled.
        input_shape: Shape of the features of one input.
    """

    def __init__(
        self, sampler: TaskSampler, to_features: Callable[[Tensor], Tensor], input_shape: tuple[int, ...]
    ) -> None:
        self.sampler = sampler
        self.input_shape: tuple[int, ...] = input_shape
        self._to_features = to_features
        # What a sampler may offer beside the Protocol, this one has where that one does.
        for name in ("class_scope", "sample_classes", "sample_indices", "left_out"):
            if hasattr(sampler, name):
                setattr(self, name, getattr(sampler, name))

    @property
    def num_outputs(self) -> int:
        """Number of classes or of target dimensions."""
        return self.sampler.num_outputs

    @property
    def has_equal_sizes(self) -> bool:
        """Whether all draws have the same sizes."""
        return self.sampler.has_equal_sizes

    def sample(self, num_tasks: int, *, generator: torch.Generator) -> Episode:
        """Draws tasks; see ``TaskSampler``."""
        drawn = self.sampler.sample(num_tasks, generator=generator)
        return Episode(*(self._encoded(batch) for batch in drawn))

    def _encoded(self, batch: Batch) -> Batch:
        features: Any = self._to_features(batch.x.flatten(0, 1))
        return Batch(features.unflatten(0, batch.x.shape[:2]), batch.y)
