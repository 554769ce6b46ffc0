"""The contract of algorithms accepts a foreign one and finds what is wrong with a broken one."""

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch

from ibaml import tree
from ibaml.algorithms import FOMAML, IBAML, IMAML, MAML, MetaParameters, TaskNoise
from ibaml.algorithms.base import Estimator, Network
from ibaml.algorithms.heads import LinearGaussian
from ibaml.algorithms.nll import Nll
from ibaml.testing import AlgorithmContract, failures
from ibaml.types import Batch, Episode, HypergradientInfo, InnerSolution, Params, Tensor


@dataclasses.dataclass(frozen=True, kw_only=True)
class OneStep:
    """An algorithm of one's own: MAML with one step, from scratch."""

    rate: float = 0.05

    name: ClassVar[str] = "one_step"
    estimator: ClassVar[Estimator] = "unrolled"
    is_bayesian: ClassVar[bool] = False
    uses_features: ClassVar[bool] = False
    serves_unmeasured_targets: ClassVar[bool] = False
    is_sequential: ClassVar[bool] = False

    @property
    def serves_any_number_of_outputs(self) -> bool:
        return False

    @property
    def temperature(self) -> None:
        return None

    @property
    def num_curvature_points(self) -> int:
        return 0

    def describe(self) -> str:
        return f"one step of {self.rate}"

    def init(self, adapted: Params, shared: Params, *, generator: torch.Generator) -> MetaParameters:
        return MetaParameters(adapted, shared)

    def draw_noise(self, meta: MetaParameters, *, generator: torch.Generator) -> TaskNoise:
        return TaskNoise({}, {})

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
        gradient = torch.func.grad(lambda w: nll.mean(support)(w, meta.shared))
        start = meta.prior if start is None else start
        value = tree.axpy(-self.rate, gradient(start), start)
        return InnerSolution(value, tree.norm(gradient(value)), 1)

    def hypergradient(
        self, nll: Nll, meta: MetaParameters, episode: Episode, noise: TaskNoise, *, with_grad_norm: bool = True
    ) -> tuple[MetaParameters, HypergradientInfo]:
        def outer(theta: MetaParameters) -> tuple[Tensor, InnerSolution]:
            solution = self.adapt(nll, theta, episode.support, noise)
            return nll.mean(episode.query)(solution.value, theta.shared), solution._replace(num_steps=torch.ones(()))

        gradient, (loss, solution) = torch.func.grad_and_value(outer, has_aux=True)(meta)
        no_residual = torch.zeros_like(loss)
        info = HypergradientInfo(loss, solution.grad_norm, no_residual, no_residual == 0, solution.value)
        return gradient, info

    def draw_evaluation_noise(self, meta: MetaParameters, *, generator: torch.Generator) -> Params:
        return {}

    def update(self, *arguments: Any) -> None:
        return None

    def outputs(
        self, network: Network, shared: Params, posterior: Params, x: Tensor, noise: Params
    ) -> dict[str, Tensor]:
        return {"outputs": network.outputs(posterior, shared, x).unsqueeze(0)}

    def draw_outputs(self, *arguments: Any, generator: torch.Generator) -> None:
        return None

    def mean_outputs(self, network: Network, shared: Params, posterior: Params, x: Tensor) -> Tensor:
        return network.outputs(posterior, shared, x)

    def map_weights(self, function: Callable[[Params], Params], prior: Params) -> Params:
        return function(prior)

    def parameter_groups(self, prior: Params) -> tuple[list[Tensor], list[Tensor]]:
        return list(prior.values()), []

    def check_task(self, nll: Nll, meta: MetaParameters, episode: Episode) -> None:
        pass


def test_algorithm_of_ones_own() -> None:
    class Mine(AlgorithmContract):
        make = OneStep

    assert failures(Mine) == {}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Boasting(MAML):
    """A first-order gradient that claims to be the derivative."""

    def hypergradient(self, *arguments: Any, **options: Any) -> Any:
        return FOMAML(inner=self.inner).hypergradient(*arguments, **options)


@dataclasses.dataclass(frozen=True, kw_only=True)
class OffByAThousandth(IBAML):
    """Gives a gradient in the log-variances that is a thousandth too long."""

    def hypergradient(self, *arguments: Any, **options: Any) -> Any:
        gradient, info = super().hypergradient(*arguments, **options)
        log_var = tree.scale(1.001, gradient.prior.log_var)
        return gradient._replace(prior=gradient.prior._replace(log_var=log_var)), info


@dataclasses.dataclass(frozen=True, kw_only=True)
class Unsolved(IMAML):
    """Ignores the proximal term where it adapts, so that its implicit gradient is one of another problem."""

    def adapt(self, *arguments: Any, **options: Any) -> InnerSolution:
        return MAML(inner=self.inner).adapt(*arguments, **options)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Impure(MAML):
    """Writes the adapted weights into the meta-parameters."""

    def hypergradient(self, nll: Nll, meta: MetaParameters, *arguments: Any, **options: Any) -> Any:
        gradient, info = super().hypergradient(nll, meta, *arguments, **options)
        for weight, adapted in zip(tree.leaves(meta.prior), tree.leaves(info.inner_params), strict=True):
            weight.copy_(adapted)
        return gradient, info


@dataclasses.dataclass(frozen=True, kw_only=True)
class Random(MAML):
    """Draws from the global generator."""

    def adapt(self, *arguments: Any, **options: Any) -> InnerSolution:
        solution = super().adapt(*arguments, **options)
        return solution._replace(value=tree.map(lambda leaf: leaf + 1e-3 * torch.randn_like(leaf), solution.value))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Branching(MAML):
    """Asks a tensor a question that has no answer under vmap."""

    def hypergradient(self, nll: Nll, meta: MetaParameters, episode: Episode, *arguments: Any, **options: Any) -> Any:
        if episode.support.y.sum() > 1e9:
            raise ValueError("too large")
        return super().hypergradient(nll, meta, episode, *arguments, **options)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Forgetful(LinearGaussian):
    """Knows nothing but the last examples that it was given."""

    def update(self, nll: Nll, meta: MetaParameters, posterior: Any, more: Batch) -> InnerSolution:
        return self.adapt(nll, meta, more, TaskNoise({}, {}))


@pytest.mark.parametrize(
    ("algorithm", "test"),
    [
        (Forgetful, "test_examples_in_parts_are_those_at_once"),
        (Boasting, "test_hypergradient_equals_central_differences_of_its_outer_loss"),
        (OffByAThousandth, "test_hypergradient_equals_central_differences_of_its_outer_loss"),
        (Unsolved, "test_hypergradient_equals_central_differences_of_its_outer_loss"),
        (Impure, "test_nothing_is_changed_in_place"),
        (Random, "test_posterior_is_around_weights_of_the_task"),
        (Branching, "test_vmap_over_tasks_equals_the_loop"),
    ],
)
def test_broken_algorithm_is_found(algorithm: Any, test: str) -> None:
    class Broken(AlgorithmContract):
        make = algorithm

    assert failures(Broken, only=test)
