"""The grid: which inner variable, and how to differentiate through its optimisation.

| inner variable | unrolled | first_order | implicit |
|---|---|---|---|
| weights | MAML | FOMAML | iMAML |
| Gaussian over weights | ABML, VAMPIRE | first-order ABML | **iBaML** |

The inner problem is one for all: ``min_v L(v) + weight * divergence(v, prior)``, where ``L`` is the mean nll of the
support set at the weights, or its expectation under a distribution. A cell is a record of the settings that it uses.
"""

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, ClassVar, Literal, NamedTuple, get_args, get_origin, get_type_hints

import torch

from ibaml import objectives, tree
from ibaml.algorithms.base import Algorithm
from ibaml.curvature import DifferentiatedLoss, at_fixed
from ibaml.hypergradients import (
    first_order_hypergradient,
    gaussian_implicit_hypergradient,
    implicit_hypergradient,
    unrolled_hypergradient,
)
from ibaml.inner_problem import MetaParameters, TaskNll, TaskNoise, expected_nll, mean_nll
from ibaml.priors import DiagonalPrior, PointPrior, Prior
from ibaml.solvers.inner import GradientDescent, InnerSolver
from ibaml.solvers.linear import CG, LinearSolver
from ibaml.types import Batch, Episode, HypergradientInfo, InnerSolution, Params, Tensor

OuterLoss = Literal["expected_nll", "predictive_nll", "elbo"]
"""Outer loss of a distribution over weights: the query's expected nll (Jensen), the nll of the query's averaged
prediction, or the expected nll of support and query together plus the KL divergence, per example (ABML's)."""

Hypergradient = tuple[MetaParameters, HypergradientInfo]


class TaskProblem(NamedTuple):
    """One task's bilevel problem in the inner variable ``v`` and the meta-parameters ``theta``.

    Attributes:
        nll: Per-example nll.
        episode: Support and query set.
        noise: Noise of the task.
        meta: ``theta``, where the gradient is taken.
        weight: Weight of the divergence in ``F``.
        support_nll: ``L(v, theta.shared)``.
        inner_loss: ``F(v, theta)``.
        outer_loss: ``O(v, theta)``.
        solver: ``(loss, init) -> InnerSolution``.
    """

    nll: TaskNll
    episode: Episode
    noise: TaskNoise
    meta: MetaParameters
    weight: float
    support_nll: Callable[..., Tensor]
    inner_loss: Callable[..., Tensor]
    outer_loss: Callable[..., Tensor]
    solver: Callable[..., InnerSolution]


