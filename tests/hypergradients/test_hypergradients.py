"""Every estimator against closed forms, dense algebra, hand-written loops and finite differences."""

import math
import re
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from ibaml import tree
from ibaml.algorithms import objectives
from ibaml.data.linear_regression import closed_form_posterior
from ibaml.hypergradients import (
    first_order_hypergradient,
    gaussian_implicit_hypergradient,
    implicit_hypergradient,
    unrolled_hypergradient,
)
from ibaml.priors import PointPrior
from ibaml.priors.diagonal import DiagonalGaussian, kl_divergence, sample_noise
from ibaml.solvers.inner import gradient_descent
from ibaml.solvers.linear import LinearSolver, cg, dense, minres
from ibaml.types import Batch, Params, PyTree, Tensor

ALGEBRA = 1e-10
SOLVER = 1e-6
DOUBLE = torch.float64


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def relative_error(actual: PyTree, expected: PyTree) -> float:
    """Largest over leaves of ``||actual - expected|| / ||expected||``: no leaf hides behind a larger one."""
    pairs = zip(tree.leaves(actual), tree.leaves(expected), strict=True)
    return max(float((a - b).norm() / b.norm()) for a, b in pairs)


def central_difference(function: Callable[[PyTree], Tensor], point: PyTree, step: float = 1e-5) -> PyTree:
    vector, unravel = tree.ravel(point)
    steps = step * torch.eye(len(vector), dtype=vector.dtype)
    values = torch.func.vmap(lambda v: function(unravel(v)))(torch.cat([vector + steps, vector - steps]))
    return unravel((values[: len(vector)] - values[len(vector) :]) / (2 * step))


class Regression(NamedTuple):
    """One task, with a prior that did not generate it."""

    support: Batch
    query: Batch
    prior: DiagonalGaussian
    noise_variance: float

    def posterior(self, prior: DiagonalGaussian, kl_weight: float) -> DiagonalGaussian:
        mean, variance = closed_form_posterior(
            self.support.x,
            self.support.y,
            prior.mean["w"],
            prior.log_var["w"].exp(),
            self.noise_variance,
            kl_weight=kl_weight,
        )
        return DiagonalGaussian({"w": mean}, {"w": variance.log()})


def regression(seed: int = 0, num_examples: int = 12, num_features: int = 4, noise_variance: float = 0.3) -> Regression:
    source = generator(seed)
    normal = partial(torch.randn, generator=source, dtype=DOUBLE)
    weights = normal(num_features)

    def batch(size: int) -> Batch:
        x = normal(size, num_features) * torch.linspace(0.5, 1.5, num_features, dtype=DOUBLE)
        return Batch(x, x @ weights + math.sqrt(noise_variance) * normal(size))

    prior = DiagonalGaussian({"w": 0.5 * normal(num_features)}, {"w": -1 + 0.5 * normal(num_features)})
    return Regression(batch(num_examples), batch(7), prior, noise_variance)


def exact_expected_nll(posterior: DiagonalGaussian, batch: Batch, noise_variance: Tensor | float) -> Tensor:
    """``E_q`` of the Gaussian nll without its constant, mean over examples; linear in the posterior variance."""
    squares = ((batch.y - batch.x @ posterior.mean["w"]) ** 2).sum()
    spread = ((batch.x**2).sum(0) * posterior.log_var["w"].exp()).sum()
    return 0.5 * (squares + spread) / (noise_variance * len(batch.y))


def smooth_outer_loss(task: Regression, posterior: DiagonalGaussian, prior: DiagonalGaussian) -> Tensor:
    """Query nll, the KL divergence, and terms that depend directly on each part of the prior."""
    query = exact_expected_nll(posterior, task.query, task.noise_variance)
    direct = (prior.mean["w"].sin() * posterior.mean["w"]).sum() + 0.2 * (prior.log_var["w"] ** 2).sum()
    return query + 0.1 * kl_divergence(posterior, prior) + 0.3 * direct


@pytest.mark.parametrize("solver", [dense, partial(cg, max_steps=100, rtol=1e-13)], ids=["dense", "cg"])
@pytest.mark.parametrize(
    ("nll_scale", "kl_weight"),
    [(1.0, 1 / 12), (1.0, 0.3 / 12), (12.0, 1.0)],
    ids=["exact Bayes", "temperature 0.3", "summed nll"],
)
def test_lemma_1_at_the_optimum_of_linear_regression_is_the_derivative_of_the_closed_form(
    solver: LinearSolver, nll_scale: float, kl_weight: float
) -> None:
    task = regression()
    outer = partial(smooth_outer_loss, task)

    def solution(prior: DiagonalGaussian) -> DiagonalGaussian:
        return task.posterior(prior, kl_weight / nll_scale)

    oracle = torch.func.grad(lambda prior: outer(solution(prior), prior))(task.prior)
    gradient, info = gaussian_implicit_hypergradient(
        lambda q: nll_scale * exact_expected_nll(q, task.support, task.noise_variance),
        outer,
        solution(task.prior),
        task.prior,
        kl_weight,
        solver,
    )
    assert relative_error(gradient, oracle) < ALGEBRA
    assert info.inner_grad_norm < 1e-13
    assert info.linear_residual < 1e-12
    assert info.linear_converged
    assert info.outer_loss == outer(solution(task.prior), task.prior)
    assert relative_error(info.inner_params, solution(task.prior)) == 0


@pytest.mark.parametrize("precondition", [True, False])
def test_free_preconditioner_can_be_switched_off_and_does_not_change_the_solution(precondition: bool) -> None:
    task = regression()
    kl_weight = 1 / 12
    posterior = task.posterior(task.prior, kl_weight)
    outer = partial(smooth_outer_loss, task)
    seen: list[bool] = []

    def solver(matvec: Any, rhs: PyTree, /, *, preconditioner: Any = None) -> Any:
        seen.append(preconditioner is not None)
        return cg(matvec, rhs, max_steps=100, rtol=1e-13, preconditioner=preconditioner)

    gradient, _ = gaussian_implicit_hypergradient(
        lambda q: exact_expected_nll(q, task.support, task.noise_variance),
        outer,
        posterior,
        task.prior,
        kl_weight,
        solver,
        precondition=precondition,
    )
    oracle = torch.func.grad(lambda prior: outer(task.posterior(prior, kl_weight), prior))(task.prior)
    assert seen == [precondition]
    assert relative_error(gradient, oracle) < ALGEBRA


