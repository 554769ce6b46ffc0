"""Algorithms that adapt a distribution over weights: ABML, VAMPIRE, iBaML."""

import abc
import dataclasses
from functools import partial
from typing import Any, ClassVar, Literal

import torch

from ibaml import tree
from ibaml.algorithms import objectives
from ibaml.algorithms.base import Estimator, MetaParameters, TaskNoise
from ibaml.algorithms.gradient_based import GradientBased, Hypergradient, TaskProblem
from ibaml.algorithms.nll import Nll
from ibaml.hypergradients import regularised_implicit_hypergradient
from ibaml.priors import DiagonalPrior, Prior
from ibaml.solvers.curvature import DifferentiatedLoss
from ibaml.solvers.linear import CG, LinearSolver
from ibaml.types import Batch, Episode, Params, Tensor

OuterLoss = Literal["expected_nll", "predictive_nll", "elbo"]
"""Outer loss: the query's expected nll (Jensen), the nll of the query's averaged prediction, or the expected nll of
support and query together plus the KL divergence, per example (ABML's)."""


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
        # One after the other: rows of a common tensor would start at addresses that no kernel likes.
        num_samples = tree.leaves(noise)[0].shape[0]
        return [self.prior.sample(posterior, tree.map(lambda leaf, i=i: leaf[i], noise)) for i in range(num_samples)]

    @property
    def _family(self) -> Prior:
        return self.prior

    @property
    def _num_samples(self) -> int:
        return self.num_samples

    @property
    @abc.abstractmethod
    def _outer(self) -> tuple[OuterLoss, float]:
        """Kind of the outer loss, and weight of the hyper-prior in it."""

    def _weight(self, num_examples: int) -> float:
        return objectives.kl_weight(num_examples, self.temperature)

    def _nll(self, nll: Nll, batch: Batch, draws: Params, *, twice: bool = False) -> DifferentiatedLoss:
        return nll.expected(self.prior, batch, draws, twice=twice)

    def _outer_loss(
        self,
        nll: Nll,
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
                lambda w, batch: nll.per_example(w, theta.shared, batch), posterior, noise.outer, episode.query
            )
        else:
            loss = nll.expected(self.prior, episode.query, noise.outer)(posterior, theta.shared)
        if kind == "elbo":
            share = _support_share(episode)
            loss = (1 - share) * loss
            if with_support:
                of_support = nll.expected(self.prior, episode.support, noise.inner)
                loss = loss + share * of_support(posterior, theta.shared)
            weight = self._weight(len(episode.support.y) + len(episode.query.y))
            loss = loss + weight * self.prior.divergence(posterior, theta.prior)
        if hyper_prior_weight:
            loss = loss + hyper_prior_weight * self.prior.hyper_prior_nll(theta.prior)
        return loss


@dataclasses.dataclass(frozen=True, kw_only=True)
class ABML(OnDistribution):
    """ABML (Ravi and Beatson 2019): learned prior, unrolled; support and query nll and the KL divergence outside.

    Attributes:
        hyper_prior_weight: Weight of the hyper-prior (nats, summed over weights) in the outer loss.
        truncation: Differentiate the last so many steps only, 0 being first-order ABML; None: all.
    """

    name: ClassVar[str] = "abml"
    estimator: ClassVar[Estimator] = "unrolled"

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
    estimator: ClassVar[Estimator] = "unrolled"

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
    """Implicit Bayesian meta-learning (Zhang et al. 2023): learned prior, implicit gradient (by Lemma 1 if diagonal).

    Attributes:
        linear: Linear solver of the implicit gradient.
        precondition: Give the linear system the free preconditioner of the family, if it has one.
        outer: Outer loss: ``"expected_nll"``, ``"predictive_nll"``, or ``"elbo"`` (ABML's).
        hyper_prior_weight: Weight of ABML's hyper-prior (nats, summed over weights) in the outer loss.
    """

    name: ClassVar[str] = "ibaml"
    estimator: ClassVar[Estimator] = "implicit"

    linear: LinearSolver = CG()
    precondition: bool = True
    outer: OuterLoss = "expected_nll"
    hyper_prior_weight: float = 0.0

    @property
    def _outer(self) -> tuple[OuterLoss, float]:
        return self.outer, self.hyper_prior_weight

    def _differentiate(self, problem: TaskProblem) -> Hypergradient:
        prior, shared = problem.meta
        # The pass for the curvature gives the support set's part of the outer loss as well.
        reuses_support = self.outer == "elbo" and not tree.leaves(shared)
        outer_loss = partial(problem.outer_loss, with_support=not reuses_support)
        (prior_gradient, shared_gradient), info = regularised_implicit_hypergradient(
            problem.support_nll,
            lambda posterior, prior, shared: outer_loss(posterior, MetaParameters(prior, shared)),
            self._adapted(problem),
            prior,
            self.prior,
            problem.weight,
            self.linear,
            shared=shared,
            precondition=self.precondition,
            outer_nll_weight=_support_share(problem.episode) if reuses_support else 0.0,
        )
        return MetaParameters(prior_gradient, shared_gradient), info


def _support_share(episode: Episode) -> float:
    """Returns the weight of the support set in an outer loss of all examples."""
    num_support = len(episode.support.y)
    return num_support / (num_support + len(episode.query.y))
