"""The grid: which inner variable, and how to differentiate through its optimisation.

| inner variable | unrolled | first_order | implicit |
|---|---|---|---|
| weights | MAML | FOMAML | iMAML |
| Gaussian over weights | ABML, VAMPIRE | first-order ABML | **iBaML** |

The inner problem is one for all: ``min_v L(v) + weight * divergence(v, prior)``, where ``L`` is the mean nll of the
support set at the weights (``on_weights``), or its expectation under a distribution (``on_distribution``). A cell is a
record of the settings that it uses.
"""

import abc
import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, ClassVar, Literal, NamedTuple, get_args, get_origin, get_type_hints

import torch

from ibaml import tree
from ibaml.algorithms.base import Algorithm, Estimator, MetaParameters, Network, TaskNoise
from ibaml.algorithms.nll import Nll
from ibaml.hypergradients import first_order_hypergradient, unrolled_hypergradient
from ibaml.priors import Prior
from ibaml.solvers.curvature import DifferentiatedLoss, at_fixed
from ibaml.solvers.inner import GradientDescent, InnerSolver
from ibaml.types import Batch, Episode, HypergradientInfo, InnerSolution, Params, Tensor

Hypergradient = tuple[MetaParameters, HypergradientInfo]


class TaskProblem(NamedTuple):
    """One task's bilevel problem in the inner variable ``v`` and the meta-parameters ``theta``.

    Attributes:
        nll: Nll of the examples of a task.
        episode: Support and query set.
        noise: Noise of the task.
        meta: ``theta``, where the gradient is taken.
        weight: Weight of the divergence in ``F``.
        support_nll: ``L(v, theta.shared)``.
        inner_loss: ``F(v, theta)``.
        outer_loss: ``O(v, theta)``.
        solver: ``(loss, init) -> InnerSolution``.
    """

    nll: Nll
    episode: Episode
    noise: TaskNoise
    meta: MetaParameters
    weight: float
    support_nll: DifferentiatedLoss
    inner_loss: DifferentiatedLoss
    outer_loss: Callable[..., Tensor]
    solver: Callable[..., InnerSolution]


