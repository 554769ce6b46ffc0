"""Bayesian linear regression on learned features, solved exactly: what iBaML approximates by inner steps.

For each target the model is ``y = z.w + noise`` with ``w ~ N(m, C C^T)`` and noise of variance ``s2``. In whitened
weights, ``w = m + C e``, the inputs are ``X = Z C`` and the prior is standard normal, so that Bayes' rule is

    e | y ~ N( A^-1 X^T (y - Z m) / s2 , A^-1 )        A = I + X^T X / s2

and, for fewer examples than weights, ``A^-1 = I - B^T B`` with ``B = L^-1 X / s``, ``L L^T = I + X X^T / s2``. In the
terms of Zhang et al. 2023 this is the minimiser of ``expected nll + lam KL`` over all Gaussians, with
``lam = 1 / num_support``; a temperature ``T`` multiplies ``lam``, which is the same as ``T s2`` in place of ``s2``.
"""

import dataclasses
from typing import Any, ClassVar, Literal, NamedTuple

import torch

from ibaml import tree
from ibaml.algorithms.heads.gaussian import GaussianHead, noise_variance
from ibaml.algorithms.heads.least_squares import LeastSquares, gaussian_nll, is_dual, least_squares, stationarity
from ibaml.priors import ColumnPrior, DiagonalColumnPrior
from ibaml.types import Batch, Params, Tensor


class Precision(NamedTuple):
    """Covariance ``S = (L L^T)^-1`` of whitened weights.

    Attributes:
        cholesky: ``L``, ``[num_targets, rank, rank]``.
    """

    cholesky: Tensor

    def variance(self, whitened: Tensor) -> Tensor:
        """Returns ``x^T S x`` for each row of ``X``, ``[num_targets, num_examples]``."""
        return (self._factor(whitened) ** 2).sum(-1)

    def covariance(self, whitened: Tensor) -> Tensor:
        """Returns ``X S X^T``, ``[num_targets, num_examples, num_examples]``."""
        factor = self._factor(whitened)
        return factor @ factor.mT

    def joint_nll(self, whitened: Tensor, error: Tensor, noise: Tensor) -> Tensor:
        """Returns ``-log N(error; 0, X S X^T + noise I)`` for each target, by the smaller of rank and examples."""
        return least_squares(self._factor(whitened), error.unsqueeze(-1), noise).nll(noise)

    def _factor(self, whitened: Tensor) -> Tensor:
        return torch.linalg.solve_triangular(self.cholesky, whitened.mT, upper=False).mT


class Reduction(NamedTuple):
    """Covariance ``S = I - B^T B`` of whitened weights.

    Attributes:
        rows: ``B``, ``[num_targets, num_support, rank]``.
    """

    rows: Tensor

    def variance(self, whitened: Tensor) -> Tensor:
        """Returns ``x^T S x`` for each row of ``X``, ``[num_targets, num_examples]``."""
        known = ((whitened @ self.rows.mT) ** 2).sum(-1)
        # Rounding may leave a little less than nothing.
        return ((whitened**2).sum(-1) - known).clamp_min(0)

    def covariance(self, whitened: Tensor) -> Tensor:
        """Returns ``X S X^T``, ``[num_targets, num_examples, num_examples]``."""
        known = whitened @ self.rows.mT
        return whitened @ whitened.mT - known @ known.mT

    def joint_nll(self, whitened: Tensor, error: Tensor, noise: Tensor) -> Tensor:
        """Returns ``-log N(error; 0, X S X^T + noise I)`` for each target, in ``num_examples`` dimensions."""
        identity = torch.eye(whitened.shape[-2], dtype=whitened.dtype, device=whitened.device)
        return gaussian_nll(error, self.covariance(whitened) + noise[:, None, None] * identity)


class Independent(NamedTuple):
    """A diagonal covariance of whitened weights.

    Attributes:
        variances: ``[num_targets, rank]``.
    """

    variances: Tensor

    def variance(self, whitened: Tensor) -> Tensor:
        """Returns ``x^T S x`` for each row of ``X``, ``[num_targets, num_examples]``."""
        return (whitened**2 @ self.variances.unsqueeze(-1)).squeeze(-1)

    def covariance(self, whitened: Tensor) -> Tensor:
        """Returns ``X S X^T``, ``[num_targets, num_examples, num_examples]``."""
        return (whitened * self.variances.unsqueeze(-2)) @ whitened.mT


class ColumnPosterior(NamedTuple):
    """The posterior of the weights of each target, float64.

    Attributes:
        prior: The prior, which whitens inputs.
        mean: Means of the weights, ``[num_targets, num_inputs]``.
        spread: Covariances of the whitened weights.
        fit: The whitened weights, and what they leave of the targets.
        noise: Variance of the noise, times the temperature, ``[num_targets]``.
    """

    prior: Any
    mean: Tensor
    spread: Precision | Reduction | Independent
    fit: LeastSquares
    noise: Tensor


