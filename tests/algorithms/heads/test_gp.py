"""The Gaussian process against scikit-learn, the linear-Gaussian head, dense joint Gaussians and differences."""

import math
import re
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.gaussian_process import GaussianProcessRegressor, kernels
from torch.distributions import MultivariateNormal, Normal

from ibaml import records, tree
from ibaml.algorithms import RECORDS, MetaParameters, TaskNoise, make_algorithm
from ibaml.algorithms.heads import GaussianProcess, LinearGaussian
from ibaml.algorithms.heads.gp import GaussianProcessPrior, kernel_diagonal, kernel_matrix
from ibaml.likelihoods import Gaussian
from ibaml.priors import DiagonalColumnPrior
from ibaml.priors.columns import DiagonalColumns
from ibaml.types import Batch, Episode, Params, Tensor

DOUBLE = torch.float64
NOISE = Gaussian.parameter_name
NO_NOISE = TaskNoise({}, {})
NUM_FEATURES = 2
OUTER = ["predictive_nll", "expected_nll", "marginal"]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Features:
    num_outputs = 2

    def features(self, shared: Params, x: Tensor) -> Tensor:
        return torch.tanh(x @ shared["weight"])


def set_up(algorithm: GaussianProcess, num_support: int = 6) -> tuple[Features, MetaParameters, Episode]:
    """Two targets."""
    source = generator(2)
    prior = algorithm.init_prior(NUM_FEATURES + 1, 2, like=torch.zeros(0, dtype=DOUBLE))
    shared = {"weight": torch.zeros(2, NUM_FEATURES, dtype=DOUBLE), NOISE: torch.full((2,), -1.0, dtype=DOUBLE)}
    meta = tree.map(
        lambda leaf: leaf + 0.5 * torch.randn(leaf.shape, generator=source, dtype=DOUBLE), MetaParameters(prior, shared)
    )
    support, query = (
        Batch(*(torch.randn(size, 2, generator=source, dtype=DOUBLE) for _ in range(2))) for size in (num_support, 5)
    )
    return Features(), meta, Episode(support, query)


def inputs(shared: Params, x: Tensor) -> Tensor:
    hidden = torch.tanh(x @ shared["weight"])
    return torch.cat([hidden, torch.ones_like(hidden[:, :1])], -1)


def joint_by_hand(theta: MetaParameters, x: Tensor, target: int) -> tuple[Tensor, Tensor]:
    """Mean and covariance of the functions of a target, pair by pair."""
    z = inputs(theta.shared, x)
    covariance = torch.zeros(len(z), len(z), dtype=DOUBLE)
    for name, parameters in theta.prior.kernels.items():
        if name == "linear":
            covariance = covariance + z @ torch.diag(parameters[target % len(parameters)].exp()) @ z.mT
            continue
        which = target % len(parameters.log_variance)
        steps = (z[:, None, :-1] - z[None, :, :-1]) / parameters.log_length_scale[which].exp()
        # Off the diagonal alone has the root a derivative.
        diagonal = torch.eye(len(z), dtype=DOUBLE)
        distance = ((steps**2).sum(-1) + diagonal).sqrt() * (1 - diagonal)
        u = math.sqrt(5) * distance
        shape = torch.exp(-0.5 * distance**2) if name == "squared_exponential" else (1 + u + u**2 / 3) * torch.exp(-u)
        covariance = covariance + parameters.log_variance[which].exp() * shape
    mean = torch.zeros(len(z), dtype=DOUBLE)
    if len(theta.prior.mean):
        weights = theta.prior.mean[target % len(theta.prior.mean)]
        mean = z @ weights if len(weights) > 1 else weights.expand(len(z))
    return mean, covariance


def predictive_by_hand(theta: MetaParameters, episode: Episode, target: int) -> tuple[Tensor, Tensor]:
    num_support, noise = len(episode.support.y), theta.shared[NOISE][target].exp()
    mean, covariance = joint_by_hand(theta, torch.cat([batch.x for batch in episode]), target)
    observed = covariance[:num_support, :num_support] + noise * torch.eye(num_support, dtype=DOUBLE)
    gain = covariance[num_support:, :num_support] @ torch.linalg.inv(observed)
    shifted = mean[num_support:] + gain @ (episode.support.y[:, target] - mean[:num_support])
    return shifted, covariance[num_support:, num_support:] - gain @ covariance[:num_support, num_support:]


