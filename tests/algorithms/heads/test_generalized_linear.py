"""The head of generalised linear models against scikit-learn, dense Newton matrices, quadrature and simulations."""

import dataclasses
import math
import re
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import ibaml
from ibaml import records, tree
from ibaml.algorithms import RECORDS, MetaParameters, TaskNoise, make_algorithm
from ibaml.algorithms.heads import GeneralizedLinear
from ibaml.algorithms.heads.generalized_linear import solves
from ibaml.algorithms.heads.linear_gaussian import Precision, Reduction
from ibaml.algorithms.model import build_model
from ibaml.likelihoods import Categorical, Gaussian, Likelihood, NegativeBinomial, Poisson, StudentT, UnitGaussian
from ibaml.priors import DiagonalPrior
from ibaml.solvers.linear import Dense
from ibaml.types import Batch, Episode, Params, Tensor

DOUBLE = torch.float64
NO_NOISE = TaskNoise({}, {})
NUM_FEATURES = 4
LIKELIHOODS: dict[str, Likelihood] = {
    "poisson": Poisson(num_targets=2, initial_rate=2.0),
    "negative_binomial": NegativeBinomial(num_targets=2, initial_rate=2.0, initial_size=3.0),
    "student_t": StudentT(num_targets=2, initial_scale=0.4, initial_degrees=3.0),
    "gaussian": Gaussian(num_targets=2, initial_noise_variance=0.3),
    "unit_gaussian": UnitGaussian(num_targets=2),
}
OUTER = ["predictive_nll", "expected_nll", "marginal"]
PRIORS = ["diagonal", "full", "low_rank"]
names = pytest.mark.parametrize("name", LIKELIHOODS)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=DOUBLE)


class Features:
    """A hidden layer and a likelihood: what a head sees of a model."""

    def __init__(self, likelihood: Likelihood, num_outputs: int = 2) -> None:
        self.likelihood = likelihood
        self.num_outputs = num_outputs

    def features(self, shared: Params, x: Tensor) -> Tensor:
        return torch.tanh(x @ shared["weight"])


def targets_of(likelihood: Likelihood, size: int, seed: int) -> Tensor:
    if likelihood.target_kind == "counts":
        return torch.poisson(2 * torch.exp(0.7 * randn(size, 2, seed=seed)), generator=generator(seed))
    y = randn(size, 2, seed=seed)
    y[0] += 4  # An outlier.
    return y


def set_up(algorithm: Any, name: str, num_support: int = 3) -> tuple[Any, MetaParameters, Episode]:
    likelihood = LIKELIHOODS[name]
    prior = algorithm.init_prior(NUM_FEATURES + 1, 2, like=torch.zeros(0, dtype=DOUBLE))
    own = {key: value.double() for key, value in likelihood.initial_parameters().items()}
    shared = {"weight": torch.zeros(2, NUM_FEATURES, dtype=DOUBLE), **own}
    # Away from any symmetry.
    meta = tree.map(lambda leaf: leaf + 0.4 * randn(*leaf.shape, seed=2), MetaParameters(prior, shared))
    support, query = (
        Batch(randn(size, 2, seed=seed), targets_of(likelihood, size, seed + 1) if size else torch.zeros(0, 2).double())
        for size, seed in ((num_support, 3), (5, 5))
    )
    return Features(likelihood), meta, Episode(support, query)


def inputs(nll: Any, shared: Params, x: Tensor) -> Tensor:
    hidden = nll.features(shared, x)
    return torch.cat([hidden, torch.ones_like(hidden[:, :1])], -1)


def covariances(member: Any) -> Tensor:
    """Of the weights of each target under the prior, by hand."""
    if hasattr(member, "lower"):
        factor = member.factor()
        return factor @ factor.mT
    variances = torch.exp(member.log_var)
    if not hasattr(member, "loadings"):
        return torch.diag_embed(variances)
    factors = variances.sqrt().unsqueeze(-1) * member.loadings
    return torch.diag_embed(variances) + factors @ factors.mT


