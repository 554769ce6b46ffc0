"""Simulation-based calibration: tasks drawn from a prior are predicted as often right as the posterior says.

Of the linear-Gaussian head and of that of generalised linear models the tests of these heads do the same.
"""

import math
from collections.abc import Callable

import pytest
import torch
from scipy import stats

from ibaml import algorithms, tree
from ibaml.algorithms import MetaParameters, TaskNoise
from ibaml.algorithms.heads import GaussianClasses, GaussianProcess, GeneralizedLinear, Softmax
from ibaml.algorithms.model import build_model
from ibaml.data.linear_regression import LinearRegressionTasks
from ibaml.likelihoods import Gaussian
from ibaml.priors import DiagonalColumnPrior, DiagonalGaussian
from ibaml.solvers.inner import NaturalGradient
from ibaml.types import Batch, Tensor

DOUBLE = torch.float64
NUM_FEATURES, NUM_CLASSES = 2, 3


def randn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)


def with_constant(features: Tensor) -> Tensor:
    return torch.cat([features, torch.ones_like(features[..., :1])], -1)


def assert_uniform(probability: Tensor) -> None:
    counts = torch.bincount((20 * probability).long().clamp(0, 19), minlength=20)
    assert stats.chisquare(counts.numpy()).pvalue > 0.01, counts


@pytest.mark.parametrize("num_support", [1, 6])
def test_values_of_a_gaussian_process(num_support: int) -> None:
    """The kernel is written out: lines, and a smooth function about them."""
    head, num_tasks = GaussianProcess(kernels=("linear", "squared_exponential")), 3_000
    prior = head.init_prior(NUM_FEATURES + 1, 1, like=torch.zeros(0, dtype=DOUBLE))
    prior = tree.map(lambda leaf: leaf + 0.3 * randn(*leaf.shape, seed=1), prior)
    shared = {Gaussian.parameter_name: torch.tensor([-1.0], dtype=DOUBLE)}
    z = with_constant(randn(num_tasks, num_support + 1, NUM_FEATURES, seed=2))
    curve = prior.kernels["squared_exponential"]
    scaled = z[..., :-1] / curve.log_length_scale[0].exp()
    kernel = curve.log_variance[0].exp() * torch.exp(-0.5 * torch.cdist(scaled, scaled) ** 2)
    kernel = kernel + (z * prior.kernels["linear"][0].exp()) @ z.mT + 1e-10 * torch.eye(num_support + 1, dtype=DOUBLE)
    values = z @ prior.mean[0] + (torch.linalg.cholesky(kernel) @ randn(*z.shape[:2], 1, seed=3)).squeeze(-1)
    noise = shared[Gaussian.parameter_name].exp().sqrt()
    y = values + noise * randn(*values.shape, seed=4)

    def moments(support: Batch, x: Tensor) -> tuple[Tensor, Tensor]:
        return head.moments(head.solve(prior, shared, support, 1)[0], x)

    mean, variance = torch.func.vmap(moments)(Batch(z[:, :-1], y[:, :-1, None]), z[:, -1:])
    mean, variance = mean.flatten(), variance.flatten()
    assert_uniform(torch.special.ndtr((values[:, -1] - mean) / variance.sqrt()))
    assert_uniform(torch.special.ndtr((y[:, -1] - mean) / (variance + noise**2).sqrt()))


