"""An image that comes in several tasks of an evaluation passes through the network once.

A thousand 20-way 1-shot tasks of Omniglot hold 320,000 images, of which 33,840 are different. Where no task adapts the
body of the network, and the features of an image do not depend on those beside it, they are the same in every task.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import torch

from ibaml.algorithms.tail import FEATURES
from ibaml.data.augmentation import UNCHANGED
from ibaml.posterior import FittedModel
from ibaml.types import Episode, TaskSampler, Tensor

_MOST_BYTES = 2**30
"""Memory that features may take."""


class ImagesOnce:
    """A sampler of the same tasks with positions among all images for inputs, and a model that takes those.

    Features are computed when an image is first drawn. It is a TaskSampler for the model that it holds.

    Args:
        fitted: The model.
        tasks: Sampler with ``sample_positions``.
        features: Those of some image, ``[1, *feature_shape]``.

    Attributes:
        fitted: The adapted part of the model, on the features of all images that were drawn.
    """

    def __init__(self, fitted: FittedModel, tasks: Any, features: Tensor) -> None:
        self._whole, self._tasks = fitted, tasks
        num_images = len(tasks.images.images)
        self._features = features.new_zeros(num_images, *features.shape[1:])
        self._is_known = torch.zeros(num_images, dtype=torch.bool, device=self._features.device)
        shared = fitted.model.with_features(fitted.meta.shared, self._features)
        self.fitted = dataclasses.replace(
            fitted, model=fitted.model.on_features, meta=fitted.meta._replace(shared=shared)
        )
        self.input_shape = ()
        self.num_outputs = tasks.num_outputs
        self.has_equal_sizes = tasks.has_equal_sizes

    def sample(self, num_tasks: int, *, generator: torch.Generator) -> Episode:
        """Draws what the sampler of images draws, as positions, whose features there are from then on."""
        drawn = self._tasks.sample_positions(num_tasks, generator=generator)
        positions = torch.cat([batch.x.flatten() for batch in drawn]).unique()
        is_new = ~self._is_known[positions.to(self._is_known.device)]
        if is_new.any():
            new = positions[is_new.to(positions.device)]
            inputs = self._tasks.inputs_at(new).to(self._features.device)
            places = new.to(self._features.device)
            self._features[places] = self._whole.on_features(inputs)[1][FEATURES]
            self._is_known[places] = True
        return drawn

    def sample_classes(self, num_tasks: int, *, generator: torch.Generator) -> Tensor:
        """Returns which classes the tasks have."""
        return self._tasks.sample_classes(num_tasks, generator=generator)


def images_once(
    fitted: FittedModel, tasks: TaskSampler | Sequence[Episode], x: Tensor
) -> tuple[FittedModel, TaskSampler | Sequence[Episode]]:
    """Returns model and tasks such that no image passes twice, or both as they are where that cannot be.

    Args:
        fitted: The model.
        tasks: Source of the tasks, or the tasks themselves.
        x: Inputs of some task, on the device.
    """
    model = fitted.model
    if not hasattr(tasks, "sample_positions") or getattr(tasks, "augmentation", UNCHANGED) != UNCHANGED:
        return fitted, tasks
    if not len(x) or not model.splits(x) or not model.examples_stand_alone:
        return fitted, tasks
    if model.tail is None or next(model.tail.body.parameters(), None) is None:
        return fitted, tasks  # What comes before the adapted layers costs nothing.
    features = fitted.on_features(x[:1])[1][FEATURES]
    if len(tasks.images.images) * features.element_size() * math.prod(features.shape[1:]) > _MOST_BYTES:  # pyright: ignore[reportAttributeAccessIssue]
        return fitted, tasks
    once = ImagesOnce(fitted, tasks, features)
    return once.fitted, once