def test_variance_printed_in_equation_20b_is_not_stationary() -> None:
    # The paper: d = (diag(X X^T) / (2 s2) + 1/D)^-1. There lam/d = A/2 + lam/D with A = diag(X X^T) / (N s2), so that
    # dF/dlog d = (A d + lam d/D - lam) / 2 = A d / 4, while the corrected lam/d = A + lam/D makes it zero.
    task = regression()
    x, num_examples = task.support.x, len(task.support.y)
    kl_weight = 1 / num_examples
    curvature = (x**2).sum(0) / (num_examples * task.noise_variance)
    variance = task.prior.log_var["w"].exp()
    corrected = task.posterior(task.prior, kl_weight)

    def slope(posterior: DiagonalGaussian) -> DiagonalGaussian:
        def inner_loss(q: DiagonalGaussian) -> Tensor:
            expected = exact_expected_nll(q, task.support, task.noise_variance)
            return objectives.negative_elbo(expected, q, task.prior, kl_weight)

        return torch.func.grad(inner_loss)(posterior)

    printed_variance = kl_weight / (curvature / 2 + kl_weight / variance)
    printed = slope(corrected._replace(log_var={"w": printed_variance.log()})).log_var["w"]
    torch.testing.assert_close(printed, curvature * printed_variance / 4, rtol=1e-10, atol=1e-14)
    assert printed.min() > 1e-3
    assert tree.norm(slope(corrected)) < 1e-14


def network_outputs(weights: Params, x: Tensor) -> Tensor:
    return torch.tanh(x @ weights["w1"].mT + weights["b1"]) @ weights["w2"].mT


def network_nll(weights: Params, batch: Batch) -> Tensor:
    return 0.5 * ((batch.y - network_outputs(weights, batch.x)) ** 2).sum(-1) / 0.2


def network_task(source: torch.Generator) -> tuple[Batch, Batch]:
    def batch(size: int) -> Batch:
        x = torch.randn(size, 2, generator=source, dtype=DOUBLE)
        return Batch(x, torch.sin(x.sum(-1, keepdim=True)) + 0.1 * torch.randn(size, 1, generator=source, dtype=DOUBLE))

    return batch(6), batch(8)


def network_gaussian(source: torch.Generator, centre: float, spread: float = 0.3) -> DiagonalGaussian:
    shapes = {"w1": (3, 2), "b1": (3,), "w2": (1, 3)}
    mean = {name: 0.7 * torch.randn(shape, generator=source, dtype=DOUBLE) for name, shape in shapes.items()}
    log_var = {
        name: centre + spread * torch.randn(shape, generator=source, dtype=DOUBLE) for name, shape in shapes.items()
    }
    return DiagonalGaussian(mean, log_var)


def lemma_1_in_mean_and_variance(
    expected_nll: Callable[[DiagonalGaussian], Tensor],
    outer_loss: Callable[[DiagonalGaussian, DiagonalGaussian], Tensor],
    posterior: DiagonalGaussian,
    prior: DiagonalGaussian,
    kl_weight: float,
) -> DiagonalGaussian:
    """Equations (16) and (17) as printed, with ``lam``: coordinates ``(m, d)`` and ``(m_t, d_t)``, dense algebra."""
    mean, unravel = tree.ravel(posterior.mean)
    size = len(mean)

    def gaussian(point: Tensor) -> DiagonalGaussian:
        return DiagonalGaussian(unravel(point[:size]), unravel(point[size:].log()))

    def point(q: DiagonalGaussian) -> Tensor:
        return torch.cat([tree.ravel(q.mean)[0], tree.ravel(q.log_var)[0].exp()])

    v, theta = point(posterior), point(prior)
    nll_gradient = torch.func.grad(lambda p: expected_nll(gaussian(p)))(v)
    outer_v, outer_theta = torch.func.grad(lambda p, t: outer_loss(gaussian(p), gaussian(t)), argnums=(0, 1))(v, theta)
    prior_precision = 1 / theta[size:]
    diagonal = torch.cat(
        [kl_weight * prior_precision, kl_weight / 2 * (prior_precision + 2 / kl_weight * nll_gradient[size:]) ** 2]
    )
    hessian = torch.func.hessian(lambda p: expected_nll(gaussian(p)))(v) + torch.diag(diagonal)
    u = torch.linalg.solve(hessian, outer_v)
    g_mean = outer_theta[:size] + kl_weight * u[:size] * prior_precision
    g_variance = (
        outer_theta[size:]
        - nll_gradient[:size] * u[:size] * prior_precision
        + kl_weight * u[size:] * prior_precision**2 / 2
    )
    return DiagonalGaussian(unravel(g_mean), unravel(theta[size:] * g_variance))


class NetworkProblem(NamedTuple):
    """Losses of a small network with fixed noise, a prior, and a point within its reach that is not stationary."""

    expected_nll: Callable[[DiagonalGaussian], Tensor]
    outer_loss: Callable[[DiagonalGaussian, DiagonalGaussian], Tensor]
    posterior: DiagonalGaussian
    prior: DiagonalGaussian


def network_problem(seed: int, centre: float, dtype: torch.dtype = DOUBLE) -> NetworkProblem:
    """Draws in double precision and rounds, so that the same seed is the same problem in every dtype."""
    source = generator(seed)
    support, query = network_task(source)
    prior = network_gaussian(source, centre)
    posterior = DiagonalGaussian(
        prior.sample(tree.map(lambda leaf: leaf[0], sample_noise(prior.mean, 1, generator=source))),
        network_gaussian(source, centre - 0.5).log_var,
    )
    noises = [sample_noise(prior.mean, 4, generator=source) for _ in range(2)]
    support, query, prior, posterior, (inner_noise, outer_noise) = tree.map(
        lambda leaf: leaf.to(dtype), (support, query, prior, posterior, noises)
    )

    def outer_loss(q: DiagonalGaussian, p: DiagonalGaussian) -> Tensor:
        value = objectives.predictive_nll(network_nll, q, outer_noise, query)
        return value + 0.05 * kl_divergence(q, p) + 0.001 * tree.dot(p.log_var, p.log_var)

    return NetworkProblem(
        lambda q: objectives.expected_nll(network_nll, q, inner_noise, support), outer_loss, posterior, prior
    )


