"""Implicit hypergradients of a learnable prior, Lemma 1 of Zhang et al. 2023 among them."""

from collections.abc import Callable
from typing import Any

import torch

from ibaml import tree
from ibaml.hypergradients.base import diagnostics, gradients_and_value, require_residual
from ibaml.priors import DiagonalGaussian, DiagonalPrior, Prior
from ibaml.solvers.curvature import at_fixed, value_gradient_and_hvp, vjp
from ibaml.solvers.curvature import gradient as gradient_of
from ibaml.solvers.linear import LinearSolver
from ibaml.types import HypergradientInfo, PyTree, Tensor


@torch.no_grad()
def gaussian_implicit_hypergradient(
    expected_nll: Callable[..., Tensor],
    outer_loss: Callable[..., Tensor],
    posterior: DiagonalGaussian,
    prior: DiagonalGaussian,
    kl_weight: float,
    solver: LinearSolver,
    *,
    shared: PyTree | None = None,
    precondition: bool = True,
    outer_nll_weight: float = 0.0,
) -> tuple[Any, HypergradientInfo]:
    """Implicit hypergradient of a learnable Gaussian prior: Lemma 1, eq. (16)-(17), of Zhang et al. 2023.

    The inner problem is ``min_v L(v) + lam * KL(v || prior)`` over ``v = (m_t, rho = log d_t)``, with the prior's
    parameters ``(m, log D)`` as meta-parameters. Written in log coordinates (``docs/design.md`` derives it from the
    paper's ``(m, d)`` form), with ``s = u_d / d_t``:

        H' = hess L - diag(0, dL/drho) + diag(lam / D, (lam / 2) (d_t / D + (2 / lam) dL/drho)^2)
        H' (u_m, s) = (dO/dm_t, dO/drho)
        g_m = dO/dm + lam u_m / D
        g_logD = dO/dlogD - dL/dm_t u_m + (lam / 2) (d_t / D) s

    At a stationary point this is ``implicit_hypergradient`` of the same problem. Because the stationarity condition of
    the variances, ``1/d_t = 1/D + (2 / lam) dL/dd_t``, has been substituted, it stays exact for a linear model when
    only the variances are off. When the mean is off by ``e``, its error in ``g_logD`` is of the order of ``e`` times
    the curvature of ``L``, that of the generic form ``e`` times ``lam / D``; which is larger depends on the task.

    Args:
        expected_nll: ``L(posterior) -> scalar``, mean nll of the support set in nats per example, a deterministic
            function (noise fixed). With ``shared``: ``L(posterior, shared)``.
        outer_loss: ``O(posterior, prior) -> scalar``; with ``shared``: ``O(posterior, prior, shared)``.
        posterior: The point that the inner solver returned.
        prior: Prior at which the gradient is taken.
        kl_weight: ``lam``, positive: temperature / number of support examples.
        solver: Linear solver, for example ``CG(max_steps=5)``.
        shared: As in ``regularised_implicit_hypergradient``.
        precondition: Hand the solver ``diag(d_t / lam, 2 / lam)``, about the inverse of the diagonal of ``H'`` at a
            stationary point; free of cost.
        outer_nll_weight: As in ``regularised_implicit_hypergradient``.

    Returns:
        The gradient as a DiagonalGaussian (``mean`` holds ``g_m``, ``log_var`` holds ``g_logD``), or the pair of it and
        the gradient of ``shared``; and the diagnostics.

    Raises:
        ValueError: If ``kl_weight`` is not positive, or ``outer_nll_weight`` is given with ``shared`` parameters.

    Cost:
        Two gradients (three with ``shared``) and one Hessian-vector product of ``L`` per solver step. Memory does not
        depend on how many steps the inner solver took.
    """
    if not kl_weight > 0:
        raise ValueError(
            f"kl_weight must be positive, but is {kl_weight}: without the prior in the inner loss its solution does "
            "not depend on the prior, and the implicit gradient is undefined."
        )
    return regularised_implicit_hypergradient(
        expected_nll,
        outer_loss,
        posterior,
        prior,
        DiagonalPrior(),
        kl_weight,
        solver,
        shared=shared,
        precondition=precondition,
        outer_nll_weight=outer_nll_weight,
    )


