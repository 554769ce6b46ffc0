"""Labelled images grouped by class, and the sampler that draws few-shot classification tasks from them."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ibaml.data.arguments import require_cpu_generator, require_positive_int
from ibaml.types import Batch, Episode, Tensor


@dataclass(frozen=True, kw_only=True, eq=False)
class ClassImages:
    """Images sorted by class; classes may have different numbers of images.

    The images of class ``c`` are ``images[class_start[c]:class_start[c + 1]]``.

    Attributes:
        images: uint8 in 0..255, shape ``[num_images, channels, height, width]``, on any device.
        class_start: int64, shape ``[num_classes + 1]``: first image of each class, then ``num_images``.
        class_names: One distinct name per class.

    Raises:
        TypeError: If ``images`` is not uint8 or ``class_start`` not int64.
        ValueError: If shapes disagree, ``class_start`` does not run from 0 to ``num_images``, names repeat or
            a class has no image.

    Examples:
        >>> data = ClassImages(
        ...     images=torch.zeros(5, 1, 4, 4, dtype=torch.uint8),
        ...     class_start=torch.tensor([0, 2, 5]),
        ...     class_names=("a", "b"),
        ... )
        >>> data.num_classes, data.image_shape, data.class_sizes.tolist()
        (2, (1, 4, 4), [2, 3])
    """

    images: Tensor
    class_start: Tensor
    class_names: tuple[str, ...]

    def __post_init__(self) -> None:
        """Checks that the three fields describe the same classes."""
        if self.images.dtype != torch.uint8:
            raise TypeError(f"images must be uint8 in 0..255, got {self.images.dtype}; convert before building.")
        if self.class_start.dtype != torch.int64:
            raise TypeError(f"class_start must be int64, got {self.class_start.dtype}; use class_start.long().")
        if self.images.ndim != 4:
            raise ValueError(
                "images must have shape [num_images, channels, height, width], "
                f"got {tuple(self.images.shape)}; grey images need a channel axis of length 1."
            )
        if self.class_start.ndim != 1 or self.class_start.numel() != len(self.class_names) + 1:
            raise ValueError(
                f"class_start must have one entry per class and one more, [{len(self.class_names) + 1}] for "
                f"{len(self.class_names)} class_names, got shape {tuple(self.class_start.shape)}."
            )
        if not self.class_names:
            raise ValueError("class_names is empty: at least one class is needed.")
        if len(set(self.class_names)) != len(self.class_names):
            repeated = next(name for name in self.class_names if self.class_names.count(name) > 1)
            raise ValueError(f"class_names must be distinct, {repeated!r} occurs twice; rename or merge the classes.")
        starts = self.class_start.tolist()
        if starts[0] != 0 or starts[-1] != len(self.images):
            raise ValueError(
                f"class_start must run from 0 to the number of images {len(self.images)}, "
                f"got {starts[0]} to {starts[-1]}."
            )
        for name, start, end in zip(self.class_names, starts[:-1], starts[1:], strict=True):
            if end <= start:
                raise ValueError(f"class {name!r} has no image (class_start {start} to {end}); leave it out.")

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.class_names)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of every image."""
        _, channels, height, width = self.images.shape
        return channels, height, width

    @property
    def class_sizes(self) -> Tensor:
        """Number of images of each class, int64, shape ``[num_classes]``."""
        return self.class_start.diff()

    def select(self, class_indices: Sequence[int] | Tensor) -> "ClassImages":
        """Returns the chosen classes, in the order given.

        Args:
            class_indices: Distinct integers in ``0..num_classes - 1``.

        Returns:
            The images of those classes, copied.

        Raises:
            ValueError: If no class is chosen, one is chosen twice or an index is out of range.

        Examples:
            >>> data = ClassImages(
            ...     images=torch.arange(3, dtype=torch.uint8).reshape(3, 1, 1, 1),
            ...     class_start=torch.tensor([0, 1, 3]),
            ...     class_names=("a", "b"),
            ... )
            >>> data.select([1]).images.flatten()
            tensor([1, 2], dtype=torch.uint8)
        """
        chosen = [int(index) for index in class_indices]
        if not chosen:
            raise ValueError("class_indices is empty: choose at least one class.")
        if len(set(chosen)) != len(chosen):
            raise ValueError("class_indices must be distinct: a class chosen twice cannot be told from itself.")
        for index in chosen:
            if not 0 <= index < self.num_classes:
                raise ValueError(f"class_indices must lie in 0..{self.num_classes - 1}, got {index}.")
        starts = self.class_start.tolist()
        pieces = [self.images[starts[index] : starts[index + 1]] for index in chosen]
        sizes = torch.tensor([len(piece) for piece in pieces])
        return ClassImages(
            images=torch.cat(pieces),
            class_start=_starts_from_sizes(sizes),
            class_names=tuple(self.class_names[index] for index in chosen),
        )

    def to(self, device: torch.device | str) -> "ClassImages":
        """Returns the same classes with the images on ``device``; sampling from them then needs no transfer.

        Args:
            device: For example ``"cuda"``. ``class_start`` stays where it is: only the sampler reads it, on the CPU.

        Returns:
            A new ClassImages, sharing storage where nothing had to move.
        """
        return ClassImages(images=self.images.to(device), class_start=self.class_start, class_names=self.class_names)


