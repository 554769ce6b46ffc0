"""The nll of one task's examples as functions of weights, or of a distribution over them, with their gradients."""

from collections.abc import Callable
from typing import Any, NamedTuple

from ibaml import objectives
from ibaml.curvature import DifferentiatedLoss
from ibaml.priors import DiagonalGaussian
from ibaml.traced import TracedNll
from ibaml.types import Batch, Params, Tensor

TaskNll = Callable[[Params, Params, Batch], Tensor]
"""``(adapted, shared, batch) -> nll per example``: ``ibaml.model.Model.nll`` or a ``ibaml.traced.TracedNll``."""


class MetaParameters(NamedTuple):
    """All that is learned over tasks.

    Attributes:
        prior: The prior over what is adapted: a member of the algorithm's family (``ibaml.priors``), which for
            algorithms on weights is the initial weights.
        shared: Parameters that are the same for all tasks.
    """

    prior: Any
    shared: Params


class TaskNoise(NamedTuple):
    """Standard normal noise of one task; empty dicts for weights algorithms.

    Attributes:
        inner: For the expected nll of the support set, leading axis ``num_samples``.
        outer: For the outer loss, leading axis ``num_samples``.
    """

    inner: Params
    outer: Params


def mean_nll(nll: TaskNll, batch: Batch, *, twice: bool = False) -> Callable[..., Tensor]:
    """Returns the mean nll, ``(weights, shared) -> scalar``, with the gradient that programs bring along."""
    if not isinstance(nll, TracedNll):
        return lambda weights, shared: nll(weights, shared, batch).mean()

    def value_and_gradient(weights: Params, shared: Params) -> tuple[Tensor, Params]:
        return nll.mean_and_gradient(weights, shared, batch, twice=twice)

    return DifferentiatedLoss(
        value_and_gradient,
        lambda *arguments: value_and_gradient(*arguments)[1],
        lambda weights, shared: nll.mean(weights, shared, batch),
    )


def expected_nll(nll: TaskNll, batch: Batch, draws: Params, *, twice: bool = False) -> Callable[..., Tensor]:
    """Returns the expected nll, ``(posterior, shared) -> scalar``, with the gradient that programs bring along."""
    if not isinstance(nll, TracedNll):
        return lambda posterior, shared: objectives.expected_nll(
            lambda weights, examples: nll(weights, shared, examples), posterior, draws, batch
        )

    def value_and_gradient(posterior: DiagonalGaussian, shared: Params) -> tuple[Tensor, DiagonalGaussian]:
        return nll.expected_and_gradient(posterior, shared, draws, batch, twice=twice)

    return DifferentiatedLoss(
        value_and_gradient,
        lambda *arguments: value_and_gradient(*arguments)[1],
        lambda posterior, shared: nll.expected(posterior, shared, draws, batch),
    )