@pytest.mark.parametrize("kl_weight", [1 / 6, 0.05])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_log_coordinates_equal_the_printed_lemma_away_from_stationary_points(seed: int, kl_weight: float) -> None:
    problem = network_problem(seed, centre=-2.0)
    expected = lemma_1_in_mean_and_variance(*problem, kl_weight)
    gradient, info = gaussian_implicit_hypergradient(*problem, kl_weight, dense)
    assert info.inner_grad_norm > 0.1
    assert relative_error(gradient, expected) < ALGEBRA


def test_log_coordinates_keep_their_digits_in_single_precision() -> None:
    # Variances of about exp(-10), as at the start of a published run.
    kl_weight = 1 / 6
    reference, _ = gaussian_implicit_hypergradient(*network_problem(3, centre=-9.5), kl_weight, dense)
    gradient, info = gaussian_implicit_hypergradient(
        *network_problem(3, centre=-9.5, dtype=torch.float32), kl_weight, partial(cg, max_steps=60, rtol=1e-6)
    )
    assert all(leaf.dtype == torch.float32 for leaf in tree.leaves(gradient))
    assert info.linear_residual < 1e-5
    assert relative_error(gradient, reference) < 1e-3


class Neuron(NamedTuple):
    """Bayesian regression with one tanh unit: small, and nonlinear in the mean and in the log-variance."""

    inner_loss: Callable[[DiagonalGaussian, DiagonalGaussian], Tensor]
    expected_nll: Callable[[DiagonalGaussian], Tensor]
    outer_loss: Callable[[DiagonalGaussian, DiagonalGaussian], Tensor]
    prior: DiagonalGaussian
    kl_weight: float


def neuron(seed: int = 0) -> Neuron:
    source = generator(seed)
    normal = partial(torch.randn, generator=source, dtype=DOUBLE)
    x, query_x, kl_weight = normal(8, 3), normal(8, 3), 0.5
    y, query_y = torch.sin(x.sum(-1)), torch.sin(query_x.sum(-1))
    inner_noise, outer_noise = normal(4, 3), normal(4, 3)
    prior = DiagonalGaussian({"w": 0.5 * normal(3)}, {"w": -1 + 0.3 * normal(3)})

    def nll(q: DiagonalGaussian, noise: Tensor, inputs: Tensor, targets: Tensor) -> Tensor:
        return (0.5 * (targets - torch.tanh(q.sample({"w": noise})["w"] @ inputs.mT)) ** 2 / 0.3).mean()

    def inner_loss(q: DiagonalGaussian, p: DiagonalGaussian) -> Tensor:
        return nll(q, inner_noise, x, y) + kl_weight * kl_divergence(q, p)

    def outer_loss(q: DiagonalGaussian, p: DiagonalGaussian) -> Tensor:
        return nll(q, outer_noise, query_x, query_y) + 0.05 * kl_divergence(q, p)

    return Neuron(inner_loss, lambda q: nll(q, inner_noise, x, y), outer_loss, prior, kl_weight)


def test_implicit_estimators_equal_the_unrolled_one_at_the_end_of_a_long_inner_run() -> None:
    problem = neuron()
    solver = partial(gradient_descent, num_steps=450, learning_rate=0.3)
    unrolled, unrolled_info = unrolled_hypergradient(
        problem.inner_loss, problem.outer_loss, lambda theta: theta, problem.prior, solver
    )
    posterior = solver(lambda v: problem.inner_loss(v, problem.prior), problem.prior).value
    generic, generic_info = implicit_hypergradient(
        problem.inner_loss, problem.outer_loss, posterior, problem.prior, dense
    )
    gaussian, gaussian_info = gaussian_implicit_hypergradient(
        problem.expected_nll, problem.outer_loss, posterior, problem.prior, problem.kl_weight, dense
    )
    for info in (unrolled_info, generic_info, gaussian_info):
        assert info.inner_grad_norm < 1e-12
        assert info.linear_converged
        torch.testing.assert_close(info.outer_loss, unrolled_info.outer_loss, rtol=1e-12, atol=0)
    assert unrolled_info.linear_residual == 0
    assert relative_error(gaussian, generic) < 1e-9
    assert relative_error(generic, unrolled) < 1e-9


def linear_estimates(
    task: Regression,
    outer_loss: Callable[[DiagonalGaussian], Tensor],
    posterior: DiagonalGaussian,
    kl_weight: float,
) -> tuple[DiagonalGaussian, DiagonalGaussian, DiagonalGaussian]:
    """Returns the Gaussian and the generic implicit gradient at a point, and the oracle."""

    def expected_nll(q: DiagonalGaussian) -> Tensor:
        return exact_expected_nll(q, task.support, task.noise_variance)

    def inner_loss(q: DiagonalGaussian, p: DiagonalGaussian) -> Tensor:
        return objectives.negative_elbo(expected_nll(q), q, p, kl_weight)

    def outer(q: DiagonalGaussian, p: DiagonalGaussian) -> Tensor:
        return outer_loss(q)

    gaussian, _ = gaussian_implicit_hypergradient(expected_nll, outer, posterior, task.prior, kl_weight, dense)
    generic, _ = implicit_hypergradient(inner_loss, outer, posterior, task.prior, dense)
    oracle = torch.func.grad(lambda p: outer_loss(task.posterior(p, kl_weight)))(task.prior)
    return gaussian, generic, oracle


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_gaussian_form_is_exact_at_wrong_variances_where_the_generic_form_is_not(seed: int) -> None:
    # With an expected nll that is linear in d, 1/D + (2/lam) dL/dd is the precision of the solution at *every* d: the
    # substituted stationarity condition repairs a wrong variance completely as long as the mean is right. The generic
    # form has d d*/D where the derivative of the solution has d*^2/D.
    task, kl_weight = regression(seed), 1 / 12
    solution = task.posterior(task.prior, kl_weight)
    shift = torch.randn(4, generator=generator(seed), dtype=DOUBLE)
    wrong = solution._replace(log_var={"w": solution.log_var["w"] + shift})
    gaussian, generic, oracle = linear_estimates(
        task, lambda q: exact_expected_nll(q, task.query, task.noise_variance), wrong, kl_weight
    )
    slope = 0.5 * (task.query.x**2).mean(0) / task.noise_variance
    error = torch.expm1(shift) * (2 * solution.log_var["w"] - task.prior.log_var["w"]).exp() * slope
    assert relative_error(gaussian, oracle) < ALGEBRA
    assert relative_error(generic.mean, oracle.mean) < ALGEBRA
    torch.testing.assert_close(generic.log_var["w"] - oracle.log_var["w"], error, rtol=1e-8, atol=1e-12)
    assert error.norm() > 1e-3