@dataclasses.dataclass(frozen=True, kw_only=True)
class GradientBased(abc.ABC):
    """What the cells share: the inner problem and its solver.

    Attributes:
        inner: Inner solver, for training and for adaptation.
    """

    name: ClassVar[str]
    estimator: ClassVar[Estimator]
    is_bayesian: ClassVar[bool]
    uses_features: ClassVar[bool] = False
    serves_unmeasured_targets: ClassVar[bool] = False

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

    @property
    def serves_any_number_of_outputs(self) -> bool:
        """False: weights of a network are for its outputs."""
        return False

    def init(self, adapted: Params, shared: Params, *, generator: torch.Generator) -> MetaParameters:
        """Returns initial meta-parameters; see ``Algorithm``."""
        return MetaParameters(self._family.init(adapted, generator=generator), shared)

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
        """Solves the inner problem of one task; see ``Algorithm``."""
        if self.is_bayesian and not len(support.y):
            # What is left of the inner loss is the divergence, which is least at the prior.
            return InnerSolution(meta.prior, support.x.new_zeros((), dtype=torch.float32), 0)
        weight = self._weight(len(support.y))
        inner_loss = regularised(self._nll(nll, support, noise.inner), self._family, weight)
        return self._solver(meta, weight)(
            at_fixed(inner_loss, meta), meta.prior if start is None else start, with_grad_norm=with_grad_norm
        )

    def hypergradient(
        self, nll: Nll, meta: MetaParameters, episode: Episode, noise: TaskNoise, *, with_grad_norm: bool = True
    ) -> Hypergradient:
        """Returns one task's gradient of the outer loss in the meta-parameters; see ``Algorithm``."""
        # Parameters that ask for gradients would make every inner step keep its graph.
        meta = tree.detach(meta)
        weight = self._weight(len(episode.support.y))
        goes_back = self.estimator == "unrolled" and self._truncation is None
        support_nll = self._nll(nll, episode.support, noise.inner, twice=goes_back or self.estimator == "implicit")
        problem = TaskProblem(
            nll=nll,
            episode=episode,
            noise=noise,
            meta=meta,
            weight=weight,
            support_nll=support_nll,
            inner_loss=regularised(support_nll, self._family, weight),
            outer_loss=partial(self._outer_loss, nll, episode, noise),
            solver=partial(self._solver(meta, weight), with_grad_norm=with_grad_norm),
        )
        # No derivative is kept but those that the estimator asks for.
        with torch.no_grad():
            return self._differentiate(problem)

    @property
    def is_sequential(self) -> bool:
        """False: a family of posteriors that is not exact adds up its errors from part to part."""
        return False

    def update(self, nll: Nll, meta: MetaParameters, posterior: Any, more: Batch) -> None:
        """Returns None: it takes all examples; see ``Algorithm``."""
        del nll, meta, posterior, more

    def outputs(self, network: Network, shared: Params, posterior: Any, x: Tensor, noise: Params) -> dict[str, Tensor]:
        """Returns the outputs under each weight sample; see ``Algorithm``."""
        samples = self.weight_samples(posterior, noise)
        return {"outputs": torch.stack([network.outputs(weights, shared, x) for weights in samples])}

    def draw_outputs(
        self, network: Network, shared: Params, posterior: Any, x: Tensor, *, generator: torch.Generator
    ) -> None:
        """Returns None: outputs are those of weight samples."""
        del network, shared, posterior, x, generator

    def mean_outputs(self, network: Network, shared: Params, posterior: Any, x: Tensor) -> Tensor:
        """Returns the outputs at the mean weights; see ``Algorithm``."""
        return network.outputs(self.mean_weights(posterior), shared, x)

    def mean_weights(self, posterior: Any) -> Params:
        """Returns the mean of the adapted weights.

        Args:
            posterior: What ``adapt`` returned.
        """
        return self._family.mean(posterior)

    def map_weights(self, function: Callable[[Params], Params], prior: Any) -> Any:
        """Applies a function of weights to each part of a prior; see ``Algorithm``."""
        return self._family.map(function, prior)

    def parameter_groups(self, prior: Any) -> tuple[list[Tensor], list[Tensor]]:
        """Returns places and widths; see ``Prior``."""
        return self._family.parameter_groups(prior)

    def check_task(self, nll: Nll, meta: MetaParameters, episode: Episode) -> None:
        """Refuses nothing."""
        del nll, meta, episode

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

    def _adapted(self, problem: TaskProblem) -> Any:
        """Solves the inner problem; its steps are differentiated once, where the curvature asks for twice."""
        solution = self.adapt(problem.nll, problem.meta, problem.episode.support, problem.noise, with_grad_norm=False)
        return solution.value

    @property
    def _num_samples(self) -> int:
        return 1

    @property
    def _truncation(self) -> int | None:
        return None

    @property
    @abc.abstractmethod
    def _family(self) -> Prior:
        """The family of the inner variable."""

    @abc.abstractmethod
    def weight_samples(self, posterior: Any, noise: Params) -> list[Params]:
        """Returns the weights whose outputs make a prediction.

        Args:
            posterior: What ``adapt`` returned.
            noise: From ``draw_evaluation_noise``.
        """

    @abc.abstractmethod
    def _weight(self, num_examples: int) -> float:
        """Returns the weight of the divergence beside the mean nll of so many examples."""

    @abc.abstractmethod
    def _nll(self, nll: Nll, batch: Batch, draws: Params, *, twice: bool = False) -> DifferentiatedLoss:
        """Returns ``(v, shared) -> mean nll``; ``twice`` announces that it will be differentiated twice."""

    @abc.abstractmethod
    def _outer_loss(
        self, nll: Nll, episode: Episode, noise: TaskNoise, posterior: Any, theta: MetaParameters
    ) -> Tensor:
        """Returns the outer loss."""


def num_inner_steps(algorithm: Algorithm) -> int:
    """Returns the number of inner steps of an algorithm of the grid.

    Raises:
        TypeError: If the algorithm takes none.
    """
    if not isinstance(algorithm, GradientBased):
        raise TypeError(f"{algorithm.name} takes no inner steps: expected an algorithm of the grid, such as maml.")
    return algorithm.inner.num_steps


def regularised(support_nll: DifferentiatedLoss, family: Prior, weight: float) -> DifferentiatedLoss:
    """Returns the inner loss ``F(v, theta) = L(v, shared) + weight * divergence(v, prior)``.

    With a distribution it is the negative ELBO (Zhang et al. 2023, eq. (7)).
    """

    def with_divergence(mean: Tensor, posterior: Any, theta: MetaParameters) -> Tensor:
        return mean + weight * family.divergence(posterior, theta.prior) if weight else mean

    def with_its_gradient(of_nll: Any, posterior: Any, theta: MetaParameters) -> Any:
        return tree.axpy(weight, family.divergence_gradient(posterior, theta.prior), of_nll) if weight else of_nll

    def value(posterior: Any, theta: MetaParameters) -> Tensor:
        return with_divergence(support_nll(posterior, theta.shared), posterior, theta)

    def value_and_gradient(posterior: Any, theta: MetaParameters) -> tuple[Tensor, Any]:
        mean, of_nll = support_nll.value_and_gradient(posterior, theta.shared)
        return with_divergence(mean, posterior, theta), with_its_gradient(of_nll, posterior, theta)

    def gradient(posterior: Any, theta: MetaParameters) -> Any:
        return with_its_gradient(support_nll.gradient(posterior, theta.shared), posterior, theta)

    return DifferentiatedLoss(value_and_gradient, gradient, value)


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
