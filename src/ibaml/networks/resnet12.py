"""ResNet-12, the residual network of few-shot learning."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import nn

from ibaml.checks import require_positive_int
from ibaml.networks.layers import NormPolicy, check_input, check_norm, image_norm, image_shape, initialize_weights
from ibaml.types import Tensor

_NEGATIVE_SLOPE = 0.1


class ResidualStage(nn.Module):
    """Three 3 x 3 convolutions with a 1 x 1 shortcut around them, then an optional halving of the feature map.

    ``y = pool(leaky_relu(branch(x) + shortcut(x)))`` with leaky ReLU of slope 0.1 and 2 x 2 max-pooling. The
    convolutions have biases only without normalisation, which would cancel them.

    Args:
        in_channels: Number of input channels.
        channels: Number of output channels.
        norm: Normalisation policy.
        pool: Whether to halve the feature map.
    """

    def __init__(self, in_channels: int, channels: int, *, norm: NormPolicy, pool: bool) -> None:
        super().__init__()
        bias = norm == "none"
        self.branch = nn.Sequential(
            nn.Conv2d(in_channels, channels, 3, padding=1, bias=bias),
            image_norm(norm, channels),
            nn.LeakyReLU(_NEGATIVE_SLOPE),
            nn.Conv2d(channels, channels, 3, padding=1, bias=bias),
            image_norm(norm, channels),
            nn.LeakyReLU(_NEGATIVE_SLOPE),
            nn.Conv2d(channels, channels, 3, padding=1, bias=bias),
            image_norm(norm, channels),
        )
        self.shortcut = nn.Sequential(
            nn.Conv2d(in_channels, channels, 1, bias=bias),
            image_norm(norm, channels),
        )
        self.activation = nn.LeakyReLU(_NEGATIVE_SLOPE)
        self.pool = nn.MaxPool2d(2) if pool else nn.Identity()

    def forward(
        self, x: Float[Tensor, "examples in_channels height width"]
    ) -> Float[Tensor, "examples channels pooled_height pooled_width"]:
        """Computes the feature map of the next stage.

        Args:
            x: Feature map, shape ``[examples, in_channels, height, width]``.

        Returns:
            Feature map, shape ``[examples, channels, height // 2, width // 2]``; not halved without pooling.
        """
        return self.pool(self.activation(self.branch(x) + self.shortcut(x)))


class ResNet12(nn.Module):
    """Four residual stages of three convolutions, global average pooling and a linear head.

    The backbone of Oreshkin et al. 2018 and Lee et al. 2019, without their DropBlock. 2 x 2 max-pooling ends every
    stage (84, 42, 21, 10, 5); a feature map that is a single pixel high or wide is not pooled any further, so every
    image size works.

    Attributes:
        norm: Normalisation policy; ``"batch"`` makes predictions transductive, see
            [`NormPolicy`][ibaml.networks.NormPolicy].
        input_shape: Shape of one input, ``(in_channels, height, width)``.
        num_outputs: Number of outputs.

    Args:
        num_outputs: Number of outputs: ways for classification, target dimensions for regression.
        in_channels: Number of image channels.
        image_size: Side of the square images, or ``(height, width)``.
        widths: Number of channels of each stage; Lee et al. use ``(64, 160, 320, 640)``.
        norm: Normalisation policy.
        zero_head: Whether the last layer starts at zero, so that all classes are equal before adaptation.
        generator: Source of the initial weights; ``None`` uses torch's global one.

    Raises:
        TypeError: If a count is not an int.
        ValueError: If a count is below one, ``widths`` is not of length four, or ``norm`` is unknown.

    Examples:
        >>> network = ResNet12(5, image_size=28, widths=(8, 16, 16, 32))
        >>> network(torch.zeros(10, 3, 28, 28)).shape
        torch.Size([10, 5])
    """

    def __init__(
        self,
        num_outputs: int,
        *,
        in_channels: int = 3,
        image_size: int | tuple[int, int] = 84,
        widths: Sequence[int] = (64, 128, 256, 512),
        norm: NormPolicy = "batch",
        zero_head: bool = False,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        require_positive_int("num_outputs", num_outputs)
        check_norm(norm)
        if len(widths) != 4:
            raise ValueError(f"widths must give the channels of 4 stages, got {len(widths)} of them: {tuple(widths)}.")
        for width in widths:
            require_positive_int("widths", width)
        self.norm: NormPolicy = norm
        self.input_shape = image_shape(in_channels, image_size)
        self.num_outputs = num_outputs
        self.constructor_arguments: dict[str, Any] = {
            "num_outputs": num_outputs,
            "in_channels": in_channels,
            "image_size": self.input_shape[1:],
            "widths": tuple(widths),
            "norm": norm,
            "zero_head": zero_head,
        }

        _, height, width = self.input_shape
        smallest_area = height * width
        stages: list[nn.Module] = []
        for index, channels in enumerate(widths):
            smallest_area = min(smallest_area, height * width)
            pool = min(height, width) > 1
            stages.append(
                ResidualStage(in_channels if index == 0 else widths[index - 1], channels, norm=norm, pool=pool)
            )
            if pool:
                height, width = height // 2, width // 2
        self._min_examples = 2 if norm == "batch" and smallest_area == 1 else 1
        self.features = nn.Sequential(*stages)
        self.head = nn.Linear(widths[-1], num_outputs)
        initialize_weights(
            self,
            self.head,
            nonlinearity="leaky_relu",
            negative_slope=_NEGATIVE_SLOPE,
            generator=generator,
            zero_head=zero_head,
        )

    def forward(self, x: Float[Tensor, "examples ..."]) -> Float[Tensor, "examples outputs"]:
        """Computes logits or regression outputs.

        Args:
            x: Images, shape ``[examples, in_channels, height, width]``.

        Returns:
            Outputs, shape ``[examples, num_outputs]``.

        Raises:
            ValueError: If the images have another shape than the network was built for, or if ``norm="batch"`` is
                asked for statistics of a single value.
        """
        check_input(x, self.input_shape, min_examples=self._min_examples)
        return self.head(self.features(x).mean((-2, -1)))
