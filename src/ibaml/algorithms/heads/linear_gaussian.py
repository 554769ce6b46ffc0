"""Bayesian linear regression on learned features, solved exactly: what iBaML approximates by inner steps.

For each target the model is ``y = z.w + noise`` with ``w ~ N(m, C C^T)`` and noise of variance ``s2``. In whitened
weights, ``w = m + C e``, the inputs are ``X = Z C`` and the prior is standard normal, so that Bayes' rule is

    e | y ~ N( A^-1 X^T (y - Z m) / s2 , A^-1 )        A = I + X^T X / s2

and, for fewer examples than weights, ``A^-1 = I - B^T B`` with ``B = L^-1 X / s``, ``L L^T = I + X X^T / s2``. In the
terms of Zhang et al. 2023 this is the minimiser of ``expected nll + lam KL`` over all Gaussians, with
``lam = 1 / num_support``; a temperature ``T`` multiplies ``lam``, which is the same as ``T s2`` in place of ``s2``.

Further examples ``X2`` with errors ``r`` of the predicted means are taken in from the posterior alone, by Bayes' rule
with it as the prior: ``A2 = A + X2^T X2 / s2``, and the weights move by ``A2^-1 X2^T r / s2``.

Where a target was not measured its row of ``X`` is zero, and so is its error: the row says nothing of that target.
"""

import dataclasses
import math
from typing import Any, ClassVar, Literal, NamedTuple

import torch

from ibaml import tree
from ibaml.algorithms.heads.gaussian import GaussianHead, Measured, noise_variance
from ibaml.algorithms.heads.least_squares import (
    cholesky_or_nan,
    gaussian_nll,
    inverse_of_factor,
    is_dual,
    least_squares,
    log_determinant,
    plus_identity,
    stationarity,
)
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

    @property
    def root(self) -> Tensor:
        """``R`` with ``R^T R = A``, ``[num_targets, rank, rank]``."""
        return self.cholesky.mT

    def extended(self, rows: Tensor, error: Tensor) -> "tuple[Precision, Tensor]":
        """Returns the covariance after further examples, and the step of the whitened weights.

        Args:
            rows: ``X2 / s``, ``[num_targets, num_more, rank]``.
            error: ``r / s``, ``[num_targets, num_more, 1]``.

        Cost:
            ``(rank + num_more) rank^2`` operations for each target.
        """
        return _triangular(torch.cat([self.root, rows], -2), rows, error)

    def _factor(self, whitened: Tensor) -> Tensor:
        return torch.linalg.solve_triangular(self.cholesky, whitened.mT, upper=False).mT


def _triangular(root: Tensor, rows: Tensor, error: Tensor) -> tuple[Precision, Tensor]:
    """Returns the covariance of which ``root`` is a root of the inverse, and the step that further examples bring.

    By an orthogonal transformation of the root, differentiably: its condition number is not squared.
    """
    factor = torch.linalg.qr(root).R.mT
    # A Cholesky factor has a positive diagonal.
    factor = factor * torch.sign(torch.diagonal(factor, dim1=-2, dim2=-1)).unsqueeze(-2)
    return Precision(factor), torch.cholesky_solve(rows.mT @ error, factor)


class Reduction(NamedTuple):
    """Covariance ``S = I - B^T B`` of whitened weights.

    Attributes:
        rows: ``B``, ``[num_targets, num_support, rank]``.
        cholesky: ``L``, ``[num_targets, num_support, num_support]``, so that ``L B = X / s``.
    """

    rows: Tensor
    cholesky: Tensor

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

    @property
    def root(self) -> Tensor:
        """``R`` with ``R^T R = A``, ``[num_targets, rank + num_support, rank]``."""
        rows = self.cholesky @ self.rows
        identity = torch.eye(rows.shape[-1], dtype=rows.dtype, device=rows.device)
        return torch.cat([identity.expand(len(rows), -1, -1), rows], -2)

    def extended(self, rows: Tensor, error: Tensor) -> "tuple[Precision | Reduction, Tensor]":
        """Returns the covariance after further examples, and the step of the whitened weights; see ``Precision``.

        The factor ``L`` gets further rows, ``[L21, L22]`` with ``L21 = X2 B^T / s``, and ``B`` the rows
        ``L22^-1 (X2 / s - L21 B)``: as many as there are examples, and at most as many as there are weights.
        """
        if self.rows.shape[-2] + rows.shape[-2] >= rows.shape[-1]:
            return _triangular(torch.cat([self.root, rows], -2), rows, error)
        left = rows @ self.rows.mT
        corner = cholesky_or_nan(plus_identity(rows @ rows.mT - left @ left.mT))
        more = torch.linalg.solve_triangular(corner, rows - left @ self.rows, upper=False)
        nothing = torch.zeros_like(left.mT)
        cholesky = torch.cat([torch.cat([self.cholesky, nothing], -1), torch.cat([left, corner], -1)], -2)
        step = more.mT @ torch.linalg.solve_triangular(corner, error, upper=False)
        return Reduction(torch.cat([self.rows, more], -2), cholesky), step


class Root(NamedTuple):
    """Covariance ``S = R^T R`` of whitened weights, for predictions by products alone.

    Attributes:
        root: ``R``, ``[num_targets, rank, rank]``.
    """

    root: Tensor

    def variance(self, whitened: Tensor) -> Tensor:
        """Returns ``x^T S x`` for each row of ``X``, ``[num_targets, num_examples]``."""
        return ((whitened @ self.root.mT) ** 2).sum(-1)

    def covariance(self, whitened: Tensor) -> Tensor:
        """Returns ``X S X^T``, ``[num_targets, num_examples, num_examples]``."""
        factor = whitened @ self.root.mT
        return factor @ factor.mT