@pytest.mark.parametrize("num_support", [1, 8])
def test_values_whose_noise_depends_on_the_input(num_support: int) -> None:
    """By what is predicted, and also in the fifth of the queries with the least noise and in that with the most."""
    likelihood, num_tasks = Gaussian(heteroscedastic=True, initial_noise_variance=0.3), 3_000
    head = GeneralizedLinear(likelihood=likelihood)
    prior = head.init_prior(NUM_FEATURES + 1, 2, like=torch.zeros((), dtype=DOUBLE))
    prior = tree.map(lambda leaf: leaf + 1.5 * randn(*leaf.shape, seed=5), prior)
    z = with_constant(randn(num_tasks, num_support + 1, NUM_FEATURES, seed=2))
    weights = prior.mean[0] + (0.5 * prior.log_var[0]).exp() * randn(num_tasks, NUM_FEATURES + 1, seed=3)
    values = (z @ weights.unsqueeze(-1)).squeeze(-1)
    noise = 0.3 * torch.exp(10 * torch.tanh(z @ prior.mean[1] / 10))
    y = values + noise.sqrt() * randn(*values.shape, seed=4)

    def found(support: Batch, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mean, variance = head.moments(head.solve(prior, {}, support, 2)[0], x)
        prediction = likelihood.predict(mean.mT.unsqueeze(0), {}, output_variance=variance.mT.unsqueeze(0))
        return prediction.mean, prediction.total_uncertainty, variance[0]

    mean, total, variance = (
        each.flatten() for each in torch.func.vmap(found)(Batch(z[:, :-1], y[:, :-1, None]), z[:, -1:])
    )
    assert_uniform(torch.special.ndtr((values[:, -1] - mean) / variance.sqrt()))
    probability = torch.special.ndtr((y[:, -1] - mean) / total.sqrt())
    assert_uniform(probability)
    by_noise = noise[:, -1].argsort().chunk(5)
    assert float(noise[by_noise[-1], -1].mean() / noise[by_noise[0], -1].mean()) > 10
    for group in (by_noise[0], by_noise[-1]):
        assert_uniform(probability[group])


def assert_frequencies(probs: Tensor, labels: Tensor, *, tolerance: float = 0.0) -> None:
    """In each fifth of the probabilities of each class, it is as frequent as they say, within 3.5 standard errors."""
    for label in range(NUM_CLASSES):
        for group in probs[:, label].argsort().chunk(5):
            p, hits = probs[group, label], (labels[group] == label).double()
            error = math.sqrt(float((p * (1 - p)).mean()) / len(group))
            assert abs(float((hits - p).mean())) < 3.5 * error + tolerance, (label, float(p.mean()), float(hits.mean()))


def draw(probs: Tensor, seed: int) -> Tensor:
    """Classes from probabilities ``[num_tasks, num_examples, num_classes]``."""
    drawn = torch.multinomial(probs.flatten(0, 1), 1, generator=torch.Generator().manual_seed(seed))
    return drawn.reshape(probs.shape[:2])


@pytest.mark.parametrize("num_support", [1, 8])
def test_gaussian_classes_are_as_frequent_as_said(num_support: int) -> None:
    head, num_tasks = GaussianClasses(tied=False), 4_000
    prior = head.init_prior(NUM_FEATURES + 1, NUM_CLASSES, like=torch.zeros((), dtype=DOUBLE))
    prior = tree.map(lambda leaf: leaf + 0.5 * randn(*leaf.shape, seed=1), prior)
    means = prior.mean + (0.5 * prior.log_tau2).exp() * randn(num_tasks, NUM_CLASSES, NUM_FEATURES, seed=2)
    frequency = torch.softmax(prior.log_frequency, 0).expand(num_tasks, num_support + 1, -1)
    labels = draw(frequency, 3)
    centre = means.gather(1, labels.unsqueeze(-1).expand(-1, -1, NUM_FEATURES))
    z = with_constant(centre + (0.5 * prior.log_sigma2).exp() * randn(*centre.shape, seed=4))

    def probabilities(support: Batch, x: Tensor) -> Tensor:
        return head.mean(head.solve(prior, {}, support, NUM_CLASSES)[0], x).softmax(-1)

    probs = torch.func.vmap(probabilities)(Batch(z[:, :-1], labels[:, :-1]), z[:, -1:])
    assert_frequencies(probs[:, 0], labels[:, -1])


@pytest.mark.parametrize("num_support", [2, 8])
def test_softmax_classes_are_as_frequent_as_said(num_support: int) -> None:
    """Laplace's approximation at Bayes' temperature: within a hundredth of what is exact."""
    family, num_tasks = DiagonalColumnPrior(tied=False, learn_mean=True), 3_000
    head = Softmax(prior=family, posterior_temperature=1.0, num_evaluation_samples=64)
    prior = family.init(NUM_FEATURES + 1, NUM_CLASSES, like=torch.zeros((), dtype=DOUBLE))
    prior = tree.map(lambda leaf: leaf + 0.5 * randn(*leaf.shape, seed=1), prior)
    deviation = (0.5 * prior.log_var).exp()
    weights = family.mean(prior) + deviation * randn(num_tasks, NUM_CLASSES, NUM_FEATURES + 1, seed=2)
    z = with_constant(randn(num_tasks, num_support + 1, NUM_FEATURES, seed=3))
    labels = draw((z @ weights.mT).softmax(-1), 4)

    def probabilities(support: Batch, x: Tensor) -> Tensor:
        solution, _ = head.solve(prior, {}, support, NUM_CLASSES)
        return head.predict(solution, {}, x, {})["outputs"].softmax(-1).mean(0)

    probs = torch.func.vmap(probabilities)(Batch(z[:, :-1], labels[:, :-1]), z[:, -1:])
    assert_frequencies(probs[:, 0], labels[:, -1], tolerance=0.01)


@pytest.mark.parametrize(
    "make", [algorithms.ibaml, algorithms.abml, algorithms.vampire], ids=lambda make: make.__name__
)
def test_weights_of_a_linear_model_by_inner_steps(make: Callable[..., algorithms.Algorithm]) -> None:
    """With inputs that are orthogonal the diagonal family holds the posterior; it is found where the steps suffice."""
    settings = {"temperature": 1.0, "inner": NaturalGradient(num_steps=10, learning_rate=1.0)}
    algorithm, num_tasks = make(**settings), 3_000
    mean, variance = torch.tensor([1.0, -0.5], dtype=DOUBLE), torch.tensor([0.5, 1.5], dtype=DOUBLE)
    tasks = LinearRegressionTasks(
        prior_mean=torch.zeros_like(mean),
        prior_variance=variance,
        noise_variance=1.0,
        num_shots=4,
        num_queries=1,
        design="orthogonal",
        dtype=DOUBLE,
    )
    x = tasks.sample(num_tasks, generator=torch.Generator().manual_seed(0)).support.x
    weights = mean + variance.sqrt() * randn(num_tasks, 2, seed=1)
    y = (x @ weights.unsqueeze(-1)) + randn(*x.shape[:2], 1, seed=2)
    model = build_model(torch.nn.Linear(2, 1, bias=False).double(), Gaussian(num_targets=1))
    prior = DiagonalGaussian({"weight": mean.unsqueeze(0)}, {"weight": variance.log().unsqueeze(0)})
    meta = MetaParameters(prior, {Gaussian.parameter_name: torch.zeros(1, dtype=DOUBLE)})
    # Of mean zero and with unit, uncorrelated second moments, so that the expected nll comes out exact.
    signs = torch.tensor([[[1.0, 1.0]], [[1.0, -1.0]], [[-1.0, 1.0]], [[-1.0, -1.0]]], dtype=DOUBLE)
    noise = TaskNoise({"weight": signs}, {"weight": signs})

    def adapt(support: Batch) -> tuple[DiagonalGaussian, Tensor]:
        found = algorithm.adapt(model, meta, support, noise)
        return found.value, found.grad_norm

    posterior, grad_norm = torch.func.vmap(adapt)(Batch(x, y))
    assert float(grad_norm.max()) < 1e-8
    deviation = (0.5 * posterior.log_var["weight"]).exp()
    probability = torch.special.ndtr((weights.unsqueeze(1) - posterior.mean["weight"]) / deviation)
    for weight in probability.flatten(0, 1).mT:
        assert_uniform(weight)
