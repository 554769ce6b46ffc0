"""Softmax regression on learned features with a Gaussian prior, solved by Newton's method, and its Laplace posterior.

In whitened weights ``e_c``, with ``w_c = m_c + C_c e_c`` for each class ``c``, logits ``f_c = Z m_c + (Z C_c) e_c`` and
probabilities ``p = softmax(f)``, the inner loss is the summed cross entropy of the support set and ``|e|^2 / 2``. It is
strictly convex, and at its minimum ``e_c = (Z C_c)^T a_c`` with ``a_c = y_c - p_c``. Where examples are few, the
unknowns are therefore the coefficients ``a``, one for each example and class, and all that is needed of features are
the inner products ``G_c = (Z C_c) (Z C_c)^T`` (Rasmussen and Williams 2006, section 3.5). Else they are ``e`` itself.

The solution is differentiated by the implicit function theorem: one Newton step from it, with the Newton matrix held
fixed, has its value and its derivative. Relatives: MetaOptNet, deep kernel transfer, last-layer Laplace.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal, NamedTuple, Protocol

import torch

from ibaml import tree
from ibaml.algorithms.heads.base import Head
from ibaml.algorithms.heads.targets import indicators, require_classes
from ibaml.checks import require_positive_int
from ibaml.likelihoods import Categorical
from ibaml.likelihoods.base import wide
from ibaml.priors.columns import ColumnPrior, DiagonalColumnPrior
from ibaml.types import Batch, Params, Tensor

_NUM_HALVINGS = 8
"""Step lengths that the line search chooses from: 1, 1/2, 1/4, ..."""

_SUFFICIENT_DECREASE = 1e-4
"""Share of the decrease that the slope promises which a step must bring (Armijo's rule)."""


_TOLERANCE_EXPONENT = 0.6
"""Newton's method has converged at a relative gradient norm of the rounding error of the features to this power.

The step that is taken all the same squares it, and the Newton matrix is as near to that of the solution.
"""


class SoftmaxPosterior(NamedTuple):
    """A Gaussian over the weights of a task.

    Attributes:
        weights: Its mode, ``[num_classes, num_inputs]``.
        prior: The prior.
        problem: The inner problem; an empty tuple at temperature 0, where the mode is all.
        factors: Those of the Newton matrix at the mode, whose inverse is the covariance at temperature 1; likewise.
    """

    weights: Tensor
    prior: Any
    problem: Any
    factors: Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class Softmax(Head):
    """Softmax regression: a strictly convex inner problem, solved to convergence without an inner learning rate.

    Logits are integrated over at points that are a function of nothing but their number: predictions are no random
    variables, and a training loss can be the loss of what is predicted. Each query is judged by itself: the logits of
    two queries are not drawn together.

    Attributes:
        prior: Prior of the weights of each class. Tied priors suit classes that are exchangeable, as they are if every
            task numbers its own.
        posterior_temperature: Factor of the Laplace covariance; 1 is the curvature of the inner loss, 0 a point.
        num_evaluation_samples: Logit samples of a prediction, in pairs about the mode.
        outer: Loss of the query set: cross entropy at the mode, or of the probabilities averaged over the samples.
        max_newton_steps: Newton steps at most. Three to eight suffice; weak priors of classes that can be separated
            need some twenty. Too few show in the norm of the inner gradient.

    Raises:
        ValueError: If a setting is out of range.
        TypeError: If a count is not an integer.
    """

    prior: ColumnPrior = DiagonalColumnPrior(tied=True, learn_mean=False)
    posterior_temperature: float = 0.03
    num_evaluation_samples: int = 64
    outer: Literal["map_nll", "predictive_nll"] = "map_nll"
    max_newton_steps: int = 30

    name: ClassVar[str] = "softmax"

    def __post_init__(self) -> None:
        """Refuses settings out of range."""
        if self.outer not in ("map_nll", "predictive_nll"):
            raise ValueError(f"outer must be one of map_nll, predictive_nll, but is {self.outer!r}.")
        if not 0 <= self.posterior_temperature < math.inf:
            raise ValueError(
                f"posterior_temperature must be 0 or positive and finite, but is {self.posterior_temperature}."
            )
        require_positive_int("max_newton_steps", self.max_newton_steps)
        if require_positive_int("num_evaluation_samples", self.num_evaluation_samples) % 2:
            raise ValueError(
                f"num_evaluation_samples must be even, since samples come in pairs, but is "
                f"{self.num_evaluation_samples}."
            )

    @property
    def serves_any_number_of_outputs(self) -> bool:
        """Whether all classes have one prior."""
        return self.prior.tied

    def describe(self) -> str:
        """Returns how a task is solved."""
        posterior = f"Laplace posterior at temperature {self.posterior_temperature:g}"
        return f"Newton's method to convergence, {posterior if self.posterior_temperature else 'mode alone'}"

    def init_prior(self, num_inputs: int, num_outputs: int, *, like: Tensor) -> Any:
        """Returns the prior that training starts from; see ``Head``."""
        return self.prior.init(num_inputs, num_outputs, like=like)

    def parameter_groups(self, prior: Any) -> tuple[list[Tensor], list[Tensor]]:
        """Returns the tensors of the prior; see ``Head``."""
        return self.prior.parameter_groups(prior)

    def solve(self, prior: Any, shared: Params, support: Batch, num_outputs: int) -> tuple[SoftmaxPosterior, Tensor]:
        """Finds the mode by Newton's method, and the Laplace posterior there; see ``Head``.

        Raises:
            ValueError: If there is a prior for each of another number of classes.

        Cost:
            For each Newton step the smaller of ``(K R)^2 (K R + 3 N)`` and ``(K + 1) N^3`` operations for ``K``
            classes, ``R`` whitened features and ``N`` examples.
        """
        del shared
        # In float64: a weak prior and features of any size make a Newton matrix that float32 cannot hold.
        inputs, prior = support.x.double(), tree.map(torch.Tensor.double, prior)
        mean = self.prior.mean(prior)
        require_classes(num_outputs, len(mean), tied=self.prior.tied)
        targets = indicators(support.y, num_outputs, like=inputs)
        problem = _problem(self.prior.whiten(prior, inputs), num_outputs)
        offset = mean @ inputs.mT
        fixed = tree.detach(problem)
        tolerance = torch.finfo(wide(support.x)[0].dtype).eps ** _TOLERANCE_EXPONENT
        unknown, residual, *factors = _Newton.apply(
            type(problem), self.max_newton_steps, tolerance, offset.detach(), targets, *fixed
        )
        # One Newton step from the solution, differentiable in all but the Newton matrix and where it starts.
        log_probs = torch.log_softmax(offset + problem.outputs(unknown), 0)
        unknown = unknown - fixed.solve(factors, problem.residual(unknown, targets - log_probs.exp()))
        weights = mean + self.prior.colour(prior, problem.whitened(unknown))
        if not self.posterior_temperature:
            return SoftmaxPosterior(weights, prior, (), ()), residual
        if self.outer == "predictive_nll":
            # Only here the derivative of the covariance is wanted.
            factors = problem.factorize(torch.log_softmax(offset + problem.outputs(unknown), 0))
        return SoftmaxPosterior(weights, prior, problem, tuple(factors)), residual

    def predict(self, solution: SoftmaxPosterior, shared: Params, inputs: Tensor, noise: Params) -> dict[str, Tensor]:
        """Returns logits under each sample, ``[num_samples, num_examples, num_classes]``; see ``Head``.

        Cost:
            For each query ``K N^2``, or ``(K R)^2``, and ``K^3`` operations; nothing of this at temperature 0.
        """
        del shared, noise
        return {"outputs": self._samples(solution, inputs)}

    def outer_loss(self, solution: SoftmaxPosterior, shared: Params, query: Batch) -> Tensor:
        """Returns the cross entropy of the query set; see ``Head``."""
        logits = self._samples(solution, query.x) if self.outer == "predictive_nll" else self.mean(solution, query.x)
        nll = Categorical().nll(logits, query.y, shared)
        if self.outer == "predictive_nll":
            nll = math.log(len(nll)) - torch.logsumexp(-nll, 0)
        return nll.mean()

    def mean(self, solution: SoftmaxPosterior, inputs: Tensor) -> Tensor:
        """Returns the logits at the mode; see ``Head``."""
        return (inputs.double() @ solution.weights.mT).to(wide(inputs)[0].dtype)

    def covariance(self, solution: SoftmaxPosterior, inputs: Tensor) -> Tensor:
        """Returns the covariance of the logits of each query, ``[num_examples, num_classes, num_classes]``.

        ``T (Z C) H^-1 (Z C)^T`` with the Newton matrix ``H``. At inputs that the support set says nothing about it is
        ``T`` times the prior's.

        Args:
            solution: From ``solve``, at a positive temperature.
            inputs: ``z``, ``[num_examples, num_inputs]``.
        """
        whitened = self.prior.whiten(solution.prior, inputs.double())
        return self.posterior_temperature * solution.problem.covariance(solution.factors, whitened)

    def _samples(self, solution: SoftmaxPosterior, inputs: Tensor) -> Tensor:
        logits = self.mean(solution, inputs)
        if not self.posterior_temperature:
            return logits.unsqueeze(0)
        num_classes = logits.shape[-1]
        covariance = self.covariance(solution, inputs)
        # What rounding may take from a variance: without it the factor of a nearly singular matrix need not exist.
        variance = torch.diagonal(covariance, dim1=-2, dim2=-1).mean(-1)
        limits = torch.finfo(covariance.dtype)
        ridge = (8 * num_classes * limits.eps * variance + limits.tiny)[..., None, None]
        identity = torch.eye(num_classes, dtype=covariance.dtype, device=covariance.device)
        factor = _cholesky(covariance + ridge * identity).to(logits.dtype)
        return logits + torch.einsum("sk,njk->snj", normal_points(self.num_evaluation_samples, logits), factor)


def normal_points(num_points: int, like: Tensor) -> Tensor:
    """Returns points that stand for a standard normal distribution, ``[num_points, num_dimensions]``.

    A Kronecker sequence, ``u_sk = s sqrt(k-th prime) mod 1``, through the normal quantile function, and the negatives
    of its points, so that all odd moments are exact; a linear map makes the covariance so. In 2 to 20 dimensions errors
    of probabilities were 7 to 100 times smaller than with as many random points for logits of standard deviation 0.3
    to 1, and 3 to 7 times for 3.

    Args:
        num_points: Points; an even number is used, of at least four for each dimension.
        like: Its last axis has the dimensions of a point, its dtype and device are theirs.
    """
    num_dimensions = like.shape[-1]
    num_pairs = max(num_points // 2, 2 * num_dimensions)
    steps = torch.arange(1, num_pairs + 1, dtype=torch.float64, device=like.device)
    points = torch.stack([torch.special.ndtri(torch.frac(math.sqrt(p) * steps)) for p in _primes(num_dimensions)], -1)
    factor = torch.linalg.cholesky_ex(points.mT @ points / num_pairs)[0]
    points = torch.linalg.solve_triangular(factor, points.mT, upper=False).mT.to(like.dtype)
    return torch.cat([points, -points])


@functools.cache
def _primes(num: int) -> tuple[int, ...]:
    found: list[int] = []
    candidates = itertools.count(2)
    while len(found) < num:
        candidate = next(candidates)
        if all(candidate % prime for prime in found):
            found.append(candidate)
    return tuple(found)


class _Problem(Protocol):
    """The inner problem in some unknowns ``x``, ``[num_classes, num_unknowns]``.

    All but ``covariance`` also take leading axes, the same for all tensors.
    """

    @property
    def squared_norms(self) -> Tensor:
        """Squared norms of the whitened features, ``[num_priors, num_examples]``."""
        ...

    def start(self, targets: Tensor, /) -> Tensor:
        """Returns unknowns of zero for targets ``[num_classes, num_examples]``."""
        ...

    def outputs(self, unknown: Tensor, /) -> Tensor:
        """Returns what the unknowns add to the logits, ``[num_classes, num_examples]``."""
        ...

    def whitened(self, unknown: Tensor, /) -> Tensor:
        """Returns the whitened weights ``e``, ``[num_classes, rank]``."""
        ...

    def inner(self, one: Tensor, other: Tensor, /) -> Tensor:
        """Returns the inner product of the whitened weights of two unknowns, a scalar."""
        ...

    def residual(self, unknown: Tensor, errors: Tensor, /) -> Tensor:
        """Returns the unknowns whose whitened weights are the gradient ``e_c - (Z C_c)^T (y_c - p_c)``.

        Args:
            unknown: Unknowns.
            errors: ``y - p``, ``[num_classes, num_examples]``.
        """
        ...

    def factorize(self, log_probs: Tensor, /) -> tuple[Tensor, ...]:
        """Returns factors of the Newton matrix at log-probabilities ``[num_classes, num_examples]``."""
        ...

    def solve(self, factors: Sequence[Tensor], right: Tensor, /) -> Tensor:
        """Returns minus the Newton step where the residual is ``right``."""
        ...

    def covariance(self, factors: Sequence[Tensor], whitened: Tensor, /) -> Tensor:
        """Returns the covariance of logits, ``[num_queries, num_classes, num_classes]``.

        Args:
            factors: From ``factorize``.
            whitened: Whitened features of the queries, ``[num_priors, num_queries, rank]``.
        """
        ...


class _OfExamples(NamedTuple):
    """Unknowns are coefficients of the examples, ``e_c = (Z C_c)^T x_c``.

    The Newton matrix is ``I + W G``, with the inverse ``I - Q G``. For ``D_c = diag(p_c)``, ``E_c = (D_c^-1 + G_c)^-1``
    and ``R^T`` that sums over classes, ``Q = E - E R (R^T E R)^-1 R^T E`` (Rasmussen and Williams 2006, eq. (3.47)).

    Attributes:
        features: ``Z C``, ``[num_priors, num_examples, rank]``.
        products: ``G``, ``[num_priors, num_examples, num_examples]``.
    """

    features: Tensor
    products: Tensor

    @property
    def squared_norms(self) -> Tensor:
        return torch.diagonal(self.products, dim1=-2, dim2=-1)

    def start(self, targets: Tensor) -> Tensor:
        return torch.zeros_like(targets)

    def outputs(self, unknown: Tensor) -> Tensor:
        return _each(self.products, unknown)

    def whitened(self, unknown: Tensor) -> Tensor:
        return _each(self.features.mT, unknown)

    def inner(self, one: Tensor, other: Tensor) -> Tensor:
        return (one * self.outputs(other)).sum((-2, -1))

    def residual(self, unknown: Tensor, errors: Tensor) -> Tensor:
        return unknown - errors

    def factorize(self, log_probs: Tensor) -> tuple[Tensor, ...]:
        # E_c = V_c^T V_c with V_c = L_c^-1 D_c^1/2 and L_c L_c^T = I + D_c^1/2 G_c D_c^1/2, whose eigenvalues are at
        # least 1. The root of a probability that underflows has a derivative if it is taken of the logarithm.
        root = torch.exp(0.5 * log_probs)
        identity = torch.eye(root.shape[-1], dtype=root.dtype, device=root.device)
        factor = _cholesky(identity + root.unsqueeze(-1) * self.products * root.unsqueeze(-2))
        half = torch.linalg.solve_triangular(factor, torch.diag_embed(root), upper=False)
        stacked = half.flatten(-3, -2)
        return half, _cholesky(stacked.mT @ stacked)

    def solve(self, factors: Sequence[Tensor], right: Tensor) -> Tensor:
        half, total = factors
        first = _each(half.mT, _each(half, self.outputs(right)))
        shift = torch.cholesky_solve(first.sum(-2).unsqueeze(-1), total).mT
        return right - first + _each(half.mT, _each(half, shift))

    def covariance(self, factors: Sequence[Tensor], whitened: Tensor) -> Tensor:
        # k(z, z) - k(z)^T Q k(z), where k(z) are inner products with the support set.
        half, total = factors
        explained = half @ (self.features @ whitened.mT)
        prior = (whitened**2).sum(-1)
        # No less than what rounding leaves of the prior's variance.
        own = torch.maximum(prior - (explained**2).sum(-2), torch.finfo(prior.dtype).eps * prior)
        between = torch.linalg.solve_triangular(total, half.mT @ explained, upper=False)
        return torch.diag_embed(own.mT) + torch.einsum("knm,jnm->mkj", between, between)


class _OfWeights(NamedTuple):
    """Unknowns are the whitened weights; the Newton matrix is the Hessian of the inner loss in them.

    Attributes:
        features: ``Z C``, ``[num_priors, num_examples, rank]``.
    """

    features: Tensor

    @property
    def squared_norms(self) -> Tensor:
        return (self.features**2).sum(-1)

    def start(self, targets: Tensor) -> Tensor:
        return targets.new_zeros(*targets.shape[:-1], self.features.shape[-1])

    def outputs(self, unknown: Tensor) -> Tensor:
        return _each(self.features, unknown)

    def whitened(self, unknown: Tensor) -> Tensor:
        return unknown

    def inner(self, one: Tensor, other: Tensor) -> Tensor:
        return (one * other).sum((-2, -1))

    def residual(self, unknown: Tensor, errors: Tensor) -> Tensor:
        return unknown - _each(self.features.mT, errors)

    def factorize(self, log_probs: Tensor) -> tuple[Tensor, ...]:
        # H = I + blockdiag((Z C_c)^T D_c (Z C_c)) - V^T V with V = [D_1 (Z C_1), D_2 (Z C_2), ...].
        weighted = log_probs.exp().unsqueeze(-1) * self.features
        num_classes, rank = weighted.shape[-3], weighted.shape[-1]
        columns = weighted.movedim(-3, -2).flatten(-2)
        own = (weighted.mT @ self.features).movedim(-3, -2).flatten(-2)
        identity = torch.eye(num_classes * rank, dtype=weighted.dtype, device=weighted.device)
        in_block = identity[::rank, ::rank].repeat_interleave(rank, 0).repeat_interleave(rank, 1)
        blocks = in_block * own.repeat(*(1 for _ in own.shape[:-2]), num_classes, 1)
        return (_cholesky(identity + blocks - columns.mT @ columns),)

    def solve(self, factors: Sequence[Tensor], right: Tensor) -> Tensor:
        return torch.cholesky_solve(right.flatten(-2).unsqueeze(-1), factors[0]).squeeze(-1).reshape(right.shape)

    def covariance(self, factors: Sequence[Tensor], whitened: Tensor) -> Tensor:
        (factor,) = factors
        identity = torch.eye(len(factor), dtype=factor.dtype, device=factor.device)
        inverse = torch.linalg.solve_triangular(factor, identity, upper=False)
        along = inverse.unflatten(-1, (-1, whitened.shape[-1])).movedim(-2, 0) @ whitened.mT
        return torch.einsum("kim,jim->mkj", along, along)


def _problem(features: Tensor, num_classes: int) -> _OfExamples | _OfWeights:
    """Returns the problem in the unknowns that cost less; ``features`` are ``[num_priors, num_examples, rank]``."""
    num_examples, rank = features.shape[-2:]
    if _costs_less_in_weights(num_examples, rank, num_classes):
        return _OfWeights(features)
    return _OfExamples(features, features @ features.mT)


def _costs_less_in_weights(num_examples: int, rank: int, num_classes: int) -> bool:
    num_weights = num_classes * rank
    return num_weights**2 * (num_weights + 3 * num_examples) < (num_classes + 1) * num_examples**3


class _Newton(torch.autograd.Function):
    """Newton's method as one operation without a derivative, for all tasks at once under ``torch.func.vmap``.

    Not for a gradient: its arguments are detached, and the implicit function theorem needs none. But each of its some
    300 small operations would pass through each transform around it, which made a hypergradient twice as slow as it is,
    and under ``vmap``, where no step after convergence could be left out, ten times.
    """

    @staticmethod
    def forward(
        kind: Callable[..., _Problem],
        max_steps: int,
        tolerance: float,
        offset: Tensor,
        targets: Tensor,
        *leaves: Tensor,
    ) -> tuple[Tensor, ...]:
        problem = kind(*leaves)
        unknown, factors = _newton(problem, offset, targets, max_steps, tolerance)
        errors = targets - torch.softmax(offset + problem.outputs(unknown), -2)
        return unknown, _relative_gradient(problem, unknown, problem.residual(unknown, errors), errors), *factors

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: tuple[Tensor, ...]) -> None:
        ctx.mark_non_differentiable(*output)

    @staticmethod
    def vmap(  # pyright: ignore[reportIncompatibleMethodOverride]
        info: Any,
        in_dims: tuple[int | None, ...],
        kind: Callable[..., _Problem],
        max_steps: int,
        tolerance: float,
        *tensors: Tensor,
    ) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        batched = [
            tensor.expand(info.batch_size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
            for tensor, dim in zip(tensors, in_dims[3:], strict=True)
        ]
        found = _Newton.apply(kind, max_steps, tolerance, *batched)
        return found, (0,) * len(found)


def _newton(
    problem: _Problem, offset: Tensor, targets: Tensor, max_steps: int, tolerance: float
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Returns the solution and the Newton matrix of the last step."""
    unknown, factors = problem.start(targets), ()
    for _ in range(max_steps):
        logits = offset + problem.outputs(unknown)
        log_probs = torch.log_softmax(logits, -2)
        errors = targets - log_probs.exp()
        residual = problem.residual(unknown, errors)
        factors = problem.factorize(log_probs)
        step = -problem.solve(factors, residual)
        # The step that is taken all the same leaves rounding alone, and so do further ones while other tasks go on.
        converged = _relative_gradient(problem, unknown, residual, errors) <= tolerance
        length = torch.where(converged, 1.0, _step_length(problem, unknown, step, residual, logits, targets))
        unknown = unknown + length[..., None, None] * step
        # After a step of length 0 the next would be the same.
        if tree.holds((converged | (length == 0)).all()):
            break
    return unknown, factors


def _step_length(
    problem: _Problem, unknown: Tensor, step: Tensor, residual: Tensor, logits: Tensor, targets: Tensor
) -> Tensor:
    """Returns the largest of some step lengths at which the inner loss has decreased; 0 if there is none."""
    lengths = 0.5 ** torch.arange(_NUM_HALVINGS, dtype=step.dtype, device=step.device)

    def cross_entropy(at: Tensor, targets: Tensor) -> Tensor:
        return (torch.logsumexp(at, -2) - (targets * at).sum(-2)).sum(-1)

    before = cross_entropy(logits, targets).unsqueeze(-1)
    after = cross_entropy(
        logits.unsqueeze(-3) + lengths[:, None, None] * problem.outputs(step).unsqueeze(-3), targets.unsqueeze(-3)
    )
    along, squared, slope, size = problem.inner(
        torch.stack([unknown, step, residual, unknown]), torch.stack([step, step, step, unknown])
    ).unsqueeze(-1)
    decrease = before - after - lengths * (along + 0.5 * lengths * squared)
    # Near the solution a decrease is lost in rounding, and the whole step is right.
    rounding = 32 * torch.finfo(step.dtype).eps * (1 + before + 0.5 * size)
    enough = decrease >= -_SUFFICIENT_DECREASE * lengths * slope - rounding
    return torch.where(enough, lengths, 0.0).amax(-1)


def _relative_gradient(problem: _Problem, unknown: Tensor, residual: Tensor, errors: Tensor) -> Tensor:
    """Returns the norm of the gradient ``e - (Z C)^T (y - p)`` over those of its terms, examples taken one by one."""
    both = torch.stack([residual, unknown])
    norm, of_prior = problem.inner(both, both).clamp_min(0).sqrt()
    of_examples = (errors**2 * problem.squared_norms).sum((-2, -1)).sqrt()
    return norm / (of_prior + of_examples + torch.finfo(norm.dtype).tiny)


def _each(matrices: Tensor, vectors: Tensor) -> Tensor:
    """Returns a matrix times a vector for each class; one matrix, or one vector, may serve all."""
    if matrices.shape[-3] == 1:
        return vectors @ matrices.squeeze(-3).mT
    return (matrices @ vectors.unsqueeze(-1)).squeeze(-1)


def _cholesky(matrix: Tensor) -> Tensor:
    """Returns the Cholesky factor; NaN for a matrix that is not positive definite, where torch would raise."""
    factor, info = torch.linalg.cholesky_ex(matrix)
    return torch.where((info == 0)[..., None, None], factor, math.nan)