def inner_loss(nll: Any, theta: MetaParameters, weights: Tensor, batch: Batch) -> Tensor:
    """Summed nll and minus the log density of the prior, but for its constants, in the weights themselves."""
    outputs = inputs(nll, theta.shared, batch.x) @ weights.mT
    error = (weights - theta.prior.mean).unsqueeze(-1)
    penalty = 0.5 * (error.mT @ torch.linalg.solve(covariances(theta.prior), error)).sum()
    return nll.likelihood.nll(outputs, batch.y, theta.shared).sum() + penalty


def dense_posterior(nll: Any, theta: MetaParameters, weights: Tensor, batch: Batch) -> Tensor:
    """The covariance of each target's weights, with negative second derivatives taken as zero."""
    z = inputs(nll, theta.shared, batch.x)

    def total(outputs: Tensor) -> Tensor:
        return nll.likelihood.nll(outputs, batch.y, theta.shared).sum()

    outputs = z @ weights.mT
    hessian = torch.func.hessian(total)(outputs).reshape(outputs.numel(), -1)
    curvature = torch.diagonal(hessian).reshape(outputs.shape).clamp_min(0).mT
    assert (hessian - torch.diag(torch.diagonal(hessian))).abs().max() < 1e-12
    return torch.linalg.inv(torch.linalg.inv(covariances(theta.prior)) + z.mT @ (curvature.unsqueeze(-1) * z))


def adapted(algorithm: Any, nll: Any, meta: MetaParameters, episode: Episode) -> Any:
    found = algorithm.adapt(nll, meta, episode.support, NO_NOISE)
    return found.value.solution, found.grad_norm


