"""Prototypes: the nearest class mean in feature space (Snell et al. 2017), a baseline without a posterior."""

import dataclasses
import math
from typing import ClassVar, NamedTuple

import torch

from ibaml.algorithms.base import MetaParameters
from ibaml.algorithms.heads.base import Head
from ibaml.algorithms.heads.targets import indicators, require_likelihood_of_classes
from ibaml.algorithms.nll import Nll
from ibaml.likelihoods import Categorical
from ibaml.likelihoods.base import wide
from ibaml.types import Batch, Episode, Params, Tensor


class PrototypesScale(NamedTuple):
    """What is learned over tasks.

    Attributes:
        log_scale: Logarithm of what squared distances are divided by, a scalar.
    """

    log_scale: Tensor


class ClassMeans(NamedTuple):
    """What is known of a task.

    Attributes:
        means: Mean of the features of each class, ``[num_classes, num_features]``; 0 for one without examples.
        counts: Examples of each class, ``[num_classes]``.
        log_scale: As learned.
    """

    means: Tensor
    counts: Tensor
    log_scale: Tensor


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prototypes(Head):
    """Prototypes: ``logit_c = -|z - mean_c|^2 / scale`` with a learned scale.

    Nothing is known of a class without examples but that its mean is one of those that classes have: its squared
    distance is the average of those to the classes that have examples. So it is never the most probable of three, and
    beside one class that has examples it is as probable as that.

    Attributes:
        initial_scale: Scale where training starts, as a multiple of the number of features: squared distances grow in
            proportion to it.

    Raises:
        ValueError: If the scale is not positive.
    """

    initial_scale: float = 1.0

    name: ClassVar[str] = "prototypes"
    is_bayesian: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Refuses settings out of range."""
        if not 0 < self.initial_scale < math.inf:
            raise ValueError(f"initial_scale must be positive and finite, but is {self.initial_scale}.")

    @property
    def serves_any_number_of_outputs(self) -> bool:
        """True."""
        return True

    def check_task(self, nll: Nll, meta: MetaParameters, episode: Episode) -> None:
        """Refuses targets that are numbers; see ``Algorithm``."""
        require_likelihood_of_classes(nll, self.name)
        super().check_task(nll, meta, episode)

    def describe(self) -> str:
        """Returns how a task is solved."""
        return "class means, squared distances over a learned scale"

    def init_prior(self, num_inputs: int, num_outputs: int, *, like: Tensor) -> PrototypesScale:
        """Returns the scale that training starts from; see ``Head``."""
        del num_outputs
        return PrototypesScale(like.new_full((), math.log(self.initial_scale * max(num_inputs - 1, 1))))

    def parameter_groups(self, prior: PrototypesScale) -> tuple[list[Tensor], list[Tensor]]:
        """Returns nothing, and the scale."""
        return [], [prior.log_scale]

    def solve(
        self, prior: PrototypesScale, shared: Params, support: Batch, num_outputs: int
    ) -> tuple[ClassMeans, Tensor]:
        """Returns the class means; see ``Head``.

        Cost:
            ``K N F`` operations.
        """
        del shared
        features = wide(support.x)[0][:, :-1]
        members = indicators(support.y, num_outputs, like=features)
        counts = members.sum(-1)
        means = members @ features / counts.clamp_min(1).unsqueeze(-1)
        return ClassMeans(means, counts, prior.log_scale), torch.zeros_like(features[0, 0])

    def predict(self, solution: ClassMeans, shared: Params, inputs: Tensor, noise: Params) -> dict[str, Tensor]:
        """Returns the logits, ``[1, num_examples, num_classes]``."""
        del shared, noise
        return {"outputs": self.mean(solution, inputs).unsqueeze(0)}

    def outer_loss(self, solution: ClassMeans, shared: Params, query: Batch) -> Tensor:
        """Returns the cross entropy of the query set; see ``Head``."""
        return Categorical().nll(self.mean(solution, query.x), query.y, shared).mean()

    def mean(self, solution: ClassMeans, inputs: Tensor) -> Tensor:
        """Returns the logits, ``[num_examples, num_classes]``.

        Args:
            solution: From ``solve``.
            inputs: ``z``, ``[num_examples, num_inputs]``.

        Cost:
            ``M K F`` operations for ``M`` inputs.
        """
        is_seen = solution.counts > 0
        weights = is_seen.to(solution.means.dtype) / is_seen.sum()
        # The square is expanded, so that no tensor has examples, classes and features; about the middle of the class
        # means, so that what is subtracted is of the size of what is left.
        middle = weights @ solution.means
        features, means = wide(inputs)[0][:, :-1] - middle, solution.means - middle
        squares = (features**2).sum(-1, keepdim=True) - 2 * features @ means.mT + (means**2).sum(-1)
        squares = torch.where(is_seen, squares, (squares @ weights).unsqueeze(-1))
        return -squares * torch.exp(-solution.log_scale)
