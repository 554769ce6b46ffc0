"""Nearest neighbours in feature space: what the support examples nearby have, averaged; a baseline without a posterior.

With weights ``w_i`` proportional to ``exp(-|z - z_i|^2 / scale)`` over the ``k`` nearest support examples, and their
targets (for classes: indicators) ``y_i``, the average is ``a = sum_i w_i y_i``. Numbers are predicted by ``a``, classes
by probabilities proportional to ``a_c + smoothing``.
"""

import dataclasses
import math
from typing import Any, ClassVar, NamedTuple

import torch

from ibaml.algorithms.base import MetaParameters
from ibaml.algorithms.heads.base import Head
from ibaml.algorithms.heads.gaussian import noise_variance
from ibaml.algorithms.heads.targets import indicators
from ibaml.algorithms.nll import Nll
from ibaml.checks import require_positive_int
from ibaml.likelihoods import Categorical, Gaussian, UnitGaussian
from ibaml.likelihoods.base import wide
from ibaml.types import Batch, Episode, Params, Tensor


class NeighboursPrior(NamedTuple):
    """What is learned over tasks.

    Attributes:
        log_scale: Natural logarithm of what squared distances are divided by, a scalar.
        log_smoothing: Natural logarithm of what is added to the average of each class, a scalar; no use for numbers.
    """

    log_scale: Tensor
    log_smoothing: Tensor


class Examples(NamedTuple):
    """What is known of a task.

    Attributes:
        features: ``[num_support, num_features]``.
        targets: Numbers, or indicators of the classes, ``[num_support, num_outputs]``.
        log_scale: As learned.
        log_smoothing: As learned; an empty tuple for numbers.
    """

    features: Tensor
    targets: Tensor
    log_scale: Tensor
    log_smoothing: Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class Neighbours(Head):
    """The average over the nearest support examples, for classes and for numbers with Gaussian noise.

    Attributes:
        num_neighbours: Number of neighbours; all of them where the support set is smaller.
        initial_scale: Scale where training starts, as a multiple of the number of features.
        initial_smoothing: Smoothing there.

    Raises:
        TypeError: If the number is not an integer.
        ValueError: If a setting is out of range.
    """

    num_neighbours: int = 5
    initial_scale: float = 1.0
    initial_smoothing: float = 0.1

    name: ClassVar[str] = "neighbours"
    is_bayesian: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Refuses settings out of range."""
        require_positive_int("num_neighbours", self.num_neighbours)
        for name in ("initial_scale", "initial_smoothing"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be positive and finite, but is {getattr(self, name)}.")

    @property
    def serves_any_number_of_outputs(self) -> bool:
        """True."""
        return True

    def describe(self) -> str:
        """Returns how a task is solved."""
        return f"average over {self.num_neighbours} nearest neighbours"

    def init_prior(self, num_inputs: int, num_outputs: int, *, like: Tensor) -> NeighboursPrior:
        """Returns what training starts from; see ``Head``."""
        del num_outputs
        return NeighboursPrior(
            like.new_full((), math.log(self.initial_scale * max(num_inputs - 1, 1))),
            like.new_full((), math.log(self.initial_smoothing)),
        )

    def parameter_groups(self, prior: NeighboursPrior) -> tuple[list[Tensor], list[Tensor]]:
        """Returns nothing, and what is on a log scale."""
        return [], list(prior)

    def check_task(self, nll: Nll, meta: MetaParameters, episode: Episode) -> None:
        """Refuses likelihoods whose mean is not what the network puts out; see ``Algorithm``.

        Raises:
            ValueError: If it is another.
        """
        likelihood = getattr(nll, "likelihood", None)
        is_plain = isinstance(likelihood, Gaussian) and not likelihood.heteroscedastic
        if likelihood is not None and not is_plain and not isinstance(likelihood, Categorical | UnitGaussian):
            raise ValueError(
                f"algorithm {self.name!r} averages classes, or numbers with Gaussian noise of one variance, but the "
                f"likelihood is {likelihood!r}: use 'categorical' or 'gaussian'."
            )
        super().check_task(nll, meta, episode)

    def solve(
        self, prior: NeighboursPrior, shared: Params, support: Batch, num_outputs: int
    ) -> tuple[Examples, Tensor]:
        """Keeps the support set; see ``Head``."""
        del shared
        features = wide(support.x)[0][:, :-1]
        is_number = support.y.is_floating_point()
        targets = support.y if is_number else indicators(support.y, num_outputs, like=features).mT
        smoothing = () if is_number else prior.log_smoothing
        solution = Examples(features, targets, prior.log_scale, smoothing)
        return solution, torch.zeros_like(prior.log_scale)

    def predict(self, solution: Examples, shared: Params, inputs: Tensor, noise: Params) -> dict[str, Tensor]:
        """Returns the logits or means, ``[1, num_examples, num_outputs]``."""
        del shared, noise
        return {"outputs": self.mean(solution, inputs).unsqueeze(0)}

    def outer_loss(self, solution: Examples, shared: Params, query: Batch) -> Tensor:
        """Returns the nll of the query set; see ``Head``."""
        outputs = self.mean(solution, query.x)
        if not query.y.is_floating_point():
            return Categorical().nll(outputs, query.y, shared).mean()
        variance = noise_variance(shared, query.y.mT).to(outputs.dtype)
        squares = (query.y - outputs) ** 2 / variance
        return 0.5 * (squares + torch.log(2 * math.pi * variance)).sum(-1).mean()

    def mean(self, solution: Examples, inputs: Tensor) -> Tensor:
        """Returns the logits or means, ``[num_examples, num_outputs]``.

        Args:
            solution: From ``solve``.
            inputs: ``z``, ``[num_examples, num_inputs]``.

        Cost:
            ``M N F`` operations for ``M`` inputs and ``N`` support examples.
        """
        # The square is expanded about the middle of the support set, so that no tensor has both sets and features.
        middle = solution.features.mean(0)
        one, other = wide(inputs)[0][:, :-1] - middle, solution.features - middle
        squares = (one**2).sum(-1, keepdim=True) - 2 * one @ other.mT + (other**2).sum(-1)
        num_neighbours = min(self.num_neighbours, len(other))
        nearest, positions = torch.topk(-squares.clamp_min(0), num_neighbours, dim=-1)
        weights = torch.softmax(nearest * torch.exp(-solution.log_scale), -1)
        average = (weights.unsqueeze(-1) * solution.targets[positions]).sum(-2)
        if isinstance(solution.log_smoothing, tuple):
            return average
        return torch.log(average + torch.exp(solution.log_smoothing))
