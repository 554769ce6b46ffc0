"""Gaussians with a full covariance over all adapted weights, for few of them: correlated intercepts and slopes, a head.

The covariance is ``C C^T`` with ``C = diag(exp(log_scale)) L`` and ``L`` unit lower triangular, over the weights in the
order of their names: every value of the coordinates is a covariance, and no coordinate has a unit but the mean.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import torch

from ibaml import tree
from ibaml.priors import base
from ibaml.priors.base import ImplicitSystem, map_to_wide
from ibaml.priors.diagonal import DiagonalGaussian, DiagonalPrior, hyper_prior_nll, sample_noise
from ibaml.types import Params, Tensor

_LARGEST = 2_000
# In steps relative to the prior, a log-variance moves by 2.5 and a log-deviation by half of that.
_LOG_SCALE_SPEED = 1.25


class FullGaussian(NamedTuple):
    """A Gaussian over a parameter dict, ``N(mean, C C^T)``.

    Attributes:
        mean: Mean of each weight, by parameter name.
        log_scale: Logarithm of the diagonal of ``C`` (natural), same names and shapes as ``mean``.
        lower: What ``L`` has below its diagonal, row after row, ``[num_weights (num_weights - 1) / 2]``.
    """

    mean: Params
    log_scale: Params
    lower: Tensor

    def factor(self) -> Tensor:
        """Returns ``C``, ``[num_weights, num_weights]``."""
        scale = torch.exp(tree.ravel(self.log_scale)[0])
        return scale.unsqueeze(-1) * unit_triangular(self.lower, len(scale))

    def covariance(self) -> Tensor:
        """Returns ``C C^T``, ``[num_weights, num_weights]``."""
        factor = self.factor()
        return factor @ factor.mT

    def sample(self, noise: Params) -> Params:
        """Maps standard normal noise to draws, ``mean + C noise`` (reparameterised).

        Args:
            noise: Standard normal values of the shape of ``mean``, or with one more leading axis for several draws.

        Examples:
            >>> q = FullGaussian({"w": torch.ones(2)}, {"w": torch.zeros(2)}, torch.tensor([3.0]))
            >>> q.sample({"w": torch.tensor([1.0, 2.0])})
            {'w': tensor([2., 6.])}
        """
        mean, unravel = tree.ravel(self.mean)
        factor = self.factor()

        def one(draw: Params) -> Params:
            return unravel(mean + factor @ tree.ravel(draw)[0])

        first, like = tree.leaves(noise)[0], tree.leaves(self.mean)[0]
        return one(noise) if first.ndim == like.ndim else torch.func.vmap(one)(noise)


@dataclasses.dataclass(frozen=True, kw_only=True)
class FullPrior:
    """Gaussians with a full covariance over the flattened weights.

    Attributes:
        initial_log_var: Range of the uniform distribution of the initial log-variances; all covariances start at zero.
    """

    initial_log_var: tuple[float, float] = (-10.0, -9.0)

    def __post_init__(self) -> None:
        """Refuses a range that is none."""
        DiagonalPrior(initial_log_var=self.initial_log_var)

    @property
    def is_distribution(self) -> bool:
        """True."""
        return True

    def init(self, weights: Params, /, *, generator: torch.Generator) -> FullGaussian:
        """Returns the weights as means, with random log-variances and no covariances.

        Raises:
            ValueError: If there are too many weights for a covariance matrix.
        """
        num_weights = sum(leaf.numel() for leaf in weights.values())
        require_few_weights(num_weights, "adapt fewer, such as adapt='head.*', or use DiagonalPrior")
        diagonal = DiagonalPrior(initial_log_var=self.initial_log_var).init(weights, generator=generator)
        like = tree.leaves(weights)[0]
        lower = torch.zeros(num_weights * (num_weights - 1) // 2, dtype=like.dtype, device=like.device)
        return FullGaussian(weights, tree.scale(0.5, diagonal.log_var), lower)

    def draw_noise(
        self, member: FullGaussian, num_samples: int, /, *, generator: torch.Generator, antithetic: bool = False
    ) -> Params:
        """Draws noise of the shapes of the means; see ``sample_noise``."""
        return sample_noise(member.mean, num_samples, generator=generator, antithetic=antithetic)

    def sample(self, member: FullGaussian, noise: Params, /) -> Params:
        """Returns ``mean + C noise``."""
        return member.sample(noise)

    def mean(self, member: FullGaussian, /) -> Params:
        """Returns the means."""
        return member.mean

    def map(self, function: Callable[[Params], Params], member: FullGaussian, /) -> FullGaussian:
        """Applies the function to means and log-scales.

        Weights that it appends (zeros that align a flat vector) are independent of all others, and those that it takes
        away again were.
        """
        mean, log_scale = function(member.mean), function(member.log_scale)
        num_weights = sum(leaf.numel() for leaf in tree.leaves(mean))
        num_lower, num_before = num_weights * (num_weights - 1) // 2, member.lower.shape[-1]
        padding = member.lower.new_zeros(max(0, num_lower - num_before))
        return FullGaussian(mean, log_scale, torch.cat([member.lower[:num_lower], padding]))

    def divergence(self, posterior: FullGaussian, prior: FullGaussian, /) -> Tensor:
        """Returns the Kullback-Leibler divergence, exact, in nats, at least float32.

        With ``S = C_p^-1 C_q`` it is ``(||S||^2 + ||C_p^-1 (m_q - m_p)||^2 - d) / 2 - log det S``.
        """
        posterior, prior = map_to_wide(posterior, prior)
        difference = tree.ravel(tree.sub(posterior.mean, prior.mean))[0]
        columns = torch.cat([posterior.factor(), difference.unsqueeze(-1)], -1)
        whitened = torch.linalg.solve_triangular(prior.factor(), columns, upper=False)
        # log det S is the difference of the diagonals' logarithms.
        log_ratio = tree.ravel(tree.sub(posterior.log_scale, prior.log_scale))[0]
        return 0.5 * ((whitened**2).sum() - len(difference)) - log_ratio.sum()

    def divergence_gradient(self, posterior: FullGaussian, prior: FullGaussian, /) -> FullGaussian:
        """Returns the gradient of ``divergence`` by autograd."""
        return torch.func.grad(self.divergence)(posterior, prior)

    def geometry(self, prior: FullGaussian, weight: float, /) -> "FullGeometry":
        """Returns what the prior and the KL weight say of the inner problem."""
        return FullGeometry(prior, weight)

    def implicit_system(
        self, posterior: FullGaussian, prior: FullGaussian, weight: float, nll_gradient: FullGaussian, /
    ) -> ImplicitSystem:
        """Returns the generic system."""
        del nll_gradient
        return base.implicit_system(self.divergence_gradient, posterior, prior, weight)

    def hyper_prior_nll(self, prior: FullGaussian, /) -> Tensor:
        """Returns ABML's hyper-prior of the marginal distributions of the weights."""
        _, unravel = tree.ravel(prior.mean)
        variance = (prior.factor() ** 2).sum(-1)
        return hyper_prior_nll(DiagonalGaussian(prior.mean, unravel(torch.log(variance))))

    def parameter_groups(self, member: FullGaussian, /) -> tuple[list[Tensor], list[Tensor]]:
        """Returns the means, and what makes the covariance."""
        return tree.leaves(member.mean), [*tree.leaves(member.log_scale), member.lower]


