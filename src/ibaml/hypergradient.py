"""Hypergradients: the derivative of an outer loss through the solution of an inner problem.

For ``O(v(theta), theta)`` with ``v(theta)`` from an inner problem ``min_v F(v, theta)`` there are four estimators. All
return ``(gradient, HypergradientInfo)`` with the gradient in the structure of ``theta``; all are pure functions of
pytrees and run under ``torch.func.vmap`` over tasks.

An implicit gradient describes the *solution* of the inner problem: it cannot learn anything that only the solver sees,
such as its learning rate or its starting point. And it is as wrong as ``v`` is far from the solution, which is why the
inner gradient norm and the linear residual are part of every result.
"""

from collections.abc import Callable
from typing import Any, TypeAlias

import torch

from ibaml import tree
from ibaml.curvature import at_fixed, value_gradient_and_hvp
from ibaml.curvature import gradient as gradient_of
from ibaml.gaussian import DiagonalGaussian
from ibaml.types import HypergradientInfo, InnerSolver, LinearSolution, LinearSolver, PyTree, Tensor

BilevelLoss: TypeAlias = Callable[[PyTree, PyTree], Tensor]
"""``(inner_params, meta_params) -> scalar``."""


def unrolled_hypergradient(
    inner_loss: BilevelLoss,
    outer_loss: BilevelLoss,
    init: Callable[[PyTree], PyTree],
    meta_params: PyTree,
    inner_solver: InnerSolver,
    *,
    inner_loss_at: Callable[[int], BilevelLoss] | None = None,
    truncation: int | None = None,
) -> tuple[PyTree, HypergradientInfo]:
    """Differentiates through the steps of the inner solver (Zhang et al. 2023: explicit; eq. (10)).

    Args:
        inner_loss: ``F(v, theta)``.
        outer_loss: ``O(v, theta)``.
        init: Starting point of the inner solver as a function of ``theta``.
        meta_params: ``theta``.
        inner_solver: Differentiable inner solver.
        inner_loss_at: Loss of step ``k`` when it changes from step to step.
        truncation: Go back through the last so many steps only. Before them ``dv/dtheta`` counts as ``d init/dtheta``,
            so that 0 is the first-order estimator and the number of steps is the full one.

    Returns:
        The gradient and its diagnostics.

    Cost:
        For K steps: K + 1 gradients forward, about 2 K + 1 backward. Memory grows with the steps that are
        differentiated.

    Examples:
        One step of size 0.1 on ``v^2 / 2`` from ``theta``, judged by ``v^2 / 2``: the factor is ``0.9 * 0.9``.

        >>> from functools import partial
        >>> from ibaml.inner import gradient_descent
        >>> half_square = lambda v, theta: 0.5 * (v**2).sum()
        >>> solver = partial(gradient_descent, num_steps=1, learning_rate=0.1)
        >>> unrolled_hypergradient(half_square, half_square, lambda theta: theta, torch.ones(1), solver)[0]
        tensor([0.8100])
    """

    def objective(meta: PyTree) -> tuple[Tensor, tuple[Tensor, PyTree]]:
        solution = inner_solver(
            at_fixed(inner_loss, meta),
            init(meta),
            loss_at=_fix_meta(inner_loss_at, meta),
            num_differentiable_steps=truncation,
        )
        return outer_loss(solution.value, meta), (solution.grad_norm, solution.value)

    gradient, (value, (grad_norm, adapted)) = torch.func.grad_and_value(objective, has_aux=True)(meta_params)
    return gradient, _info(value, grad_norm, adapted)