def outer_by_hand(theta: MetaParameters, episode: Episode, outer: str) -> Tensor:
    losses: list[Tensor] = []
    for target in range(2):
        noise = theta.shared[NOISE][target].exp()
        if outer == "marginal":
            mean, covariance = joint_by_hand(theta, torch.cat([batch.x for batch in episode]), target)
            y = torch.cat([batch.y[:, target] for batch in episode])
            joint = MultivariateNormal(mean, covariance + noise * torch.eye(len(y), dtype=DOUBLE))
            losses.append(-joint.log_prob(y) / len(y))
            continue
        mean, covariance = predictive_by_hand(theta, episode, target)
        variance, y = torch.diagonal(covariance), episode.query.y[:, target]
        if outer == "predictive_nll":
            losses.append(-Normal(mean, (variance + noise).sqrt()).log_prob(y).mean())
        else:
            losses.append((-Normal(mean, noise.sqrt()).log_prob(y) + 0.5 * variance / noise).mean())
    return torch.stack(losses).sum()


def assert_near(actual: Any, expected: Any, tolerance: float) -> None:
    for one, other in zip(tree.leaves(actual), tree.leaves(expected), strict=True):
        assert float((one - other).norm()) <= tolerance * float(other.norm()), f"{one} against {other}"


VARIANTS = [
    {},
    {"kernels": ("squared_exponential",), "mean_function": "zero"},
    {"kernels": ("matern52", "linear", "squared_exponential"), "mean_function": "constant"},
    {"tied": True},
]


@pytest.mark.parametrize("num_support", [0, 6])
@pytest.mark.parametrize("settings", VARIANTS, ids=str)
def test_predictions_are_those_of_conditioned_joint_gaussians(settings: dict[str, Any], num_support: int) -> None:
    algorithm = GaussianProcess(**settings)
    nll, meta, episode = set_up(algorithm, num_support)
    adapted = algorithm.adapt(nll, meta, episode.support, NO_NOISE)
    assert adapted.grad_norm < 1e-12 and adapted.num_steps == 0
    found = algorithm.outputs(nll, meta.shared, adapted.value, episode.query.x, {})
    assert found["outputs"].shape == found["output_variance"].shape == (1, 5, 2)
    for target in range(2):
        mean, covariance = predictive_by_hand(meta, episode, target)
        assert_near(found["outputs"][0, :, target], mean, 1e-10)
        assert_near(found["output_variance"][0, :, target], torch.diagonal(covariance), 1e-10)


@pytest.mark.parametrize("outer", OUTER)
@pytest.mark.parametrize("settings", VARIANTS, ids=str)
def test_hypergradient_is_the_derivative_of_dense_closed_forms(settings: dict[str, Any], outer: Any) -> None:
    algorithm = GaussianProcess(outer=outer, **settings)
    nll, meta, episode = set_up(algorithm)
    gradient, info = algorithm.hypergradient(nll, meta, episode, NO_NOISE)

    def objective(theta: MetaParameters) -> Tensor:
        return outer_by_hand(theta, episode, outer)

    assert_near(info.outer_loss, objective(meta), 1e-10)
    assert_near(gradient, torch.func.grad(objective)(meta), 1e-9)


def test_hypergradient_equals_central_differences_also_at_repeated_inputs() -> None:
    algorithm = GaussianProcess(centre=True)
    nll, meta, episode = set_up(algorithm)
    # Where examples coincide, the distance is at the edge of its domain.
    episode.query.x[:2] = episode.support.x[:2]
    episode.support.x[3] = episode.support.x[4]
    gradient, _ = algorithm.hypergradient(nll, meta, episode, NO_NOISE)
    flat, unravel = tree.ravel(meta)

    def loss(vector: Tensor) -> Tensor:
        return algorithm.hypergradient(nll, unravel(vector), episode, NO_NOISE)[1].outer_loss

    units = 1e-5 * torch.eye(len(flat), dtype=DOUBLE)
    above, below = torch.func.vmap(loss)(torch.cat([flat + units, flat - units])).chunk(2)
    assert_near(gradient, unravel((above - below) / 2e-5), 1e-7)


