"""The Gaussian family over network weights: one mean and one log-variance per weight.

Everything is parametrised by the *log*-variance: variances near ``exp(-10)`` lose their digits in float32, gradient
descent on a variance can cross zero, and in log coordinates both problems vanish.
"""

import math
from typing import NamedTuple

import torch

from ibaml import tree
from ibaml.types import Params, PyTree, Tensor


class DiagonalGaussian(NamedTuple):
    """A Gaussian with diagonal covariance over a parameter dict, ``N(mean, diag(exp(log_var)))``.

    Attributes:
        mean: Mean of each weight, by parameter name.
        log_var: Log-variance of each weight (natural logarithm), same names and shapes as ``mean``.
    """

    mean: Params
    log_var: Params

    def sample(self, noise: Params) -> Params:
        """Maps standard normal noise to a draw, ``mean + exp(log_var / 2) * noise`` (reparameterised).

        Args:
            noise: Standard normal values of the shape of ``mean``, or with one more leading axis for several draws.

        Returns:
            The draw, of the shape of ``noise``.

        Examples:
            >>> q = DiagonalGaussian({"w": torch.tensor([1.0])}, {"w": torch.tensor([0.0])})
            >>> q.sample({"w": torch.tensor([2.0])})
            {'w': tensor([3.])}
        """
        return tree.map(lambda m, rho, e: m + torch.exp(0.5 * rho) * e, self.mean, self.log_var, noise)

    def log_prob(self, value: Params) -> Tensor:
        """Returns the log-density of one weight dict, in nats, a scalar tensor.

        Args:
            value: Weights of the shape of ``mean``.
        """
        terms = tree.map(
            lambda m, rho, x: -0.5 * (math.log(2 * math.pi) + rho + (x - m) ** 2 * torch.exp(-rho)).sum(),
            *map_to_wide(self.mean, self.log_var, value),
        )
        return torch.stack(tree.leaves(terms)).sum()

    def entropy(self) -> Tensor:
        """Returns the differential entropy in nats, ``sum (1 + log 2 pi + log_var) / 2``, a scalar tensor."""
        (log_var,) = map_to_wide(self.log_var)
        terms = tree.map(lambda rho: 0.5 * (1 + math.log(2 * math.pi) + rho).sum(), log_var)
        return torch.stack(tree.leaves(terms)).sum()


def map_to_wide(*trees: PyTree) -> tuple[PyTree, ...]:
    """Casts half-precision leaves to float32: sums over millions of weights have no place in 16 bits."""
    return tuple(tree.map(lambda x: x.to(torch.promote_types(x.dtype, torch.float32)), t) for t in trees)


def kl_divergence(posterior: DiagonalGaussian, prior: DiagonalGaussian) -> Tensor:
    """Kullback-Leibler divergence ``KL(posterior || prior)`` of two diagonal Gaussians, exact.

    With ``posterior = N(m_t, d_t)`` and ``prior = N(m, D)`` it is
    ``sum (d_t / D - 1 - log(d_t / D) + (m_t - m)^2 / D) / 2``. The first three terms are computed as
    ``expm1(log(d_t / D)) - log(d_t / D)``, which keeps its digits when the variances nearly agree.

    Args:
        posterior: First argument of the divergence.
        prior: Second argument, same names and shapes.

    Returns:
        A scalar tensor in nats, at least float32.

    Raises:
        ValueError: If the two have different parameter names.

    Examples:
        >>> standard = DiagonalGaussian({"w": torch.zeros(2)}, {"w": torch.zeros(2)})
        >>> kl_divergence(standard._replace(mean={"w": torch.ones(2)}), standard)
        tensor(1.)
    """
    if posterior.mean.keys() != prior.mean.keys():
        difference = sorted(posterior.mean.keys() ^ prior.mean.keys())
        raise ValueError(
            f"posterior and prior must have the same parameter names, but differ in {difference}: "
            "build the posterior from the prior, for example posterior = prior."
        )

    def divergence(posterior_mean: Tensor, posterior_log_var: Tensor, mean: Tensor, log_var: Tensor) -> Tensor:
        log_ratio = posterior_log_var - log_var
        distance = (posterior_mean - mean) ** 2 * torch.exp(-log_var)
        return 0.5 * (torch.expm1(log_ratio) - log_ratio + distance).sum()

    terms = tree.map(divergence, *map_to_wide(posterior.mean, posterior.log_var, prior.mean, prior.log_var))
    return torch.stack(tree.leaves(terms)).sum()


def kl_divergence_gradient(posterior: DiagonalGaussian, prior: DiagonalGaussian) -> DiagonalGaussian:
    """Gradient of ``kl_divergence`` in the mean and the log-variance of the posterior.

    It is ``((m_t - m) / D, (d_t / D - 1) / 2)``; differentiable in all parameters of both.
    """
    wide_posterior, wide_prior = map_to_wide(posterior, prior)
    return DiagonalGaussian(
        mean=tree.map(
            lambda a, b, r: (a - b) * torch.exp(-r), wide_posterior.mean, wide_prior.mean, wide_prior.log_var
        ),
        log_var=tree.map(lambda a, b: 0.5 * torch.expm1(a - b), wide_posterior.log_var, wide_prior.log_var),
    )


def sample_noise(like: PyTree, num_samples: int, *, generator: torch.Generator, antithetic: bool = False) -> PyTree:
    """Draws standard normal noise for ``num_samples`` weight samples.

    Args:
        like: Pytree of tensors (usually the prior mean) whose shapes, dtypes and devices the noise takes.
        num_samples: Number of draws, at least 1. Becomes the leading axis of every leaf.
        generator: Source of randomness. Draws are made on its device and moved.
        antithetic: Make the second half the negative of the first: odd functions of the noise then average to zero
            exactly, which lowers the variance of gradients with respect to the mean.

    Raises:
        ValueError: If ``num_samples`` is not positive, or odd while ``antithetic`` is set.
    """
    if num_samples < 1:
        raise ValueError(f"num_samples must be at least 1, but is {num_samples}.")
    if antithetic and num_samples % 2:
        raise ValueError(f"num_samples must be even with antithetic=True, but is {num_samples}: add or drop one.")
    num_drawn = num_samples // 2 if antithetic else num_samples

    def draw(leaf: Tensor) -> Tensor:
        noise = torch.randn(
            (num_drawn, *leaf.shape), generator=generator, dtype=leaf.dtype, device=generator.device
        ).to(leaf.device)
        return torch.cat([noise, -noise]) if antithetic else noise

    return tree.map(draw, like)
