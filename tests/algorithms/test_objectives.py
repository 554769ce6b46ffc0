"""Inner and outer losses against closed forms and torch.distributions."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributions import Gamma, Normal

from ibaml import tree
from ibaml.algorithms import objectives
from ibaml.priors import PointPrior
from ibaml.priors.diagonal import DiagonalGaussian, hyper_prior_nll, kl_divergence, natural_gradient, sample_noise
from ibaml.types import Batch, Params, Tensor

ALGEBRA = 1e-10
NOISE_VARIANCE = 0.3

seeds = st.integers(0, 2**20)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def random_gaussian(seed: int, *shape: int) -> DiagonalGaussian:
    return DiagonalGaussian({"w": draw(*shape, seed=seed)}, {"w": 0.5 * draw(*shape, seed=seed + 1) - 1})


def regression_nll(weights: Params, batch: Batch) -> Tensor:
    """Linear regression with known noise, ``[N]``."""
    residual = batch.y - batch.x @ weights["w"]
    return 0.5 * (residual**2 / NOISE_VARIANCE + math.log(2 * math.pi * NOISE_VARIANCE))


def classification_nll(weights: Params, batch: Batch) -> Tensor:
    return torch.nn.functional.cross_entropy(torch.tanh(batch.x @ weights["w"]) * 3, batch.y, reduction="none")


def exact_expected_nll(posterior: DiagonalGaussian, batch: Batch) -> Tensor:
    """``E_q[(y - x^T w)^2] = (y - x^T m)^2 + sum_i x_i^2 d_i``, mean over the examples."""
    spread = (batch.x**2) @ posterior.log_var["w"].exp()
    return (regression_nll(posterior.mean, batch) + 0.5 * spread / NOISE_VARIANCE).mean()


def exact_posterior(prior: DiagonalGaussian, batch: Batch) -> DiagonalGaussian:
    """The minimiser of the negative ELBO of Bayesian linear regression among diagonal Gaussians (temperature 1)."""
    precision = torch.exp(-prior.log_var["w"])
    full = batch.x.T @ batch.x / NOISE_VARIANCE + torch.diag(precision)
    mean = torch.linalg.solve(full, precision * prior.mean["w"] + batch.x.T @ batch.y / NOISE_VARIANCE)
    return DiagonalGaussian({"w": mean}, {"w": -torch.log(torch.diagonal(full))})


def regression_batch(num_examples: int = 6, num_weights: int = 3, seed: int = 50) -> Batch:
    return Batch(draw(num_examples, num_weights, seed=seed), draw(num_examples, seed=seed + 1))


@pytest.mark.parametrize(("num_support", "temperature", "expected"), [(5, 1.0, 0.2), (4, 0.01, 0.0025), (1, 2.0, 2.0)])
def test_kl_weight_is_the_temperature_over_the_support_size(
    num_support: int, temperature: float, expected: float
) -> None:
    assert objectives.kl_weight(num_support, temperature) == pytest.approx(expected, rel=1e-15)


def test_kl_weight_defaults_to_exact_bayes() -> None:
    assert objectives.kl_weight(10) == 0.1


@pytest.mark.parametrize("num_support", [0, -2])
def test_kl_weight_refuses_an_empty_support_set(num_support: int) -> None:
    with pytest.raises(ValueError, match=f"num_support must be at least 1, but is {num_support}."):
        objectives.kl_weight(num_support)


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.inf, math.nan])
def test_kl_weight_refuses_a_temperature_out_of_range(temperature: float) -> None:
    with pytest.raises(ValueError, match=f"temperature must be positive and finite, but is {temperature}."):
        objectives.kl_weight(5, temperature)


def test_sampled_nll_has_one_row_for_every_draw() -> None:
    posterior, batch, noise = random_gaussian(0, 3), regression_batch(), {"w": draw(4, 3, seed=9)}
    table = objectives.sampled_nll(regression_nll, posterior, noise, batch)
    assert table.shape == (4, 6)
    for row, e in zip(table, noise["w"], strict=True):
        weights = {"w": posterior.mean["w"] + posterior.log_var["w"].exp().sqrt() * e}
        torch.testing.assert_close(row, regression_nll(weights, batch), rtol=ALGEBRA, atol=ALGEBRA)


@settings(deadline=None, max_examples=30)
@given(seed=seeds, num_samples=st.integers(1, 6))
def test_expected_and_predictive_nll_equal_their_definitions_and_obey_jensen(seed: int, num_samples: int) -> None:
    posterior = random_gaussian(seed, 3, 4)
    batch = Batch(draw(5, 3, seed=seed + 2), torch.tensor([0, 1, 2, 3, 0]))
    noise = {"w": draw(num_samples, 3, 4, seed=seed + 3)}
    draws = [posterior.sample({"w": e}) for e in noise["w"]]
    likelihoods = torch.stack([torch.exp(-classification_nll(weights, batch)) for weights in draws])
    expected = objectives.expected_nll(classification_nll, posterior, noise, batch)
    predictive = objectives.predictive_nll(classification_nll, posterior, noise, batch)
    torch.testing.assert_close(expected, -likelihoods.log().mean(), rtol=ALGEBRA, atol=ALGEBRA)
    torch.testing.assert_close(predictive, -likelihoods.mean(0).log().mean(), rtol=ALGEBRA, atol=ALGEBRA)
    assert predictive <= expected + ALGEBRA
    if num_samples > 1:
        assert predictive < expected


def test_predictive_nll_survives_likelihoods_that_underflow() -> None:
    nlls = torch.tensor([2000.0, 2001.0], dtype=torch.float64)

    def nll(weights: Params, batch: Batch) -> Tensor:
        del batch
        return weights["w"].reshape(1)

    posterior = DiagonalGaussian({"w": torch.zeros(()).double()}, {"w": torch.zeros(()).double()})
    value = objectives.predictive_nll(nll, posterior, {"w": nlls}, regression_batch())
    # -log((e^-2000 + e^-2001) / 2)
    assert float(value) == pytest.approx(2000 - math.log1p(math.exp(-1)) + math.log(2), rel=1e-14)


@pytest.mark.parametrize("antithetic", [False, True])
def test_expected_nll_of_a_linear_gaussian_model_lies_within_five_standard_errors(antithetic: bool) -> None:
    posterior, batch, num_samples = random_gaussian(0, 3), regression_batch(), 4000
    noise = sample_noise(posterior.mean, num_samples, generator=torch.Generator().manual_seed(0), antithetic=antithetic)
    per_draw = objectives.sampled_nll(regression_nll, posterior, noise, batch).mean(1)
    if antithetic:
        per_draw = 0.5 * (per_draw[: num_samples // 2] + per_draw[num_samples // 2 :])
    standard_error = per_draw.std() / math.sqrt(len(per_draw))
    estimate = objectives.expected_nll(regression_nll, posterior, noise, batch)
    assert (estimate - exact_expected_nll(posterior, batch)).abs() <= 5 * standard_error
    assert standard_error < 0.05 * estimate.abs()


def test_gradient_of_the_expected_nll_lies_within_five_standard_errors() -> None:
    posterior, batch, num_samples = random_gaussian(0, 3), regression_batch(), 2000
    noise = sample_noise(posterior.mean, num_samples, generator=torch.Generator().manual_seed(1))

    def gradient_of_one(e: Tensor) -> DiagonalGaussian:
        return torch.func.grad(lambda q: objectives.expected_nll(regression_nll, q, {"w": e[None]}, batch))(posterior)

    samples = torch.func.vmap(gradient_of_one)(noise["w"])
    exact = torch.func.grad(lambda q: exact_expected_nll(q, batch))(posterior)
    for part in ("mean", "log_var"):
        values = getattr(samples, part)["w"]
        error = (values.mean(0) - getattr(exact, part)["w"]).abs()
        assert (error <= 5 * values.std(0) / math.sqrt(num_samples)).all()


@settings(deadline=None, max_examples=20)
@given(seed=seeds, weight=st.floats(1e-3, 2.0))
def test_negative_elbo_is_the_sum_of_its_terms(seed: int, weight: float) -> None:
    posterior, prior = random_gaussian(seed, 3), random_gaussian(seed + 5, 3)
    expected = draw(seed=seed)
    value = objectives.negative_elbo(expected, posterior, prior, weight)
    torch.testing.assert_close(value, expected + weight * kl_divergence(posterior, prior), rtol=ALGEBRA, atol=ALGEBRA)


@settings(deadline=None, max_examples=20)
@given(seed=seeds)
def test_closed_form_posterior_of_linear_regression_is_stationary(seed: int) -> None:
    prior, batch = random_gaussian(seed, 3), regression_batch(seed=seed + 7)

    def loss(posterior: DiagonalGaussian) -> Tensor:
        return objectives.negative_elbo(
            exact_expected_nll(posterior, batch), posterior, prior, objectives.kl_weight(len(batch.y))
        )

    gradient = torch.func.grad(loss)(exact_posterior(prior, batch))
    assert tree.norm(gradient) <= 1e-9


def test_natural_gradient_divides_by_the_diagonal_of_the_hessian_at_the_optimum() -> None:
    prior, batch = random_gaussian(0, 3), regression_batch()
    weight = objectives.kl_weight(len(batch.y))
    optimum = exact_posterior(prior, batch)
    flat, unravel = tree.ravel(optimum)

    def loss(vector: Tensor) -> Tensor:
        posterior = unravel(vector)
        return objectives.negative_elbo(exact_expected_nll(posterior, batch), posterior, prior, weight)

    hessian = torch.func.hessian(loss)(flat)
    # The direction is linear in a small gradient; its second-order term is of the size of the gradient.
    gradient = unravel(1e-9 * draw(6, seed=3))
    direction = natural_gradient(weight)(optimum, gradient)
    torch.testing.assert_close(
        tree.ravel(direction)[0], tree.ravel(gradient)[0] / torch.diagonal(hessian), rtol=1e-6, atol=0
    )


def test_natural_gradient_is_the_newton_direction_of_an_orthogonal_design() -> None:
    prior = random_gaussian(0, 3)
    basis = torch.linalg.qr(draw(6, 3, seed=1))[0]
    batch = Batch(basis * torch.tensor([1.0, 2.0, 3.0]).double(), draw(6, seed=2))
    weight = objectives.kl_weight(6)
    optimum = exact_posterior(prior, batch)
    flat, unravel = tree.ravel(optimum)

    def loss(vector: Tensor) -> Tensor:
        posterior = unravel(vector)
        return objectives.negative_elbo(exact_expected_nll(posterior, batch), posterior, prior, weight)

    gradient = 1e-9 * draw(6, seed=3)
    newton = torch.linalg.solve(torch.func.hessian(loss)(flat), gradient)
    direction = natural_gradient(weight)(optimum, unravel(gradient))
    torch.testing.assert_close(tree.ravel(direction)[0], newton, rtol=1e-6, atol=0)


@pytest.mark.parametrize("start", [-6.0, 0.0, 2.0])
def test_one_full_natural_step_solves_an_orthogonal_design(start: float) -> None:
    # Each variance goes straight to its optimum unless it has to grow more than tenfold.
    prior = random_gaussian(0, 3)
    basis = torch.linalg.qr(draw(6, 3, seed=1))[0]
    batch = Batch(basis * torch.tensor([1.0, 2.0, 3.0]).double(), draw(6, seed=2))
    weight = objectives.kl_weight(6)
    optimum = exact_posterior(prior, batch)
    posterior = DiagonalGaussian(prior.mean, {name: torch.full_like(v, start) for name, v in prior.log_var.items()})

    def loss(q: DiagonalGaussian) -> Tensor:
        return objectives.negative_elbo(exact_expected_nll(q, batch), q, prior, weight)

    steps = 0
    while float(tree.norm(tree.sub(posterior, optimum))) > 1e-9:
        direction = natural_gradient(weight)(posterior, torch.func.grad(loss)(posterior))
        largest_growth = -tree.ravel(direction.log_var)[0].min()
        assert largest_growth <= math.log(10) + 1e-12
        posterior = tree.sub(posterior, direction)
        steps += 1
        assert steps <= 4
    assert (steps == 1) == (start >= 0.0)


@settings(deadline=None, max_examples=20)
@given(seed=seeds)
def test_divergence_of_points_is_half_a_squared_distance_with_the_gradient_that_it_states(seed: int) -> None:
    weights = {"a": draw(2, seed=seed), "b": draw(3, seed=seed + 1)}
    centre = {"a": draw(2, seed=seed + 2), "b": draw(3, seed=seed + 3)}
    difference = tree.ravel(weights)[0] - tree.ravel(centre)[0]
    penalty = PointPrior().divergence(weights, centre)
    torch.testing.assert_close(penalty, difference @ difference / 2, rtol=ALGEBRA, atol=ALGEBRA)
    gradient = torch.func.grad(PointPrior().divergence)(weights, centre)
    torch.testing.assert_close(tree.ravel(gradient)[0], difference, rtol=ALGEBRA, atol=ALGEBRA)
    stated = PointPrior().divergence_gradient(weights, centre)
    torch.testing.assert_close(stated, gradient, rtol=ALGEBRA, atol=ALGEBRA)


def test_divergence_of_points_is_a_gaussian_prior_up_to_a_constant() -> None:
    centre, strength = {"w": draw(3)}, 2.5
    prior = Normal(centre["w"], strength**-0.5)

    def gap(seed: int) -> Tensor:
        weights = {"w": draw(3, seed=seed)}
        return strength * PointPrior().divergence(weights, centre) + prior.log_prob(weights["w"]).sum()

    torch.testing.assert_close(gap(1), gap(2), rtol=ALGEBRA, atol=ALGEBRA)


@settings(deadline=None, max_examples=30)
@given(seed=seeds, shape=st.floats(0.5, 3.0), rate=st.floats(1e-3, 2.0))
def test_hyper_prior_equals_torch_distributions(seed: int, shape: float, rate: float) -> None:
    prior = random_gaussian(seed, 4)
    precision = torch.exp(-prior.log_var["w"])
    gamma = Gamma(torch.tensor(shape, dtype=torch.float64), torch.tensor(rate, dtype=torch.float64))
    oracle = -Normal(0.0, 1.0).log_prob(prior.mean["w"]).sum() - gamma.log_prob(precision).sum()
    value = hyper_prior_nll(prior, shape=shape, rate=rate)
    torch.testing.assert_close(value, oracle, rtol=ALGEBRA, atol=ALGEBRA)


def test_hyper_prior_has_the_defaults_of_abml() -> None:
    prior = random_gaussian(0, 4)
    assert hyper_prior_nll(prior) == hyper_prior_nll(prior, shape=1.0, rate=0.01)