def first_order_hypergradient(
    inner_loss: BilevelLoss,
    outer_loss: BilevelLoss,
    init: Callable[[PyTree], PyTree],
    meta_params: PyTree,
    inner_solver: InnerSolver,
    *,
    inner_loss_at: Callable[[int], BilevelLoss] | None = None,
) -> tuple[PyTree, HypergradientInfo]:
    """Treats ``dv/dtheta`` as ``d init/dtheta``, the identity on matching coordinates (Finn et al. 2017, FOMAML).

    The arguments are those of ``unrolled_hypergradient``. The bias is of the order of the inner learning rate times the
    curvature, per step.

    Cost:
        K + 1 gradients for the inner steps and one for the outer loss. Memory does not depend on K.
    """
    meta_params = tree.detach(meta_params)
    solution = inner_solver(
        at_fixed(inner_loss, meta_params), init(meta_params), loss_at=_fix_meta(inner_loss_at, meta_params)
    )
    (outer_v, outer_meta), value = torch.func.grad_and_value(outer_loss, argnums=(0, 1))(solution.value, meta_params)
    through_init = torch.func.vjp(init, meta_params)[1](outer_v)[0]
    return tree.add(outer_meta, through_init), _info(value, solution.grad_norm, solution.value)


def implicit_hypergradient(
    inner_loss: BilevelLoss,
    outer_loss: BilevelLoss,
    inner_params: PyTree,
    meta_params: PyTree,
    solver: LinearSolver,
) -> tuple[PyTree, HypergradientInfo]:
    """Implicit function theorem at the point that an inner solver returned.

    Solves ``(d2F/dv2) u = dO/dv`` and returns ``dO/dtheta - (d2F/dtheta dv) u`` (Zhang et al. 2023, eq. (14)). Exact
    when ``dF/dv = 0`` and the system is solved; the error is of the order of the distance to the stationary point plus
    the residual of the system (Theorem 2). How the point was found does not matter, and its solver's settings cannot
    be learned this way. This is also the interface for tuning hyper-parameters by gradients.

    Args:
        inner_loss: ``F(v, theta)``, twice differentiable.
        outer_loss: ``O(v, theta)``.
        inner_params: ``v``, a (nearly) stationary point of ``F`` in its first argument.
        meta_params: ``theta``.
        solver: Linear solver, for example ``functools.partial(ibaml.cg, max_steps=10)``.

    Returns:
        The gradient in the structure of ``meta_params`` and its diagnostics.

    Cost:
        Three gradients and one Hessian-vector product per solver step. Memory does not depend on how many steps the
        inner solver took.

    Examples:
        Ridge regression of one weight: ``v = x y / (x^2 + theta)``, so ``dv/dtheta = -v / (x^2 + theta)``.

        >>> from functools import partial
        >>> from ibaml.linear_solve import cg
        >>> inner = lambda v, theta: 0.5 * (2 * v - 3) ** 2 + 0.5 * theta * v**2
        >>> gradient, info = implicit_hypergradient(
        ...     inner, lambda v, theta: v, torch.tensor(6 / 5.0), torch.tensor(1.0), partial(cg, max_steps=3)
        ... )
        >>> gradient
        tensor(-0.2400)
    """
    (outer_v, outer_meta), value = torch.func.grad_and_value(outer_loss, argnums=(0, 1))(inner_params, meta_params)
    _, inner_gradient, curvature = value_gradient_and_hvp(at_fixed(inner_loss, meta_params), inner_params)
    solution = solver(curvature, outer_v)
    pullback = torch.func.vjp(lambda meta: gradient_of(inner_loss)(inner_params, meta), meta_params)[1]
    gradient = tree.sub(outer_meta, pullback(solution.value)[0])
    return gradient, _info(value, tree.norm(inner_gradient), inner_params, solution, outer_v)


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
        solver: Linear solver, for example ``functools.partial(ibaml.cg, max_steps=5)``.
        shared: Further meta-parameters that ``L`` and ``O`` depend on directly (weights that are not adapted, the noise
            of a likelihood). Their gradient is the generic implicit one.
        precondition: Hand the solver ``diag(d_t / lam, 2 / lam)``, about the inverse of the diagonal of ``H'`` at a
            stationary point; free of cost.
        outer_nll_weight: Adds so many times ``L`` to the outer loss, as ABML's has it; its gradient is at hand then.
            Not with ``shared``.

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
    if outer_nll_weight and shared is not None and tree.leaves(shared):
        raise ValueError(
            f"outer_nll_weight is {outer_nll_weight}, but there are shared parameters, whose gradient would lack that "
            "term: make it a part of outer_loss."
        )
    arguments = () if shared is None else (shared,)
    outer_gradients, value = torch.func.grad_and_value(outer_loss, argnums=tuple(range(2 + len(arguments))))(
        posterior, prior, *arguments
    )
    outer_posterior, outer_prior = outer_gradients[:2]
    nll_value, nll_gradient, nll_curvature = value_gradient_and_hvp(at_fixed(expected_nll, *arguments), posterior)
    if outer_nll_weight:
        value = value + outer_nll_weight * nll_value
        outer_posterior = tree.axpy(outer_nll_weight, nll_gradient, outer_posterior)

    pull = tree.map(lambda log_var: kl_weight * torch.exp(-log_var), prior.log_var)  # lam / D
    variance_ratio = tree.map(lambda rho, log_var: torch.exp(rho - log_var), posterior.log_var, prior.log_var)
    log_var_diagonal = tree.map(
        lambda ratio, g: 0.5 * kl_weight * (ratio + (2 / kl_weight) * g) ** 2 - g, variance_ratio, nll_gradient.log_var
    )

    def matvec(vector: DiagonalGaussian) -> DiagonalGaussian:
        curved = nll_curvature(vector)
        return DiagonalGaussian(
            mean=tree.map(torch.addcmul, curved.mean, pull, vector.mean),
            log_var=tree.map(torch.addcmul, curved.log_var, log_var_diagonal, vector.log_var),
        )

    scale = tree.map(lambda rho: torch.exp(rho) / kl_weight, posterior.log_var)

    def free_preconditioner(vector: DiagonalGaussian) -> DiagonalGaussian:
        return DiagonalGaussian(tree.mul(scale, vector.mean), tree.scale(2 / kl_weight, vector.log_var))

    solution = solver(matvec, outer_posterior, preconditioner=free_preconditioner if precondition else None)
    mean_part, log_var_part = solution.value
    prior_gradient = DiagonalGaussian(
        mean=tree.map(torch.addcmul, outer_prior.mean, pull, mean_part),
        log_var=tree.map(
            lambda o, g, u, ratio, s: o - g * u + 0.5 * kl_weight * ratio * s,
            outer_prior.log_var,
            nll_gradient.mean,
            mean_part,
            variance_ratio,
            log_var_part,
        ),
    )
    inner_gradient = DiagonalGaussian(
        mean=tree.map(
            lambda g, p, a, b: g + p * (a - b),
            nll_gradient.mean,
            pull,
            posterior.mean,
            prior.mean,
        ),
        log_var=tree.map(lambda g, ratio: g + 0.5 * kl_weight * (ratio - 1), nll_gradient.log_var, variance_ratio),
    )
    info = _info(value, tree.norm(inner_gradient), posterior, solution, outer_posterior)
    if shared is None:
        return prior_gradient, info
    if not tree.leaves(shared):
        return (prior_gradient, outer_gradients[2]), info
    pullback = torch.func.vjp(lambda s: gradient_of(expected_nll)(posterior, s), shared)[1]
    return (prior_gradient, tree.sub(outer_gradients[2], pullback(solution.value)[0])), info


def _fix_meta(
    inner_loss_at: Callable[[int], BilevelLoss] | None, meta_params: PyTree
) -> Callable[[int], Callable[[PyTree], Tensor]] | None:
    """Turns a step-dependent bilevel loss into a step-dependent loss of the inner parameters alone."""
    if inner_loss_at is None:
        return None
    return lambda step: at_fixed(inner_loss_at(step), meta_params)


def _info(
    outer_loss: Tensor,
    grad_norm: Tensor,
    inner_params: PyTree,
    solution: LinearSolution | None = None,
    rhs: PyTree | None = None,
) -> HypergradientInfo:
    """Collects the diagnostics, with the linear residual relative to its right-hand side."""
    inner_params = tree.detach(inner_params)
    if solution is None:
        no_residual, always = torch.zeros_like(grad_norm), torch.ones_like(grad_norm, dtype=torch.bool)
        return HypergradientInfo(outer_loss, grad_norm, no_residual, always, inner_params)
    scale = tree.norm(rhs)
    relative = solution.residual_norm / torch.where(scale > 0, scale, torch.ones_like(scale))
    return HypergradientInfo(outer_loss, grad_norm, relative, solution.converged, inner_params)
