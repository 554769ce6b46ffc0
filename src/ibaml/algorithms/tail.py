"""Networks whose adapted part is their tail: what comes before it is computed once per task.

``f(x) = tail(body(x))`` with a body that no task adapts. Inner steps, weight samples, curvature and predictions then
pass through the tail alone, as functions of the features ``body(x)``.
"""

import copy
import functools
import itertools
from collections.abc import Iterable, Sequence

import torch
from torch import nn

from ibaml.types import Tensor

FEATURES = "example_features"
"""Name of the features among the shared parameters of ``OnFeatures``, ``[num_examples, *feature_shape]``."""


class OnFeatures(nn.Module):
    """A tail as a network whose inputs are the positions of examples in a tensor of their features.

    So whatever differentiates a network in its shared parameters gives the gradient in the features. Parameters keep
    the names that they have in the whole network.

    Args:
        layers: The layers of the tail by name, in the order in which they are applied; ``""`` is the whole network.
    """

    def __init__(self, layers: dict[str, nn.Module]) -> None:
        super().__init__()
        self.register_buffer(FEATURES, torch.empty(0))
        self._layers = tuple(layers)
        # In a tuple, a module is not registered.
        self._whole = tuple(layer for name, layer in layers.items() if not name)
        for name, layer in layers.items():
            if name:
                _add(self, name, layer)
            else:
                for own, parameter in layer.named_parameters():
                    self.register_parameter(own, parameter)

    def forward(self, positions: Tensor) -> Tensor:
        """Returns the tail's outputs of the examples at some positions, int64 ``[num_examples]``."""
        found = getattr(self, FEATURES)[positions]
        if self._whole:
            return torch.func.functional_call(self._whole[0], dict(self.named_parameters()), (found,))
        for name in self._layers:
            found = self.get_submodule(name)(found)
        return found


class Lookup(nn.Module):
    """The body of ``OnFeatures``: finds the features of examples."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer(FEATURES, torch.empty(0))

    def forward(self, positions: Tensor) -> Tensor:
        """Returns the features of the examples at some positions, int64 ``[num_examples]``."""
        return getattr(self, FEATURES)[positions]


class Tail:
    """The adapted end of a network.

    Attributes:
        body: The network without it: the same modules, and so the same names of parameters.
        network: The tail as a network on features.
        statistics: Names of the running averages of the body's normalisation.
        is_exact: Whether the two together have been seen to give what the network gives; None until tried.
    """

    def __init__(self, body: nn.Module, network: OnFeatures, *, is_exact: bool | None = None) -> None:
        self.body = body
        self.network = network
        self.is_exact = is_exact
        self.statistics = frozenset(
            f"{name}.{average}".lstrip(".")
            for name, module in body.named_modules()
            if keeps_statistics(module)
            for average in ("running_mean", "running_var")
        )

    @functools.cached_property
    def training_body(self) -> nn.Module:
        """The body with normalisation by the examples at hand, which moves the running averages that it is given."""
        return _in_training(self.body)

    def on_features(self) -> "Tail":
        """Returns the tail of the tail: itself, with a body that finds features."""
        return Tail(Lookup(), self.network, is_exact=True)


def find_tail(network: nn.Module, adapted: Iterable[str]) -> Tail | None:
    """Returns the part of a network from the first adapted layer on; None if it is not known where that is.

    Known are a single module, and the last modules of an ``nn.Sequential``. Whether nothing but the tail comes after
    the body only its outputs can tell (``Model.splits``).

    Args:
        network: The network.
        adapted: Names of the adapted parameters.

    Examples:
        >>> network = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2))
        >>> find_tail(network, ["2.weight"]).body(torch.ones(1, 2)).shape
        torch.Size([1, 3])
    """
    owners = [name.rpartition(".")[0].split(".") if "." in name else [] for name in adapted]
    together = itertools.takewhile(lambda parts: len(set(parts)) == 1, zip(*owners, strict=False))
    common = [parts[0] for parts in together]
    parent = network.get_submodule(".".join(common))
    if isinstance(parent, nn.Sequential) and common not in owners:
        children = [name for name, _ in parent.named_children()]
        first = min(children.index(owner[len(common)]) for owner in owners)
        return _tail(network, [".".join([*common, child]) for child in children[first:]])
    if not common and list(network.children()):
        return None
    return _tail(network, [".".join(common)])


def keeps_statistics(module: nn.Module) -> bool:
    """Whether a layer keeps running averages of its inputs' mean and variance."""
    return isinstance(module, nn.modules.batchnorm._NormBase) and module.track_running_stats  # pyright: ignore[reportPrivateUsage]


def last_layer(network: nn.Module) -> str:
    """Returns the pattern of the parameters of a network's last linear layer, whose place a head takes.

    Raises:
        ValueError: If there is no linear layer.

    Examples:
        >>> last_layer(nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2)))
        '2.*'
    """
    found = [name for name, module in network.named_modules() if isinstance(module, nn.Linear)]
    if not found:
        raise ValueError(
            f"network ({type(network).__name__}) has no linear layer, whose place a head would take: let it end in one "
            "that gives the outputs, or choose an algorithm that adapts all weights, such as algorithm='ibaml'."
        )
    return f"{found[-1]}.*".lstrip(".")


def _tail(network: nn.Module, names: Sequence[str]) -> Tail:
    return Tail(_without(network, names), OnFeatures({name: network.get_submodule(name) for name in names}))


def _add(root: nn.Module, name: str, layer: nn.Module) -> None:
    """Puts a layer at a dotted name, with empty modules on the way."""
    *path, last = name.split(".")
    for part in path:
        if not hasattr(root, part):
            root.add_module(part, nn.Module())
        root = root.get_submodule(part)
    root.add_module(last, layer)


def _without(network: nn.Module, names: Sequence[str]) -> nn.Module:
    """Returns a network that shares all modules but passes its features through where some were."""
    if "" in names:
        return nn.Identity()
    children = dict(network.named_children())
    for child in {name.partition(".")[0] for name in names}:
        below = [rest for name in names if (rest := name.partition(".")[2]) and name.startswith(f"{child}.")]
        children[child] = _without(children[child], below) if below else nn.Identity()
    return _with_children(network, children)


def _in_training(module: nn.Module) -> nn.Module:
    """Returns a module that shares all tensors, with the layers that keep running averages in training mode."""
    own = _with_children(module, {name: _in_training(child) for name, child in module.named_children()})
    own.training = keeps_statistics(module)
    return own


def _with_children(module: nn.Module, children: dict[str, nn.Module]) -> nn.Module:
    """Returns a module that shares everything but the table of its children, which a shallow copy would share too."""
    own = copy.copy(module)
    own._modules = {**module._modules, **children}  # pyright: ignore[reportPrivateUsage]
    return own
