"""Plain weights: the family of distributions without spread, with a squared distance for a divergence."""

import dataclasses
from collections.abc import Callable

import torch

from ibaml import tree
from ibaml.priors.base import ImplicitSystem, map_to_wide
from ibaml.solvers.inner import Geometry
from ibaml.types import Params, Tensor


@dataclasses.dataclass(frozen=True, kw_only=True)
class PointPrior:
    """Initial weights, pulled at by ``weight / 2 ||w - w0||^2`` where an algorithm says so (iMAML's proximal term)."""

    @property
    def is_distribution(self) -> bool:
        """False."""
        return False

    def init(self, weights: Params, /, *, generator: torch.Generator) -> Params:
        """Returns the weights."""
        del generator
        return weights

    def draw_noise(
        self, member: Params, num_samples: int, /, *, generator: torch.Generator, antithetic: bool = False
    ) -> Params:
        """Returns no noise."""
        del member, num_samples, generator, antithetic
        return {}

    def sample(self, member: Params, noise: Params, /) -> Params:
        """Returns the weights."""
        del noise
        return member

    def mean(self, member: Params, /) -> Params:
        """Returns the weights."""
        return member

    def map(self, function: Callable[[Params], Params], member: Params, /) -> Params:
        """Returns the function of the weights."""
        return function(member)

    def divergence(self, posterior: Params, prior: Params, /) -> Tensor:
        """Returns ``||w - w0||^2 / 2``, up to a factor the negative log-density of an isotropic Gaussian prior."""
        difference = tree.sub(*map_to_wide(posterior, prior))
        return 0.5 * tree.dot(difference, difference)

    def divergence_gradient(self, posterior: Params, prior: Params, /) -> Params:
        """Returns ``w - w0``."""
        return tree.sub(posterior, prior)

    def geometry(self, prior: Params, weight: float, /) -> Geometry | None:
        """Returns None: a penalty says nothing of the units of a weight."""
        del prior, weight
        return None

    def implicit_system(
        self, posterior: Params, prior: Params, weight: float, nll_gradient: Params, /
    ) -> ImplicitSystem:
        """Returns ``H_D = weight I`` and ``M = -weight I``."""
        del posterior, prior, nll_gradient
        return ImplicitSystem(
            add_curvature=lambda of_nll, vector: tree.axpy(weight, vector, of_nll),
            add_mixed=lambda direct, solution: tree.axpy(weight, solution, direct),
            preconditioner=None,
        )

    def hyper_prior_nll(self, prior: Params, /) -> Tensor:
        """Refuses.

        Raises:
            ValueError: Always: the hyper-prior is one of variances.
        """
        raise ValueError("hyper_prior_weight needs a prior that is a distribution, but plain weights have no variance.")

    def parameter_groups(self, member: Params, /) -> tuple[list[Tensor], list[Tensor]]:
        """Returns all tensors, and none."""
        return tree.leaves(member), []