def with_rotations(images: ClassImages) -> ClassImages:
    """Adds each class turned by 90, 180 and 270 degrees (counter-clockwise) as three further classes.

    The augmentation that Santoro et al. 2016 and Vinyals et al. 2016 use for Omniglot. A character that is symmetric
    under a rotation coincides with its own copy; like them, this keeps both.

    Args:
        images: Square images.

    Returns:
        Four times as many classes: the originals in their order and under their names, then all of them turned by
        90 degrees (name suffix ``@90``), by 180 (``@180``) and by 270 (``@270``).

    Raises:
        ValueError: If the images are not square.
    """
    _, height, width = images.image_shape
    if height != width:
        raise ValueError(
            f"images must be square to be turned by 90 degrees, got {height} x {width}; resize them when loading."
        )
    turned = [torch.rot90(images.images, quarter, dims=(2, 3)) for quarter in range(4)]
    names = list(images.class_names)
    for degrees in (90, 180, 270):
        names.extend(f"{name}@{degrees}" for name in images.class_names)
    return ClassImages(
        images=torch.cat(turned),
        class_start=_starts_from_sizes(images.class_sizes.repeat(4)),
        class_names=tuple(names),
    )


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

    Raises:
        TypeError: If ``images`` is not ClassImages or a count is not an int.
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

    def __init__(self, images: ClassImages, *, num_ways: int, num_shots: int, num_queries: int) -> None:
        """Checks that the classes suffice; see the class for the arguments."""
        if not isinstance(images, ClassImages):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(f"images must be ClassImages, got {type(images).__name__}; use one of the load functions.")
        self.images = images
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
    def input_shape(self) -> tuple[int, ...]:
        """Channels, height and width of an image."""
        return self.images.image_shape

    @property
    def num_outputs(self) -> int:
        """Number of classes in a task."""
        return self.num_ways

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
        require_positive_int("num_tasks", num_tasks)
        require_cpu_generator(generator)
        num_images = self.num_shots + self.num_queries

        # The places of the largest of i.i.d. uniform keys, in descending order of the keys, are a uniformly random
        # ordered subset. float64 makes ties between keys (which topk would break by position) practically impossible.
        keys = torch.rand(num_tasks, self.images.num_classes, generator=generator, dtype=torch.float64)
        classes = keys.topk(self.num_ways).indices
        sizes = self._class_sizes[classes]
        keys = torch.rand(
            num_tasks, self.num_ways, int(self._class_sizes.max()), generator=generator, dtype=torch.float64
        )
        # Ragged classes: places past the end of a class lose to every real one, of which there are enough.
        keys.masked_fill_(torch.arange(keys.shape[-1]) >= sizes.unsqueeze(-1), -1.0)
        indices = self._class_start[classes].unsqueeze(-1) + keys.topk(num_images).indices

        labels = torch.arange(self.num_ways).unsqueeze(-1).expand(num_tasks, self.num_ways, num_images)
        return Episode(
            support=self._batch(indices[..., : self.num_shots], labels[..., : self.num_shots]),
            query=self._batch(indices[..., self.num_shots :], labels[..., self.num_shots :]),
        )

    def _batch(self, indices: Tensor, labels: Tensor) -> Batch:
        """Gathers images by index and flattens the axes of class and image into one of examples."""
        device = self.images.images.device
        x = self.images.images[indices.flatten(1).to(device)].to(torch.float32).div_(255)
        return Batch(x=x, y=labels.flatten(1).to(device))


def _starts_from_sizes(sizes: Tensor) -> Tensor:
    """Returns the running total of class sizes with a leading zero."""
    return torch.cat([sizes.new_zeros(1), sizes.cumsum(0)])
