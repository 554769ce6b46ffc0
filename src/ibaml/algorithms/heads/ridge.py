"""Ridge regression on one-hot labels as a classifier, in closed form (R2-D2, Bertinetto et al. 2019).

With one-hot labels ``Y`` of the support set, ``W = (Z^T Z + r I)^-1 Z^T Y`` and ``logits = scale * z.W``, where ``r``
and ``scale`` are learned. It is a baseline without a posterior.
"""

import dataclasses
import math
from typing import ClassVar, NamedTuple

import torch
from torch.nn import functional

from ibaml.algorithms.base import MetaParameters
from ibaml.algorithms.heads.base import Head
from ibaml.algorithms.heads.least_squares import least_squares, stationarity
from ibaml.algorithms.nll import Nll
from ibaml.likelihoods import Categorical
from ibaml.types import Batch, Episode, Params, Tensor


class RidgePrior(NamedTuple):
    """Meta-parameters.

    Attributes:
        log_regularization: Natural logarithm of ``r``, ``[1]``.
        log_scale: Natural logarithm of what predictions are multiplied with, ``[1]``.
        bias: What is added to the logits of each class, ``[num_classes]``; empty if classes are tied.
    """

    log_regularization: Tensor
    log_scale: Tensor
    bias: Tensor


class RidgeSolution(NamedTuple):
    """The classifier of a task.

    Attributes:
        weights: Of the logits, ``[num_inputs, num_classes]``.
        bias: Of the logits, ``[num_classes]``.
    """

    weights: Tensor
    bias: Tensor


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ridge(Head):
    """Ridge regression on one-hot labels.

    Attributes:
        tied: Whether classes are exchangeable: then there is no bias, since one that all classes have cancels in the
            softmax (that of R2-D2 does), and tasks may have any number of classes. Else each class has its own.
        initial_regularization: ``r / num_features``, where training starts: at 1 and features of unit variance one
            example is fitted half way.
        initial_scale: Of the predictions there, which are about 1 for the right class and 0 for the others.

    Raises:
        ValueError: If a setting is out of range.
    """

    tied: bool = True
    initial_regularization: float = 1.0
    initial_scale: float = 10.0

    name: ClassVar[str] = "ridge"
    is_bayesian: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Refuses settings out of range."""
        for name in ("initial_regularization", "initial_scale"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be positive and finite, but is {getattr(self, name)}.")

    @property
    def serves_any_number_of_outputs(self) -> bool:
        """Whether classes are tied."""
        return self.tied

    def describe(self) -> str:
        """Returns how a task is solved."""
        return "exact ridge regression on one-hot labels"

    def init_prior(self, num_inputs: int, num_outputs: int, *, like: Tensor) -> RidgePrior:
        """Returns what training starts from; see ``Head``."""
        regularization = self.initial_regularization * max(num_inputs - 1, 1)
        return RidgePrior(
            like.new_full((1,), math.log(regularization)),
            like.new_full((1,), math.log(self.initial_scale)),
            like.new_zeros(0 if self.tied else num_outputs),
        )

    def parameter_groups(self, prior: RidgePrior) -> tuple[list[Tensor], list[Tensor]]:
        """Returns the bias, and what is on a log scale; see ``Head``."""
        return [prior.bias], [prior.log_regularization, prior.log_scale]

    def check_task(self, nll: Nll, meta: MetaParameters, episode: Episode) -> None:
        """Refuses targets that are no classes; see ``Algorithm``.

        Raises:
            ValueError: If they are not.
        """
        likelihood = getattr(nll, "likelihood", None)
        if likelihood is not None and not isinstance(likelihood, Categorical):
            raise ValueError(
                f"algorithm {self.name!r} is regression on one-hot labels of classes, but the likelihood is "
                f"{likelihood!r}: use likelihood='categorical', or algorithm='linear_gaussian' for numbers."
            )
        super().check_task(nll, meta, episode)

    def solve(
        self, prior: RidgePrior, shared: Params, support: Batch, num_outputs: int
    ) -> tuple[RidgeSolution, Tensor]:
        """Returns the weights of the logits; see ``Head``. A class without examples has none.

        Cost:
            ``num_support num_inputs min(num_support, num_inputs)`` operations and a Cholesky factorisation of
            ``min(num_support, num_inputs)`` rows, in float64.
        """
        del shared
        inputs = support.x.double()
        classes = torch.arange(num_outputs, device=inputs.device)
        one_hot = (support.y.unsqueeze(-1) == classes).double()
        regularization = torch.exp(prior.log_regularization.double()).squeeze(0)
        found = least_squares(inputs, one_hot, regularization)
        weights = torch.exp(prior.log_scale.double()) * found.weights
        bias = inputs.new_zeros(num_outputs) if self.tied else prior.bias.double()
        return RidgeSolution(weights, bias), stationarity(found, inputs, one_hot, regularization)

    def predict(self, solution: RidgeSolution, shared: Params, inputs: Tensor, noise: Params) -> dict[str, Tensor]:
        """Returns one sample of the logits; see ``Head``."""
        del shared, noise
        return {"outputs": self.mean(solution, inputs).unsqueeze(0)}

    def outer_loss(self, solution: RidgeSolution, shared: Params, query: Batch) -> Tensor:
        """Returns the cross entropy; see ``Head``."""
        del shared
        return functional.cross_entropy(self.mean(solution, query.x), query.y)

    def mean(self, solution: RidgeSolution, inputs: Tensor) -> Tensor:
        """Returns the logits; see ``Head``."""
        return (inputs.double() @ solution.weights + solution.bias).to(inputs.dtype)
