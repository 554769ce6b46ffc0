"""A network divides into a body that no task adapts and a tail that sees its features."""

from typing import Any

import pytest
import torch
from torch import nn

from ibaml.algorithms import make_algorithm
from ibaml.algorithms.model import build_model
from ibaml.algorithms.tail import find_tail, last_layer
from ibaml.likelihoods import Categorical
from ibaml.networks import MLP, Conv4
from ibaml.types import Batch, Tensor


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def layers() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3), nn.Tanh(), nn.Linear(3, 2))


class Nested(nn.Module):
    """The head lies deep inside, and the body has a branch."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(4, 3)
        self.outer = nn.ModuleDict({"inner": nn.ModuleDict({"head": nn.Linear(7, 2)})})

    def forward(self, x: Tensor) -> Tensor:
        return self.outer["inner"]["head"](torch.cat([torch.tanh(self.body(x)), x], -1))


class Twice(nn.Module):
    """Something follows the head, which starts at zero."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 2)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, x: Tensor) -> Tensor:
        return 2 * self.head(x)


CASES: dict[str, tuple[Any, str | list[str], tuple[int, ...], int]] = {
    "perceptron with its inputs": (
        lambda: MLP(3, input_shape=4, hidden_sizes=(6,), skip_inputs=True),
        "head.*",
        (4,),
        10,
    ),
    "convolutions": (lambda: Conv4(3, image_size=8, channels=4, norm="group"), "head.*", (1, 8, 8), 4),
    "a single layer": (lambda: nn.Linear(4, 3), "*", (4,), 4),
    "the last two of a sequence": (layers, ["2.*", "4.*"], (4,), 5),
    "deep inside": (Nested, "*head*", (4,), 7),
}


@pytest.mark.parametrize("name", CASES)
def test_tail_on_features_is_the_network(name: str) -> None:
    build, adapt, shape, num_features = CASES[name]
    model = build_model(build(), Categorical(), adapt=adapt)
    x = torch.randn(6, *shape, generator=generator())
    assert model.splits(x)
    features = model.features(model.shared, x)
    assert features.shape == (6, num_features)
    tail, shared, positions = model.on_features, model.with_features(model.shared, features), torch.tensor([3, 0, 3])
    torch.testing.assert_close(
        tail.outputs(model.adapted, shared, positions), model.outputs(model.adapted, model.shared, x[[3, 0, 3]])
    )
    # The tail has features of its own, so that a head sees no difference.
    assert torch.equal(tail.features(shared, positions), features[[3, 0, 3]]) and tail.splits(positions)
    y = torch.tensor([0, 1, 1])
    torch.testing.assert_close(
        tail.per_example(model.adapted, shared, Batch(positions, y)),
        model.per_example(model.adapted, model.shared, Batch(x[[3, 0, 3]], y)),
    )


def test_the_network_itself_stays_whole() -> None:
    network = layers()
    expected = network(torch.ones(1, 4))
    build_model(network, Categorical(), adapt="4.*").splits(torch.ones(2, 4))
    assert torch.equal(network(torch.ones(1, 4)), expected) and len(network) == 5


@pytest.mark.parametrize(("network", "adapt"), [(Twice(), "head.*"), (MLP(2, input_shape=4), "*")])
def test_what_is_no_tail_is_not_split(network: nn.Module, adapt: str) -> None:
    model = build_model(network, Categorical(), adapt=adapt)
    assert not model.splits(torch.randn(3, 4, generator=generator()))
    with pytest.raises(ValueError, match="algorithm 'softmax' takes the place of the network's last linear layer, but"):
        model.check_features(make_algorithm("softmax"), torch.randn(3, 4, generator=generator()))
    model.check_features(make_algorithm("maml"), torch.randn(3, 4, generator=generator()))


def test_features_of_an_unknown_tail_are_refused() -> None:
    model = build_model(MLP(2, input_shape=4), Categorical())
    assert find_tail(model.network, model.adapted) is None
    with pytest.raises(ValueError, match="are not the last layers of the network .MLP.: adapt its last linear layer"):
        model.features(model.shared, torch.zeros(1, 4))


def test_features_that_are_no_vectors_are_refused() -> None:
    network = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    model = build_model(network, Categorical(), adapt="1.*")
    with pytest.raises(ValueError, match=r"sees features of shape \(3, 5, 3\); algorithm 'softmax' expects \[num_ex"):
        model.check_features(make_algorithm("softmax"), torch.zeros(3, 5, 4))


def test_the_last_linear_layer_is_found() -> None:
    assert last_layer(layers()) == "4.*" and last_layer(nn.Linear(2, 1)) == "*"
    assert last_layer(Nested()) == "outer.inner.head.*"
    with pytest.raises(ValueError, match="network .Tanh. has no linear layer, whose place a head would take"):
        last_layer(nn.Tanh())


def test_adapted_parameters_of_more_than_a_layer_are_no_head() -> None:
    model = build_model(layers(), Categorical(), adapt=["2.*", "4.*"])
    with pytest.raises(ValueError, match="algorithm 'ridge' takes the place of one linear layer, but the adapted par"):
        make_algorithm("ridge").init(model.adapted, model.shared, generator=generator())