@pytest.mark.parametrize("name", ["squared_exponential", "matern52"])
def test_equals_scikit_learn(name: str) -> None:
    algorithm = GaussianProcess(kernels=("linear", name), mean_function="zero")
    source = generator(3)
    x, query = (torch.randn(size, 3, generator=source, dtype=DOUBLE) for size in (15, 6))
    y = torch.sin(x.sum(-1))
    lengths, variance, slope, bias, noise = np.array([0.7, 1.3, 2.0]), 1.7, 0.4, 0.9, 0.05
    shape: Any = {"squared_exponential": kernels.RBF, "matern52": lambda scale: kernels.Matern(scale, nu=2.5)}[name]
    # Its linear kernel is sigma_0^2 + x.x'.
    dot = kernels.ConstantKernel(slope) * kernels.DotProduct(math.sqrt(bias / slope))
    regressor = GaussianProcessRegressor(
        dot + kernels.ConstantKernel(variance) * shape(lengths), alpha=noise, optimizer=None
    ).fit(x.numpy(), y.numpy())
    expected_mean, expected_deviation = regressor.predict(query.numpy(), return_std=True)

    def ones(batch: Tensor) -> Tensor:
        return torch.cat([batch, torch.ones_like(batch[:, :1])], -1)

    prior = algorithm.init_prior(4, 1, like=torch.zeros(0, dtype=DOUBLE))
    stationary = prior.kernels[name]._replace(
        log_length_scale=torch.tensor(np.log(lengths)).unsqueeze(0),
        log_variance=torch.tensor([variance], dtype=DOUBLE).log(),
    )
    linear = torch.tensor([[slope, slope, slope, bias]], dtype=DOUBLE).log()
    prior = prior._replace(kernels={"linear": linear, name: stationary})
    shared = {NOISE: torch.tensor([noise], dtype=DOUBLE).log()}
    solution, residual = algorithm.solve(prior, shared, Batch(ones(x), y.unsqueeze(-1)), 1)
    found = algorithm.predict(solution, shared, ones(query), {})
    assert residual < 1e-12
    np.testing.assert_allclose(found["outputs"][0, :, 0], expected_mean, rtol=1e-10)
    np.testing.assert_allclose(found["output_variance"][0, :, 0].sqrt(), expected_deviation, rtol=1e-8)
    evidence, num_support = algorithm.support_nll(solution)
    np.testing.assert_allclose(-evidence, regressor.log_marginal_likelihood_value_, rtol=1e-10)
    assert num_support == 15


@pytest.mark.parametrize("outer", OUTER)
@pytest.mark.parametrize("num_support", [2, 20])
def test_linear_kernel_alone_is_the_linear_gaussian_head(num_support: int, outer: Any) -> None:
    algorithm = GaussianProcess(kernels=("linear",), outer=outer)
    nll, meta, episode = set_up(algorithm, num_support)
    head = LinearGaussian(outer=outer)
    columns = meta._replace(prior=DiagonalColumns(meta.prior.mean, meta.prior.kernels["linear"]))
    gradient, info = algorithm.hypergradient(nll, meta, episode, NO_NOISE)
    expected, expected_info = head.hypergradient(nll, columns, episode, NO_NOISE)
    assert_near(info.outer_loss, expected_info.outer_loss, 1e-10)
    assert_near([gradient.prior.mean, gradient.prior.kernels["linear"]], list(expected.prior), 1e-9)
    assert_near(gradient.shared, expected.shared, 1e-9)
    found, wanted = (
        each.outputs(nll, meta.shared, posterior, episode.query.x, {})
        for each, posterior in ((algorithm, info.inner_params), (head, expected_info.inner_params))
    )
    assert_near(found, wanted, 1e-10)


def test_first_kernels_have_the_variance_that_was_asked_for() -> None:
    algorithm = GaussianProcess(initial_variance=3.0, initial_bias_variance=0.2, initial_length_scale=0.5)
    prior = algorithm.init_prior(5, 2, like=torch.zeros(0, dtype=DOUBLE))
    unit = torch.ones(1, 5, dtype=DOUBLE)
    torch.testing.assert_close(kernel_diagonal(prior, unit), torch.full((2, 1), 3.2, dtype=DOUBLE))
    torch.testing.assert_close(kernel_matrix(prior, unit, unit)[:, 0], kernel_diagonal(prior, unit))
    assert_near(prior.kernels["matern52"].log_length_scale.exp(), torch.ones(2, 4, dtype=DOUBLE), 1e-12)
    alike = DiagonalColumnPrior(initial_variance=1.5, initial_bias_variance=0.2).init(5, 2, like=prior.mean)
    assert_near(prior.kernels["linear"], alike.log_var, 1e-12)