@pytest.mark.parametrize("prior", PRIORS)
@pytest.mark.parametrize("num_support", [1, 3, 12])
@names
def test_mode_and_covariance_are_those_of_dense_matrices(name: str, num_support: int, prior: str) -> None:
    algorithm: Any = make_algorithm("generalized_linear", prior=prior)
    nll, meta, episode = set_up(algorithm, name, num_support)
    solution, residual = adapted(algorithm, nll, meta, episode)
    assert residual < 1e-9 and isinstance(solution.spread, Reduction if num_support < 5 else Precision)
    gradient = torch.func.grad(lambda weights: inner_loss(nll, meta, weights, episode.support))(solution.mean)
    assert gradient.abs().max() < 1e-9
    posterior = algorithm.adapt(nll, meta, episode.support, NO_NOISE).value
    found = algorithm.outputs(nll, meta.shared, posterior, episode.query.x, {})
    z = inputs(nll, meta.shared, episode.query.x)
    covariance = dense_posterior(nll, meta, solution.mean, episode.support)
    variance = torch.diagonal(z @ covariance @ z.mT, dim1=-2, dim2=-1).mT
    torch.testing.assert_close(found["outputs"][0], z @ solution.mean.mT, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(found["output_variance"][0], variance, rtol=1e-8, atol=1e-10)
    joint = algorithm.joint_covariance(solution, z)
    torch.testing.assert_close(joint, z @ covariance @ z.mT, rtol=1e-8, atol=1e-10)


def test_mode_of_counts_is_that_of_scikit_learn() -> None:
    linear_model = pytest.importorskip("sklearn.linear_model")
    z = torch.cat([randn(40, 3, seed=0), torch.ones(40, 1, dtype=DOUBLE)], -1)
    y = torch.poisson(torch.exp(z @ torch.tensor([[0.5], [-0.3], [0.0], [1.0]], dtype=DOUBLE)), generator=generator(1))
    algorithm = GeneralizedLinear(likelihood=Poisson())
    prior = algorithm.init_prior(4, 1, like=z)._replace(log_var=torch.full((1, 4), math.log(0.7), dtype=DOUBLE))
    solution, _ = algorithm.solve(prior, {}, Batch(z, y), 1)
    # It minimises the mean nll and alpha |w|^2 / 2.
    other = linear_model.PoissonRegressor(
        alpha=1 / (0.7 * 40), fit_intercept=False, tol=1e-10, max_iter=1000, solver="newton-cholesky"
    ).fit(z.numpy(), y[:, 0].numpy())
    torch.testing.assert_close(solution.mean[0], torch.from_numpy(other.coef_), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("outer", OUTER)
@pytest.mark.parametrize("prior", PRIORS)
@pytest.mark.parametrize("num_support", [3, 12])
@pytest.mark.parametrize("name", ["gaussian", "unit_gaussian"])
def test_of_gaussian_noise_it_is_the_linear_gaussian_head(name: str, num_support: int, prior: str, outer: str) -> None:
    algorithm: Any = make_algorithm("generalized_linear", prior=prior, outer=outer)
    exact: Any = make_algorithm("linear_gaussian", prior=prior, outer=outer)
    nll, meta, episode = set_up(algorithm, name, num_support)
    found, expected = (each.hypergradient(nll, meta, episode, NO_NOISE) for each in (algorithm, exact))
    for one, other in zip(tree.leaves(found[0]), tree.leaves(expected[0]), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(found[1].outer_loss, expected[1].outer_loss, rtol=1e-8, atol=1e-8)
    outputs, wanted = (
        each.outputs(nll, meta.shared, info.inner_params, episode.query.x, {})
        for each, (_, info) in ((algorithm, found), (exact, expected))
    )
    for key in ("outputs", "output_variance"):
        torch.testing.assert_close(outputs[key], wanted[key], rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("outer", OUTER)
@pytest.mark.parametrize("num_support", [3, 12])
@names
def test_hypergradient_is_that_of_central_differences_of_the_solved_problem(
    name: str, num_support: int, outer: Any
) -> None:
    algorithm: Any = GeneralizedLinear(outer=outer)
    nll, meta, episode = set_up(algorithm, name, num_support)
    gradient, info = algorithm.hypergradient(nll, meta, episode, NO_NOISE)
    flat, unravel = tree.ravel(meta)

    def loss(vector: Tensor) -> Tensor:
        return algorithm.objective(nll, unravel(vector), episode)[0]

    step = 1e-4 * torch.eye(len(flat), dtype=DOUBLE)
    at = torch.cat([flat + step, flat - step, flat + 2 * step, flat - 2 * step])
    above, below, far_above, far_below = torch.func.vmap(loss)(at).chunk(4)
    # Fourth order, so that its own error is far below the tolerance.
    expected = (8 * (above - below) - (far_above - far_below)) / 12e-4
    assert (tree.ravel(gradient)[0] - expected).norm() < 1e-7 * expected.norm()
    assert info.inner_grad_norm < 1e-9 and info.linear_residual == 0 and info.linear_converged


@names
def test_hypergradient_is_that_of_the_generic_implicit_one(name: str) -> None:
    algorithm: Any = GeneralizedLinear()
    nll, meta, episode = set_up(algorithm, name, 12)
    found, info = algorithm.hypergradient(nll, meta, episode, NO_NOISE)

    def outer(weights: Tensor, theta: MetaParameters) -> Tensor:
        z, covariance = (
            inputs(nll, theta.shared, episode.query.x),
            dense_posterior(nll, theta, weights, episode.support),
        )
        variance = torch.diagonal(z @ covariance @ z.mT, dim1=-2, dim2=-1).mT
        return (
            nll.likelihood.predict((z @ weights.mT)[None], theta.shared, output_variance=variance[None])
            .nll(episode.query.y)
            .mean()
        )

    expected, _ = ibaml.implicit_hypergradient(
        lambda weights, theta: inner_loss(nll, theta, weights, episode.support),
        outer,
        info.inner_params.solution.mean,
        meta,
        Dense(),
    )
    one, other = tree.ravel(found)[0], tree.ravel(expected)[0]
    assert (one - other).norm() < 1e-8 * other.norm()


@pytest.mark.parametrize("prior", PRIORS)
@names
def test_primal_and_dual_are_one(name: str, prior: str) -> None:
    algorithm: Any = make_algorithm("generalized_linear", prior=prior)
    nll, meta, episode = set_up(algorithm, name)
    z = inputs(nll, meta.shared, episode.support.x)
    known = algorithm.for_task(nll)
    # Examples without features turn the one into the other, and add a constant to the nll.
    nothing = Batch(z.new_zeros(20, NUM_FEATURES + 1), torch.ones(20, 2, dtype=DOUBLE))
    dual, _ = known.solve(meta.prior, meta.shared, Batch(z, episode.support.y), 2)
    padded = Batch(*(torch.cat(pair) for pair in zip((z, episode.support.y), nothing, strict=True)))
    primal, _ = known.solve(meta.prior, meta.shared, padded, 2)
    assert isinstance(dual.spread, Reduction) and isinstance(primal.spread, Precision)
    query = inputs(nll, meta.shared, episode.query.x)
    torch.testing.assert_close(primal.mean, dual.mean, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(known.moments(primal, query), known.moments(dual, query), rtol=1e-10, atol=1e-10)
    constant = nll.likelihood.nll(nothing.y * 0, nothing.y, meta.shared).sum()
    torch.testing.assert_close(primal.nll - constant, dual.nll, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("outer", OUTER)
@pytest.mark.parametrize("num_support", [3, 12])
@names
def test_vmap_over_tasks_equals_the_loop(name: str, num_support: int, outer: Any) -> None:
    algorithm: Any = GeneralizedLinear(outer=outer)
    nll, meta, episode = set_up(algorithm, name, num_support)
    # One that takes more steps than the other.
    episodes = [episode, tree.map(lambda leaf: 2 * leaf.flip(0), episode)]
    stacked = tree.map(lambda *leaves: torch.stack(leaves), *episodes)
    found = torch.func.vmap(lambda one: algorithm.hypergradient(nll, meta, one, NO_NOISE))(stacked)
    for i, each in enumerate(episodes):
        expected = algorithm.hypergradient(nll, meta, each, NO_NOISE)
        # Tasks that go on together take a step more.
        assert found[1].inner_grad_norm[i] < 1e-9
        without_norm = [
            (gradient, info._replace(inner_grad_norm=info.outer_loss)) for gradient, info in (found, expected)
        ]
        for actual, wanted in zip(*map(tree.leaves, without_norm), strict=True):
            torch.testing.assert_close(actual[i], wanted, rtol=1e-12, atol=1e-12)


def grid_posterior(likelihood: Likelihood, batch: Batch, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Weights on a grid of two dimensions with a standard normal prior: outputs at ``z``, log weights, log evidence."""
    axis = torch.linspace(-5, 5, 801, dtype=DOUBLE)
    weights = torch.cartesian_prod(axis, axis)
    outputs = (weights @ batch.x.mT).unsqueeze(-1)
    log_joint = -0.5 * (weights**2).sum(-1) - math.log(2 * math.pi) + 2 * math.log(axis[1] - axis[0])
    own = {key: value.double() for key, value in likelihood.initial_parameters().items()}
    log_joint = log_joint - likelihood.nll(outputs, batch.y.expand_as(outputs), own).sum(-1)
    evidence = torch.logsumexp(log_joint, 0)
    return (weights @ z.mT).unsqueeze(-1), log_joint - evidence, evidence


@pytest.mark.parametrize(
    "likelihood",
    [Poisson(initial_rate=3.0), NegativeBinomial(initial_rate=3.0), StudentT(initial_scale=0.5)],
    ids=repr,
)
def test_predictions_and_marginal_likelihood_are_near_those_of_quadrature(likelihood: Likelihood) -> None:
    z = torch.stack([randn(15, seed=0), torch.ones(15, dtype=DOUBLE)], -1)
    f = z @ torch.tensor([[0.7], [-0.4]], dtype=DOUBLE)
    y = (
        torch.poisson(3 * torch.exp(f), generator=generator(1))
        if likelihood.target_kind == "counts"
        else f + 0.5 * randn(15, 1, seed=1)
    )
    if likelihood.target_kind == "real":
        y[3] += 6
    algorithm = GeneralizedLinear(likelihood=likelihood)
    prior = tree.map(torch.zeros_like, algorithm.init_prior(2, 1, like=z))
    own = {key: value.double() for key, value in likelihood.initial_parameters().items()}
    solution, _ = algorithm.solve(prior, own, Batch(z, y), 1)
    query = torch.tensor([[0.0, 1.0], [1.0, 1.0], [-2.0, 1.0]], dtype=DOUBLE)
    values = torch.tensor([0.0, 2.0, 7.0], dtype=DOUBLE)
    at, log_weight, evidence = grid_posterior(likelihood, Batch(z, y), query)
    # Laplace's approximation of 15 examples.
    assert abs(solution.nll + evidence) < 0.05
    found: Any = likelihood.predict(
        **{k: v for k, v in algorithm.predict(solution, own, query, {}).items()}, parameters=own
    )
    found_any = False
    for value in values:
        target = value.expand(3, 1)
        exact = -torch.logsumexp(log_weight.unsqueeze(-1) - likelihood.nll(at, target.expand_as(at), own), 0)
        close = exact < 4  # What is likely at all.
        found_any |= bool(close.any())
        assert ((found.nll(target) - exact)[close].abs() < 0.1).all(), (found.nll(target), exact)
    assert found_any


COVERAGE = {
    "poisson": (Poisson(initial_rate=5.0), 3),
    "negative_binomial": (NegativeBinomial(initial_rate=5.0, initial_size=4.0), 6),
    "student_t": (StudentT(initial_scale=0.5, initial_degrees=4.0), 8),
}


@pytest.mark.parametrize("name", COVERAGE)
def test_intervals_of_tasks_from_the_model_cover(name: str) -> None:
    likelihood, num_support = COVERAGE[name]
    algorithm: Any = GeneralizedLinear(prior=ibaml.priors.FullColumnPrior())
    nll = Features(likelihood, 1)
    prior = algorithm.init_prior(3, 1, like=torch.zeros(0, dtype=DOUBLE))
    prior = tree.map(lambda leaf: leaf + 0.3 * randn(*leaf.shape, seed=1), prior)
    own = {key: value.double() for key, value in likelihood.initial_parameters().items()}
    meta = MetaParameters(prior, {"weight": randn(2, 2, seed=2), **own})
    num_tasks, source = 2_000, generator(3)
    weights = prior.mean + torch.randn(num_tasks, 3, generator=source, dtype=DOUBLE) @ prior.factor()[0].mT
    x = torch.randn(num_tasks, num_support + 1, 2, generator=source, dtype=DOUBLE)
    f = torch.einsum("tnf,tf->tn", torch.func.vmap(lambda each: inputs(nll, meta.shared, each))(x), weights)
    if likelihood.target_kind == "real":
        gamma = torch.distributions.Gamma(2.0, 2.0)
        torch.manual_seed(4)
        y = f + 0.5 * torch.randn(f.shape, dtype=DOUBLE) / gamma.sample(f.shape).double().sqrt()
    else:
        rate = 5 * torch.exp(f)
        if name == "negative_binomial":
            torch.manual_seed(4)
            rate = rate * torch.distributions.Gamma(4.0, 4.0).sample(f.shape).double()
        y = torch.poisson(rate, generator=source)

    def predict(support: Batch, x: Tensor) -> dict[str, Tensor]:
        posterior = algorithm.adapt(nll, meta, support, NO_NOISE).value
        return algorithm.outputs(nll, meta.shared, posterior, x, {})

    support = Batch(x[:, :-1], y[:, :-1, None])
    found = torch.func.vmap(predict)(support, x[:, -1:])
    prediction: Any = likelihood.predict(
        found["outputs"][:, :, 0].movedim(0, 1), own, output_variance=found["output_variance"][:, :, 0].movedim(0, 1)
    )
    query = y[:, -1:]
    # Of a count the ranks are spread over its jump.
    low, high = (
        prediction.cdf(query - 1) if prediction.components.is_discrete else prediction.cdf(query),
        prediction.cdf(query),
    )
    rank = low + (high - low) * torch.rand(low.shape, generator=source, dtype=DOUBLE)
    covered = float(((rank > 0.05) & (rank < 0.95)).double().mean())
    assert abs(covered - 0.9) < 2 * math.sqrt(0.9 * 0.1 / num_tasks), covered


@names
def test_without_examples_it_is_the_prior(name: str) -> None:
    algorithm: Any = make_algorithm("generalized_linear", prior="full")
    nll, meta, episode = set_up(algorithm, name, 0)
    solution, residual = adapted(algorithm, nll, meta, episode)
    assert residual == 0 and solution.nll == 0
    torch.testing.assert_close(solution.mean, meta.prior.mean, rtol=0, atol=1e-12)
    z = inputs(nll, meta.shared, episode.query.x)
    expected = torch.diagonal(z @ covariances(meta.prior) @ z.mT, dim1=-2, dim2=-1)
    torch.testing.assert_close(algorithm.moments(solution, z)[1], expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("scale", [1.0, 1e3, 1e6])
def test_counts_far_from_the_prior_are_solved(scale: float) -> None:
    z = torch.cat([randn(6, 2, seed=0), torch.ones(6, 1, dtype=DOUBLE)], -1)
    y = (scale * torch.exp(0.5 * z[:, :1])).round()
    algorithm = GeneralizedLinear(likelihood=Poisson())
    prior = algorithm.init_prior(3, 1, like=z)._replace(log_var=torch.full((1, 3), 3.0, dtype=DOUBLE))
    solution, residual = algorithm.solve(prior, {}, Batch(z, y), 1)
    # Errors of counts of a million are differences of such.
    assert residual < (1e-9 if scale < 1e5 else 1e-7)
    torch.testing.assert_close(
        torch.exp(algorithm.mean(solution, z)), y, rtol=0.3 if scale == 1 else 0.05, atol=1.0 if scale == 1 else 0.0
    )


def test_outliers_do_not_drag_the_prediction() -> None:
    z = torch.cat([randn(10, 1, seed=0), torch.ones(10, 1, dtype=DOUBLE)], -1)
    y = z @ torch.tensor([[1.0], [0.5]], dtype=DOUBLE) + 0.05 * randn(10, 1, seed=1)
    clean = y.clone()
    y[:3] += 30
    algorithm = GeneralizedLinear(likelihood=StudentT())
    prior = algorithm.init_prior(2, 1, like=z)._replace(log_var=torch.full((1, 2), 3.0, dtype=DOUBLE))
    shared = {StudentT.scale_name: torch.tensor([-2.5]).double(), StudentT.degrees_name: torch.tensor([0.0]).double()}
    solution, residual = algorithm.solve(prior, shared, Batch(z, y), 1)
    assert residual < 1e-9
    torch.testing.assert_close(algorithm.mean(solution, z), clean, rtol=0, atol=0.2)


def test_hostile_tasks_are_solved_or_say_so() -> None:
    """A fifth of outliers, tails as heavy as they can be, and hardly more examples than weights."""
    num_tasks, algorithm = 2_000, GeneralizedLinear(likelihood=StudentT())
    x = torch.cat([randn(num_tasks, 7, 3, seed=0), torch.ones(num_tasks, 7, 1, dtype=DOUBLE)], -1)
    is_wrong = torch.rand(num_tasks, 7, 1, generator=generator(1), dtype=DOUBLE) < 0.2
    y = x @ randn(num_tasks, 4, 1, seed=2) + torch.where(is_wrong, 5.0, 0.2) * randn(num_tasks, 7, 1, seed=3)
    shared = {StudentT.scale_name: torch.tensor([-2.3]).double(), StudentT.degrees_name: torch.tensor([-2.0]).double()}
    prior = algorithm.init_prior(4, 1, like=x)

    def loss(theta: Any, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        solution, residual = algorithm.solve(theta, shared, Batch(x[:5], y[:5]), 1)
        return algorithm.outer_loss(solution, shared, Batch(x[5:], y[5:])), residual

    gradient, (losses, residuals) = torch.func.vmap(torch.func.grad_and_value(loss, has_aux=True), (None, 0, 0))(
        prior, x, y
    )
    assert tree.all_finite((gradient, losses, residuals)) and losses.max() < 20
    assert (residuals < 1e-6).double().mean() > 0.99


def test_too_few_steps_are_seen_in_the_gradient_norm() -> None:
    algorithm: Any = GeneralizedLinear(max_newton_steps=1)
    nll, meta, episode = set_up(algorithm, "poisson", 12)
    assert adapted(algorithm, nll, meta, episode)[1] > 1e-4


@names
def test_float32_agrees_with_float64(name: str) -> None:
    algorithm: Any = GeneralizedLinear()
    nll, meta, episode = set_up(algorithm, name, 12)
    found = algorithm.hypergradient(nll, *tree.map(lambda leaf: leaf.float(), (meta, episode)), NO_NOISE)
    expected = algorithm.hypergradient(nll, meta, episode, NO_NOISE)
    assert found[1].outer_loss.dtype == torch.float32 and found[1].inner_grad_norm < 1e-3
    for one, other in zip(tree.leaves(found[0]), tree.leaves(expected[0]), strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-4, atol=1e-5)


def test_one_prior_serves_all_targets_if_tied() -> None:
    tied = GeneralizedLinear(prior=ibaml.priors.FullColumnPrior(tied=True))
    nll, meta, episode = set_up(tied, "poisson")
    copies = meta._replace(prior=tree.map(lambda leaf: leaf.repeat(2, 1), meta.prior))
    each = GeneralizedLinear(prior=ibaml.priors.FullColumnPrior())
    found, expected = (
        algorithm.objective(nll, theta, episode)[0] for algorithm, theta in ((tied, meta), (each, copies))
    )
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("outer", OUTER)
@pytest.mark.parametrize("num_support", [0, 3, 12])
def test_noise_that_depends_on_the_input_gives_weighted_regression(num_support: int, outer: Any) -> None:
    """The logarithm of its variance is linear in the features, with weights that all tasks share."""
    likelihood = Gaussian(num_targets=2, heteroscedastic=True, initial_noise_variance=0.3)
    algorithm = GeneralizedLinear(outer=outer)
    nll = Features(likelihood, 4)
    prior = algorithm.init_prior(NUM_FEATURES + 1, 4, like=torch.zeros(0, dtype=DOUBLE))
    meta = MetaParameters(prior, {"weight": torch.zeros(2, NUM_FEATURES, dtype=DOUBLE)})
    meta = tree.map(lambda leaf: leaf + 0.4 * randn(*leaf.shape, seed=2), meta)
    _, _, episode = set_up(algorithm, "gaussian", num_support)
    info = algorithm.hypergradient(nll, meta, episode, NO_NOISE)[1]
    found = algorithm.outputs(nll, meta.shared, info.inner_params, episode.query.x, {})
    assert found["outputs"].shape == found["output_variance"].shape == (1, 5, 4)

    def noise(z: Tensor, target: int, theta: MetaParameters) -> Tensor:
        return 0.3 * torch.exp(10 * torch.tanh(z @ theta.prior.mean[2 + target] / 10))

    def by_hand(theta: MetaParameters) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        z, asked = (inputs(nll, theta.shared, batch.x) for batch in episode)
        losses, moments = [], []
        for target in range(2):
            prior_mean, precision = theta.prior.mean[target], torch.diag(torch.exp(-theta.prior.log_var[target]))
            weight = z / noise(z, target, theta).unsqueeze(-1)
            covariance = torch.linalg.inv(weight.mT @ z + precision)
            mean = covariance @ (precision @ prior_mean + weight.mT @ episode.support.y[:, target])
            variance, own = torch.diagonal(asked @ covariance @ asked.mT), noise(asked, target, theta)
            moments.append((asked @ mean, variance))
            y = episode.query.y[:, target]
            if outer == "marginal":
                both, all_y = torch.cat([z, asked]), torch.cat([episode.support.y[:, target], y])
                total = both @ torch.linalg.inv(precision) @ both.mT + torch.diag(noise(both, target, theta))
                normal = torch.distributions.MultivariateNormal(both @ prior_mean, total)
                losses.append(-normal.log_prob(all_y) / len(all_y))
            elif outer == "predictive_nll":
                losses.append(-torch.distributions.Normal(asked @ mean, (variance + own).sqrt()).log_prob(y).mean())
            else:
                expected = -torch.distributions.Normal(asked @ mean, own.sqrt()).log_prob(y) + 0.5 * variance / own
                losses.append(expected.mean())
        return torch.stack(losses).sum(), moments

    wanted, moments = by_hand(meta)
    torch.testing.assert_close(info.outer_loss, wanted, rtol=1e-9, atol=1e-9)
    for target, (mean, variance) in enumerate(moments):
        torch.testing.assert_close(found["outputs"][0, :, target], mean, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(found["output_variance"][0, :, target], variance, rtol=1e-9, atol=1e-9)
    assert not found["output_variance"][..., 2:].any()
    gradient = algorithm.hypergradient(nll, meta, episode, NO_NOISE)[0]
    expected = torch.func.grad(lambda theta: by_hand(theta)[0])(meta)
    for one, other in zip(tree.leaves(gradient), tree.leaves(expected), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-9)
    pair = tree.map(lambda leaf: torch.stack([leaf, leaf.flip(0)]), episode)
    batched = torch.func.vmap(lambda one: algorithm.objective(nll, meta, one)[0])(pair)
    torch.testing.assert_close(batched, wanted.expand(2), rtol=1e-9, atol=1e-9)
    drawn = algorithm.draw(
        info.inner_params.solution, inputs(nll, meta.shared, episode.query.x), 7, generator=generator()
    )
    assert drawn.shape == (7, 5, 4)
    torch.testing.assert_close(drawn[..., 2:], found["outputs"][..., 2:].expand(7, -1, -1))


def test_shared_outputs_need_means_of_their_own() -> None:
    likelihood = Gaussian(heteroscedastic=True)
    model = build_model(nn.Linear(2, 2), likelihood)
    for settings in ({"tied": True}, {"learn_mean": False}):
        algorithm = GeneralizedLinear(prior=ibaml.priors.DiagonalColumnPrior(**settings))
        prior = algorithm.init_prior(3, 2, like=torch.zeros(0))
        with pytest.raises(
            ValueError, match="has outputs that all tasks share, which are means of columns of the prior"
        ):
            algorithm.check_task(
                model, MetaParameters(prior, {}), Episode(Batch(*[torch.zeros(1)] * 2), Batch(*[torch.zeros(1)] * 2))
            )


def test_it_says_which_likelihoods_it_solves() -> None:
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Samples(Poisson):
        """One that takes samples of outputs alone."""

        def predict(self, outputs: Tensor, parameters: Params, *, output_variance: Tensor | None = None) -> Any:
            if output_variance is not None:
                raise ValueError("output_variance: takes samples")
            return super().predict(outputs, parameters)

    assert all(solves(likelihood) for likelihood in LIKELIHOODS.values())
    refused: list[Any] = [Categorical(), Samples()]
    assert not any(solves(likelihood) for likelihood in refused)
    algorithm = GeneralizedLinear()
    nll, meta, episode = set_up(algorithm, "poisson")
    algorithm.check_task(SimpleNamespace(likelihood=Poisson()), meta, episode)  # pyright: ignore[reportArgumentType]
    message = "algorithm 'generalized_linear' is for likelihoods of numbers whose predictions take in the variance"
    for likelihood in refused:
        with pytest.raises(ValueError, match=re.escape(message)):
            algorithm.check_task(build_model(nn.Linear(2, 1), likelihood), meta, episode)
    with pytest.raises(ValueError, match="algorithm 'generalized_linear' has no likelihood: set one, such as"):
        algorithm.solve(meta.prior, meta.shared, episode.support, 2)


def test_it_survives_json_and_says_what_it_does() -> None:
    algorithm = make_algorithm("generalized_linear", prior="low_rank", outer="marginal", max_newton_steps=7)
    assert records.from_json(records.to_json(algorithm), RECORDS) == algorithm
    assert algorithm.describe() == "Newton's method to convergence, Laplace posterior"
    assert not algorithm.serves_any_number_of_outputs
    prior = GeneralizedLinear().init_prior(3, 1, like=torch.zeros(0))
    where, wide = GeneralizedLinear().parameter_groups(prior)
    assert where == [prior.mean] and wide == [prior.log_var]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"outer": "elbo"}, "outer must be one of predictive_nll, expected_nll, marginal, but is 'elbo'."),
        ({"max_newton_steps": 0}, "max_newton_steps must be at least 1, got 0"),
        ({"prior": DiagonalPrior()}, "prior must be one of columns such as DiagonalColumnPrior(), but is Diagonal"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        make_algorithm("generalized_linear", **settings)