@dataclasses.dataclass(frozen=True, kw_only=True)
class GradientBased:
    """What the cells share: the inner problem and its solver.

    Attributes:
        inner: Inner solver, for training and for adaptation.
    """

    name: ClassVar[str]
    estimator: ClassVar[Literal["unrolled", "first_order", "implicit"]]

    inner: InnerSolver = GradientDescent()

    def __post_init__(self) -> None:
        """Refuses settings out of range."""
        hints = get_type_hints(type(self))
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            is_allowed, expected = _CHECKS.get(field.name, (lambda _: True, ""))
            if get_origin(hints[field.name]) is Literal:
                choices = get_args(hints[field.name])
                is_allowed, expected = choices.__contains__, f"one of {', '.join(choices)}"
            if not is_allowed(value):
                raise ValueError(f"{field.name} must be {expected}, but is {value!r}.")

    def init(self, adapted: Params, shared: Params, *, generator: torch.Generator) -> MetaParameters:
        """Returns initial meta-parameters; see ``Algorithm``."""
        return MetaParameters(self._family.init(adapted, generator=generator), shared)

    def adapt(
        self,
        nll: TaskNll,
        meta: MetaParameters,
        support: Batch,
        noise: TaskNoise,
        *,
        start: Any = None,
        with_grad_norm: bool = True,
    ) -> InnerSolution:
        """Solves the inner problem of one task; see ``Algorithm``."""
        weight = self._weight(len(support.y))
        inner_loss = regularised(self._nll(nll, support, noise.inner), self._family, weight)
        return self._solver(meta, weight)(
            at_fixed(inner_loss, meta), meta.prior if start is None else start, with_grad_norm=with_grad_norm
        )

    def hypergradient(self, nll: TaskNll, meta: MetaParameters, episode: Episode, noise: TaskNoise) -> Hypergradient:
        """Returns one task's gradient of the outer loss in the meta-parameters; see ``Algorithm``."""
        # Parameters that ask for gradients would make every inner step keep its graph.
        meta = tree.detach(meta)
        weight = self._weight(len(episode.support.y))
        goes_back = self.estimator == "unrolled" and self._truncation is None
        support_nll = self._nll(nll, episode.support, noise.inner, twice=goes_back or self.estimator == "implicit")
        return self._differentiate(
            TaskProblem(
                nll=nll,
                episode=episode,
                noise=noise,
                meta=meta,
                weight=weight,
                support_nll=support_nll,
                inner_loss=regularised(support_nll, self._family, weight),
                outer_loss=partial(self._outer_loss, nll, episode, noise),
                solver=self._solver(meta, weight),
            )
        )

    @property
    def num_curvature_points(self) -> int:
        """At how many points a hypergradient takes Hessian-vector products; see ``Algorithm``."""
        if self.estimator != "unrolled":
            return self._num_samples
        steps = self.inner.num_steps
        # The one more is where the inner steps ended.
        return (1 + (steps if self._truncation is None else min(steps, self._truncation))) * self._num_samples

    def _differentiate(self, problem: TaskProblem) -> Hypergradient:
        """Returns the hypergradient of one task."""
        arguments = (problem.inner_loss, problem.outer_loss, lambda theta: theta.prior, problem.meta, problem.solver)
        if self.estimator == "first_order":
            return first_order_hypergradient(*arguments)
        return unrolled_hypergradient(*arguments, truncation=self._truncation)

    def _solver(self, meta: MetaParameters, weight: float) -> Callable[..., InnerSolution]:
        return partial(self.inner, geometry=self._family.geometry(meta.prior, weight))

    # What a kind of inner variable, or a cell, says of itself.

    @property
    def _family(self) -> Prior:
        raise NotImplementedError

    @property
    def _num_samples(self) -> int:
        return 1

    @property
    def _truncation(self) -> int | None:
        return None

    def _weight(self, num_examples: int) -> float:
        """Returns the weight of the divergence beside the mean nll of so many examples."""
        raise NotImplementedError

    def _nll(self, nll: TaskNll, batch: Batch, draws: Params, *, twice: bool = False) -> Callable[..., Tensor]:
        """Returns ``(v, shared) -> mean nll``; ``twice`` announces that it will be differentiated twice."""
        raise NotImplementedError

    def _outer_loss(
        self, nll: TaskNll, episode: Episode, noise: TaskNoise, posterior: Any, theta: MetaParameters
    ) -> Tensor:
        raise NotImplementedError


@dataclasses.dataclass(frozen=True, kw_only=True)
class OnWeights(GradientBased):
    """Algorithms that adapt plain weights; their outer loss is the query's nll."""

    prior: ClassVar[PointPrior] = PointPrior()
    is_bayesian: ClassVar[bool] = False
    temperature: ClassVar[None] = None

    def describe(self) -> str:
        """Returns the estimator and the inner solver."""
        return f"{self.estimator} gradient, {self.inner}"

    def draw_noise(self, meta: MetaParameters, *, generator: torch.Generator) -> TaskNoise:
        """Returns no noise."""
        del meta, generator
        return TaskNoise({}, {})

    def draw_evaluation_noise(self, meta: MetaParameters, *, generator: torch.Generator) -> Params:
        """Returns no noise."""
        del meta, generator
        return {}

    def weight_samples(self, posterior: Params, noise: Params) -> list[Params]:
        """Returns the adapted weights, once."""
        del noise
        return [posterior]

    @property
    def _family(self) -> Prior:
        return self.prior

    def _weight(self, num_examples: int) -> float:
        del num_examples
        return 0.0

    def _nll(self, nll: TaskNll, batch: Batch, draws: Params, *, twice: bool = False) -> Callable[..., Tensor]:
        del draws
        return mean_nll(nll, batch, twice=twice)

    def _outer_loss(
        self, nll: TaskNll, episode: Episode, noise: TaskNoise, posterior: Params, theta: MetaParameters
    ) -> Tensor:
        del noise
        return mean_nll(nll, episode.query)(posterior, theta.shared)


