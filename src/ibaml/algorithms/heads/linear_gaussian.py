"""Bayesian linear regression on learned features, solved exactly: what iBaML approximates by inner steps.

With outputs that are affine in the adapted weights ``w`` (a last linear layer) and Gaussian noise, the nll of every
example is quadratic in ``w``. The nll alone therefore tells all: with ``H`` and ``g`` the Hessian and the gradient of
the support set's mean nll at ``w = 0``, with the prior ``N(m, P^-1)`` and with ``lam = temperature / num_support``, the
minimiser of ``expected nll + lam KL`` over Gaussians is

    A = H / lam + P        mean = A^-1 (P m - g / lam)        covariance = A^-1, or diag(1 / A_ii) if it is diagonal

At temperature 1 and with a full covariance that is Bayes' rule: ``H = Z^T Z / (s2 num_support)`` for features ``Z``.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, ClassVar, Literal

import torch

from ibaml import tree
from ibaml.algorithms.base import MetaParameters, TaskNoise
from ibaml.algorithms.nll import Nll
from ibaml.algorithms.objectives import kl_weight
from ibaml.priors import DiagonalGaussian, DiagonalPrior, FullGaussian, Prior
from ibaml.types import Batch, Episode, HypergradientInfo, InnerSolution, Params, Tensor


@dataclasses.dataclass(frozen=True, kw_only=True)
class LinearGaussian:
    """A linear-Gaussian head: no inner steps, no weight samples, no linear solver; predictions are exact Gaussians.

    Relatives: ALPaCA, Bayesian last layers, mixed-effects models (without a hidden layer).

    Attributes:
        prior: Family of the prior: ``DiagonalPrior`` or ``FullPrior``.
        covariance: Whether the posterior's covariance is ``"full"`` (Bayes' rule), or ``"diagonal"``, the family of
            Zhang et al. 2023.
        temperature: The KL divergence has weight ``temperature / num_support``. 1 is exact Bayes.
        outer: Outer loss of the query set: minus the log predictive density, or the expected nll.
    """

    prior: Prior = DiagonalPrior(initial_log_var=(-2.0, -2.0))
    covariance: Literal["full", "diagonal"] = "full"
    temperature: float = 1.0
    outer: Literal["predictive_nll", "expected_nll"] = "predictive_nll"

    name: ClassVar[str] = "linear_gaussian"
    is_bayesian: ClassVar[bool] = True
    estimator: ClassVar[Literal["implicit"]] = "implicit"
    num_curvature_points: ClassVar[int] = 1

    def __post_init__(self) -> None:
        """Refuses settings out of range."""
        if self.covariance not in ("full", "diagonal"):
            raise ValueError(f"covariance must be one of full, diagonal, but is {self.covariance!r}.")
        if self.outer not in ("predictive_nll", "expected_nll"):
            raise ValueError(f"outer must be one of predictive_nll, expected_nll, but is {self.outer!r}.")
        if not self.temperature > 0:
            raise ValueError(f"temperature must be positive, but is {self.temperature}.")
        if not getattr(self.prior, "is_distribution", False):
            raise ValueError(f"prior must be a distribution such as DiagonalPrior(), but is {self.prior!r}.")

    def describe(self) -> str:
        """Returns how the inner problem is solved."""
        return f"exact solution with {self.covariance} covariance, temperature {self.temperature:g}"

    def init(self, adapted: Params, shared: Params, *, generator: torch.Generator) -> MetaParameters:
        """Returns initial meta-parameters; see ``Algorithm``."""
        return MetaParameters(self.prior.init(adapted, generator=generator), shared)

    def draw_noise(self, meta: MetaParameters, *, generator: torch.Generator) -> TaskNoise:
        """Returns no noise."""
        del meta, generator
        return TaskNoise({}, {})

    def draw_evaluation_noise(self, meta: MetaParameters, *, generator: torch.Generator) -> Params:
        """Returns no noise."""
        del meta, generator
        return {}

    def check_task(self, nll: Nll, meta: MetaParameters, episode: Episode) -> None:
        """Refuses a model whose nll is not quadratic in the adapted weights; see ``Algorithm``.

        Raises:
            ValueError: If it is not.
        """
        mean = self.prior.mean(meta.prior)
        flat, unravel = tree.ravel(mean)
        # No direction that a likelihood could be blind to, as a softmax is to a constant.
        step = unravel(torch.cos(torch.arange(len(flat), dtype=flat.dtype, device=flat.device)))
        values = [
            nll.per_example(tree.axpy(float(k), step, mean), meta.shared, episode.query).double() for k in range(4)
        ]
        # The third difference of a quadratic function is zero.
        third = values[3] - 3 * values[2] + 3 * values[1] - values[0]
        size = torch.stack(values).abs().max()
        if not bool((third.abs() <= 1e-3 * size).all()):
            raise ValueError(
                f"the outputs are not affine in the adapted parameters ({', '.join(mean)}), or the noise is not "
                "Gaussian: algorithm 'linear_gaussian' solves the last linear layer of a network exactly, for "
                "likelihood='gaussian'. Adapt that layer alone, such as adapt='head.*'."
            )

    def adapt(
        self,
        nll: Nll,
        meta: MetaParameters,
        support: Batch,
        noise: TaskNoise,
        *,
        start: Any = None,
        with_grad_norm: bool = True,
    ) -> InnerSolution:
        """Solves the inner problem of one task exactly; see ``Algorithm``. ``start`` has no effect.

        Cost:
            One gradient and one Hessian-vector product of the head for each of ``d`` adapted weights, and ``d^3``.
        """
        del noise, start
        posterior = self._solve(nll, meta, support)
        grad_norm = torch.full_like(tree.leaves(posterior)[0].flatten()[0], math.nan)
        if with_grad_norm:
            grad_norm = self._grad_norm(nll, meta, support, posterior)
        return InnerSolution(posterior, grad_norm, 0)

    def hypergradient(
        self, nll: Nll, meta: MetaParameters, episode: Episode, noise: TaskNoise
    ) -> tuple[MetaParameters, HypergradientInfo]:
        """Returns the gradient of the outer loss by autograd through the closed form, exact; see ``Algorithm``."""
        del noise
        meta = tree.detach(meta)

        def objective(theta: MetaParameters) -> tuple[Tensor, Any]:
            posterior = self._solve(nll, theta, episode.support)
            return self._outer_loss(nll, theta.shared, episode.query, posterior), posterior

        gradient, (value, posterior) = torch.func.grad_and_value(objective, has_aux=True)(meta)
        posterior = tree.detach(posterior)
        grad_norm = self._grad_norm(nll, meta, episode.support, posterior)
        solved = torch.ones_like(grad_norm, dtype=torch.bool)
        return gradient, HypergradientInfo(value, grad_norm, torch.zeros_like(grad_norm), solved, posterior)

    def outputs(self, network: Callable[[Params], Tensor], posterior: Any, noise: Params) -> dict[str, Tensor]:
        """Returns the outputs at the posterior mean and their variance, exact; see ``Algorithm``."""
        del noise
        mean, unravel = tree.ravel(posterior.mean)
        slope = torch.func.jacfwd(lambda vector: network(unravel(vector)))(mean)
        variance = ((slope @ _factor(posterior).to(slope.dtype)) ** 2).sum(-1)
        return {"outputs": network(posterior.mean).unsqueeze(0), "output_variance": variance.unsqueeze(0)}

    def _solve(self, nll: Nll, meta: MetaParameters, support: Batch) -> Any:
        prior_mean, unravel = tree.ravel(self.prior.mean(meta.prior))
        weight = kl_weight(len(support.y), self.temperature)
        _, gradient, hessian = _expand(
            lambda w: nll.per_example(w, meta.shared, support).mean(), torch.zeros_like(prior_mean), unravel
        )
        # In float64: the precisions of data and prior may differ by orders of magnitude.
        precision = torch.cholesky_inverse(_factor(meta.prior))
        total = hessian / weight + precision
        cholesky = _cholesky(total)
        target = precision @ prior_mean.double() - gradient / weight
        mean = torch.cholesky_solve(target.unsqueeze(-1), cholesky).squeeze(-1)
        named = unravel(mean.to(prior_mean.dtype))
        if self.covariance == "diagonal":
            return DiagonalGaussian(named, unravel(-torch.log(torch.diagonal(total)).to(prior_mean.dtype)))
        factor = _cholesky(torch.cholesky_inverse(cholesky))
        scale = torch.diagonal(factor)
        rows, columns = torch.tril_indices(len(scale), len(scale), -1, device=scale.device)
        lower = (factor / scale.unsqueeze(-1))[rows, columns]
        return FullGaussian(named, unravel(torch.log(scale).to(prior_mean.dtype)), lower.to(prior_mean.dtype))

    def _grad_norm(self, nll: Nll, meta: MetaParameters, support: Batch, posterior: Any) -> Tensor:
        """Returns the norm of the inner gradient in the mean: a small number, unless the nll is not quadratic."""
        gradient = torch.func.grad(lambda w: nll.per_example(w, meta.shared, support).mean())(posterior.mean)
        pull = tree.ravel(tree.sub(posterior.mean, self.prior.mean(meta.prior)))[0].double()
        pull = torch.cholesky_solve(pull.unsqueeze(-1), _factor(meta.prior)).squeeze(-1)
        weight = kl_weight(len(support.y), self.temperature)
        whole = tree.ravel(gradient)[0] + weight * pull.to(tree.leaves(gradient)[0].dtype)
        return torch.linalg.vector_norm(whole).detach()

    def _outer_loss(self, nll: Nll, shared: Params, query: Batch, posterior: Any) -> Tensor:
        mean, unravel = tree.ravel(posterior.mean)
        value, gradient, hessian = _expand(lambda w: nll.per_example(w, shared, query), mean, unravel)
        factor = _factor(posterior)
        # Per example, with C C^T the covariance: K = C^T H C, and E[nll] = nll(mean) + tr K / 2.
        curvature = factor.mT @ hessian @ factor
        if self.outer == "expected_nll":
            loss = value + 0.5 * torch.diagonal(curvature, dim1=-2, dim2=-1).sum(-1)
        else:
            # -log E[exp(-nll)] = nll(mean) + (log det(I + K) - h^T (I + K)^-1 h) / 2 with h = C^T g, for a quadratic.
            identity = torch.eye(len(mean), dtype=factor.dtype, device=factor.device)
            cholesky = _cholesky(identity + curvature)
            along = (gradient @ factor).unsqueeze(-1)
            solved = torch.linalg.solve_triangular(cholesky, along, upper=False)
            log_determinant = 2 * torch.log(torch.diagonal(cholesky, dim1=-2, dim2=-1)).sum(-1)
            loss = value + 0.5 * (log_determinant - (solved**2).sum((-2, -1)))
        return loss.mean().to(value.dtype)


def _factor(member: DiagonalGaussian | FullGaussian) -> Tensor:
    """Returns the lower triangular factor of the covariance, float64."""
    return member.factor().double()


def _cholesky(matrix: Tensor) -> Tensor:
    """Returns the Cholesky factor; NaN for a matrix that is not positive definite, where torch would raise."""
    factor, info = torch.linalg.cholesky_ex(matrix)
    return torch.where((info == 0)[..., None, None], factor, math.nan)


def _expand(
    function: Callable[[Params], Tensor], at: Tensor, unravel: Callable[[Tensor], Params]
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns value, gradient and Hessian of one function or several of the flattened weights, the latter two float64.

    All come from one pass, forward over forward: only what depends on the weights, the head, is computed for each pair
    of them, and the derivatives in shared parameters that a hypergradient needs go backwards through it once.
    """

    def value(vector: Tensor) -> tuple[Tensor, Tensor]:
        found = function(unravel(vector))
        return found, found

    def gradient(vector: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        found, of = torch.func.jacfwd(value, has_aux=True)(vector)
        return found, (found, of)

    hessian, (slope, found) = torch.func.jacfwd(gradient, has_aux=True)(at)
    return found, slope.double(), hessian.double()
