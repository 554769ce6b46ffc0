"""Initial weights, drawn from an explicit generator."""

from typing import Literal, TypeAlias

import torch
from torch import nn

Nonlinearity: TypeAlias = Literal["relu", "leaky_relu", "tanh"]


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