@dataclasses.dataclass(frozen=True, kw_only=True)
class OnDistribution(GradientBased):
    """Algorithms that adapt a distribution over weights by minimising the negative ELBO.

    Attributes:
        inner: Inner solver, for training and for adaptation.
        prior: Family of the prior and the posteriors.
        temperature: The KL divergence has weight ``temperature / num_support``. 1 is exact Bayes.
        num_samples: Weight samples ``S`` in training.
        num_evaluation_samples: Weight samples in prediction.
        antithetic: Draw noise in pairs of opposite sign (``num_samples`` even).
    """

    is_bayesian: ClassVar[bool] = True

    prior: Prior = DiagonalPrior()
    temperature: float = 0.01
    num_samples: int = 5
    num_evaluation_samples: int = 10
    antithetic: bool = False

    def __post_init__(self) -> None:
        """Refuses settings out of range."""
        super().__post_init__()
        if self.antithetic and self.num_samples % 2:
            raise ValueError(f"num_samples must be even with antithetic=True, but is {self.num_samples}.")

    def describe(self) -> str:
        """Returns the estimator, the inner solver and the temperature."""
        return f"{self.estimator} gradient, {self.inner}, temperature {self.temperature:g}"

    def draw_noise(self, meta: MetaParameters, *, generator: torch.Generator) -> TaskNoise:
        """Draws ``num_samples`` weight samples for the inner problem, and as many for the outer loss."""
        draw = partial(
            self.prior.draw_noise, meta.prior, self.num_samples, generator=generator, antithetic=self.antithetic
        )
        return TaskNoise(draw(), draw())

    def draw_evaluation_noise(self, meta: MetaParameters, *, generator: torch.Generator) -> Params:
        """Draws the noise of ``num_evaluation_samples`` weight samples."""
        return self.prior.draw_noise(meta.prior, self.num_evaluation_samples, generator=generator)

    def weight_samples(self, posterior: Any, noise: Params) -> list[Params]:
        """Returns one weight sample for each draw of the noise."""
        draws = self.prior.sample(posterior, noise)
        num_samples = tree.leaves(noise)[0].shape[0]
        return [tree.map(lambda leaf, i=i: leaf[i], draws) for i in range(num_samples)]

    @property
    def _family(self) -> Prior:
        return self.prior

    @property
    def _num_samples(self) -> int:
        return self.num_samples

    @property
    def _outer(self) -> tuple[OuterLoss, float]:
        """Kind of the outer loss, and weight of the hyper-prior in it."""
        raise NotImplementedError

    def _weight(self, num_examples: int) -> float:
        return objectives.kl_weight(num_examples, self.temperature)

    def _nll(self, nll: TaskNll, batch: Batch, draws: Params, *, twice: bool = False) -> Callable[..., Tensor]:
        return expected_nll(nll, batch, draws, twice=twice)

    def _outer_loss(
        self,
        nll: TaskNll,
        episode: Episode,
        noise: TaskNoise,
        posterior: Any,
        theta: MetaParameters,
        *,
        with_support: bool = True,
    ) -> Tensor:
        """Returns the outer loss; without the support set's nll of the ELBO if ``with_support`` is False."""
        kind, hyper_prior_weight = self._outer
        if kind == "predictive_nll":
            loss = objectives.predictive_nll(
                lambda w, batch: nll(w, theta.shared, batch), posterior, noise.outer, episode.query
            )
        else:
            loss = expected_nll(nll, episode.query, noise.outer)(posterior, theta.shared)
        if kind == "elbo":
            share = _support_share(episode)
            loss = (1 - share) * loss
            if with_support:
                loss = loss + share * expected_nll(nll, episode.support, noise.inner)(posterior, theta.shared)
            weight = self._weight(len(episode.support.y) + len(episode.query.y))
            loss = loss + weight * self.prior.divergence(posterior, theta.prior)
        if hyper_prior_weight:
            loss = loss + hyper_prior_weight * self.prior.hyper_prior_nll(theta.prior)
        return loss


@dataclasses.dataclass(frozen=True, kw_only=True)
class MAML(OnWeights):
    """MAML (Finn et al. 2017): learned initial weights, backpropagation through the inner steps.

    Attributes:
        truncation: Differentiate the last so many steps only; None: all.
    """

    name: ClassVar[str] = "maml"
    estimator: ClassVar[Literal["unrolled"]] = "unrolled"

    truncation: int | None = None

    @property
    def _truncation(self) -> int | None:
        return self.truncation


