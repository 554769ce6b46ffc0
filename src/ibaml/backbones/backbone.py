"""The record of a backbone: the function, and what its inputs are to look like."""

import dataclasses
import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from ibaml.backbones.frozen import module_of, weights_digest
from ibaml.checks import require_positive_int
from ibaml.data.images import resize_image, scale_pixels, to_pixels
from ibaml.types import Tensor

_TOLERANCE = 1e-3


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Backbone:
    """A frozen network, or any function, that turns inputs into features, with what it wants to be given.

    A module sees batches of tensors on the learner's device, in its own floating-point type. Arrays of ``uint8`` with
    four axes are pixels: they are resized to ``image_size`` and divided by 255. Images of floating-point numbers have
    the right size already and are in [0, 1]. Both are then normalised, ``(pixels - mean) / std``. A mapping of arrays
    (token ids, masks) reaches the module as keyword arguments, and a function of text gets lists of strings.

    Attributes:
        module: An ``nn.Module``, or a callable from a batch of inputs to features; see ``as_features`` for the forms
            of outputs that are understood.
        image_size: Side, or height and width, of the images that it takes; needed for folders of images.
        channels: Of images that are read from files: 3 for colour, 1 for grey.
        mean: Mean of each channel that pixels in [0, 1] are normalised by; None: they are not.
        std: Standard deviation of each channel, beside ``mean``.
        batch_size: Inputs of one forward pass.
        name: Tells this backbone from others where its weights cannot: a callable that is no module has features on
            disk only if it has a name. Change it when the function changes.
        square_root: Whether features are scaled to length 1 and the square root of each is taken, its sign kept. It
            takes away how strong a picture is, and makes features that are averages of rectified maps less skewed.
            None: where no training task has a negative one.
        cache: Whether features of tasks are kept on disk, to be computed once.

    Raises:
        TypeError: If ``module`` cannot be called, or a size is not an integer.
        ValueError: If a size or standard deviation is not positive, or of ``mean`` and ``std`` one is missing or has
            another number of channels.

    Examples:
        >>> network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
        >>> Backbone(module=network, image_size=32, mean=(0.5, 0.5, 0.5), std=(0.2, 0.2, 0.2)).size
        (32, 32)
    """

    module: Callable[..., Any] = dataclasses.field(repr=False)
    image_size: int | tuple[int, int] | None = None
    channels: int = 3
    mean: Sequence[float] | None = None
    std: Sequence[float] | None = None
    batch_size: int = 64
    name: str | None = None
    square_root: bool | None = None
    cache: bool = True

    def __post_init__(self) -> None:
        """Refuses settings out of range."""
        if not callable(self.module):
            raise TypeError(
                f"backbone must be an nn.Module, a callable or a Backbone, but is a {type(self.module).__name__}."
            )
        require_positive_int("batch_size", self.batch_size)
        for side in self.size or ():
            require_positive_int("image_size", side)
        if self.channels not in (1, 3):
            raise ValueError(f"channels must be 1 (grey) or 3 (colour), but is {self.channels!r}.")
        if (self.mean is None) != (self.std is None):
            missing = "mean" if self.mean is None else "std"
            raise ValueError(f"{missing} is None, but pixels are normalised by mean and std together: give both.")
        if self.mean is None or self.std is None:
            return
        if not len(self.mean) == len(self.std) == self.channels:
            raise ValueError(
                f"mean has {len(self.mean)} and std {len(self.std)} values, but there are {self.channels} channels: "
                "give one of each for a channel."
            )
        if not all(0 < value < float("inf") for value in self.std):
            raise ValueError(f"std must be positive and finite, but is {tuple(self.std)}.")

    @property
    def size(self) -> tuple[int, int] | None:
        """Height and width of its images; None if it takes none."""
        if self.image_size is None or isinstance(self.image_size, tuple):
            return self.image_size
        return self.image_size, self.image_size

    @property
    def owner(self) -> nn.Module | None:
        """The module whose weights decide the features, if it can be seen."""
        return module_of(self.module)

    def digest(self) -> str | None:
        """Returns 64 hexadecimal digits that change with the weights, the structure or the name; None if unknown.

        Of a callable that is neither a module nor the method of one, the name is all there is.
        """
        owner = self.owner
        if owner is None and self.name is None:
            return None
        method = "" if owner is None or owner is self.module else str(getattr(self.module, "__qualname__", ""))
        weights = "" if owner is None else weights_digest(owner)
        return hashlib.sha256("\n".join([self.name or "", method, weights]).encode()).hexdigest()

    def settings(self) -> dict[str, Any]:
        """Returns what decides the module's outputs beside itself, as JSON values."""
        return {
            "image_size": None if self.size is None else list(self.size),
            "channels": self.channels,
            "mean": None if self.mean is None else [float(value) for value in self.mean],
            "std": None if self.std is None else [float(value) for value in self.std],
            "name": self.name,
        }

    def prepare(self, argument: str, inputs: Tensor) -> Tensor:
        """Returns a batch of arrays as the module wants it: images resized and normalised, all else unchanged.

        Args:
            argument: How messages call the inputs.
            inputs: ``[num_inputs, *shape]``.

        Raises:
            ValueError: If images of floating-point numbers have another size or range, or any images other channels.
        """
        if inputs.ndim != 4 or not (inputs.dtype == torch.uint8 or inputs.is_floating_point()):
            return inputs
        if self.mean is not None and inputs.shape[1] != self.channels:
            raise ValueError(
                f"{argument} has images of shape {tuple(inputs.shape[1:])}, but the backbone takes {self.channels} "
                "channels, [channels, height, width]."
            )
        if inputs.dtype == torch.uint8:
            inputs = scale_pixels(self._resized(inputs))
        elif self.size is not None and tuple(inputs.shape[2:]) != self.size:
            raise ValueError(
                f"{argument} has images of height and width {tuple(inputs.shape[2:])}, but the backbone takes "
                f"{self.size}: resize them, or give pixels of 0..255 as uint8, which are resized as files are."
            )
        if self.mean is None or self.std is None:
            return inputs
        if len(inputs) and not (-_TOLERANCE <= float(inputs.min()) and float(inputs.max()) <= 1 + _TOLERANCE):
            raise ValueError(
                f"{argument} has pixels between {float(inputs.min()):.3g} and {float(inputs.max()):.3g}, but expected "
                "[0, 1], which mean and std normalise: divide by 255, or give uint8."
            )
        mean, std = (inputs.new_tensor(list(values)).reshape(-1, 1, 1) for values in (self.mean, self.std))
        return (inputs - mean) / std

    def _resized(self, pixels: Tensor) -> Tensor:
        size = self.size
        if size is None or tuple(pixels.shape[2:]) == size or pixels.shape[1] not in (1, 3):
            return pixels
        from PIL import Image  # takes long, and importing the library needs none

        arrays = pixels.cpu().numpy().transpose(0, 2, 3, 1)
        images = [Image.fromarray(array if array.shape[2] == 3 else array[:, :, 0]) for array in arrays]
        return torch.from_numpy(np.stack([to_pixels(resize_image(image, size)) for image in images]))
