"""What families of distributions over adapted weights share."""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch

from ibaml import tree
from ibaml.solvers.inner import Geometry
from ibaml.types import MatVec, Params, PyTree, Tensor


class ImplicitSystem(NamedTuple):
    """What ``weight * divergence(v, prior)`` contributes to the implicit gradient at a posterior ``v``.

    With ``H_L`` the Hessian of the nll and ``g`` its gradient, the system is ``(H_L + H_D) u = b`` and the gradient in
    the prior ``o - M u``. A family may use that the posterior is nearly stationary, ``g = -weight * d divergence/dv``,
    to write ``H_D`` and ``M`` in a form that is more accurate away from it.

    Attributes:
        add_curvature: ``(H_L u, u) -> H_L u + H_D u``.
        add_mixed: ``(o, u) -> o - M u``, in the structure of the prior.
        preconditioner: Product with an approximation of the inverse of ``H_L + H_D``; None if none is known.
    """

    add_curvature: Callable[[PyTree, PyTree], PyTree]
    add_mixed: Callable[[PyTree, PyTree], PyTree]
    preconditioner: MatVec | None


def implicit_system(
    divergence_gradient: Callable[[Any, Any], Any], posterior: Any, prior: Any, weight: float
) -> ImplicitSystem:
    """Returns the system of a family without a form of its own, by differentiating its divergence.

    Args:
        divergence_gradient: Gradient of the divergence in the posterior, differentiable in both.
        posterior: Where the system is taken.
        prior: The prior.
        weight: Weight of the divergence.
    """

    def add_curvature(of_nll: PyTree, vector: PyTree) -> PyTree:
        product = torch.func.jvp(lambda v: divergence_gradient(v, prior), (posterior,), (vector,))[1]
        return tree.axpy(weight, product, of_nll)

    def add_mixed(direct: PyTree, solution: PyTree) -> PyTree:
        pullback = torch.func.vjp(lambda p: divergence_gradient(posterior, p), prior)[1]
        return tree.axpy(-weight, pullback(solution)[0], direct)

    return ImplicitSystem(add_curvature, add_mixed, None)


class Prior(Protocol):
    """A family of distributions over weights, of which the prior and every posterior are members.

    The family is a record of settings; its members are pytrees of tensors and arguments of every method. Plain weights
    are the family of points.
    """

    @property
    def is_distribution(self) -> bool:
        """Whether a member has any spread."""
        ...

    def init(self, weights: Params, /, *, generator: torch.Generator) -> Any:
        """Returns the member that training starts from, around initial weights.

        Args:
            weights: Initial weights by name.
            generator: Source of randomness.
        """
        ...

    def draw_noise(
        self, member: Any, num_samples: int, /, *, generator: torch.Generator, antithetic: bool = False
    ) -> Params:
        """Draws standard normal noise for weight samples, with a leading axis; empty for points.

        Args:
            member: Gives names, shapes, dtypes and devices.
            num_samples: Number of samples.
            generator: Source of randomness.
            antithetic: Whether to draw pairs of opposite sign.
        """
        ...

    def sample(self, member: Any, noise: Params, /) -> Params:
        """Maps noise to weights; noise with a leading axis gives as many samples."""
        ...

    def mean(self, member: Any, /) -> Params:
        """Returns the mean weights."""
        ...

    def map(self, function: Callable[[Params], Params], member: Any, /) -> Any:
        """Applies a function of weights by name, such as flattening, to each such part of a member."""
        ...

    def divergence(self, posterior: Any, prior: Any, /) -> Tensor:
        """Returns how far a posterior is from the prior, in nats: ``KL(posterior || prior)``, or what stands for it."""
        ...

    def divergence_gradient(self, posterior: Any, prior: Any, /) -> Any:
        """Returns the gradient of ``divergence`` in the posterior."""
        ...

    def geometry(self, prior: Any, weight: float, /) -> Geometry | None:
        """Returns what is known of the inner problem ``nll + weight * divergence``; None if nothing is.

        Args:
            prior: The prior.
            weight: Positive weight of the divergence beside the mean nll.
        """
        ...

    def implicit_system(self, posterior: Any, prior: Any, weight: float, nll_gradient: Any, /) -> ImplicitSystem:
        """Returns what the divergence contributes to the implicit gradient; ``implicit_system`` serves any family.

        Args:
            posterior: Where the system is taken.
            prior: The prior.
            weight: Weight of the divergence beside the mean nll.
            nll_gradient: Gradient of the mean nll at the posterior.
        """
        ...

    def hyper_prior_nll(self, prior: Any, /) -> Tensor:
        """Returns the negative log-density of a prior under ABML's hyper-prior, in nats, summed over weights."""
        ...

    def parameter_groups(self, member: Any, /) -> tuple[list[Tensor], list[Tensor]]:
        """Returns the tensors that say where a member is, and those that say how wide it is, on a log scale."""
        ...


def map_to_wide(*trees: PyTree) -> tuple[PyTree, ...]:
    """Casts half-precision leaves to float32: sums over millions of weights have no place in 16 bits."""
    return tuple(tree.map(lambda x: x.to(torch.promote_types(x.dtype, torch.float32)), t) for t in trees)
