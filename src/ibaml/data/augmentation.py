"""Pictures that differ a little at every draw: for training from few of them."""

import dataclasses
import math
from collections.abc import Sequence

import torch
from torch.nn import functional

from ibaml.types import Tensor


@dataclasses.dataclass(frozen=True, kw_only=True)
class Augmentation:
    """How the images of training tasks are changed, each by itself and anew at every draw.

    Attributes:
        flip: Whether left and right change places in half of the images.
        crop: Least share of the area that a random part of an image has, which then takes the whole place; 1: all.
        colour: Brightness, contrast and saturation are multiplied by factors between ``1 - colour`` and ``1 + colour``;
            0: they stay. Grey images have no saturation.

    Raises:
        TypeError: If ``flip`` is not a bool.
        ValueError: If a share is out of range.

    Examples:
        >>> images = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
        >>> Augmentation(crop=0.5).apply(images, generator=torch.Generator().manual_seed(0)).shape
        torch.Size([2, 3, 8, 8])
    """

    flip: bool = True
    crop: float = 1.0
    colour: float = 0.0

    def __post_init__(self) -> None:
        """Refuses settings out of range."""
        if not isinstance(self.flip, bool):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(f"flip must be True or False, but is {self.flip!r}.")
        if not 0 < self.crop <= 1:
            raise ValueError(f"crop must be a share of the area above 0 and at most 1, but is {self.crop}.")
        if not 0 <= self.colour < 1:
            raise ValueError(f"colour must be at least 0 and below 1, but is {self.colour}.")

    def apply(self, images: Tensor, *, generator: torch.Generator) -> Tensor:
        """Returns changed images.

        Args:
            images: In [0, 1], ``[..., channels, height, width]``, on any device.
            generator: CPU generator; its state alone decides what is drawn.

        Returns:
            Images of the same shape, in [0, 1].
        """
        flat = images.flatten(0, -4)

        def uniform(low: float, high: float, *shape: int) -> Tensor:
            drawn = torch.rand(len(flat), *shape, generator=generator)
            return (low + (high - low) * drawn).to(flat)

        if self.flip:
            flat = torch.where((uniform(0, 1) < 0.5)[:, None, None, None], flat.flip(-1), flat)
        if self.crop < 1:
            flat = _parts(flat, uniform(math.sqrt(self.crop), 1), uniform(-1, 1, 2))
        if self.colour:
            factors = uniform(1 - self.colour, 1 + self.colour, 3)
            flat = _recoloured(flat, *factors.unbind(1))
        return flat.view_as(images)


@dataclasses.dataclass(frozen=True, kw_only=True)
class NormalisedAugmentation(Augmentation):
    """Changes of images that are normalised already, ``(pixels - mean) / std``: the same as of their pixels.

    Attributes:
        mean: Mean of each channel, of pixels in [0, 1].
        std: Standard deviation of each channel.

    Examples:
        >>> NormalisedAugmentation(flip=False, mean=(0.5,), std=(0.2,)).apply(
        ...     torch.zeros(1, 1, 2, 2), generator=torch.Generator()
        ... ).abs().max()
        tensor(0.)
    """

    mean: Sequence[float]
    std: Sequence[float]

    def apply(self, images: Tensor, *, generator: torch.Generator) -> Tensor:
        """Returns changed images, normalised as they came; arguments are those of ``Augmentation.apply``."""
        mean, std = (images.new_tensor(list(values)).reshape(-1, 1, 1) for values in (self.mean, self.std))
        return (super().apply(images * std + mean, generator=generator) - mean) / std


UNCHANGED = Augmentation(flip=False)
"""Leaves images as they are: what is meant wherever no augmentation is named."""


def _parts(images: Tensor, sides: Tensor, places: Tensor) -> Tensor:
    """Returns parts of images in the size of the whole, bilinear.

    Args:
        images: ``[num_images, channels, height, width]``.
        sides: Share of each side, ``[num_images]``.
        places: Where the part lies, from -1 (left, top) to 1, ``[num_images, 2]``.
    """
    offsets = places * (1 - sides).unsqueeze(-1)
    none = torch.zeros_like(sides)
    rows = [torch.stack([sides, none, offsets[:, 0]], -1), torch.stack([none, sides, offsets[:, 1]], -1)]
    grid = functional.affine_grid(torch.stack(rows, 1), list(images.shape), align_corners=False)
    return functional.grid_sample(images, grid, padding_mode="border", align_corners=False)


def _recoloured(images: Tensor, brightness: Tensor, contrast: Tensor, saturation: Tensor) -> Tensor:
    """Returns images with each of three properties times a factor, in this order, ``[num_images]`` each."""

    def mixed(other: Tensor, own: Tensor, factor: Tensor) -> Tensor:
        return (other + (own - other) * factor[:, None, None, None]).clamp(0, 1)

    images = mixed(torch.zeros_like(images), images, brightness)
    images = mixed(images.mean((1, 2, 3), keepdim=True), images, contrast)
    return mixed(images.mean(1, keepdim=True), images, saturation) if images.shape[1] > 1 else images
