"""The inner problem of one task as functions: losses that bring their gradient along where it is known."""

from collections.abc import Callable
from typing import NamedTuple, cast

from ibaml import objectives, tree
from ibaml.curvature import DifferentiatedLoss
from ibaml.gaussian import DiagonalGaussian, kl_divergence_gradient
from ibaml.traced import TracedNll
from ibaml.types import Batch, Params, Tensor

TaskNll = Callable[[Params, Params, Batch], Tensor]
"""``(adapted, shared, batch) -> nll per example``: ``ibaml.model.Model.nll`` or a ``ibaml.traced.TracedNll``."""


class MetaParameters(NamedTuple):
    """All that is learned over tasks.

    Attributes:
        prior: Initial weights (weights algorithms) or the prior over weights (Gaussian algorithms) of what is adapted.
        shared: Parameters that are the same for all tasks.
    """

    prior: Params | DiagonalGaussian
    shared: Params


class TaskNoise(NamedTuple):
    """Standard normal noise of one task; empty dicts for weights algorithms.

    Attributes:
        inner: For the expected nll of the support set, leading axis ``num_samples``.
        outer: For the outer loss, leading axis ``num_samples``.
        steps: For each inner step with fresh noise, leading axes ``num_inner_steps, num_samples``; else empty.
    """

    inner: Params
    outer: Params
    steps: Params


class InnerProblem(NamedTuple):
    """The inner problem of one task as functions of the inner variable and the meta-parameters."""

    expected_nll: Callable[..., Tensor] | None
    inner_loss: Callable[..., Tensor]
    inner_loss_at: Callable[[int], Callable[..., Tensor]] | None


def mean_nll(nll: TaskNll, weights: Params, shared: Params, batch: Batch) -> Tensor:
    """Returns the mean nll over a batch, by programs if there are any."""
    return nll.mean(weights, shared, batch) if isinstance(nll, TracedNll) else nll(weights, shared, batch).mean()


def penalised_nll(nll: TaskNll, support: Batch, strength: float, *, twice: bool) -> Callable[..., Tensor]:
    """Returns the inner loss of weights, ``(weights, theta) -> scalar``, with its gradient if there are programs."""

    def penalised(mean: Tensor, weights: Params, theta: MetaParameters) -> Tensor:
        return mean + objectives.proximal_penalty(weights, cast(Params, theta.prior), strength) if strength else mean

    def value(weights: Params, theta: MetaParameters) -> Tensor:
        return penalised(mean_nll(nll, weights, theta.shared, support), weights, theta)

    if not isinstance(nll, TracedNll):
        return value

    def value_and_gradient(weights: Params, theta: MetaParameters) -> tuple[Tensor, Params]:
        mean, gradient = nll.mean_and_gradient(weights, theta.shared, support, twice=twice)
        return penalised(mean, weights, theta), with_penalty(gradient, weights, theta)

    def with_penalty(gradient: Params, weights: Params, theta: MetaParameters) -> Params:
        return tree.axpy(strength, tree.sub(weights, theta.prior), gradient) if strength else gradient

    def gradient(weights: Params, theta: MetaParameters) -> Params:
        of_nll = nll.mean_and_gradient(weights, theta.shared, support, twice=twice)[1]
        return with_penalty(of_nll, weights, theta)

    return DifferentiatedLoss(value_and_gradient, gradient, value)


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


def negative_elbo(of_support: Callable[..., Tensor], weight: float) -> Callable[..., Tensor]:
    """Returns the inner loss of a Gaussian, ``(posterior, theta) -> scalar``."""

    def with_divergence(expected: Tensor, posterior: DiagonalGaussian, theta: MetaParameters) -> Tensor:
        return objectives.negative_elbo(expected, posterior, cast(DiagonalGaussian, theta.prior), weight)

    def value(posterior: DiagonalGaussian, theta: MetaParameters) -> Tensor:
        return with_divergence(of_support(posterior, theta.shared), posterior, theta)

    if not isinstance(of_support, DifferentiatedLoss):
        return value

    def value_and_gradient(posterior: DiagonalGaussian, theta: MetaParameters) -> tuple[Tensor, DiagonalGaussian]:
        expected, of_nll = of_support.value_and_gradient(posterior, theta.shared)
        return with_divergence(expected, posterior, theta), with_gradient_of_divergence(of_nll, posterior, theta)

    def with_gradient_of_divergence(
        of_nll: DiagonalGaussian, posterior: DiagonalGaussian, theta: MetaParameters
    ) -> DiagonalGaussian:
        return tree.axpy(weight, kl_divergence_gradient(posterior, cast(DiagonalGaussian, theta.prior)), of_nll)

    def gradient(posterior: DiagonalGaussian, theta: MetaParameters) -> DiagonalGaussian:
        return with_gradient_of_divergence(of_support.gradient(posterior, theta.shared), posterior, theta)

    return DifferentiatedLoss(value_and_gradient, gradient, value)