@dataclasses.dataclass(frozen=True, kw_only=True)
class LinearGaussian(GaussianHead):
    """A linear-Gaussian head: no inner steps, no weight samples, no linear solver; predictions are exact Gaussians.

    Relatives: ALPaCA, Bayesian last layers, mixed-effects models (without a hidden layer), Gaussian processes with the
    kernel ``z^T C C^T z'``.

    Attributes:
        prior: Family of the prior over the weights of a target. Full or low rank: intercept and slopes correlate.
        covariance: Whether the posterior's covariance is ``"full"`` (Bayes' rule), or ``"diagonal"``, the family of
            Zhang et al. 2023: ``d = 1 / diag(Z^T Z / s2 + D^-1)``, which a diagonal prior ``N(m, D)`` goes with.
        temperature: The KL divergence has weight ``temperature / num_support``. 1 is exact Bayes.

    Raises:
        ValueError: If a setting is out of range, or does not go with another.
    """

    prior: ColumnPrior = DiagonalColumnPrior()
    covariance: Literal["full", "diagonal"] = "full"
    temperature: float = 1.0  # pyright: ignore[reportIncompatibleMethodOverride, reportAssignmentType]

    name: ClassVar[str] = "linear_gaussian"

    def __post_init__(self) -> None:
        """Refuses settings that cannot work."""
        super().__post_init__()
        if self.covariance not in ("full", "diagonal"):
            raise ValueError(f"covariance must be one of full, diagonal, but is {self.covariance!r}.")
        if not self.temperature > 0:
            raise ValueError(f"temperature must be positive, but is {self.temperature}.")
        if not hasattr(self.prior, "whiten"):
            raise ValueError(f"prior must be one of columns such as DiagonalColumnPrior(), but is {self.prior!r}.")
        if self.covariance == "diagonal" and not self.prior.is_diagonal:
            raise ValueError(
                f"covariance='diagonal' is a family of posteriors for independent weights, but the prior is "
                f"{self.prior!r}: use DiagonalColumnPrior(), or covariance='full'."
            )
        if self.outer == "marginal" and (self.temperature != 1 or self.covariance != "full"):
            raise ValueError(
                "outer='marginal' is the marginal likelihood of Bayes' rule; expected temperature=1 and "
                f"covariance='full', but they are {self.temperature} and {self.covariance!r}."
            )

    def describe(self) -> str:
        """Returns how a task is solved."""
        return f"exact solution with {self.covariance} covariance, temperature {self.temperature:g}"

    def init_prior(self, num_inputs: int, num_outputs: int, *, like: Tensor) -> Any:
        """Returns the first member of the prior's family; see ``Head``."""
        return self.prior.init(num_inputs, num_outputs, like=like)

    def parameter_groups(self, prior: Any) -> tuple[list[Tensor], list[Tensor]]:
        """Returns those of the prior's family; see ``Head``."""
        return self.prior.parameter_groups(prior)

    def solve(self, prior: Any, shared: Params, support: Batch, num_outputs: int) -> tuple[ColumnPosterior, Tensor]:
        """Returns the posterior of each target's weights; see ``Head``.

        Cost:
            ``num_support rank min(num_support, rank)`` operations for the product and a Cholesky factorisation of
            ``min(num_support, rank)`` rows for each target.
        """
        del num_outputs
        prior = tree.map(torch.Tensor.double, prior)
        inputs, targets = support.x.double(), support.y.double().mT
        noise = self.temperature * noise_variance(shared, targets)
        whitened, prior_mean = self.prior.whiten(prior, inputs), self.prior.mean(prior)
        error = (targets - prior_mean @ inputs.mT).unsqueeze(-1)
        found = least_squares(whitened, error, noise)
        if self.covariance == "diagonal":
            spread = Independent(1 / (1 + (whitened**2).sum(-2) / noise.unsqueeze(-1)))
        elif is_dual(whitened):
            rows = torch.linalg.solve_triangular(found.cholesky, whitened, upper=False)
            spread = Reduction(rows / noise.sqrt()[:, None, None])
        else:
            spread = Precision(found.cholesky)
        mean = prior_mean + self.prior.colour(prior, found.weights.squeeze(-1))
        return ColumnPosterior(prior, mean, spread, found, noise), stationarity(found, whitened, error, noise)

    def moments(self, solution: ColumnPosterior, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Returns ``z.mean`` and ``z^T S z``; see ``HeadOfFunctions``."""
        inputs = inputs.double()
        variance = solution.spread.variance(self.prior.whiten(solution.prior, inputs))
        return solution.mean @ inputs.mT, variance

    def joint_covariance(self, solution: ColumnPosterior, inputs: Tensor) -> Tensor:
        """Returns ``Z C S C^T Z^T``; see ``HeadOfFunctions``."""
        return solution.spread.covariance(self.prior.whiten(solution.prior, inputs.double()))

    def support_nll(self, solution: ColumnPosterior) -> tuple[Tensor, int]:
        """Returns minus the log marginal likelihood of the support set; see ``GaussianHead``."""
        return solution.fit.nll(solution.noise).sum(), solution.fit.residual.shape[-2]

    def joint_nll(self, solution: ColumnPosterior, noise: Tensor, query: Batch) -> Tensor:
        """Returns minus the joint log density of the query set; see ``GaussianHead``."""
        assert not isinstance(solution.spread, Independent)
        inputs = query.x.double()
        error = query.y.double().mT - solution.mean @ inputs.mT
        return solution.spread.joint_nll(self.prior.whiten(solution.prior, inputs), error, noise).sum()