@torch.no_grad()
def regularised_implicit_hypergradient(
    nll: Callable[..., Tensor],
    outer_loss: Callable[..., Tensor],
    posterior: Any,
    prior: Any,
    family: Prior,
    weight: float,
    solver: LinearSolver,
    *,
    shared: PyTree | None = None,
    precondition: bool = True,
    outer_nll_weight: float = 0.0,
) -> tuple[Any, HypergradientInfo]:
    """Implicit hypergradient of a prior, and of shared parameters, for ``min_v L(v) + weight * divergence(v, prior)``.

    That of ``implicit_hypergradient``, with the divergence's part written by the family (``Prior.implicit_system``).

    Args:
        nll: ``L(posterior) -> scalar``; with ``shared``: ``L(posterior, shared)``.
        outer_loss: ``O(posterior, prior) -> scalar``; with ``shared``: ``O(posterior, prior, shared)``.
        posterior: The point that the inner solver returned, a member of the family.
        prior: Prior at which the gradient is taken, a member of the family.
        family: The family.
        weight: Weight of the divergence, positive.
        solver: Linear solver.
        shared: Further meta-parameters that ``L`` and ``O`` depend on directly (weights that are not adapted, the noise
            of a likelihood). Their gradient is the generic implicit one.
        precondition: Hand the solver the family's preconditioner, if it has one.
        outer_nll_weight: Adds so many times ``L`` to the outer loss, as ABML's has it; its gradient is at hand then.
            Not with ``shared``.

    Returns:
        The gradient as a member of the family, or the pair of it and the gradient of ``shared``; and the diagnostics.

    Raises:
        ValueError: If ``outer_nll_weight`` is given with ``shared`` parameters.

    Cost:
        Two gradients (three with ``shared``) and one Hessian-vector product of ``L`` per solver step. Memory does not
        depend on how many steps the inner solver took.
    """
    if outer_nll_weight and shared is not None and tree.leaves(shared):
        raise ValueError(
            f"outer_nll_weight is {outer_nll_weight}, but there are shared parameters, whose gradient would lack that "
            "term: make it a part of outer_loss."
        )
    arguments = () if shared is None else (shared,)
    (outer_posterior, outer_prior, *outer_shared), value = gradients_and_value(outer_loss, posterior, prior, *arguments)
    nll_value, nll_gradient, nll_curvature = value_gradient_and_hvp(at_fixed(nll, *arguments), posterior)
    if outer_nll_weight:
        value = value + outer_nll_weight * nll_value
        outer_posterior = tree.axpy(outer_nll_weight, nll_gradient, outer_posterior)

    system = family.implicit_system(posterior, prior, weight, nll_gradient)
    solution = require_residual(
        solver(
            lambda vector: system.add_curvature(nll_curvature(vector), vector),
            outer_posterior,
            preconditioner=system.preconditioner if precondition else None,
        )
    )
    prior_gradient = system.add_mixed(outer_prior, solution.value)
    inner_gradient = tree.axpy(weight, family.divergence_gradient(posterior, prior), nll_gradient)
    info = diagnostics(value, tree.norm(inner_gradient), posterior, solution, outer_posterior)
    if shared is None:
        return prior_gradient, info
    if not tree.leaves(shared):
        return (prior_gradient, outer_shared[0]), info
    # g = dO/dshared - (d2L/dshared dv) u
    pullback = vjp(lambda s: gradient_of(nll)(posterior, s), shared)[1]
    return (prior_gradient, tree.sub(outer_shared[0], pullback(solution.value)[0])), info
