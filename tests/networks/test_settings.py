import dataclasses
import json
import re

import pytest
import torch
from torch import nn

from ibaml.networks import MLP, Conv4, NetworkSettings, RadialBasis, ResNet12, network_settings
from ibaml.networks.settings import NETWORKS

ARGUMENTS = {
    "Conv4": {"num_outputs": 3, "channels": 4, "image_size": (16, 16), "norm": "group"},
    "MLP": {"num_outputs": 3, "input_shape": (2, 2), "hidden_sizes": (5, 4), "activation": "gelu"},
    "RadialBasis": {"num_outputs": 3, "input_shape": (2, 2), "num_centres": 4},
    "ResNet12": {"num_outputs": 3, "image_size": (16, 16)},
}


def test_every_network_is_listed():
    assert NETWORKS == {"Conv4": Conv4, "MLP": MLP, "RadialBasis": RadialBasis, "ResNet12": ResNet12}
    assert ARGUMENTS.keys() == NETWORKS.keys()


@pytest.mark.parametrize("name", ARGUMENTS)
def test_a_network_is_built_again_from_json(name):
    settings = NetworkSettings(name=name, arguments=ARGUMENTS[name])
    network = settings.build(generator=torch.Generator().manual_seed(0))
    assert isinstance(network, NETWORKS[name])
    found = network_settings(network)
    assert found is not None
    assert all(found.arguments[key] == value for key, value in ARGUMENTS[name].items())
    again = NetworkSettings(**json.loads(json.dumps(dataclasses.asdict(found))))
    rebuilt = again.build(generator=torch.Generator().manual_seed(0))
    assert repr(rebuilt) == repr(network)
    for (first, value), (second, other) in zip(network.state_dict().items(), rebuilt.state_dict().items(), strict=True):
        assert first == second and torch.equal(value, other)


def test_modules_of_ones_own_have_no_settings():
    class Conv4(nn.Module):
        """Has the name of one of the package."""

    class Wider(MLP):
        """Changes one of the package."""

    assert network_settings(nn.Linear(1, 1)) is None
    assert network_settings(Conv4()) is None
    assert network_settings(Wider(1, input_shape=1)) is None


def test_refuses():
    with pytest.raises(ValueError, match="must be one of Conv4, MLP, RadialBasis, ResNet12, but is 'Conv5'"):
        NetworkSettings(name="Conv5")
    message = "MLP has no argument widths; there are num_outputs, input_shape, hidden_sizes, activation, norm"
    with pytest.raises(ValueError, match=re.escape(message)):
        NetworkSettings(name="MLP", arguments={"num_outputs": 1, "input_shape": 1, "widths": [3]})
    with pytest.raises(ValueError, match="MLP cannot be built with .*'many'.*: num_outputs must be an int, got 'many'"):
        NetworkSettings(name="MLP", arguments={"num_outputs": "many", "input_shape": 1}).build()
    with pytest.raises(ValueError, match="MLP cannot be built with {}: .*missing"):
        NetworkSettings(name="MLP").build()
    with pytest.raises(ValueError, match="num_outputs must be at least 1, got 0"):
        NetworkSettings(name="MLP", arguments={"num_outputs": 0, "input_shape": 1}).build()
