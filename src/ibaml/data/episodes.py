"""The sampler that draws few-shot classification tasks from images grouped by class."""

import torch

from ibaml.checks import require_cpu_generator, require_positive_int
from ibaml.data.augmentation import UNCHANGED, Augmentation
from ibaml.data.images import ClassImages, scale_pixels
from ibaml.types import Batch, ClassScope, Episode, PyTree, Tensor


class EpisodeSampler:
    """Draws N-way K-shot classification tasks: a TaskSampler over ClassImages.

    Each task takes ``num_ways`` distinct classes in random order, uniformly over all classes whatever their sizes, and
    from each class ``num_shots + num_queries`` distinct images, uniformly. The label of a class is its place in that
    order, so that nothing about a class carries over from task to task.

    Cost: ``num_tasks * (num_classes + num_ways * largest_class)`` random numbers; no Python loop over tasks.

    Args:
        images: The classes to draw from.
        num_ways: Classes in a task.
        num_shots: Support images of each class.
        num_queries: Query images of each class.
        augmentation: How images are changed at every draw.

    Raises:
        TypeError: If ``images`` is not ClassImages, ``augmentation`` no Augmentation, or a count is not an int.
        ValueError: If a count is below one, there are fewer classes than ``num_ways`` or a class has fewer than
            ``num_shots + num_queries`` images.

    Examples:
        >>> data = ClassImages(
        ...     images=torch.zeros(12, 1, 4, 4, dtype=torch.uint8),
        ...     class_start=torch.tensor([0, 4, 8, 12]),
        ...     class_names=("a", "b", "c"),
        ... )
        >>> sampler = EpisodeSampler(data, num_ways=2, num_shots=1, num_queries=3)
        >>> episode = sampler.sample(7, generator=torch.Generator().manual_seed(0))
        >>> episode.support.x.shape, episode.query.x.shape
        (torch.Size([7, 2, 1, 4, 4]), torch.Size([7, 6, 1, 4, 4]))
        >>> episode.query.y[0]
        tensor([0, 0, 0, 1, 1, 1])
    """

    def __init__(
        self,
        images: ClassImages,
        *,
        num_ways: int,
        num_shots: int,
        num_queries: int,
        augmentation: Augmentation = UNCHANGED,
    ) -> None:
        """Checks that the classes suffice; see the class for the arguments."""
        if not isinstance(images, ClassImages):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(f"images must be ClassImages, got {type(images).__name__}; use one of the load functions.")
        if not isinstance(augmentation, Augmentation):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(
                f"augmentation must be an ibaml.data.Augmentation, got {type(augmentation).__name__}; to leave images "
                "as they are leave it out."
            )
        self.images = images
        self.augmentation = augmentation
        self.num_ways = require_positive_int("num_ways", num_ways)
        self.num_shots = require_positive_int("num_shots", num_shots)
        self.num_queries = require_positive_int("num_queries", num_queries)
        if images.num_classes < num_ways:
            raise ValueError(
                f"num_ways={num_ways} needs at least {num_ways} classes, got {images.num_classes}; "
                "lower num_ways or add classes."
            )
        self._class_start = images.class_start[:-1].cpu()
        self._class_sizes = images.class_sizes.cpu()
        needed = num_shots + num_queries
        smallest = int(self._class_sizes.argmin())
        if (size := int(self._class_sizes[smallest])) < needed:
            raise ValueError(
                f"class {images.class_names[smallest]!r} has {size} images, but num_shots + num_queries = "
                f"{num_shots} + {num_queries} = {needed} are needed of every class; "
                "lower them or leave the class out with select()."
            )

    @property
    def class_scope(self) -> ClassScope:
        """``"per_task"``: a label says nothing about a class beyond its task."""
        return "per_task"

    @property
    def has_equal_sizes(self) -> bool:
        """True: every draw has the same sizes."""
        return True

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Channels, height and width of an image."""
        return self.images.image_shape

    @property
    def num_outputs(self) -> int:
        """Number of classes in a task."""
        return self.num_ways

    def content(self) -> PyTree:
        """Returns what decides the draws: the same for images on any device, whose tasks may differ in a last digit."""
        images, changes = self.images, self.augmentation
        own = images.images, self._class_start, self._class_sizes, self.num_ways, self.num_shots, self.num_queries
        return own if changes == UNCHANGED else (*own, changes.flip, changes.crop, changes.colour)

    def sample(self, num_tasks: int, *, generator: torch.Generator) -> Episode:
        """Draws tasks.

        Args:
            num_tasks: Number of tasks, at least one.
            generator: CPU generator; its state alone decides the result.

        Returns:
            An Episode on the images' device. Inputs are float32 in [0, 1] of shape
            ``[num_tasks, num_ways * num_shots, channels, height, width]`` (queries: ``num_ways * num_queries``), labels
            int64 of shape ``[num_tasks, num_ways * num_shots]``. Examples are grouped by class, label 0 first.

        Raises:
            TypeError: If ``num_tasks`` is not an int or ``generator`` not a generator.
            ValueError: If ``num_tasks`` is below one or the generator is not on the CPU.
        """
        drawn = self.sample_positions(num_tasks, generator=generator)
        drawn = Episode(*(batch._replace(x=self.inputs_at(batch.x)) for batch in drawn))
        if self.augmentation == UNCHANGED:
            return drawn
        change = self.augmentation.apply
        return Episode(*(batch._replace(x=change(batch.x, generator=generator)) for batch in drawn))

    def sample_positions(self, num_tasks: int, *, generator: torch.Generator) -> Episode:
        """Draws the tasks that ``sample`` draws, with positions among all images for inputs.

        Args:
            num_tasks: As in ``sample``.
            generator: As in ``sample``.

        Returns:
            An Episode on the images' device; positions are int64 of the shape of the labels.

        Raises:
            TypeError: As in ``sample``.
            ValueError: As in ``sample``.
        """
        num_images = self.num_shots + self.num_queries
        classes = self.sample_classes(num_tasks, generator=generator)
        sizes = self._class_sizes[classes]
        keys = torch.rand(
            num_tasks, self.num_ways, int(self._class_sizes.max()), generator=generator, dtype=torch.float64
        )
        # Ragged classes: places past the end of a class lose to every real one, of which there are enough.
        keys.masked_fill_(torch.arange(keys.shape[-1]) >= sizes.unsqueeze(-1), -1.0)
        positions = self._class_start[classes].unsqueeze(-1) + keys.topk(num_images).indices
        labels = torch.arange(self.num_ways).unsqueeze(-1).expand(num_tasks, self.num_ways, num_images)
        parts = (slice(self.num_shots), slice(self.num_shots, None))
        device = self.images.images.device
        return Episode(
            *(Batch(*(each[..., part].flatten(1).to(device) for each in (positions, labels))) for part in parts)
        )

    def inputs_at(self, positions: Tensor) -> Tensor:
        """Returns the inputs at some positions among all images, unchanged by augmentation.

        Args:
            positions: Int64 of any shape.

        Returns:
            float32 in [0, 1], ``[*positions.shape, *input_shape]``.
        """
        return scale_pixels(self.images.images[positions])

    def sample_classes(self, num_tasks: int, *, generator: torch.Generator) -> Tensor:
        """Returns which classes the tasks have that ``sample`` draws from a generator in the same state.

        Args:
            num_tasks: As in ``sample``.
            generator: As in ``sample``; nothing but the classes is drawn from it.

        Returns:
            Index of each class among those of ``images``, in the order of the labels, int64, ``[num_tasks, num_ways]``.

        Raises:
            TypeError: As in ``sample``.
            ValueError: As in ``sample``.
        """
        require_positive_int("num_tasks", num_tasks)
        require_cpu_generator(generator)
        # The places of the largest of i.i.d. uniform keys, in descending order of the keys, are a uniformly random
        # ordered subset. float64 makes ties between keys (which topk would break by position) practically impossible.
        keys = torch.rand(num_tasks, self.images.num_classes, generator=generator, dtype=torch.float64)
        return keys.topk(self.num_ways).indices
