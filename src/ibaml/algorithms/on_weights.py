"""Algorithms that adapt plain weights: MAML, first-order MAML, iMAML."""

import dataclasses
from typing import ClassVar

import torch

from ibaml.algorithms.base import Estimator, MetaParameters, TaskNoise
from ibaml.algorithms.gradient_based import GradientBased, Hypergradient, TaskProblem
from ibaml.algorithms.nll import Nll
from ibaml.hypergradients import implicit_hypergradient
from ibaml.priors import PointPrior, Prior
from ibaml.solvers.curvature import DifferentiatedLoss
from ibaml.solvers.inner import GradientDescent, InnerSolver
from ibaml.solvers.linear import CG, LinearSolver
from ibaml.types import Batch, Episode, Params, Tensor


@dataclasses.dataclass(frozen=True, kw_only=True)
class OnWeights(GradientBased):
    """Algorithms that adapt plain weights; their outer loss is the query's nll."""

    prior: ClassVar[PointPrior] = PointPrior()
    is_bayesian: ClassVar[bool] = False

    @property
    def temperature(self) -> None:
        """None: there is no posterior."""
        return

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

    def _nll(self, nll: Nll, batch: Batch, draws: Params, *, twice: bool = False) -> DifferentiatedLoss:
        del draws
        return nll.mean(batch, twice=twice)

    def _outer_loss(
        self, nll: Nll, episode: Episode, noise: TaskNoise, posterior: Params, theta: MetaParameters
    ) -> Tensor:
        del noise
        return nll.mean(episode.query)(posterior, theta.shared)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MAML(OnWeights):
    """MAML (Finn et al. 2017): learned initial weights, backpropagation through the inner steps.

    Attributes:
        truncation: Differentiate the last so many steps only; None: all.
    """

    name: ClassVar[str] = "maml"
    estimator: ClassVar[Estimator] = "unrolled"

    truncation: int | None = None

    @property
    def _truncation(self) -> int | None:
        return self.truncation


@dataclasses.dataclass(frozen=True, kw_only=True)
class FOMAML(OnWeights):
    """First-order MAML (Finn et al. 2017): the query gradient at the adapted weights."""

    name: ClassVar[str] = "fomaml"
    estimator: ClassVar[Estimator] = "first_order"


@dataclasses.dataclass(frozen=True, kw_only=True)
class IMAML(OnWeights):
    """The iMAML algorithm (Rajeswaran et al. 2019): proximal inner problem, implicit gradient.

    Attributes:
        linear: Linear solver of the implicit gradient.
        proximal_strength: Strength of ``||w - prior||^2 / 2`` in the inner loss, its lambda; positive, because without
            it the solution of the inner problem does not depend on what is learned.
    """

    name: ClassVar[str] = "imaml"
    estimator: ClassVar[Estimator] = "implicit"

    inner: InnerSolver = GradientDescent(num_steps=16)
    linear: LinearSolver = CG()
    proximal_strength: float = 2.0

    def _weight(self, num_examples: int) -> float:
        return self.proximal_strength

    def _differentiate(self, problem: TaskProblem) -> Hypergradient:
        adapted = self._adapted(problem)
        return implicit_hypergradient(problem.inner_loss, problem.outer_loss, adapted, problem.meta, self.linear)