def test_at_a_wrong_mean_each_form_has_the_error_that_its_derivation_predicts() -> None:
    # An outer loss that is linear in (m_t, d_t) has an exact u_m at every point. Off by e = m_t - m*, the Gaussian form
    # puts dL/dm_t = -lam (m* - m)/D + A e where the generic one puts -lam (m_t - m)/D: errors -(A e) u_m and
    # (lam/D) e u_m. Neither wins everywhere: the Gaussian one is worse in directions where the data outweigh the prior.
    task, kl_weight = regression(), 1 / 12
    solution = task.posterior(task.prior, kl_weight)
    normal = partial(torch.randn, 4, generator=generator(5), dtype=DOUBLE)
    error, slope = normal(), normal()
    wrong = solution._replace(mean={"w": solution.mean["w"] + error})
    gaussian, generic, oracle = linear_estimates(
        task, lambda q: slope @ q.mean["w"] + q.log_var["w"].exp().sum(), wrong, kl_weight
    )
    curvature = task.support.x.mT @ task.support.x / (12 * task.noise_variance)
    prior_precision = kl_weight * (-task.prior.log_var["w"]).exp()
    u_mean = torch.linalg.solve(curvature + torch.diag(prior_precision), slope)
    assert relative_error(gaussian.mean, oracle.mean) < ALGEBRA
    assert relative_error(generic.mean, oracle.mean) < ALGEBRA
    gaussian_error = gaussian.log_var["w"] - oracle.log_var["w"]
    generic_error = generic.log_var["w"] - oracle.log_var["w"]
    torch.testing.assert_close(gaussian_error, -(curvature @ error) * u_mean, rtol=1e-8, atol=1e-12)
    torch.testing.assert_close(generic_error, prior_precision * error * u_mean, rtol=1e-8, atol=1e-12)
    assert min(gaussian_error.norm(), generic_error.norm()) > 1e-2


def test_too_few_inner_steps_show_in_the_error_and_in_the_reported_gradient_norm() -> None:
    task, kl_weight = regression(1), 0.5
    outer = partial(smooth_outer_loss, task)

    def expected_nll(q: DiagonalGaussian) -> Tensor:
        return exact_expected_nll(q, task.support, task.noise_variance)

    def inner_loss(q: DiagonalGaussian) -> Tensor:
        return objectives.negative_elbo(expected_nll(q), q, task.prior, kl_weight)

    oracle = torch.func.grad(lambda prior: outer(task.posterior(prior, kl_weight), prior))(task.prior)
    errors, norms = [], []
    for num_steps, learning_rate in ((5, 0.01), (50, 0.01), (800, 0.15)):
        adapted = gradient_descent(inner_loss, task.prior, num_steps=num_steps, learning_rate=learning_rate)
        gradient, info = gaussian_implicit_hypergradient(
            expected_nll, outer, adapted.value, task.prior, kl_weight, dense
        )
        torch.testing.assert_close(info.inner_grad_norm, adapted.grad_norm, rtol=1e-9, atol=1e-14)
        errors.append(relative_error(gradient, oracle))
        norms.append(float(info.inner_grad_norm))
    assert errors[0] > 0.3
    assert errors[0] > 2 * errors[1] > 2e6 * errors[2]
    assert errors[2] < ALGEBRA
    assert norms[0] > 2 * norms[1] > 2e6 * norms[2]


def test_plain_gradient_descent_on_the_variance_leaves_the_domain_and_on_its_logarithm_converges() -> None:
    task, kl_weight = regression(), 1.0
    prior = DiagonalGaussian(task.prior.mean, {"w": torch.full((4,), -2.0, dtype=DOUBLE)})

    def inner_loss(q: DiagonalGaussian) -> Tensor:
        return objectives.negative_elbo(exact_expected_nll(q, task.support, task.noise_variance), q, prior, kl_weight)

    def in_variance(v: tuple[Params, Params]) -> Tensor:
        return inner_loss(DiagonalGaussian(v[0], tree.map(torch.log, v[1])))

    # At the prior dF/dd = A/2 with A = diag(X^T X) / (N s2): one step of this size takes more than the prior variance.
    variance_start = (prior.mean, tree.map(torch.exp, prior.log_var))
    variance = gradient_descent(in_variance, variance_start, num_steps=1, learning_rate=0.1).value[1]["w"]
    curvature = (task.support.x**2).mean(0) / task.noise_variance
    torch.testing.assert_close(variance, math.exp(-2) - 0.1 * curvature / 2, rtol=1e-10, atol=0)
    assert variance.min() < 0
    diverged = gradient_descent(in_variance, variance_start, num_steps=5, learning_rate=0.1)
    assert not torch.isfinite(diverged.grad_norm)

    logarithmic = gradient_descent(inner_loss, prior, num_steps=600, learning_rate=0.1)
    assert logarithmic.grad_norm < 1e-12
    assert relative_error(logarithmic.value, task._replace(prior=prior).posterior(prior, kl_weight)) < ALGEBRA


def test_kl_weight_that_is_not_positive_is_refused() -> None:
    problem = network_problem(0, centre=-2.0)
    for weight in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match=re.escape(f"kl_weight must be positive, but is {weight}")):
            gaussian_implicit_hypergradient(*problem, weight, dense)


def scaled_nll(posterior: DiagonalGaussian, shared: Params, batch: Batch) -> Tensor:
    """Expected Gaussian nll with learned input scales and a learned noise variance."""
    scaled = Batch(batch.x * shared["scale"], batch.y)
    return exact_expected_nll(posterior, scaled, shared["log_noise"].exp()) + 0.5 * shared["log_noise"]