@dataclasses.dataclass(frozen=True, kw_only=True)
class FOMAML(OnWeights):
    """First-order MAML (Finn et al. 2017): the query gradient at the adapted weights."""

    name: ClassVar[str] = "fomaml"
    estimator: ClassVar[Literal["first_order"]] = "first_order"


@dataclasses.dataclass(frozen=True, kw_only=True)
class IMAML(OnWeights):
    """The iMAML algorithm (Rajeswaran et al. 2019): proximal inner problem, implicit gradient.

    Attributes:
        linear: Linear solver of the implicit gradient.
        proximal_strength: Strength of ``||w - prior||^2 / 2`` in the inner loss, its lambda; positive, because without
            it the solution of the inner problem does not depend on what is learned.
    """

    name: ClassVar[str] = "imaml"
    estimator: ClassVar[Literal["implicit"]] = "implicit"

    inner: InnerSolver = GradientDescent(num_steps=16)
    linear: LinearSolver = CG()
    proximal_strength: float = 2.0

    def _weight(self, num_examples: int) -> float:
        return self.proximal_strength

    def _differentiate(self, problem: TaskProblem) -> Hypergradient:
        return _implicit(self, problem, self.linear)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ABML(OnDistribution):
    """ABML (Ravi and Beatson 2019): learned prior, unrolled; support and query nll and the KL divergence outside.

    Attributes:
        hyper_prior_weight: Weight of the hyper-prior (nats, summed over weights) in the outer loss.
        truncation: Differentiate the last so many steps only, 0 being first-order ABML; None: all.
    """

    name: ClassVar[str] = "abml"
    estimator: ClassVar[Literal["unrolled"]] = "unrolled"

    hyper_prior_weight: float = 0.0
    truncation: int | None = None

    @property
    def _outer(self) -> tuple[OuterLoss, float]:
        return "elbo", self.hyper_prior_weight

    @property
    def _truncation(self) -> int | None:
        return self.truncation


@dataclasses.dataclass(frozen=True, kw_only=True)
class VAMPIRE(OnDistribution):
    """VAMPIRE (Nguyen et al. 2020): learned prior, unrolled; only the query's nll outside.

    Attributes:
        outer: Outer loss: ``"expected_nll"`` or ``"predictive_nll"``.
        truncation: Differentiate the last so many steps only, 0 being first-order; None: all.
    """

    name: ClassVar[str] = "vampire"
    estimator: ClassVar[Literal["unrolled"]] = "unrolled"

    outer: Literal["expected_nll", "predictive_nll"] = "expected_nll"
    truncation: int | None = None

    @property
    def _outer(self) -> tuple[OuterLoss, float]:
        return self.outer, 0.0

    @property
    def _truncation(self) -> int | None:
        return self.truncation


@dataclasses.dataclass(frozen=True, kw_only=True)
class IBAML(OnDistribution):
    """Implicit Bayesian meta-learning (Zhang et al. 2023): learned prior, implicit gradient.

    That of a diagonal Gaussian is by Lemma 1 of the paper, that of other families the generic one.

    Attributes:
        linear: Linear solver of the implicit gradient.
        precondition: Give the system of Lemma 1 its free preconditioner.
        outer: Outer loss: ``"expected_nll"``, ``"predictive_nll"``, or ``"elbo"`` (ABML's).
        hyper_prior_weight: Weight of ABML's hyper-prior (nats, summed over weights) in the outer loss.
    """

    name: ClassVar[str] = "ibaml"
    estimator: ClassVar[Literal["implicit"]] = "implicit"

    linear: LinearSolver = CG()
    precondition: bool = True
    outer: OuterLoss = "expected_nll"
    hyper_prior_weight: float = 0.0

    @property
    def _outer(self) -> tuple[OuterLoss, float]:
        return self.outer, self.hyper_prior_weight

    def _differentiate(self, problem: TaskProblem) -> Hypergradient:
        return _OWN_IMPLICIT.get(type(self.prior), _implicit)(self, problem, self.linear)


def num_inner_steps(algorithm: Algorithm) -> int:
    """Returns the number of inner steps of an algorithm of the grid.

    Raises:
        TypeError: If the algorithm takes none.
    """
    if not isinstance(algorithm, GradientBased):
        raise TypeError(f"{algorithm.name} takes no inner steps: expected an algorithm of the grid, such as maml.")
    return algorithm.inner.num_steps


