"""The Gaussian family over network weights: one mean and one log-variance per weight.

Everything is parametrised by the *log*-variance: variances near ``exp(-10)`` lose their digits in float32, gradient
descent on a variance can cross zero, and in log coordinates both problems vanish.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import NamedTuple

import torch

from ibaml import tree
from ibaml.priors.base import ImplicitSystem, map_to_wide
from ibaml.types import Params, PyTree, Tensor

# In steps relative to the prior: examples lower a log-variance by several nats, and move a mean by a deviation or two.
_LOG_VAR_SPEED = 2.5


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

    def factor(self) -> Tensor:
        """Returns the diagonal matrix of standard deviations over the flattened weights."""
        return torch.diag(torch.exp(0.5 * tree.ravel(self.log_var)[0]))

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


@dataclasses.dataclass(frozen=True, kw_only=True)
class DiagonalPrior:
    """Gaussians with one mean and one log-variance per weight: the family of Zhang et al. 2023.

    Attributes:
        initial_log_var: Range of the uniform distribution of the initial log-variances.
    """

    initial_log_var: tuple[float, float] = (-10.0, -9.0)

    def __post_init__(self) -> None:
        """Refuses a range that is none."""
        low, high = self.initial_log_var
        if not low <= high:
            raise ValueError(f"initial_log_var must be (low, high) with low <= high, but is {self.initial_log_var}.")

    @property
    def is_distribution(self) -> bool:
        """True."""
        return True

    def init(self, weights: Params, /, *, generator: torch.Generator) -> DiagonalGaussian:
        """Returns the weights as means, with random log-variances."""
        low, high = self.initial_log_var

        def draw(leaf: Tensor) -> Tensor:
            uniform = torch.rand(leaf.shape, generator=generator, dtype=leaf.dtype, device=generator.device)
            return (low + (high - low) * uniform).to(leaf.device)

        return DiagonalGaussian(weights, tree.map(draw, weights))

    def draw_noise(
        self, member: DiagonalGaussian, num_samples: int, /, *, generator: torch.Generator, antithetic: bool = False
    ) -> Params:
        """Draws noise of the shapes of the means; see ``sample_noise``."""
        return sample_noise(member.mean, num_samples, generator=generator, antithetic=antithetic)

    def sample(self, member: DiagonalGaussian, noise: Params, /) -> Params:
        """Returns ``mean + exp(log_var / 2) * noise``."""
        return member.sample(noise)

    def mean(self, member: DiagonalGaussian, /) -> Params:
        """Returns the means."""
        return member.mean

    def map(self, function: Callable[[Params], Params], member: DiagonalGaussian, /) -> DiagonalGaussian:
        """Applies the function to means and log-variances."""
        return DiagonalGaussian(function(member.mean), function(member.log_var))

    def divergence(self, posterior: DiagonalGaussian, prior: DiagonalGaussian, /) -> Tensor:
        """Returns ``kl_divergence``."""
        return kl_divergence(posterior, prior)

    def divergence_gradient(self, posterior: DiagonalGaussian, prior: DiagonalGaussian, /) -> DiagonalGaussian:
        """Returns ``kl_divergence_gradient``."""
        return kl_divergence_gradient(posterior, prior)

    def geometry(self, prior: DiagonalGaussian, weight: float, /) -> "DiagonalGeometry":
        """Returns what the prior and the KL weight say of the inner problem."""
        return DiagonalGeometry(prior, weight)

    def implicit_system(
        self, posterior: DiagonalGaussian, prior: DiagonalGaussian, weight: float, nll_gradient: DiagonalGaussian, /
    ) -> ImplicitSystem:
        """Returns Lemma 1 of Zhang et al. 2023, eq. (16)-(17), in log coordinates; see ``lemma_1``."""
        return lemma_1(posterior, prior, weight, nll_gradient)

    def hyper_prior_nll(self, prior: DiagonalGaussian, /) -> Tensor:
        """Returns ``hyper_prior_nll``."""
        return hyper_prior_nll(prior)

    def parameter_groups(self, member: DiagonalGaussian, /) -> tuple[list[Tensor], list[Tensor]]:
        """Returns means and log-variances."""
        return tree.leaves(member.mean), tree.leaves(member.log_var)


def lemma_1(
    posterior: DiagonalGaussian, prior: DiagonalGaussian, kl_weight: float, nll_gradient: DiagonalGaussian
) -> ImplicitSystem:
    """Returns what the KL divergence contributes to the implicit gradient: Lemma 1 of Zhang et al. 2023.

    In the paper's ``(m_t, d_t)`` the unknowns are ``(u_m, u_d)``; here the coordinates are ``(m_t, rho = log d_t)`` and
    the second unknown is ``s = u_d / d_t`` (``docs/design.md`` derives one from the other).

    Args:
        posterior: ``(m_t, rho)``.
        prior: ``(m, log D)``.
        kl_weight: ``lam``.
        nll_gradient: ``(dL/dm_t, dL/drho)`` at the posterior.
    """
    # lam / D, and d_t / D.
    pull = tree.map(lambda log_var: kl_weight * torch.exp(-log_var), prior.log_var)
    variance_ratio = tree.map(lambda rho, log_var: torch.exp(rho - log_var), posterior.log_var, prior.log_var)
    # (lam / 2) (d_t / D + (2 / lam) dL/drho)^2 - dL/drho: the paper's block of the variances, in which the condition of
    # stationarity 1 / d_t = 1 / D + (2 / lam) dL/dd_t has been substituted, less what the change to rho adds to hess L.
    log_var_diagonal = tree.map(
        lambda ratio, g: 0.5 * kl_weight * (ratio + (2 / kl_weight) * g) ** 2 - g, variance_ratio, nll_gradient.log_var
    )

    def add_curvature(of_nll: DiagonalGaussian, vector: DiagonalGaussian) -> DiagonalGaussian:
        return DiagonalGaussian(
            mean=tree.map(torch.addcmul, of_nll.mean, pull, vector.mean),
            log_var=tree.map(torch.addcmul, of_nll.log_var, log_var_diagonal, vector.log_var),
        )

    def add_mixed(direct: DiagonalGaussian, solution: DiagonalGaussian) -> DiagonalGaussian:
        return DiagonalGaussian(
            # g_m = dO/dm + lam u_m / D
            mean=tree.map(torch.addcmul, direct.mean, pull, solution.mean),
            # g_logD = dO/dlogD - dL/dm_t u_m + (lam / 2) (d_t / D) s
            log_var=tree.map(
                lambda o, g, u, ratio, s: o - g * u + 0.5 * kl_weight * ratio * s,
                direct.log_var,
                nll_gradient.mean,
                solution.mean,
                variance_ratio,
                solution.log_var,
            ),
        )

    # At a stationary point the diagonal of the system is about (lam / d_t, lam / 2).
    scale = tree.map(lambda rho: torch.exp(rho) / kl_weight, posterior.log_var)

    def precondition(vector: DiagonalGaussian) -> DiagonalGaussian:
        return DiagonalGaussian(tree.mul(scale, vector.mean), tree.scale(2 / kl_weight, vector.log_var))

    return ImplicitSystem(add_curvature, add_mixed, precondition)


class DiagonalGeometry(NamedTuple):
    """What is known of the negative ELBO of a diagonal Gaussian before any example is seen.

    Attributes:
        prior: The prior.
        kl_weight: ``lam``, the weight of the KL divergence.
    """

    prior: DiagonalGaussian
    kl_weight: float

    def scale(self) -> DiagonalGaussian:
        """Returns the prior's standard deviation for the means, and 2.5 for the log-variances."""
        log_var = self.prior.log_var
        return DiagonalGaussian(
            mean=tree.map(lambda leaf: torch.exp(0.5 * leaf.detach()), log_var),
            log_var=tree.map(lambda leaf: torch.full_like(leaf, _LOG_VAR_SPEED), log_var),
        )

    def curvature(self) -> DiagonalGaussian:
        """Returns 0 (unknown) for the means, whose curvature is that of the data, and ``lam / 2``."""
        return DiagonalGaussian(
            mean=tree.zeros_like(self.prior.mean),
            log_var=tree.map(lambda leaf: torch.full_like(leaf, self.kl_weight / 2), self.prior.log_var),
        )

    def natural_direction(self, value: DiagonalGaussian, gradient: DiagonalGaussian) -> DiagonalGaussian:
        """Returns ``natural_gradient(kl_weight)(value, gradient)``."""
        return natural_gradient(self.kl_weight)(value, gradient)


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


