"""Inner and outer losses, in nats per example.

A ``NegativeLogLikelihood`` maps weights and a batch to one number per example; everything here is built on it and knows
neither network nor data. ``S`` is the number of weight samples, ``N`` the number of examples.
"""

import math
from collections.abc import Callable
from typing import Protocol, TypeAlias

import torch

from ibaml import tree
from ibaml.priors import DiagonalGaussian, kl_divergence
from ibaml.types import Batch, Params, Tensor

NegativeLogLikelihood: TypeAlias = Callable[[Params, Batch], Tensor]
"""``(weights, batch) -> nll`` of shape ``[N]``, or its mean over the examples where no more than that is wanted."""


class Samplable(Protocol):
    """A distribution over weights."""

    def sample(self, noise: Params) -> Params:
        """Maps standard normal noise to weights."""
        ...


def kl_weight(num_support: int, temperature: float = 1.0) -> float:
    """Returns the weight of the KL divergence beside the *mean* nll, ``temperature / num_support``.

    Temperature 1 is exact Bayes. Below 1 the posterior is colder (trusts the data more) than Bayes' rule says; the
    experiments of Zhang et al. 2023 used 0.01.

    Args:
        num_support: Number of support examples ``N``.
        temperature: Positive factor, to be reported with every result.

    Raises:
        ValueError: If an argument is not positive.
    """
    if num_support < 1:
        raise ValueError(f"num_support must be at least 1, but is {num_support}.")
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature must be positive and finite, but is {temperature}.")
    return temperature / num_support


def sampled_nll(nll: NegativeLogLikelihood, posterior: Samplable, noise: Params, batch: Batch) -> Tensor:
    """Returns the nll of every example under every weight sample, shape ``[S, N]``.

    Args:
        nll: Per-example nll of one weight dict.
        posterior: Distribution of the weights.
        noise: Standard normal values with a leading axis ``S``.
        batch: Examples.

    Cost:
        ``S`` forward passes, one after the other: batching weights turns convolutions into grouped ones, which are no
        faster on a CPU, slower on CUDA, and hold ``S`` times the activations.
    """
    num_samples = tree.leaves(noise)[0].shape[0]
    draws = [posterior.sample(tree.map(lambda e, s=s: e[s], noise)) for s in range(num_samples)]
    return torch.stack([nll(weights, batch) for weights in draws])


def expected_nll(
    nll: NegativeLogLikelihood, posterior: Samplable, noise: Params, batch: Batch, *, vectorize: bool = False
) -> Tensor:
    """Monte Carlo estimate of ``E_q[-log p(y | weights, X)]``, mean over examples, a scalar.

    With the noise as an argument it is a deterministic function of the posterior, so it has a Hessian.

    Args:
        nll: Nll of one weight dict, per example or their mean.
        posterior: Distribution of the weights.
        noise: Standard normal values with a leading axis ``S``.
        batch: Examples.
        vectorize: Compute the samples at once by ``torch.func.vmap``: faster for small networks without convolutions.
    """
    if vectorize:
        return torch.func.vmap(lambda draw: nll(posterior.sample(draw), batch).mean())(noise).mean()
    return sampled_nll(nll, posterior, noise, batch).mean()


def predictive_nll(nll: NegativeLogLikelihood, posterior: Samplable, noise: Params, batch: Batch) -> Tensor:
    """Returns ``-log mean_s p(y | weights_s)``, mean over examples: the nll of the averaged prediction.

    By Jensen's inequality it is at most ``expected_nll`` with the same noise.
    """
    per_sample = sampled_nll(nll, posterior, noise, batch)
    return -(torch.logsumexp(-per_sample, dim=0) - math.log(per_sample.shape[0])).mean()


def negative_elbo(expected: Tensor, posterior: DiagonalGaussian, prior: DiagonalGaussian, weight: float) -> Tensor:
    """Returns ``F = expected nll + weight * KL(posterior || prior)``, the inner loss (Zhang et al. 2023, eq. (7)).

    Args:
        expected: Expected nll on the support set, mean per example.
        posterior: Surrogate posterior of the task.
        prior: Meta-learned prior.
        weight: ``kl_weight(num_support, temperature)``.
    """
    return expected + weight * kl_divergence(posterior, prior)