def test_gradient_of_shared_parameters_is_the_derivative_of_the_closed_form() -> None:
    task, kl_weight = regression(2), 0.7 / 12
    shared = {
        "scale": torch.tensor([0.8, 1.1, 1.3, 0.6], dtype=DOUBLE),
        "log_noise": torch.tensor(-0.7, dtype=DOUBLE),
    }

    def outer(q: DiagonalGaussian, p: DiagonalGaussian, s: Params) -> Tensor:
        return scaled_nll(q, s, task.query) + 0.1 * kl_divergence(q, p) + 0.2 * (s["scale"] ** 2 * p.mean["w"]).sum()

    def solution(p: DiagonalGaussian, s: Params) -> DiagonalGaussian:
        scaled = task._replace(support=Batch(task.support.x * s["scale"], task.support.y))
        return scaled._replace(noise_variance=s["log_noise"].exp()).posterior(p, kl_weight)

    def total(p: DiagonalGaussian, s: Params) -> Tensor:
        return outer(solution(p, s), p, s)

    (prior_gradient, shared_gradient), info = gaussian_implicit_hypergradient(
        lambda q, s: scaled_nll(q, s, task.support),
        outer,
        solution(task.prior, shared),
        task.prior,
        kl_weight,
        dense,
        shared=shared,
    )
    prior_oracle, shared_oracle = torch.func.grad(total, argnums=(0, 1))(task.prior, shared)
    assert info.inner_grad_norm < 1e-13
    assert relative_error(prior_gradient, prior_oracle) < ALGEBRA
    assert relative_error(shared_gradient, shared_oracle) < ALGEBRA
    assert relative_error(shared_gradient, central_difference(lambda s: total(task.prior, s), shared)) < 1e-8


def test_empty_shared_parameters_give_the_gradient_of_the_prior_and_an_empty_one() -> None:
    problem = network_problem(1, centre=-2.0)
    alone, _ = gaussian_implicit_hypergradient(*problem, 1 / 6, dense)
    (gradient, empty), _ = gaussian_implicit_hypergradient(
        lambda q, s: problem.expected_nll(q),
        lambda q, p, s: problem.outer_loss(q, p),
        problem.posterior,
        problem.prior,
        1 / 6,
        dense,
        shared={},
    )
    assert empty == {}
    assert relative_error(gradient, alone) == 0


@pytest.mark.parametrize("seed", [0, 1])
def test_vanishing_variance_gives_imaml(seed: int) -> None:
    # Remark 2: D = I lam / strength turns lam KL into strength ||w - m||^2 / 2 in the mean; d_t -> 0 ends the sampling.
    source = generator(seed)
    support, query = network_task(source)
    centre = network_gaussian(source, 0.0).mean
    kl_weight, strength = 1 / 6, 0.4
    noise = sample_noise(centre, 4, generator=source)

    def penalised_nll(weights: Params, theta: Params) -> Tensor:
        return network_nll(weights, support).mean() + strength * PointPrior().divergence(weights, theta)

    weights = gradient_descent(lambda w: penalised_nll(w, centre), centre, num_steps=30, learning_rate=0.1).value
    expected, _ = implicit_hypergradient(
        penalised_nll, lambda w, theta: network_nll(w, query).mean(), weights, centre, dense
    )
    prior = DiagonalGaussian(
        centre, tree.map(lambda leaf: torch.full_like(leaf, math.log(kl_weight / strength)), centre)
    )
    posterior = DiagonalGaussian(weights, tree.map(lambda leaf: torch.full_like(leaf, -40.0), weights))
    gradient, _ = gaussian_implicit_hypergradient(
        lambda q: objectives.expected_nll(network_nll, q, noise, support),
        lambda q, p: objectives.expected_nll(network_nll, q, noise, query),
        posterior,
        prior,
        kl_weight,
        dense,
    )
    assert relative_error(gradient.mean, expected) < 1e-6


def ridge_task() -> tuple[Batch, Batch, Tensor]:
    source = generator(4)
    normal = partial(torch.randn, generator=source, dtype=DOUBLE)
    truth = normal(3)
    support_x, query_x = normal(10, 3), normal(6, 3)
    return (
        Batch(support_x, support_x @ truth + 0.1 * normal(10)),
        Batch(query_x, query_x @ truth + 0.1 * normal(6)),
        normal(3),
    )


@pytest.mark.parametrize("solver", [dense, partial(cg, max_steps=10, rtol=1e-12)], ids=["dense", "cg"])
def test_imaml_on_ridge_regression_has_the_closed_form_hypergradient(solver: LinearSolver) -> None:
    support, query, centre = ridge_task()
    strength = 5.0

    def inner_loss(w: Tensor, theta: Tensor) -> Tensor:
        return 0.5 * ((support.x @ w - support.y) ** 2).sum() + strength * PointPrior().divergence(w, theta)

    def outer_loss(w: Tensor, theta: Tensor) -> Tensor:
        return 0.5 * ((query.x @ w - query.y) ** 2).mean()

    # w = (X^T X + strength I)^-1 (X^T y + strength theta), so dw/dtheta = strength (X^T X + strength I)^-1.
    matrix = support.x.mT @ support.x + strength * torch.eye(3, dtype=DOUBLE)

    def solution(theta: Tensor) -> Tensor:
        return torch.linalg.solve(matrix, support.x.mT @ support.y + strength * theta)

    residual = query.x @ solution(centre) - query.y
    expected = strength * torch.linalg.solve(matrix, query.x.mT @ residual / len(residual))
    weights = gradient_descent(lambda w: inner_loss(w, centre), centre, num_steps=300, learning_rate=0.08)
    assert weights.grad_norm < 1e-12
    gradient, info = implicit_hypergradient(inner_loss, outer_loss, weights.value, centre, solver)
    assert info.linear_converged
    assert relative_error(gradient, expected) < ALGEBRA
    numeric = central_difference(lambda theta: outer_loss(solution(theta), theta), centre)
    assert relative_error(gradient, numeric) < 1e-8


class Descent(NamedTuple):
    """A short inner run on a small network whose inner and outer loss also depend directly on the meta-parameters."""

    inner_loss: Callable[[Params, Params], Tensor]
    outer_loss: Callable[[Params, Params], Tensor]
    centre: Params


NUM_STEPS, LEARNING_RATE, MOMENTUM = 6, 0.2, 0.6