def regularised(support_nll: Callable[..., Tensor], family: Prior, weight: float) -> Callable[..., Tensor]:
    """Returns the inner loss ``F(v, theta) = L(v, shared) + weight * divergence(v, prior)``.

    With a distribution it is the negative ELBO (Zhang et al. 2023, eq. (7)). It brings its gradient along if ``L``
    does.
    """

    def with_divergence(mean: Tensor, posterior: Any, theta: MetaParameters) -> Tensor:
        return mean + weight * family.divergence(posterior, theta.prior) if weight else mean

    def with_its_gradient(of_nll: Any, posterior: Any, theta: MetaParameters) -> Any:
        return tree.axpy(weight, family.divergence_gradient(posterior, theta.prior), of_nll) if weight else of_nll

    def value(posterior: Any, theta: MetaParameters) -> Tensor:
        return with_divergence(support_nll(posterior, theta.shared), posterior, theta)

    if not isinstance(support_nll, DifferentiatedLoss):
        return value

    def value_and_gradient(posterior: Any, theta: MetaParameters) -> tuple[Tensor, Any]:
        mean, of_nll = support_nll.value_and_gradient(posterior, theta.shared)
        return with_divergence(mean, posterior, theta), with_its_gradient(of_nll, posterior, theta)

    def gradient(posterior: Any, theta: MetaParameters) -> Any:
        return with_its_gradient(support_nll.gradient(posterior, theta.shared), posterior, theta)

    return DifferentiatedLoss(value_and_gradient, gradient, value)


def _implicit(algorithm: GradientBased, problem: TaskProblem, linear: LinearSolver) -> Hypergradient:
    """The implicit function theorem, for any inner variable."""
    adapted = _adapted(algorithm, problem)
    return implicit_hypergradient(problem.inner_loss, problem.outer_loss, adapted, problem.meta, linear)


def _diagonal_implicit(algorithm: IBAML, problem: TaskProblem, linear: LinearSolver) -> Hypergradient:
    """Lemma 1, for a diagonal Gaussian."""
    shared = problem.meta.shared
    # The pass for the curvature gives the support set's part of the outer loss as well.
    reuses_support = algorithm.outer == "elbo" and not tree.leaves(shared)
    outer_loss = partial(problem.outer_loss, with_support=not reuses_support)
    (prior_gradient, shared_gradient), info = gaussian_implicit_hypergradient(
        problem.support_nll,
        lambda posterior, prior, shared: outer_loss(posterior, MetaParameters(prior, shared)),
        _adapted(algorithm, problem),
        problem.meta.prior,
        problem.weight,
        linear,
        shared=shared,
        precondition=algorithm.precondition,
        outer_nll_weight=_support_share(problem.episode) if reuses_support else 0.0,
    )
    return MetaParameters(prior_gradient, shared_gradient), info


def _adapted(algorithm: GradientBased, problem: TaskProblem) -> Any:
    """Solves the inner problem; its steps are differentiated once only, where the curvature is twice."""
    solution = algorithm.adapt(problem.nll, problem.meta, problem.episode.support, problem.noise, with_grad_norm=False)
    return solution.value


def _support_share(episode: Episode) -> float:
    """Returns the weight of the support set in an outer loss of all examples."""
    num_support = len(episode.support.y)
    return num_support / (num_support + len(episode.query.y))


_OWN_IMPLICIT: Mapping[type[Prior], Callable[[Any, TaskProblem, LinearSolver], Hypergradient]] = {
    DiagonalPrior: _diagonal_implicit
}
"""Families whose structure gives a better implicit gradient than the generic one."""

_CHECKS: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    "inner": (callable, "a solver such as GradientDescent(num_steps=5)"),
    "linear": (callable, "a solver such as CG(max_steps=5)"),
    "prior": (lambda value: getattr(value, "is_distribution", False), "a distribution such as DiagonalPrior()"),
    "num_samples": (lambda value: value >= 1, "at least 1"),
    "num_evaluation_samples": (lambda value: value >= 1, "at least 1"),
    "temperature": (lambda value: value > 0, "positive"),
    "proximal_strength": (lambda value: value > 0, "positive"),
    "hyper_prior_weight": (lambda value: value >= 0, "at least 0"),
    "truncation": (lambda value: value is None or value >= 0, "at least 0 or None"),
}
"""What a setting must be, wherever there is one of the name."""