@pytest.mark.parametrize("outer", OUTER)
def test_vmap_over_tasks_equals_the_loop(outer: Any) -> None:
    algorithm = GaussianProcess(outer=outer)
    nll, meta, episode = set_up(algorithm)
    episodes = [episode, tree.map(lambda leaf: leaf.flip(0) + 0.1, episode)]
    stacked = tree.map(lambda *leaves: torch.stack(leaves), *episodes)
    found = torch.func.vmap(lambda e: algorithm.hypergradient(nll, meta, e, NO_NOISE))(stacked)
    for i, each in enumerate(episodes):
        expected = algorithm.hypergradient(nll, meta, each, NO_NOISE)
        for actual, wanted in zip(tree.leaves(found), tree.leaves(expected), strict=True):
            torch.testing.assert_close(actual[i], wanted, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("num_support", [1, 600])
def test_one_example_and_many_with_little_noise_in_float32(num_support: int) -> None:
    algorithm = GaussianProcess()
    source = generator(4)
    support, query = (torch.randn(size, 3, generator=source) for size in (num_support, 50))
    one = torch.ones(1)
    prior = algorithm.init_prior(4, 1, like=one)
    shared = {NOISE: torch.full((1,), math.log(1e-8))}

    def examples(x: Tensor) -> Batch:
        return Batch(torch.cat([x, one.expand(len(x), 1)], -1), torch.sin(x.sum(-1, keepdim=True)))

    def loss(theta: GaussianProcessPrior) -> Tensor:
        solution, _ = algorithm.solve(theta, shared, examples(support), 1)
        return algorithm.outer_loss(solution, shared, examples(query))

    gradient, value = torch.func.grad_and_value(loss)(prior)
    assert torch.isfinite(value) and all(torch.isfinite(leaf).all() for leaf in tree.leaves(gradient))
    solution, residual = algorithm.solve(prior, shared, examples(support), 1)
    again = algorithm.predict(solution, shared, examples(support).x, {})
    assert residual < 1e-6
    # Without noise the function goes through its examples, and is known there.
    assert (again["outputs"][0] - examples(support).y).abs().max() < 1e-2
    assert (again["output_variance"] >= 0).all() and again["output_variance"].max() < 1e-7


def test_what_is_where_and_what_is_wide() -> None:
    algorithm = GaussianProcess()
    _, meta, _ = set_up(algorithm)
    where, wide = algorithm.parameter_groups(meta.prior)
    assert where == [meta.prior.mean]
    assert len(wide) == 3 and all(any(leaf is each for each in wide) for leaf in tree.leaves(meta.prior.kernels))
    assert algorithm.describe() == "exact Gaussian process, kernel linear + matern52, linear mean"
    assert algorithm.is_bayesian and algorithm.temperature == 1.0


def test_an_algorithm_survives_json() -> None:
    algorithm = make_algorithm("gp", kernels=("matern52",), outer="marginal", tied=True)
    assert records.from_json(records.to_json(algorithm), RECORDS) == algorithm


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"kernels": ()},
            "kernels must be some of linear, squared_exponential, matern52, each once, but are ().",
        ),
        ({"kernels": ("cosine",)}, "each once, but are ('cosine',)."),
        ({"kernels": ("linear", "linear")}, "each once, but are ('linear', 'linear')."),
        ({"mean_function": "cubic"}, "mean_function must be one of zero, constant, linear, but is 'cubic'."),
        ({"initial_variance": 0.0}, "initial_variance must be positive and finite, but is 0.0."),
        ({"initial_length_scale": math.inf}, "initial_length_scale must be positive and finite, but is inf."),
        ({"outer": "elbo"}, "outer must be one of predictive_nll, expected_nll, marginal, but is 'elbo'."),
    ],
)
def test_settings_that_cannot_work_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        make_algorithm("gp", **settings)