def descent(seed: int = 0) -> Descent:
    source = generator(seed)
    support, query = network_task(source)

    def inner_loss(w: Params, theta: Params) -> Tensor:
        return network_nll(w, support).mean() + 0.3 * PointPrior().divergence(w, theta)

    def outer_loss(w: Params, theta: Params) -> Tensor:
        return network_nll(w, query).mean() + 0.1 * tree.dot(tree.mul(theta, theta), w)

    return Descent(inner_loss, outer_loss, network_gaussian(source, 0.0).mean)


def hand_written_loop(problem: Descent, momentum: float, num_differentiable: int) -> tuple[Params, Tensor]:
    """Double loop with autograd alone; before the last steps the iterate is ``theta`` plus a constant."""
    theta = {name: value.clone().requires_grad_() for name, value in problem.centre.items()}
    # Copies, so that the gradient in the weights does not contain the direct dependence on theta.
    weights = {name: value.clone() for name, value in theta.items()}
    velocity = {name: torch.zeros_like(value) for name, value in theta.items()}
    for step in range(NUM_STEPS + 1):
        if step == NUM_STEPS - num_differentiable:
            weights = {name: weights[name].detach() + theta[name] - theta[name].detach() for name in theta}
            velocity = {name: value.detach() for name, value in velocity.items()}
        if step == NUM_STEPS:
            break
        loss = problem.inner_loss(weights, theta)
        gradients = torch.autograd.grad(loss, list(weights.values()), create_graph=True)
        for name, gradient in zip(theta, gradients, strict=True):
            velocity[name] = momentum * velocity[name] + gradient
            weights[name] = weights[name] - LEARNING_RATE * velocity[name]
    outer = problem.outer_loss(weights, theta)
    gradients = torch.autograd.grad(outer, list(theta.values()))
    return dict(zip(theta, gradients, strict=True)), outer.detach()


@pytest.mark.parametrize("momentum", [0.0, MOMENTUM])
@pytest.mark.parametrize("truncation", [None, 0, 1, 3, NUM_STEPS, NUM_STEPS + 5])
def test_unrolled_equals_a_hand_written_double_loop(truncation: int | None, momentum: float) -> None:
    problem = descent()
    num_differentiable = NUM_STEPS if truncation is None else min(truncation, NUM_STEPS)
    expected, outer = hand_written_loop(problem, momentum, num_differentiable)
    solver = partial(gradient_descent, num_steps=NUM_STEPS, learning_rate=LEARNING_RATE, momentum=momentum)
    gradient, info = unrolled_hypergradient(
        *problem[:2], lambda theta: theta, problem.centre, solver, truncation=truncation
    )
    assert relative_error(gradient, expected) < 1e-12
    torch.testing.assert_close(info.outer_loss, outer, rtol=1e-12, atol=0)
    adapted = solver(lambda w: problem.inner_loss(w, problem.centre), problem.centre)
    assert relative_error(info.inner_params, adapted.value) < 1e-14
    torch.testing.assert_close(info.inner_grad_norm, adapted.grad_norm, rtol=1e-12, atol=0)
    assert info.linear_residual == 0 and info.linear_converged


def test_truncations_differ_from_each_other() -> None:
    # Otherwise the comparison above would not tell where the derivative is cut.
    gradients = [
        hand_written_loop(descent(), 0.0, num_differentiable)[0] for num_differentiable in (0, 1, 3, NUM_STEPS)
    ]
    for i in range(4):
        for j in range(i):
            assert relative_error(gradients[i], gradients[j]) > 0.01


def test_first_order_is_the_outer_gradient_at_the_adapted_weights() -> None:
    problem = descent()
    solver = partial(gradient_descent, num_steps=NUM_STEPS, learning_rate=LEARNING_RATE)
    gradient, info = first_order_hypergradient(*problem[:2], lambda theta: theta, problem.centre, solver)
    adapted = solver(lambda w: problem.inner_loss(w, problem.centre), problem.centre)
    through, direct = torch.func.grad(problem.outer_loss, argnums=(0, 1))(adapted.value, problem.centre)
    assert relative_error(gradient, tree.add(through, direct)) < 1e-14
    torch.testing.assert_close(info.inner_grad_norm, adapted.grad_norm, rtol=1e-12, atol=0)
    assert relative_error(info.inner_params, adapted.value) == 0
    truncated, _ = unrolled_hypergradient(*problem[:2], lambda theta: theta, problem.centre, solver, truncation=0)
    assert relative_error(gradient, truncated) < 1e-12


@pytest.mark.parametrize("estimator", ["unrolled", "first_order"])
def test_initialisation_may_be_any_function_of_the_meta_parameters(estimator: str) -> None:
    # Quadratic inner loss c v^2 / 2 from v = 3 theta^2: v_K = (1 - lr c)^K 3 theta^2, and O = v^2 / 2.
    theta, rate, curvature, num_steps = torch.tensor(0.7, dtype=DOUBLE), 0.1, 2.0, 4
    compute = unrolled_hypergradient if estimator == "unrolled" else first_order_hypergradient
    gradient, _ = compute(
        lambda v, t: 0.5 * curvature * v**2,
        lambda v, t: 0.5 * v**2,
        lambda t: 3 * t**2,
        theta,
        partial(gradient_descent, num_steps=num_steps, learning_rate=rate),
    )
    contraction = (1 - rate * curvature) ** num_steps
    passes = 2 if estimator == "unrolled" else 1
    torch.testing.assert_close(gradient, contraction**passes * 3 * theta**2 * 6 * theta, rtol=1e-12, atol=0)


