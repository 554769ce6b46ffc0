"""What is measured: a network, an algorithm and a few random tasks, all on the same tensors for every candidate."""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

import torch
from torch import nn

from ibaml import tree
from ibaml.algorithms import Algorithm, MetaParameters, TaskNoise, make_algorithm
from ibaml.algorithms.model import Model, build_model
from ibaml.likelihoods import Categorical
from ibaml.networks import MLP, Conv4, ResNet12
from ibaml.solvers.inner import GradientDescent
from ibaml.solvers.linear import CG
from ibaml.types import Batch, Episode, Params, Tensor

AlgorithmName: TypeAlias = Literal["maml", "imaml", "abml", "ibaml"]
NetworkName: TypeAlias = Literal["mlp", "conv4_64_28", "conv4_32_84", "resnet12_28", "resnet12_84", "tiny"]

MetaStep: TypeAlias = Callable[[], list[Tensor]]
"""Computes the gradients of all tasks, summed, in the order of ``Problem.meta_leaves``."""

DISPLAY_NAMES = {"maml": "MAML", "imaml": "iMAML", "abml": "ABML", "ibaml": "iBaML"}
EXPLICIT = ("maml", "abml")
NETWORKS = {
    "mlp": "MLP 2048-256-256-5",
    "conv4_64_28": "Conv4-64, 28 x 28",
    "conv4_32_84": "Conv4-32, 84 x 84",
    "resnet12_28": "ResNet-12, 28 x 28",
    "resnet12_84": "ResNet-12, 84 x 84",
    "tiny": "Conv4-4, 16 x 16",
}

# Every solve has to take all L steps, or the fast candidate is the one that stops first. An untrained network has
# negative curvature, at which conjugate gradients stop: the pull towards the prior has to outweigh it. It must not do
# so by orders of magnitude either, or the residual underflows before the last step. The learning rate and the weights
# are binary fractions, so that a library that keeps one in single precision still computes the same number.
_INNER_LEARNING_RATE = 2.0**-8
_PROXIMAL_STRENGTH = 32.0
_KL_WEIGHT = 2.0**-9


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """One line of the grid.

    Attributes:
        network: Which network.
        algorithm: "maml", "imaml", "abml" or "ibaml".
        num_shots: Support images per class.
        num_inner_steps: K.
        num_linear_steps: L; None for the explicit algorithms.
        num_ways: Classes.
        num_queries: Query images per class.
        num_samples: Weight samples S of the Gaussian algorithms.
        num_tasks: Tasks in a meta-step.
    """

    network: NetworkName
    algorithm: AlgorithmName
    num_shots: int = 1
    num_inner_steps: int = 5
    num_linear_steps: int | None = None
    num_ways: int = 5
    num_queries: int = 15
    num_samples: int = 2
    num_tasks: int = 2

    def __post_init__(self) -> None:
        """Refuses settings without a meaning."""
        for field, choices in (("network", get_args(NetworkName)), ("algorithm", get_args(AlgorithmName))):
            if getattr(self, field) not in choices:
                raise ValueError(f"{field} must be one of {', '.join(choices)}, but is {getattr(self, field)!r}.")
        for field in ("num_shots", "num_inner_steps", "num_queries", "num_samples", "num_tasks"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field} must be at least 1, but is {getattr(self, field)}.")
        if self.num_ways < 2:
            raise ValueError(f"num_ways must be at least 2, but is {self.num_ways}.")
        if (self.num_linear_steps is None) != (self.algorithm in EXPLICIT):
            raise ValueError(
                f"num_linear_steps belongs to imaml and ibaml, and they need it, but is {self.num_linear_steps} for "
                f"{self.algorithm}."
            )

    @property
    def name(self) -> str:
        """How tables call the case."""
        steps = f"K = {self.num_inner_steps}"
        steps += "" if self.num_linear_steps is None else f", L = {self.num_linear_steps}"
        return f"{DISPLAY_NAMES[self.algorithm]}, {steps}"


class Problem(NamedTuple):
    """A case with its tensors.

    Attributes:
        case: What it was built for.
        network: The module; its parameters are the initial weights (the mean of the prior).
        model: The network as a function.
        algorithm: The algorithm.
        meta: Where the gradient is taken.
        episodes: One per task.
        noises: One per task.
    """

    case: Case
    network: nn.Module
    model: Model
    algorithm: Algorithm
    meta: MetaParameters
    episodes: list[Episode]
    noises: list[TaskNoise]

    @property
    def device(self) -> torch.device:
        """Where everything lies."""
        return self.episodes[0].support.x.device

    def forward(self, weights: Params, x: Tensor) -> Tensor:
        """Returns the logits of the network with other weights."""
        return torch.func.functional_call(self.network, weights, (x,))

    def meta_leaves(self) -> list[Tensor]:
        """Lists the meta-parameters: weights, or means and then log-variances."""
        return tree.leaves(self.meta.prior)


def build_network(name: NetworkName, num_ways: int, generator: torch.Generator) -> nn.Module:
    """Builds one of ``NETWORKS``."""
    if name == "mlp":
        return MLP(num_ways, input_shape=2048, hidden_sizes=(256, 256), generator=generator)
    if name.startswith("resnet12"):
        return ResNet12(num_ways, image_size=int(name.rpartition("_")[2]), generator=generator)
    channels, size, colours = {"conv4_64_28": (64, 28, 1), "conv4_32_84": (32, 84, 3), "tiny": (4, 16, 1)}[name]
    return Conv4(num_ways, in_channels=colours, image_size=size, channels=channels, generator=generator)


def build_problem(
    case: Case, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32, seed: int = 0
) -> Problem:
    """Builds network, algorithm and random tasks; neither time nor memory depends on what images show."""
    generator = torch.Generator().manual_seed(seed)
    network = build_network(case.network, case.num_ways, generator).to(device, dtype)
    model = build_model(network, Categorical())

    def batch(num_each: int) -> Batch:
        size = (case.num_ways * num_each, *network.input_shape)
        images = torch.randn(size, generator=generator, dtype=dtype)
        return Batch(images.to(device), torch.arange(case.num_ways, device=device).repeat_interleave(num_each))

    inner = GradientDescent(num_steps=case.num_inner_steps, learning_rate=_INNER_LEARNING_RATE)
    chosen: dict[str, Any] = {"inner": inner}
    if case.num_linear_steps is not None:
        # A tolerance of zero is never met, so that every solve takes L steps.
        chosen["linear"] = CG(max_steps=case.num_linear_steps, rtol=0.0)
    if case.algorithm == "imaml":
        chosen["proximal_strength"] = _PROXIMAL_STRENGTH
    if case.algorithm in ("abml", "ibaml"):
        chosen |= {"num_samples": case.num_samples, "temperature": _KL_WEIGHT * case.num_ways * case.num_shots}
    algorithm = make_algorithm(case.algorithm, **chosen)
    meta = algorithm.init(model.adapted, model.shared, generator=generator)
    episodes = [Episode(batch(case.num_shots), batch(case.num_queries)) for _ in range(case.num_tasks)]
    noises = [algorithm.draw_noise(meta, generator=generator) for _ in range(case.num_tasks)]
    return Problem(case, network, model, algorithm, meta, episodes, noises)