def hyper_prior_nll(prior: DiagonalGaussian, *, shape: float = 1.0, rate: float = 0.01) -> Tensor:
    """Negative log-density of the hyper-prior of ABML, summed over all weights.

    ``mean ~ N(0, 1)`` and precision ``1 / D ~ Gamma(shape, rate)`` (Ravi and Beatson 2019). The density of the
    precision is taken with respect to the precision itself: no Jacobian for the log-variance is added.

    Args:
        prior: Meta-learned prior.
        shape: Positive shape of the Gamma density.
        rate: Positive rate of the Gamma density.

    Returns:
        A scalar in nats.
    """

    def term(mean: Tensor, log_var: Tensor) -> Tensor:
        mean_nll = 0.5 * (mean**2 + math.log(2 * math.pi))
        precision_nll = rate * torch.exp(-log_var) + (shape - 1) * log_var
        return (mean_nll + precision_nll + math.lgamma(shape) - shape * math.log(rate)).sum()

    return torch.stack(tree.leaves(tree.map(term, prior.mean, prior.log_var))).sum()


def natural_gradient(kl_weight: float) -> Callable[[DiagonalGaussian, DiagonalGaussian], DiagonalGaussian]:
    """Returns the map from a gradient of the negative ELBO in ``(mean, log_var)`` to its natural gradient.

    Where ``F`` is stationary in the variances, ``1/d = (1 + r) / d_now`` with ``r = (2 / lam) dF/dlog_var``. A step of
    size one with the directions ``(d_now / (lam (1 + r)) dF/dmean, log(1 + r))`` therefore sets the variance to the
    value that the local curvature asks for and takes a Newton step of the mean with it (Khan and Rue 2023: the
    Bayesian learning rule). ``r`` is kept above -0.9, so that a variance grows at most tenfold in a step. For
    ``preconditioned_gradient_descent``.

    Args:
        kl_weight: ``lam``, positive.
    """

    def precondition(posterior: DiagonalGaussian, gradient: DiagonalGaussian) -> DiagonalGaussian:
        excess = tree.map(lambda g: (2 / kl_weight * g).clamp_min(-0.9), gradient.log_var)
        return DiagonalGaussian(
            mean=tree.map(
                lambda rho, r, g: torch.exp(rho) / (kl_weight * (1 + r)) * g, posterior.log_var, excess, gradient.mean
            ),
            log_var=tree.map(torch.log1p, excess),
        )

    return precondition