def in_products(spread: "Precision | Reduction | Independent | Root") -> "Reduction | Independent | Root":
    """Returns a covariance whose use takes products alone; see ``Head.in_products``."""
    return Root(inverse_of_factor(spread.cholesky)) if isinstance(spread, Precision) else spread


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
        squares: ``|y - Z mean|^2 / s2 + |e|^2`` of the examples and the whitened weights, ``[num_targets]``.
        num_support: Number of examples, a scalar.
        num_measured: Number of those where the target was measured, ``[num_targets]``.
        noise: Variance of the noise, times the temperature, ``[num_targets]``.
    """

    prior: Any
    mean: Tensor
    spread: Precision | Reduction | Independent | Root
    squares: Tensor
    num_support: Tensor
    num_measured: Tensor
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
        inputs, targets = support.x.double(), Measured.of(support.y)
        noise = self.temperature * noise_variance(shared, targets.values)
        whitened, prior_mean = targets.rows(self.prior.whiten(prior, inputs)), self.prior.mean(prior)
        error = targets.error(prior_mean @ inputs.mT).unsqueeze(-1)
        found = least_squares(whitened, error, noise)
        if self.covariance == "diagonal":
            spread = Independent(1 / (1 + (whitened**2).sum(-2) / noise.unsqueeze(-1)))
        elif is_dual(whitened):
            rows = torch.linalg.solve_triangular(found.cholesky, whitened, upper=False)
            spread = Reduction(rows / noise.sqrt()[:, None, None], found.cholesky)
        else:
            spread = Precision(found.cholesky)
        mean = prior_mean + self.prior.colour(prior, found.weights.squeeze(-1))
        squares = (found.residual**2).sum((-2, -1)) / noise + (found.weights**2).sum((-2, -1))
        num_support = torch.full_like(noise[0], len(inputs))
        posterior = ColumnPosterior(prior, mean, spread, squares, num_support, targets.num_examples, noise)
        return posterior, stationarity(found, whitened, error, noise)

    @property
    def is_sequential(self) -> bool:
        """Whether the whole covariance is there: independent weights do not tell what further examples mean."""
        return self.covariance == "full" and not self.centre

    def extend(
        self, solution: ColumnPosterior, shared: Params, more: Batch, num_outputs: int
    ) -> tuple[ColumnPosterior, Tensor] | None:
        """Returns the posterior after further examples, from it alone; see ``Head``.

        Cost:
            ``(rank + num_more) rank^2`` operations for each target, however many examples there were; less while there
            are fewer than weights.
        """
        del shared, num_outputs
        if not isinstance(solution.spread, Precision | Reduction):
            return None
        inputs, targets, deviation = more.x.double(), Measured.of(more.y), solution.noise.sqrt()[:, None, None]
        rows = targets.rows(self.prior.whiten(solution.prior, inputs)) / deviation
        error = targets.error(solution.mean @ inputs.mT).unsqueeze(-1) / deviation
        spread, step = solution.spread.extended(rows, error)
        root, left = solution.spread.root, error - rows @ step
        first = torch.linalg.vector_norm(rows.mT @ error).clamp_min(torch.finfo(error.dtype).tiny)
        residual = torch.linalg.vector_norm(root.mT @ (root @ step) - rows.mT @ left) / first
        extended = solution._replace(
            mean=solution.mean + self.prior.colour(solution.prior, step.squeeze(-1)),
            spread=spread,
            # r^T (X2 S X2^T + s2 I)^-1 r is what the further examples add.
            squares=solution.squares + (error * left).sum((-2, -1)),
            num_support=solution.num_support + len(inputs),
            num_measured=solution.num_measured + targets.num_examples,
        )
        return extended, residual

    def in_products(self, solution: ColumnPosterior) -> ColumnPosterior:
        """Returns the posterior with a root of its covariance; see ``Head``."""
        return solution._replace(spread=in_products(solution.spread))

    def moments(self, solution: ColumnPosterior, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Returns ``z.mean`` and ``z^T S z``; see ``HeadOfFunctions``."""
        inputs = inputs.double()
        variance = solution.spread.variance(self.prior.whiten(solution.prior, inputs))
        return solution.mean @ inputs.mT, variance

    def joint_covariance(self, solution: ColumnPosterior, inputs: Tensor) -> Tensor:
        """Returns ``Z C S C^T Z^T``; see ``HeadOfFunctions``."""
        return solution.spread.covariance(self.prior.whiten(solution.prior, inputs.double()))

    def support_nll(self, solution: ColumnPosterior) -> tuple[Tensor, Tensor]:
        """Returns minus the log marginal likelihood of the support set; see ``GaussianHead``."""
        assert isinstance(solution.spread, Precision | Reduction)
        constant = solution.num_measured * torch.log(2 * math.pi * solution.noise)
        nll = 0.5 * (solution.squares + log_determinant(solution.spread.cholesky) + constant)
        return nll.sum(), solution.num_support

    def joint_nll(self, solution: ColumnPosterior, noise: Tensor, query: Batch) -> Tensor:
        """Returns minus the joint log density of the query set; see ``GaussianHead``."""
        assert isinstance(solution.spread, Precision | Reduction)
        inputs, targets = query.x.double(), Measured.of(query.y)
        error = targets.error(solution.mean @ inputs.mT)
        rows = targets.rows(self.prior.whiten(solution.prior, inputs))
        return (solution.spread.joint_nll(rows, error, noise) - targets.nll_of_noise(noise)).sum()
