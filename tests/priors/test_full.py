"""Gaussians with a full covariance, against torch.distributions and exact Bayesian linear regression."""

import dataclasses
import math
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributions import MultivariateNormal

from ibaml import algorithms, tree
from ibaml.algorithms import Algorithm, MetaParameters, TaskNoise
from ibaml.algorithms.model import Model, build_model
from ibaml.likelihoods import Gaussian
from ibaml.priors import FullGaussian, FullPrior
from ibaml.solvers.inner import Adam, GradientDescent, NaturalGradient, RelativeAdam
from ibaml.solvers.linear import CG
from ibaml.types import Batch, Episode, Params, PyTree, Tensor

DOUBLE = torch.float64
NOISE_VARIANCE = 0.2


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_gaussian(seed: int, size: int = 4) -> FullGaussian:
    source = generator(seed)
    mean, log_scale, lower = (
        0.5 * torch.randn(n, generator=source, dtype=DOUBLE) for n in (size, size, size * (size - 1) // 2)
    )
    return FullGaussian({"w": mean}, {"w": log_scale}, lower)


def as_torch(q: FullGaussian) -> MultivariateNormal:
    return MultivariateNormal(tree.ravel(q.mean)[0], scale_tril=q.factor())


@pytest.mark.parametrize("seed", range(5))
def test_divergence_equals_torch_distributions(seed: int) -> None:
    posterior, prior = random_gaussian(seed), random_gaussian(seed + 10)
    expected = torch.distributions.kl_divergence(as_torch(posterior), as_torch(prior))
    torch.testing.assert_close(FullPrior().divergence(posterior, prior), expected, rtol=1e-10, atol=1e-10)


def test_factor_has_the_entries_row_after_row() -> None:
    q = FullGaussian({"w": torch.zeros(3)}, {"w": torch.tensor([0.0, 2.0, 4.0]).log()}, torch.tensor([1.0, 2.0, 3.0]))
    expected = torch.tensor([[0.0, 0.0, 0.0], [2.0, 2.0, 0.0], [8.0, 12.0, 4.0]])
    torch.testing.assert_close(q.factor(), expected)
    torch.testing.assert_close(q.covariance(), expected @ expected.mT)


def test_samples_have_the_covariance() -> None:
    q = random_gaussian(0)
    noise = FullPrior().draw_noise(q, 100_000, generator=generator(1))
    found = torch.cov(q.sample(noise)["w"].mT)
    deviation = torch.diagonal(q.covariance()).sqrt()
    # Five standard errors of an estimated covariance, at most sqrt(2 / n) s_i s_j.
    assert ((found - q.covariance()).abs() < 5 * math.sqrt(2 / 100_000) * deviation.outer(deviation)).all()


@pytest.mark.parametrize("seed", range(3))
def test_curvature_is_that_of_the_divergence_at_the_prior(seed: int) -> None:
    prior, weight = random_gaussian(seed), 0.3
    flat, unravel = tree.ravel(prior)
    hessian = torch.func.hessian(lambda vector: weight * FullPrior().divergence(unravel(vector), prior))(flat)
    known = tree.ravel(FullPrior().geometry(prior, weight).curvature())[0]
    torch.testing.assert_close(known[4:], torch.diagonal(hessian)[4:], rtol=1e-10, atol=1e-10)
    assert (known[:4] == 0).all()


def test_hyper_prior_is_that_of_the_marginals() -> None:
    prior = random_gaussian(0)
    variance = torch.diagonal(prior.covariance())
    gamma = torch.distributions.Gamma(torch.tensor(1.0, dtype=DOUBLE), torch.tensor(0.01, dtype=DOUBLE))
    expected = (
        -torch.distributions.Normal(0.0, 1.0).log_prob(prior.mean["w"]).sum() - gamma.log_prob(1 / variance).sum()
    )
    torch.testing.assert_close(FullPrior().hyper_prior_nll(prior), expected, rtol=1e-10, atol=0)


def test_appended_weights_are_independent_and_go_without_trace() -> None:
    q, other = random_gaussian(0), random_gaussian(1)
    longer, longer_other = (
        FullPrior().map(lambda p: {"w": torch.cat([p["w"], p["w"].new_zeros(3)])}, each) for each in (q, other)
    )
    torch.testing.assert_close(longer.covariance()[:4, :4], q.covariance(), rtol=1e-14, atol=0)
    torch.testing.assert_close(longer.covariance()[4:], torch.eye(7, dtype=DOUBLE)[4:], rtol=0, atol=0)
    divergence = FullPrior().divergence
    torch.testing.assert_close(divergence(longer, longer_other), divergence(q, other), rtol=1e-12, atol=1e-12)
    back = FullPrior().map(lambda p: {"w": p["w"][:4]}, longer)
    assert all(torch.equal(a, b) for a, b in zip(tree.leaves(back), tree.leaves(q), strict=True))


def test_too_many_weights_are_refused() -> None:
    message = r"a covariance of 2001 weights has 4004001 entries; expected at most 2000 adapted weights: adapt fewer"
    with pytest.raises(ValueError, match=message):
        FullPrior().init({"w": torch.zeros(2001)}, generator=generator())


def test_a_range_that_is_none_is_refused() -> None:
    with pytest.raises(ValueError, match=r"initial_log_var must be \(low, high\) with low <= high, but is \(1"):
        FullPrior(initial_log_var=(1.0, 0.0))


# A linear model: the expected nll is quadratic, noise with unit second moments makes its samples exact, and the
# posterior is Bayes' rule with all covariances.
def linear_task(prior: FullGaussian) -> tuple[Model, MetaParameters, Episode, TaskNoise]:
    source = generator(3)
    model = build_model(nn.Linear(3, 1, bias=False).double(), Gaussian())
    x, x_query = (torch.randn(n, 3, generator=source, dtype=DOUBLE) for n in (5, 7))
    weights = torch.tensor([[1.0], [-0.5], [0.8]], dtype=DOUBLE)
    episode = Episode(Batch(x, x @ weights + 0.3), Batch(x_query, x_query @ weights))
    signs = torch.tensor([[1, 1, 1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1]], dtype=DOUBLE)
    noise = {"weight": signs.unsqueeze(1)}
    shared = {Gaussian.parameter_name: torch.tensor([math.log(NOISE_VARIANCE)], dtype=DOUBLE)}
    named = FullGaussian({"weight": prior.mean["w"][None]}, {"weight": prior.log_scale["w"][None]}, prior.lower)
    return model, MetaParameters(named, shared), episode, TaskNoise(noise, noise)


def solution(meta: MetaParameters, support: Batch) -> tuple[Tensor, Tensor]:
    """Mean and covariance by Bayes' rule."""
    precision = torch.linalg.inv(meta.prior.covariance())
    noise = torch.exp(meta.shared[Gaussian.parameter_name])
    covariance = torch.linalg.inv(support.x.mT @ support.x / noise + precision)
    return covariance @ (precision @ meta.prior.mean["weight"][0] + support.x.mT @ support.y[:, 0] / noise), covariance


@pytest.mark.parametrize("inner", [NaturalGradient(num_steps=2, learning_rate=1.0), RelativeAdam(num_steps=300)])
def test_adaptation_is_exact_bayes(inner: Any) -> None:
    model, meta, episode, noise = linear_task(random_gaussian(0, 3))
    algorithm = algorithms.ibaml(prior=FullPrior(), temperature=1.0, inner=inner)
    adapted = algorithm.adapt(model, meta, episode.support, noise)
    mean, covariance = solution(meta, episode.support)
    tolerance = 1e-10 if isinstance(inner, NaturalGradient) else 1e-2
    torch.testing.assert_close(adapted.value.mean["weight"][0], mean, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(adapted.value.covariance(), covariance, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("temperature", [1.0, 0.3])
def test_implicit_gradient_is_the_derivative_of_bayes_rule(temperature: float) -> None:
    model, meta, episode, noise = linear_task(random_gaussian(0, 3))
    algorithm = algorithms.ibaml(
        prior=FullPrior(),
        temperature=temperature,
        inner=NaturalGradient(num_steps=2, learning_rate=1.0),
        linear=CG(max_steps=60, rtol=1e-14),
    )
    gradient, info = algorithm.hypergradient(model, meta, episode, noise)
    assert info.inner_grad_norm < 1e-10

    def outer_loss(theta: MetaParameters) -> Tensor:
        # F = L + T / N KL is the problem of Bayes' rule with the noise variance times T.
        shared = {name: value + math.log(temperature) for name, value in theta.shared.items()}
        mean, covariance = solution(MetaParameters(theta.prior, shared), episode.support)
        error = (episode.query.y[:, 0] - episode.query.x @ mean) ** 2
        variance = torch.einsum("ni,ij,nj->n", episode.query.x, covariance, episode.query.x)
        log_noise = theta.shared[Gaussian.parameter_name]
        return 0.5 * ((error + variance) * torch.exp(-log_noise) + log_noise + math.log(2 * math.pi)).mean()

    assert relative_error(gradient, torch.func.grad(outer_loss)(meta)) < 1e-8


def relative_error(actual: PyTree, expected: PyTree) -> float:
    pairs = zip(tree.leaves(actual), tree.leaves(expected), strict=True)
    return max(float((a - b).norm() / b.norm()) for a, b in pairs)


@pytest.mark.parametrize(
    "algorithm",
    [
        algorithms.vampire(inner=GradientDescent(num_steps=3, learning_rate=0.05), prior=FullPrior()),
        algorithms.abml(inner=Adam(num_steps=3), prior=FullPrior(), hyper_prior_weight=0.01),
        algorithms.vampire(
            inner=GradientDescent(num_steps=3, curvature_rate=0.2), prior=FullPrior(), outer="predictive_nll"
        ),
    ],
    ids=["vampire", "abml", "curvature_rate"],
)
def test_unrolled_hypergradients_equal_central_differences(algorithm: Algorithm) -> None:
    model, meta, episode, noise = linear_task(random_gaussian(0, 3))
    gradient, _ = algorithm.hypergradient(model, meta, episode, noise)
    flat, unravel = tree.ravel(meta)
    step = 1e-5 * torch.eye(len(flat), dtype=DOUBLE)

    def loss(vector: Tensor) -> Tensor:
        return algorithm.hypergradient(model, unravel(vector), episode, noise)[1].outer_loss

    ahead, behind = (torch.stack([loss(flat + sign * each) for each in step]) for sign in (1, -1))
    assert relative_error(gradient, unravel((ahead - behind) / 2e-5)) < 1e-6


def test_vmap_over_tasks_equals_the_loop() -> None:
    algorithm = algorithms.ibaml(prior=FullPrior(), inner=GradientDescent(num_steps=3), num_samples=2)
    model, meta, _, _ = linear_task(random_gaussian(0, 3))
    source = generator(5)

    def batch() -> Batch:
        return Batch(*(torch.randn(4, n, generator=source, dtype=DOUBLE) for n in (3, 1)))

    tasks = [(Episode(batch(), batch()), algorithm.draw_noise(meta, generator=source)) for _ in range(3)]
    stacked = tree.map(lambda *leaves: torch.stack(leaves), *tasks)
    gradients, _ = torch.func.vmap(partial(algorithm.hypergradient, model, meta))(*stacked)
    for i, task in enumerate(tasks):
        expected, _ = algorithm.hypergradient(model, meta, *task)
        for actual, wanted in zip(tree.leaves(gradients), tree.leaves(expected), strict=True):
            torch.testing.assert_close(actual[i], wanted, rtol=1e-9, atol=1e-12)


def test_every_algorithm_on_distributions_takes_the_family_by_name() -> None:
    for make in (algorithms.abml, algorithms.vampire, algorithms.ibaml):
        assert dataclasses.replace(make(), prior=FullPrior()) == make(prior="full")
    draws: Params = FullPrior().draw_noise(random_gaussian(0), 3, generator=generator())
    assert draws["w"].shape == (3, 4)
