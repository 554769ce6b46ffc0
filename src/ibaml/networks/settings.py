"""Networks described by data, so that a saved model can build its network again without running foreign code."""

import dataclasses
import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ibaml.networks.conv4 import Conv4
from ibaml.networks.mlp import MLP
from ibaml.networks.radial_basis import RadialBasis
from ibaml.networks.resnet12 import ResNet12

NETWORKS: Mapping[str, type[nn.Module]] = {"Conv4": Conv4, "MLP": MLP, "RadialBasis": RadialBasis, "ResNet12": ResNet12}


@dataclasses.dataclass(frozen=True, kw_only=True)
class NetworkSettings:
    """Name and constructor arguments of one of this package's networks.

    Attributes:
        name: ``"Conv4"``, ``"MLP"``, ``"RadialBasis"`` or ``"ResNet12"``.
        arguments: Keyword arguments of its constructor, JSON-serialisable.

    Examples:
        >>> NetworkSettings(name="MLP", arguments={"num_outputs": 2, "input_shape": 3}).build().num_outputs
        2
    """

    name: str
    arguments: Mapping[str, Any] = dataclasses.field(default_factory=dict[str, Any])

    def __post_init__(self) -> None:
        """Refuses unknown names, of the network and of its arguments."""
        if self.name not in NETWORKS:
            raise ValueError(f"network name must be one of {', '.join(NETWORKS)}, but is {self.name!r}.")
        known = [name for name in inspect.signature(NETWORKS[self.name]).parameters if name != "generator"]
        if unknown := sorted(set(self.arguments) - set(known)):
            raise ValueError(f"{self.name} has no argument {', '.join(unknown)}; there are {', '.join(known)}.")

    def build(self, *, generator: torch.Generator | None = None) -> nn.Module:
        """Builds the network.

        Args:
            generator: Source of the initial weights.

        Raises:
            ValueError: If the network refuses an argument, or lacks one.
        """
        try:
            return NETWORKS[self.name](**self.arguments, generator=generator)
        except TypeError as error:
            raise ValueError(f"{self.name} cannot be built with {dict(self.arguments)}: {error}") from error


def network_settings(network: nn.Module) -> NetworkSettings | None:
    """Returns the settings that build a network of this package again, or None for any other module."""
    if NETWORKS.get(type(network).__name__) is not type(network):
        return None
    return NetworkSettings(name=type(network).__name__, arguments=network.constructor_arguments)  # pyright: ignore[reportArgumentType]
