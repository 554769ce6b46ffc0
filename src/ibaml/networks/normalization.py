"""The normalisation policy that all networks share.

Running statistics are absent on purpose: a buffer that the forward pass overwrites cannot be vmapped, and it carries
statistics of one task into the next.
"""

import math
from typing import Literal, TypeAlias, get_args

from torch import nn

NormPolicy: TypeAlias = Literal["batch", "group", "none"]
"""How activations are normalised; report it with every accuracy.

- ``"batch"``: mean and variance over the examples of the batch at hand, at training and at test time alike. A query is
  then classified with the help of the other queries (the *transductive* protocol of MAML and of most few-shot papers),
  so a prediction depends on the company it is made in.
- ``"group"``: mean and variance over groups of features of one example. Every prediction stands alone.
- ``"none"``: no normalisation.
"""

_MAX_NUM_GROUPS = 8
_MIN_GROUP_SIZE = 4


def check_norm(norm: str) -> None:
    """Refuses an unknown normalisation policy.

    Args:
        norm: Name of the policy.

    Raises:
        ValueError: If ``norm`` is not one of ``"batch"``, ``"group"`` and ``"none"``.
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
        A module that keeps the shape of its input and holds no buffer.
    """
    if norm == "batch":
        return nn.BatchNorm2d(num_channels, track_running_stats=False)
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
        A module that keeps the shape of its input and holds no buffer.
    """
    if norm == "batch":
        return nn.BatchNorm1d(num_features, track_running_stats=False)
    if norm == "group":
        return nn.GroupNorm(1, num_features)
    return nn.Identity()