@pytest.mark.parametrize("kind", ["ridge", "logistic"])
def test_weight_decay_of_a_regression_can_be_tuned_by_its_implicit_gradient(kind: str) -> None:
    source = generator(6)
    normal = partial(torch.randn, generator=source, dtype=DOUBLE)
    truth, x, query_x = normal(4), normal(20, 4), normal(15, 4)
    y, query_y = (inputs @ truth + 0.5 * normal(len(inputs)) for inputs in (x, query_x))
    if kind == "logistic":
        y, query_y = (y > 0).to(DOUBLE), (query_y > 0).to(DOUBLE)

    def data_loss(w: Tensor, inputs: Tensor, targets: Tensor) -> Tensor:
        outputs = inputs @ w
        if kind == "ridge":
            return 0.5 * ((outputs - targets) ** 2).mean()
        return torch.nn.functional.binary_cross_entropy_with_logits(outputs, targets)

    def inner_loss(w: Tensor, log_decay: Tensor) -> Tensor:
        # One strength per weight.
        return data_loss(w, x, y) + 0.5 * (log_decay.exp() * w**2).sum()

    def outer_loss(w: Tensor, log_decay: Tensor) -> Tensor:
        return data_loss(w, query_x, query_y)

    def solution(log_decay: Tensor) -> Tensor:
        w = torch.zeros(4, dtype=DOUBLE)
        for _ in range(12):
            gradient = torch.func.grad(inner_loss)(w, log_decay)
            w = w - torch.linalg.solve(torch.func.hessian(inner_loss)(w, log_decay), gradient)
        return w

    log_decay = torch.tensor([-1.0, -2.0, 0.0, -0.5], dtype=DOUBLE)
    gradient, info = implicit_hypergradient(
        inner_loss, outer_loss, solution(log_decay), log_decay, partial(cg, max_steps=20, rtol=1e-13)
    )
    assert info.inner_grad_norm < 1e-14
    assert info.linear_converged
    numeric = central_difference(lambda r: outer_loss(solution(r), r), log_decay, step=1e-4)
    assert relative_error(gradient, numeric) < 1e-6


def interpolation() -> tuple[Tensor, Tensor, Tensor]:
    """Three equations, seven unknowns, targets that are a function of two meta-parameters."""
    source = generator(7)
    normal = partial(torch.randn, generator=source, dtype=DOUBLE)
    return normal(3, 7), normal(3), normal(3, 2)


@pytest.mark.parametrize("solver", [dense, partial(minres, max_steps=30, rtol=1e-12)], ids=["dense", "minres"])
def test_singular_hessian_gives_the_hypergradient_of_the_minimum_norm_solution(solver: LinearSolver) -> None:
    # Remark 1 of the paper, eq. (12). Gradient descent from zero finds w = X^+ (y + B theta); the right-hand side of
    # the system has a null-space part, which the pseudo-inverse takes out.
    x, y, slope = interpolation()
    theta = torch.tensor([0.3, -0.8], dtype=DOUBLE)
    query = torch.randn(7, generator=generator(8), dtype=DOUBLE)

    def inner_loss(w: Tensor, t: Tensor) -> Tensor:
        return 0.5 * ((x @ w - y - slope @ t) ** 2).sum()

    def outer_loss(w: Tensor, t: Tensor) -> Tensor:
        return 0.5 * (query @ w - 1.0) ** 2

    def solution(t: Tensor) -> Tensor:
        return torch.linalg.pinv(x) @ (y + slope @ t)

    weights = gradient_descent(
        lambda w: inner_loss(w, theta), torch.zeros(7, dtype=DOUBLE), num_steps=500, learning_rate=0.08
    )
    assert relative_error(weights.value, solution(theta)) < 1e-10
    gradient, info = implicit_hypergradient(inner_loss, outer_loss, weights.value, theta, solver)
    expected = torch.func.grad(lambda t: outer_loss(solution(t), t))(theta)
    assert info.linear_converged
    # A least-squares solution: the residual is the null-space part of dO/dw, here of size 0.1 and more.
    null = query - torch.linalg.pinv(x) @ (x @ query)
    torch.testing.assert_close(info.linear_residual, null.norm() / query.norm(), rtol=1e-6, atol=0)
    assert info.linear_residual > 0.1
    assert relative_error(gradient, expected) < SOLVER


@pytest.mark.parametrize("solver", [dense, partial(minres, max_steps=30, rtol=1e-12)], ids=["dense", "minres"])
def test_singular_system_is_solved_with_minimum_norm(solver: LinearSolver) -> None:
    # Eq. (12) with a mixed derivative that sees the null space, unlike the one above: any other least-squares solution
    # of the system gives another number.
    x, y, _ = interpolation()
    weights = torch.linalg.pinv(x) @ y
    theta = torch.zeros(7, dtype=DOUBLE)
    rhs = torch.randn(7, generator=generator(8), dtype=DOUBLE)
    gradient, _ = implicit_hypergradient(
        lambda w, t: 0.5 * ((x @ w - y) ** 2).sum() - t @ w, lambda w, t: rhs @ w, weights, theta, solver
    )
    assert relative_error(gradient, torch.linalg.pinv(x.mT @ x) @ rhs) < SOLVER


def test_conjugate_gradients_do_not_claim_to_have_solved_an_inconsistent_system() -> None:
    x, y, slope = interpolation()
    theta = torch.zeros(2, dtype=DOUBLE)
    query = torch.randn(7, generator=generator(8), dtype=DOUBLE)
    gradient, info = implicit_hypergradient(
        lambda w, t: 0.5 * ((x @ w - y - slope @ t) ** 2).sum(),
        lambda w, t: query @ w,
        torch.linalg.pinv(x) @ y,
        theta,
        partial(cg, max_steps=30),
    )
    assert not info.linear_converged
    assert info.linear_residual > 0.1
    assert torch.isfinite(gradient).all()


@pytest.mark.parametrize("point", [[0.1, -0.2, 0.05], [0.1, 1.1, -0.9]], ids=["negative definite", "indefinite"])
def test_indefinite_hessian_away_from_a_minimum_is_reported_and_the_gradient_stays_finite(point: list[float]) -> None:
    # (v^2 - 1)^2 / 4 has second derivative 3 v^2 - 1.
    v, theta = torch.tensor(point, dtype=DOUBLE), torch.tensor([0.2, 0.4, -0.1], dtype=DOUBLE)
    gradient, info = implicit_hypergradient(
        lambda w, t: (0.25 * (w**2 - 1) ** 2 - t * w).sum(),
        lambda w, t: (w + t**2).sum(),
        v,
        theta,
        partial(cg, max_steps=10),
    )
    assert not info.linear_converged
    assert info.linear_residual > 0
    assert torch.isfinite(gradient).all()
    torch.testing.assert_close(info.inner_grad_norm, (v**3 - v - theta).norm(), rtol=1e-12, atol=0)
    # MINRES needs no definite matrix and solves the same system.
    solved, solved_info = implicit_hypergradient(
        lambda w, t: (0.25 * (w**2 - 1) ** 2 - t * w).sum(),
        lambda w, t: (w + t**2).sum(),
        v,
        theta,
        partial(minres, max_steps=10, rtol=1e-12),
    )
    assert solved_info.linear_converged
    torch.testing.assert_close(solved, 2 * theta + 1 / (3 * v**2 - 1), rtol=1e-8, atol=0)


