"""What all networks share: their normalisation policy, their initial weights, and checks of shapes."""

import math
from collections.abc import Sequence
from typing import Literal, TypeAlias, get_args

import torch
from torch import nn

from ibaml.checks import require_positive_int
from ibaml.types import Tensor

NormPolicy: TypeAlias = Literal["batch", "running", "group", "none"]
"""How activations are normalised; report it with every accuracy.

- ``"batch"``: mean and variance over the examples of the batch at hand, at training and at test time alike. A query is
  then classified with the help of the other queries (the *transductive* protocol of MAML and of most few-shot papers),
  so a prediction depends on the company it is made in.
- ``"running"``: at training time over all examples of all tasks of a step, while running averages are kept, which are
  used at test time: every prediction stands alone. For layers that no task adapts; in adapted ones the averages would
  carry one task's weights into the next.
- ``"group"``: mean and variance over groups of features of one example. Every prediction stands alone.
- ``"none"``: no normalisation.
"""

Nonlinearity: TypeAlias = Literal["relu", "leaky_relu", "tanh"]

_MAX_NUM_GROUPS = 8
_MIN_GROUP_SIZE = 4


def check_norm(norm: str) -> None:
    """Refuses an unknown normalisation policy.

    Args:
        norm: Name of the policy.

    Raises:
        ValueError: If ``norm`` is none of them.
    """
    if norm not in get_args(NormPolicy):
        raise ValueError(f"norm must be one of {', '.join(map(repr, get_args(NormPolicy)))}, got {norm!r}.")


def image_norm(norm: NormPolicy, num_channels: int) -> nn.Module:
    """Builds the normalisation of a feature map of shape ``[examples, num_channels, height, width]``.

    Group normalisation uses 8 equal groups of at least 4 channels, or as many as ``num_channels`` allows (4, 2 or 1): a
    deep feature map may be a single pixel, and a group of one value would be mapped to zero.

    Args:
        norm: Policy.
        num_channels: Number of channels, at least 1.

    Returns:
        A module that keeps the shape of its input; it holds buffers under ``"running"`` only.
    """
    if norm in ("batch", "running"):
        return nn.BatchNorm2d(num_channels, track_running_stats=norm == "running")
    if norm == "group":
        num_groups = math.gcd(_MAX_NUM_GROUPS, num_channels, max(1, num_channels // _MIN_GROUP_SIZE))
        return nn.GroupNorm(num_groups, num_channels)
    return nn.Identity()


def vector_norm(norm: NormPolicy, num_features: int) -> nn.Module:
    """Builds the normalisation of features of shape ``[examples, num_features]``.

    Group normalisation uses a single group (it is layer normalisation then), as there are no spatial axes to fill it.

    Args:
        norm: Policy.
        num_features: Number of features, at least 1.

    Returns:
        A module that keeps the shape of its input; it holds buffers under ``"running"`` only.
    """
    if norm in ("batch", "running"):
        return nn.BatchNorm1d(num_features, track_running_stats=norm == "running")
    if norm == "group":
        return nn.GroupNorm(1, num_features)
    return nn.Identity()


def initialize_weights(
    network: nn.Module,
    head: nn.Linear,
    *,
    nonlinearity: Nonlinearity,
    negative_slope: float = 0.0,
    generator: torch.Generator | None,
    zero_head: bool = False,
) -> None:
    """Redraws all convolution and linear weights in place; sets their biases to zero.

    Weights are normal with standard deviation ``gain / sqrt(fan_in)`` (He et al. 2015), which keeps the scale of the
    activations through the layers. The head has a gain of one.

    Args:
        network: Module whose ``nn.Conv2d`` and ``nn.Linear`` layers are drawn; other layers are left as they are.
        head: The layer of ``network`` that no activation follows.
        nonlinearity: Activation that follows every other layer.
        negative_slope: Slope of ``"leaky_relu"`` below zero.
        generator: Source of randomness on the CPU; ``None`` uses torch's global one.
        zero_head: Whether the head starts at zero: all classes are then equal before adaptation, as they are when
            labels are assigned to classes anew in every task.
    """
    for layer in network.modules():
        if not isinstance(layer, nn.Conv2d | nn.Linear):
            continue
        nn.init.kaiming_normal_(
            layer.weight,
            a=negative_slope,
            nonlinearity="linear" if layer is head else nonlinearity,
            generator=generator,
        )
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)
    if zero_head:
        nn.init.zeros_(head.weight)


def image_shape(in_channels: int, image_size: int | tuple[int, int]) -> tuple[int, int, int]:
    """Returns the shape of one image, ``(in_channels, height, width)``.

    Args:
        in_channels: Number of channels.
        image_size: Side of a square image, or ``(height, width)``.

    Returns:
        The shape.

    Raises:
        TypeError: If a count is not an int.
        ValueError: If a count is below one, or ``image_size`` has other than two entries.

    Examples:
        >>> image_shape(3, 84)
        (3, 84, 84)
    """
    require_positive_int("in_channels", in_channels)
    sides = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
    if len(sides) != 2:
        raise ValueError(f"image_size must be one side or (height, width), got {image_size!r}.")
    for side in sides:
        require_positive_int("image_size", side)
    return in_channels, *sides


def check_input(x: Tensor, input_shape: Sequence[int], *, min_examples: int = 1) -> None:
    """Refuses a batch whose examples have another shape than the network was built for.

    Only shapes are looked at, so the check also works under ``torch.func.vmap``.

    Args:
        x: Batch of inputs, expected shape ``[examples, *input_shape]``.
        input_shape: Shape of one example.
        min_examples: Smallest number of examples; 2 where batch statistics would otherwise be taken over one value.

    Raises:
        ValueError: Naming the expected shape and the one that came.
    """
    if x.ndim != 1 + len(input_shape) or tuple(x.shape[1:]) != tuple(input_shape):
        expected = ", ".join(["examples", *map(str, input_shape)])
        raise ValueError(
            f"x must have shape [{expected}], got {list(x.shape)}; "
            "build the network for these inputs, or reshape or resize them."
        )
    if x.shape[0] < min_examples:
        raise ValueError(
            f"x has {x.shape[0]} example(s), but norm='batch' needs at least {min_examples} here "
            "to estimate a variance; use norm='group' or norm='none', or pass more examples at a time."
        )