class FullGeometry(NamedTuple):
    """What is known of the negative ELBO of a full Gaussian before any example is seen.

    A change of ``C`` to ``C (I + T)`` with ``T`` lower triangular adds ``sum T_ii^2 + sum_(i>j) T_ij^2 / 2`` to the KL
    divergence, up to higher orders.

    Attributes:
        prior: The prior.
        kl_weight: ``lam``, the weight of the KL divergence.
    """

    prior: FullGaussian
    kl_weight: float

    def scale(self) -> FullGaussian:
        """Returns the marginal standard deviations for the means, 1.25 for the log-scales, and 1."""
        prior = tree.detach(self.prior)
        _, unravel = tree.ravel(prior.mean)
        return FullGaussian(
            mean=unravel((prior.factor() ** 2).sum(-1).sqrt()),
            log_scale=tree.map(lambda leaf: torch.full_like(leaf, _LOG_SCALE_SPEED), prior.log_scale),
            lower=torch.ones_like(prior.lower),
        )

    def curvature(self) -> FullGaussian:
        """Returns 0 (unknown) for the means, and the second derivatives of ``lam KL`` at the prior for the others."""
        factor = self.prior.factor()
        identity = torch.eye(len(factor), dtype=factor.dtype, device=factor.device)
        # Squared columns of C^-1. A log-scale has T = C^-1 e_i e_i^T C, an entry of L has T = C^-1 e_i s_i e_j^T.
        columns = (torch.linalg.solve_triangular(factor, identity, upper=False) ** 2).sum(0)
        log_scale, unravel = tree.ravel(self.prior.log_scale)
        rows = torch.tril_indices(len(factor), len(factor), -1, device=factor.device)[0]
        return FullGaussian(
            mean=tree.zeros_like(self.prior.mean),
            log_scale=unravel(self.kl_weight * (1 + columns * (factor**2).sum(-1))),
            lower=self.kl_weight * (torch.exp(2 * log_scale) * columns)[rows],
        )

    def natural_direction(self, value: FullGaussian, gradient: FullGaussian) -> FullGaussian:
        """Returns the way to the Gaussian that the local curvature asks for (Khan and Rue 2023).

        Where ``F`` is stationary in the covariance, its inverse is ``C^-T (I + R) C^-1`` with the symmetric
        ``R = C^T dF/dC / lam``. A step of size one along the direction sets the covariance to that and takes a Newton
        step of the mean with it. ``R`` is shifted so that no variance grows more than tenfold in a step.
        """
        scale, unravel = torch.exp(tree.ravel(value.log_scale)[0]), tree.ravel(value.mean)[1]
        factor, unit = value.factor(), unit_triangular(value.lower, len(scale))
        # C_ij = s_i L_ij: dF/dL_ij = s_i dF/dC_ij, and dF/dlog s_i = sum_j C_ij dF/dC_ij.
        strict = torch.tril(unit_triangular(gradient.lower, len(scale)), -1)
        on_diagonal = tree.ravel(gradient.log_scale)[0] - (strict * unit).sum(-1)
        by_factor = (strict + torch.diag(on_diagonal)) / scale.unsqueeze(-1)
        below = torch.tril(factor.mT @ by_factor) / self.kl_weight
        excess = below + torch.tril(below, -1).mT
        identity = torch.eye(len(scale), dtype=scale.dtype, device=scale.device)
        shift = (-0.9 - torch.linalg.eigvalsh(excess)[0]).clamp_min(0)
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(excess + (1 + shift) * identity))
        target = factor @ torch.linalg.cholesky(inverse)
        target_scale = torch.diagonal(target)
        rows, columns = torch.tril_indices(len(scale), len(scale), -1, device=scale.device)
        return FullGaussian(
            mean=unravel(target @ (target.mT @ tree.ravel(gradient.mean)[0]) / self.kl_weight),
            log_scale=unravel(torch.log(scale / target_scale)),
            lower=value.lower - (target / target_scale.unsqueeze(-1))[rows, columns],
        )


def require_few_weights(num_weights: int, advice: str) -> None:
    """Refuses more weights than a covariance matrix is good for.

    Args:
        num_weights: Weights that have the covariance.
        advice: What to do about it.

    Raises:
        ValueError: If there are too many.
    """
    if num_weights > _LARGEST:
        raise ValueError(
            f"a covariance of {num_weights} weights has {num_weights**2} entries; expected at most {_LARGEST} "
            f"adapted weights: {advice}."
        )


def unit_triangular(lower: Tensor, size: int) -> Tensor:
    """Returns the unit lower triangular matrix with some entries below its diagonal, row after row.

    Args:
        lower: The entries, ``[..., size (size - 1) / 2]``.
        size: Rows of the matrix.
    """
    column = torch.arange(size, device=lower.device)
    row = column.unsqueeze(-1)
    index = torch.where(row > column, row * (row - 1) // 2 + column + 2, (row == column).long())
    # Gathering, where writing into a matrix of zeros would be in place, has derivatives of every order under vmap.
    one = (*lower.shape[:-1], 1)
    return torch.cat([lower.new_zeros(one), lower.new_ones(one), lower], -1)[..., index]