def test_gaussian_system_that_is_indefinite_is_reported() -> None:
    problem = network_problem(0, centre=-2.0)
    indefinite = problem._replace(posterior=problem.posterior._replace(mean=tree.scale(-3.0, problem.posterior.mean)))
    gradient, info = gaussian_implicit_hypergradient(*indefinite, 0.001, partial(cg, max_steps=50))
    assert not info.linear_converged
    assert info.linear_residual > 1e-3
    assert tree.all_finite(gradient)


def test_outer_loss_without_the_inner_parameters_gives_its_direct_gradient() -> None:
    problem = network_problem(0, centre=-2.0)
    gradient, info = gaussian_implicit_hypergradient(
        problem.expected_nll,
        lambda q, p: tree.dot(p.log_var, p.log_var) + 0 * tree.dot(q.mean, q.mean),
        problem.posterior,
        problem.prior,
        1 / 6,
        partial(cg, max_steps=5),
    )
    assert info.linear_converged
    assert info.linear_residual == 0
    assert tree.norm(gradient.mean) == 0
    assert relative_error(gradient.log_var, tree.scale(2, problem.prior.log_var)) < 1e-14


ESTIMATORS = ["unrolled", "truncated", "first_order", "implicit", "gaussian"]


def estimate(
    name: str, prior: DiagonalGaussian, support: Batch, query: Batch, noise: Params, num_steps: int = 4
) -> Any:
    """One task's hypergradient by the named estimator, with weights sampled from the posterior."""
    kl_weight = 1 / 6

    def expected_nll(q: DiagonalGaussian) -> Tensor:
        return objectives.expected_nll(network_nll, q, noise, support)

    def inner_loss(q: DiagonalGaussian, p: DiagonalGaussian) -> Tensor:
        return objectives.negative_elbo(expected_nll(q), q, p, kl_weight)

    def outer_loss(q: DiagonalGaussian, p: DiagonalGaussian) -> Tensor:
        return objectives.expected_nll(network_nll, q, noise, query) + 0.01 * kl_divergence(q, p)

    solver = partial(gradient_descent, num_steps=num_steps, learning_rate=0.05)
    if name in ("implicit", "gaussian"):
        posterior = solver(lambda q: inner_loss(q, prior), prior).value
        linear_solver = partial(cg, max_steps=4)
        if name == "implicit":
            return implicit_hypergradient(inner_loss, outer_loss, posterior, prior, linear_solver)
        return gaussian_implicit_hypergradient(expected_nll, outer_loss, posterior, prior, kl_weight, linear_solver)
    arguments = (inner_loss, outer_loss, lambda theta: theta, prior, solver)
    if name == "first_order":
        return first_order_hypergradient(*arguments)
    return unrolled_hypergradient(*arguments, truncation=2 if name == "truncated" else None)


@pytest.mark.parametrize("name", ESTIMATORS)
def test_vmap_over_tasks_equals_the_loop(name: str) -> None:
    source = generator(9)
    num_tasks = 3
    prior = network_gaussian(source, -2.0)
    tasks = [(*network_task(source), sample_noise(prior.mean, 2, generator=source)) for _ in range(num_tasks)]
    stacked = tree.map(lambda *leaves: torch.stack(leaves), *tasks)
    gradients, info = torch.func.vmap(partial(estimate, name, prior))(*stacked)
    for diagnostic in info[:4]:
        assert diagnostic.shape == (num_tasks,)
    assert info.linear_converged.dtype == torch.bool
    assert len(set(info.outer_loss.tolist())) == num_tasks
    for i, task in enumerate(tasks):
        expected = estimate(name, prior, *task)
        mine = tree.map(lambda leaf, i=i: leaf[i], (gradients, info))
        for actual, wanted in zip(tree.leaves(mine), tree.leaves(expected), strict=True):
            torch.testing.assert_close(actual, wanted, rtol=1e-10, atol=1e-12)


class LiveStorages(TorchDispatchMode):
    """Remembers every storage that an operation made, to count the bytes of those still alive."""

    def __init__(self) -> None:
        super().__init__()
        self.storages: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree.leaves(result):
            if isinstance(leaf, Tensor):
                storage = leaf.untyped_storage()
                reference = StorageWeakRef(storage)
                self.storages[reference.cdata] = (reference, storage.nbytes())
        return result

    def num_bytes(self) -> int:
        return sum(size for reference, size in self.storages.values() if not reference.expired())


def bytes_alive_at_the_outer_loss(name: str, num_steps: int, requires_grad: bool = False) -> int:
    source = generator(10)
    prior = tree.map(lambda leaf: leaf.requires_grad_(requires_grad), network_gaussian(source, -2.0))
    support, query = network_task(source)
    noise = sample_noise(prior.mean, 2, generator=source)
    measured: list[int] = []
    # The outer loss is the first to look at the query inputs, when the graph of the inner steps, if any, is complete.

    class Probe(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if not measured and any(argument is query.x for argument in args if isinstance(argument, Tensor)):
                measured.append(storages.num_bytes())
            return func(*args, **(kwargs or {}))

    with LiveStorages() as storages, Probe():
        estimate(name, prior, support, query, noise, num_steps)
    return measured[0]


def test_memory_of_implicit_and_first_order_estimators_does_not_depend_on_the_number_of_inner_steps() -> None:
    for name in ("implicit", "gaussian", "first_order"):
        few, many = (bytes_alive_at_the_outer_loss(name, num_steps) for num_steps in (4, 16))
        assert few == many
        # Nothing but the iterate and its gradient norm: about the size of the posterior.
        assert many < 1200


def test_memory_of_the_unrolled_estimator_grows_with_the_differentiated_steps_alone() -> None:
    at_4, at_8, at_16 = (bytes_alive_at_the_outer_loss("unrolled", num_steps) for num_steps in (4, 8, 16))
    assert at_16 - at_8 == 2 * (at_8 - at_4) > 4000
    few, many = (bytes_alive_at_the_outer_loss("truncated", num_steps) for num_steps in (4, 16))
    assert few == many < at_4
