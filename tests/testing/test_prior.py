"""The contract of priors accepts a foreign family and finds what is wrong with a broken one."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch

from ibaml import tree
from ibaml.priors import DiagonalGaussian, DiagonalPrior
from ibaml.priors.base import implicit_system
from ibaml.priors.diagonal import sample_noise
from ibaml.testing import PriorContract, failures
from ibaml.types import Params, Tensor


class Isotropic(NamedTuple):
    mean: Params
    log_var: Tensor


@dataclasses.dataclass(frozen=True, kw_only=True)
class IsotropicPrior:
    """A family of one's own: Gaussians with one variance for all weights."""

    initial_log_var: float = -4.0

    @property
    def is_distribution(self) -> bool:
        return True

    def init(self, weights: Params, /, *, generator: torch.Generator) -> Isotropic:
        return Isotropic(weights, torch.full_like(tree.leaves(weights)[0].flatten()[0], self.initial_log_var))

    def draw_noise(self, member: Isotropic, num_samples: int, /, **options: Any) -> Params:
        return sample_noise(member.mean, num_samples, **options)

    def sample(self, member: Isotropic, noise: Params, /) -> Params:
        return tree.map(lambda m, e: m + torch.exp(0.5 * member.log_var) * e, member.mean, noise)

    def mean(self, member: Isotropic, /) -> Params:
        return member.mean

    def map(self, function: Callable[[Params], Params], member: Isotropic, /) -> Isotropic:
        return Isotropic(function(member.mean), member.log_var)

    def divergence(self, posterior: Isotropic, prior: Isotropic, /) -> Tensor:
        posterior, prior = (
            tree.map(lambda x: x.to(torch.promote_types(x.dtype, torch.float32)), g) for g in (posterior, prior)
        )
        difference, log_ratio = tree.sub(posterior.mean, prior.mean), posterior.log_var - prior.log_var
        size = sum(leaf.numel() for leaf in tree.leaves(difference))
        distance = tree.dot(difference, difference) * torch.exp(-prior.log_var)
        return 0.5 * (size * (torch.expm1(log_ratio) - log_ratio) + distance)

    def divergence_gradient(self, posterior: Isotropic, prior: Isotropic, /) -> Isotropic:
        difference, log_ratio = tree.sub(posterior.mean, prior.mean), posterior.log_var - prior.log_var
        size = sum(leaf.numel() for leaf in tree.leaves(difference))
        return Isotropic(tree.scale(torch.exp(-prior.log_var), difference), 0.5 * size * torch.expm1(log_ratio))

    def geometry(self, prior: Isotropic, weight: float, /) -> None:
        return None

    def implicit_system(self, posterior: Isotropic, prior: Isotropic, weight: float, nll_gradient: Any, /) -> Any:
        return implicit_system(self.divergence_gradient, posterior, prior, weight)

    def hyper_prior_nll(self, prior: Isotropic, /) -> Tensor:
        return 0.5 * tree.dot(prior.mean, prior.mean) + 0.01 * torch.exp(-prior.log_var)

    def parameter_groups(self, member: Isotropic, /) -> tuple[list[Tensor], list[Tensor]]:
        return tree.leaves(member.mean), [member.log_var]


def test_prior_of_ones_own() -> None:
    class Mine(PriorContract):
        make = IsotropicPrior

    assert failures(Mine) == {}


@dataclasses.dataclass(frozen=True, kw_only=True)
class WrongDivergence(DiagonalPrior):
    """The other way round."""

    def divergence(self, posterior: DiagonalGaussian, prior: DiagonalGaussian, /) -> Tensor:
        return super().divergence(prior, posterior)


@dataclasses.dataclass(frozen=True, kw_only=True)
class WrongSpread(DiagonalPrior):
    def sample(self, member: DiagonalGaussian, noise: Params, /) -> Params:
        return tree.map(lambda m, rho, e: m + torch.exp(rho) * e, member.mean, member.log_var, noise)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Biased(DiagonalPrior):
    def sample(self, member: DiagonalGaussian, noise: Params, /) -> Params:
        return super().sample(member, tree.map(lambda e: e + 0.1, noise))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Forgets(DiagonalPrior):
    def parameter_groups(self, member: DiagonalGaussian, /) -> tuple[list[Tensor], list[Tensor]]:
        return tree.leaves(member.mean), tree.leaves(member.log_var)[1:]


@dataclasses.dataclass(frozen=True, kw_only=True)
class FlattensHalf(DiagonalPrior):
    def map(self, function: Callable[[Params], Params], member: DiagonalGaussian, /) -> DiagonalGaussian:
        return DiagonalGaussian(function(member.mean), member.log_var)


@pytest.mark.parametrize(
    ("family", "test"),
    [
        (WrongDivergence, "test_divergence_is_that_of_the_samples"),
        (WrongDivergence, "test_gradient_of_the_divergence_is_that_of_autograd"),
        (WrongSpread, "test_divergence_is_that_of_the_samples"),
        (Biased, "test_samples_have_the_mean_of_the_member"),
        (Forgets, "test_parameter_groups_hold_each_tensor_once"),
        (FlattensHalf, "test_flat_weights_are_the_same_as_named_ones"),
    ],
)
def test_broken_prior_is_found(family: Any, test: str) -> None:
    class Broken(PriorContract):
        make = family

    assert failures(Broken, only=test)
