"""Conv4, the four-block convolutional network that few-shot learning compares methods with."""

from typing import Any, Literal, TypeAlias, get_args

import torch
from jaxtyping import Float
from torch import nn

from ibaml.checks import require_positive_int
from ibaml.networks.layers import NormPolicy, check_input, check_norm, image_norm, image_shape, initialize_weights
from ibaml.types import Tensor

Downsample: TypeAlias = Literal["max_pool", "stride"]
"""How a block halves its feature map: 2 x 2 max-pooling, or a convolution of stride 2."""

_NUM_BLOCKS = 4


class Conv4(nn.Module):
    """Four blocks of 3 x 3 convolution, normalisation, ReLU and halving, and a linear head (Vinyals et al. 2016).

    With ``downsample="max_pool"`` a block ends in 2 x 2 max-pooling, which rounds sizes down (84, 42, 21, 10, 5); a
    feature map that is a single pixel high or wide is not pooled any further, so every image size works. With
    ``"stride"`` the convolution itself has stride 2 and rounds up (28, 14, 7, 4, 2); that costs less than half as much.

    The convolutions keep their biases, as the reference implementations do (32,901 parameters for 3 x 84 x 84 images,
    32 channels and 5 ways). Under ``norm="batch"`` such a bias cannot change the output, so the loss has zero curvature
    along it.

    Attributes:
        norm: Normalisation policy; ``"batch"`` makes predictions transductive, see
            [`NormPolicy`][ibaml.networks.NormPolicy].
        input_shape: Shape of one input, ``(in_channels, height, width)``.
        num_outputs: Number of outputs.

    Args:
        num_outputs: Number of outputs: ways for classification, target dimensions for regression.
        in_channels: Number of image channels.
        image_size: Side of the square images, or ``(height, width)``.
        channels: Number of channels of every block; 32 and 64 are usual.
        downsample: How a block halves its feature map.
        norm: Normalisation policy.
        zero_head: Whether the last layer starts at zero, so that all classes are equal before adaptation.
        generator: Source of the initial weights; ``None`` uses torch's global one.

    Raises:
        TypeError: If a count is not an int.
        ValueError: If a count is below one, or ``downsample`` or ``norm`` is unknown.

    Examples:
        >>> network = Conv4(5, image_size=28, channels=32, generator=torch.Generator().manual_seed(0))
        >>> network(torch.zeros(10, 1, 28, 28)).shape
        torch.Size([10, 5])
    """

    def __init__(
        self,
        num_outputs: int,
        *,
        in_channels: int = 1,
        image_size: int | tuple[int, int] = 28,
        channels: int = 64,
        downsample: Downsample = "max_pool",
        norm: NormPolicy = "batch",
        zero_head: bool = False,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        require_positive_int("num_outputs", num_outputs)
        require_positive_int("channels", channels)
        check_norm(norm)
        if downsample not in get_args(Downsample):
            raise ValueError(
                f"downsample must be one of {', '.join(map(repr, get_args(Downsample)))}, got {downsample!r}."
            )
        self.norm: NormPolicy = norm
        self.input_shape = image_shape(in_channels, image_size)
        self.num_outputs = num_outputs
        self.constructor_arguments: dict[str, Any] = {
            "num_outputs": num_outputs,
            "in_channels": in_channels,
            "image_size": self.input_shape[1:],
            "channels": channels,
            "downsample": downsample,
            "norm": norm,
            "zero_head": zero_head,
        }

        stride = 2 if downsample == "stride" else 1
        _, height, width = self.input_shape
        smallest_area = height * width
        layers: list[nn.Module] = []
        for block in range(_NUM_BLOCKS):
            layers += [
                nn.Conv2d(in_channels if block == 0 else channels, channels, 3, stride=stride, padding=1),
                image_norm(norm, channels),
                nn.ReLU(),
            ]
            if stride == 2:
                height, width = (height + 1) // 2, (width + 1) // 2
            smallest_area = min(smallest_area, height * width)
            if stride == 1 and min(height, width) > 1:
                layers.append(nn.MaxPool2d(2))
                height, width = height // 2, width // 2
        self._min_examples = 2 if norm == "batch" and smallest_area == 1 else 1
        self.features = nn.Sequential(*layers)
        self.head = nn.Linear(channels * height * width, num_outputs)
        initialize_weights(self, self.head, nonlinearity="relu", generator=generator, zero_head=zero_head)

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
        return self.head(self.features(x).flatten(1))
