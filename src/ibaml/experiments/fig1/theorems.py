"""Theorems 1 and 2 of Zhang et al. 2023 on Bayesian linear regression, with every constant computed.

In flat coordinates ``v = (m_t, rho)`` and ``theta = (m, log D)``, with ``A`` the Hessian of the support nll L in the
mean, ``d = exp(rho)``, and ``d*`` the variances of the exact solution ``v*``, the Gaussian implicit gradient is
``g = P u``, ``H u = b``, where

    b(v) = dO/dv
    H(v) = blockdiag( A + lam/D , (lam/2) (d / d*)^2 )
    P(v) = [ lam/D , 0 ; -diag(dL/dm_t) , (lam/2) d/D ]

and the unrolled gradient is ``J_K^T b(v_K)`` with ``J_K = dv_K/dtheta``. The exact one is ``J*^T b(v*) = P(v*) H(v*)^-1
b(v*)``. Adding and subtracting one mixed term gives both theorems:

    || J^T b - J*^T b* ||     <=  ||J*|| Lip(b) eps  +  ||b|| delta                                       (Theorem 1)
    || P u - P* u* ||         <=  ( Lip(P) ||u*|| + ||P|| ||H^-1|| (Lip(b) + Lip(H) ||u*||) ) eps
                                  + ||P|| delta'                                                          (Theorem 2)

with ``eps = ||v - v*||``, ``delta = ||J - J*||`` and ``delta' = ||u_approximate - u||``. The paper assumes Lipschitz
constants that hold everywhere; in log-variances they exist only on bounded sets, so they are taken over the smallest
box that contains ``v`` and ``v*``. Norms of matrices are spectral.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch

from ibaml import tree
from ibaml.experiments.fig1.linear_gaussian import LinearGaussianProblem
from ibaml.hypergradients import InnerRun
from ibaml.priors import DiagonalGaussian
from ibaml.solvers.linear import LinearSolver
from ibaml.types import Batch, Episode, Tensor


class TheoremCheck(NamedTuple):
    """Both sides of a theorem and what its right-hand side is made of, for one task.

    Attributes:
        distance: ``eps``.
        inexactness: ``delta`` (Theorem 1) or ``delta'`` (Theorem 2).
        error: Left-hand side, the norm of the error of the hypergradient.
        bound: Right-hand side.
    """

    distance: Tensor
    inexactness: Tensor
    error: Tensor
    bound: Tensor


def theorem_1(problem: LinearGaussianProblem, solver: InnerRun, episode: Episode) -> TheoremCheck:
    """Returns both sides of Theorem 1, the error of the unrolled hypergradient.

    Args:
        problem: The losses and the prior.
        solver: Inner solver that is unrolled.
        episode: One task.
    """

    def adapted(prior: DiagonalGaussian) -> Tensor:
        return _flat(solver(lambda v: problem.inner_loss(v, prior, episode.support), prior).value)

    point, solution = adapted(problem.prior), _flat(problem.solution(problem.prior, episode.support))
    jacobian = _jacobian(adapted, problem.prior)
    exact_jacobian = _jacobian(lambda prior: _flat(problem.solution(prior, episode.support)), problem.prior)
    outer, exact_outer = (
        _outer_gradient(problem, episode.query, point),
        _outer_gradient(problem, episode.query, solution),
    )

    distance = (point - solution).norm()
    inexactness = _spectral(jacobian - exact_jacobian)
    lipschitz = _outer_lipschitz(problem, episode.query, point, solution)
    return TheoremCheck(
        distance=distance,
        inexactness=inexactness,
        error=(jacobian.mT @ outer - exact_jacobian.mT @ exact_outer).norm(),
        bound=_spectral(exact_jacobian) * lipschitz * distance + outer.norm() * inexactness,
    )


def theorem_2(
    problem: LinearGaussianProblem, solver: InnerRun, linear_solver: LinearSolver, episode: Episode
) -> TheoremCheck:
    """Returns both sides of Theorem 2, the error of the Gaussian implicit hypergradient.

    Args:
        problem: The losses and the prior.
        solver: Inner solver.
        linear_solver: Solver of ``H u = b``.
        episode: One task.
    """
    support, query = episode
    point, solution = _flat(problem.adapt(solver, support)), _flat(problem.solution(problem.prior, support))
    system, exact_system = _system(problem, support, point, solution), _system(problem, support, solution, solution)
    outer, exact_outer = _outer_gradient(problem, query, point), _outer_gradient(problem, query, solution)
    read_off, exact_read_off = _read_off(problem, support, point), _read_off(problem, support, solution)

    approximate = linear_solver(lambda vector: system @ vector, outer).value
    direction = torch.linalg.solve(system, outer)
    exact_direction = torch.linalg.solve(exact_system, exact_outer)

    distance = (point - solution).norm()
    inexactness = (approximate - direction).norm()
    outer_lipschitz = _outer_lipschitz(problem, query, point, solution)
    system_lipschitz, read_off_lipschitz = _inner_lipschitz(problem, support, point, solution)
    inverse = 1 / torch.linalg.eigvalsh(system)[0]
    per_distance = read_off_lipschitz * exact_direction.norm() + _spectral(read_off) * inverse * (
        outer_lipschitz + system_lipschitz * exact_direction.norm()
    )
    return TheoremCheck(
        distance=distance,
        inexactness=inexactness,
        error=(read_off @ approximate - exact_read_off @ exact_direction).norm(),
        bound=per_distance * distance + _spectral(read_off) * inexactness,
    )


def _flat(value: DiagonalGaussian) -> Tensor:
    return torch.cat(tree.leaves(value))


def _spectral(matrix: Tensor) -> Tensor:
    return torch.linalg.matrix_norm(matrix, ord=2)


def _jacobian(function: Callable[[DiagonalGaussian], Tensor], prior: DiagonalGaussian) -> Tensor:
    """Returns the Jacobian of a flat function of the prior, ``[2 num_features, 2 num_features]``."""
    # Not jacfwd: under vmap over some fifty tasks torch 2.13 returns wrong forward derivatives of linalg.solve.
    return torch.cat(tree.leaves(torch.func.jacrev(function)(prior)), dim=1)


def _outer_gradient(problem: LinearGaussianProblem, query: Batch, point: Tensor) -> Tensor:
    """Returns ``b = dO/dv``."""
    mean, log_var = point.chunk(2)
    curvature = problem.data_curvature(query)
    moment = query.x.mT @ query.y.squeeze(-1) / (query.x.shape[0] * problem.noise_variance)
    return torch.cat([curvature @ mean - moment, 0.5 * curvature.diagonal() * log_var.exp()])


def _outer_lipschitz(problem: LinearGaussianProblem, query: Batch, point: Tensor, solution: Tensor) -> Tensor:
    """Returns ``Lip(b)``: the outer loss is quadratic in the mean and exponential in each log-variance."""
    curvature = problem.data_curvature(query)
    largest = torch.maximum(point, solution).chunk(2)[1].exp()
    return torch.maximum(_spectral(curvature), (0.5 * curvature.diagonal() * largest).max())


def _system(problem: LinearGaussianProblem, support: Batch, point: Tensor, solution: Tensor) -> Tensor:
    """Returns ``H`` of Lemma 1 in log coordinates; ``dL/drho`` cancels because L is linear in the variances."""
    mean_block = problem.data_curvature(support) + torch.diag(problem.kl_weight / _prior_variance(problem))
    ratio = torch.exp(point.chunk(2)[1] - solution.chunk(2)[1])
    return torch.block_diag(mean_block, torch.diag(0.5 * problem.kl_weight * ratio**2))


def _read_off(problem: LinearGaussianProblem, support: Batch, point: Tensor) -> Tensor:
    """Returns ``P``, the matrix that takes the solution of the system to the gradient in ``(m, log D)``."""
    mean, log_var = point.chunk(2)
    prior_variance = _prior_variance(problem)
    moment = support.x.mT @ support.y.squeeze(-1) / (support.x.shape[0] * problem.noise_variance)
    nll_gradient = problem.data_curvature(support) @ mean - moment
    upper = torch.cat([torch.diag(problem.kl_weight / prior_variance), torch.zeros_like(torch.diag(mean))], dim=1)
    variance_part = torch.diag(0.5 * problem.kl_weight * log_var.exp() / prior_variance)
    return torch.cat([upper, torch.cat([-torch.diag(nll_gradient), variance_part], dim=1)])


def _inner_lipschitz(
    problem: LinearGaussianProblem, support: Batch, point: Tensor, solution: Tensor
) -> tuple[Tensor, Tensor]:
    """Returns ``Lip(H)`` and ``Lip(P)``.

    H varies in its second block only, entry j with slope ``lam (d_j / d*_j)^2``. Row j of the lower half of P varies
    with ``A_j m`` and with ``(lam/2) d_j / D_j``, on two different coordinates of v.
    """
    largest = torch.maximum(point, solution).chunk(2)[1].exp()
    system = problem.kl_weight * ((largest / solution.chunk(2)[1].exp()) ** 2).max()
    of_mean = problem.data_curvature(support).norm(dim=1)
    of_variance = 0.5 * problem.kl_weight * largest / _prior_variance(problem)
    return system, torch.maximum(of_mean, of_variance).max()


def _prior_variance(problem: LinearGaussianProblem) -> Tensor:
    return problem.prior.log_var["weights"].exp()
