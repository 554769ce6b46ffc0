"""Reference networks: plain ``nn.Module`` classes.

They are a convenience, not a requirement: the library takes any ``nn.Module``. All of them work under
``torch.func.functional_call``, ``grad``, ``jvp`` of ``grad`` and ``vmap`` over parameters, and name their normalisation
policy in the attribute ``norm``.
"""

from ibaml.networks.conv4 import Conv4, Downsample
from ibaml.networks.layers import NormPolicy
from ibaml.networks.mlp import MLP, Activation
from ibaml.networks.radial_basis import RadialBasis
from ibaml.networks.resnet12 import ResNet12
from ibaml.networks.settings import NetworkSettings, network_settings

__all__ = [
    "MLP",
    "Activation",
    "Conv4",
    "Downsample",
    "NetworkSettings",
    "NormPolicy",
    "RadialBasis",
    "ResNet12",
    "network_settings",
]
