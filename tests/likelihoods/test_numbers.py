"""Student t, Poisson and input-dependent noise against torch.distributions and scipy; what each is for, by learning."""

import dataclasses
import math

import numpy as np
import pytest
import scipy.stats
import torch
from torch import distributions

from ibaml import MetaLearner
from ibaml.likelihoods import (
    Gaussian,
    GaussianComponents,
    Likelihood,
    MixturePrediction,
    Poisson,
    PoissonComponents,
    StudentT,
    StudentTComponents,
)
from ibaml.types import Tensor

ALGEBRA = {"rtol": 1e-10, "atol": 1e-10}
LEVELS = (1e-6, 0.01, 0.3, 0.5, 0.9, 0.999)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def parameters_of(likelihood: Likelihood) -> dict[str, Tensor]:
    return {name: value.double() + 0.3 * draw(*value.shape) for name, value in likelihood.initial_parameters().items()}


SCALE, DEGREES = torch.tensor([0.5, 2.0]).double(), torch.tensor([2.5, 30.0]).double()
STUDENT_T = MixturePrediction(StudentTComponents(draw(4, 3, 2), SCALE, DEGREES))
POISSON = MixturePrediction(PoissonComponents(2 * draw(4, 3, 2) + 1))
HETEROSCEDASTIC = MixturePrediction(GaussianComponents(draw(4, 3, 2), draw(4, 3, 2, seed=1).exp()))
ANALYTIC = MixturePrediction(GaussianComponents(draw(1, 3, 2), torch.ones(2).double(), draw(1, 3, 2, seed=1).exp()))
COMPONENTS = {
    "student_t": (STUDENT_T, lambda c: scipy.stats.t(c.degrees.numpy(), c.location.numpy(), c.scale.numpy())),
    "poisson": (POISSON, lambda c: scipy.stats.poisson(c.log_rate.exp().numpy())),
    "heteroscedastic": (
        HETEROSCEDASTIC,
        lambda c: scipy.stats.norm(c.location.numpy(), c.noise_variance.sqrt().numpy()),
    ),
    "analytic": (
        ANALYTIC,
        lambda c: scipy.stats.norm(c.location.numpy(), (c.noise_variance + c.location_variance).sqrt().numpy()),
    ),
}
kinds = pytest.mark.parametrize("kind", COMPONENTS)


def pair(kind: str):
    prediction, oracle = COMPONENTS[kind]
    return prediction, oracle(prediction.components)


# The nll of outputs


def test_student_t_nll():
    likelihood, outputs, targets = StudentT(num_targets=2, initial_degrees=3.0), draw(5, 2), 4 * draw(5, 2, seed=1)
    parameters = parameters_of(likelihood)
    degrees, scale = 2 + parameters[StudentT.degrees_name].exp(), parameters[StudentT.scale_name].exp()
    oracle = -distributions.StudentT(degrees, outputs, scale).log_prob(targets).sum(-1)
    torch.testing.assert_close(likelihood.nll(outputs, targets, parameters), oracle, **ALGEBRA)


def test_student_t_starts_at_its_settings():
    parameters = StudentT(num_targets=3, initial_scale=0.2, initial_degrees=7.0).initial_parameters()
    torch.testing.assert_close(parameters[StudentT.scale_name].exp(), torch.full((3,), 0.2))
    torch.testing.assert_close(2 + parameters[StudentT.degrees_name].exp(), torch.full((3,), 7.0))


def test_poisson_nll():
    likelihood, outputs = Poisson(num_targets=2, initial_rate=5.0), draw(5, 2)
    targets = torch.poisson(5 * outputs.exp(), generator=torch.Generator().manual_seed(1))
    oracle = -distributions.Poisson(5 * outputs.exp()).log_prob(targets).sum(-1)
    torch.testing.assert_close(likelihood.nll(outputs, targets, {}), oracle, **ALGEBRA)
    torch.testing.assert_close(likelihood.nll(outputs, targets.long(), {}), oracle, **ALGEBRA)


def test_heteroscedastic_nll():
    likelihood, outputs, targets = Gaussian(num_targets=2, heteroscedastic=True), draw(5, 4), draw(5, 2, seed=1)
    assert likelihood.initial_parameters() == {}
    deviation = torch.exp(5 * torch.tanh(outputs[:, 2:] / 10))
    oracle = -distributions.Normal(outputs[:, :2], deviation).log_prob(targets).sum(-1)
    torch.testing.assert_close(likelihood.nll(outputs, targets, {}), oracle, **ALGEBRA)


def test_the_variance_of_the_noise_is_bounded():
    likelihood = Gaussian(heteroscedastic=True, initial_noise_variance=0.1)
    prediction = likelihood.predict(torch.tensor([[[0.0, 1e6], [0.0, -1e6], [0.0, 0.0]]]).double(), {})
    expected = [0.1 * math.exp(10), 0.1 * math.exp(-10), 0.1]
    np.testing.assert_allclose(prediction.aleatoric[:, 0], expected, rtol=1e-10)


@pytest.mark.parametrize(
    "likelihood", [StudentT(num_targets=2), Poisson(num_targets=2), Gaussian(num_targets=2, heteroscedastic=True)]
)
def test_nll_under_vmap_equals_the_loop_with_its_derivatives(likelihood):
    outputs, parameters = draw(3, 5, likelihood.num_outputs(2)), parameters_of(likelihood)
    targets = torch.arange(30, dtype=torch.float64).reshape(3, 5, 2)

    def loss(f: Tensor, y: Tensor) -> Tensor:
        return likelihood.nll(f, y, parameters).sum()

    gradients = torch.func.vmap(torch.func.grad(loss))(outputs, targets)
    for row, f, y in zip(gradients, outputs, targets, strict=True):
        f = f.clone().requires_grad_()
        torch.testing.assert_close(row, torch.autograd.grad(loss(f, y), f)[0], **ALGEBRA)
        assert torch.autograd.gradgradcheck(lambda f, y=y: loss(f, y), f)


# The mixture that is predicted


@kinds
def test_moments(kind):
    prediction, parts = pair(kind)
    like = prediction.components.mean
    mean, variance = (torch.from_numpy(np.asarray(value)).expand(like.shape) for value in parts.stats())
    torch.testing.assert_close(prediction.mean, mean.mean(0), **ALGEBRA)
    total = variance.mean(0) + mean.var(0, correction=0)
    torch.testing.assert_close(prediction.total_uncertainty, total, **ALGEBRA)
    torch.testing.assert_close(prediction.standard_deviation, total.sqrt(), **ALGEBRA)
    torch.testing.assert_close(prediction.aleatoric + prediction.epistemic, total, **ALGEBRA)
    if kind == "analytic":
        with pytest.raises(ValueError, match="holds the moments of its posterior and no samples: get"):
            prediction.samples()
        drawn = dataclasses.replace(prediction, draw=lambda: mean + 1)
        torch.testing.assert_close(drawn.samples(), mean + 1, **ALGEBRA)
    else:
        torch.testing.assert_close(prediction.samples(), mean, **ALGEBRA)


def test_a_variance_known_in_closed_form_is_epistemic():
    likelihood, outputs, variance = Gaussian(num_targets=2), draw(1, 3, 2), draw(1, 3, 2, seed=1).exp()
    prediction = likelihood.predict(outputs, likelihood.initial_parameters(), output_variance=variance)
    torch.testing.assert_close(prediction.epistemic, variance[0], **ALGEBRA)
    torch.testing.assert_close(prediction.aleatoric, torch.ones(3, 2))
    scaled = prediction.rescaled(torch.zeros(2), torch.tensor([2.0, 3.0])).tempered(0.5)
    torch.testing.assert_close(scaled.epistemic, variance[0] * torch.tensor([1.0, 2.25]), **ALGEBRA)


@kinds
def test_nll_is_that_of_the_joint_mixture(kind):
    prediction, parts = pair(kind)
    targets = torch.tensor([[0.0, 4.0], [2.0, 1.0], [7.0, 30.0]]).double()
    log = parts.logpmf if kind == "poisson" else parts.logpdf
    joint = torch.from_numpy(log(targets.numpy())).sum(-1)
    torch.testing.assert_close(prediction.nll(targets), math.log(len(joint)) - joint.logsumexp(0), **ALGEBRA)


@kinds
def test_cdf(kind):
    prediction, parts = pair(kind)
    for shift in (-3.5, 0.0, 2.0, 9.7):
        values = torch.full((3, 2), shift).double() + torch.arange(6).reshape(3, 2)
        expected = torch.from_numpy(parts.cdf(values.numpy())).mean(0)
        torch.testing.assert_close(prediction.cdf(values), expected, **ALGEBRA)


@pytest.mark.parametrize("kind", ["student_t", "heteroscedastic", "analytic"])
@pytest.mark.parametrize("level", LEVELS)
def test_quantile_is_the_inverse_of_the_cdf(kind, level):
    prediction, _ = pair(kind)
    found = prediction.cdf(prediction.quantile(level))
    torch.testing.assert_close(found, torch.full_like(found, level), rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("level", LEVELS)
def test_quantile_of_counts_is_the_smallest_that_reaches_the_probability(level):
    found = POISSON.quantile(level)
    assert torch.equal(found, found.round()) and bool((found >= 0).all())
    assert bool((POISSON.cdf(found) >= level).all())
    assert bool((POISSON.cdf(found - 1) < level).all())


def test_quantiles_of_a_single_poisson_distribution_are_scipys():
    rates = torch.tensor([1e-3, 0.5, 3.0, 40.0, 1e4]).double()
    prediction = MixturePrediction(PoissonComponents(rates.log().reshape(1, 5, 1)), is_vector=True, as_numpy=True)
    for level in LEVELS:
        np.testing.assert_array_equal(prediction.quantile(level), scipy.stats.poisson(rates.numpy()).ppf(level))


@pytest.mark.parametrize("kind", ["student_t", "poisson"])
def test_moments_against_draws(kind):
    prediction, parts = pair(kind)
    draws = torch.from_numpy(parts.rvs((2000, 4, 3, 2), random_state=0)).double().flatten(0, 1)
    error = (draws.mean(0) - prediction.mean).abs() / (prediction.total_uncertainty / len(draws)).sqrt()
    assert bool((error < 5).all())
    low, high = prediction.interval(0.5)
    share = ((draws >= low) & (draws <= high)).double().mean(0)
    slack = 5 * (0.25 / len(draws)) ** 0.5
    assert bool((share > 0.5 - slack).all()) and (kind == "poisson" or bool((share < 0.5 + slack).all()))


def test_tempering():
    sharper = STUDENT_T.tempered(0.5)
    torch.testing.assert_close(sharper.mean, STUDENT_T.mean, **ALGEBRA)
    torch.testing.assert_close(sharper.total_uncertainty, 0.25 * STUDENT_T.total_uncertainty, **ALGEBRA)
    certain = POISSON.tempered(1e-12)
    assert float(certain.epistemic.max()) < 1e-8
    spread = POISSON.components.log_rate.std(0)
    torch.testing.assert_close(POISSON.tempered(2.0).components.log_rate.std(0), 2 * spread, **ALGEBRA)


def test_rescaling_moves_the_density():
    mean, scale = torch.tensor([5.0, -1.0]).double(), torch.tensor([10.0, 0.1]).double()
    y = draw(3, 2, seed=3)
    moved = STUDENT_T.rescaled(mean, scale)
    torch.testing.assert_close(moved.nll(y * scale + mean), STUDENT_T.nll(y) + scale.log().sum(), **ALGEBRA)
    torch.testing.assert_close(moved.cdf(y * scale + mean), STUDENT_T.cdf(y), **ALGEBRA)


def test_scores_of_counts():
    targets = torch.poisson(POISSON.mean, generator=torch.Generator().manual_seed(0))
    scores = POISSON.scores(targets)
    assert list(scores) == ["mse", "nll", "coverage_90"]
    low, high = POISSON.interval(0.9)
    assert scores["coverage_90"] == ((low <= targets) & (targets <= high)).double().mean()
    torch.testing.assert_close(scores["nll"], POISSON.nll(targets).mean())


# What is refused


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: StudentT(initial_degrees=2.0), "initial_degrees must be above 2 and finite, but is 2.0"),
        (lambda: StudentT(initial_scale=0.0), "initial_scale must be positive and finite, but is 0.0"),
        (lambda: Poisson(initial_rate=-1.0), "initial_rate must be positive and finite, but is -1.0"),
        (lambda: Poisson(num_targets=0), "num_targets must be at least 1, but is 0"),
        (lambda: Gaussian(heteroscedastic=True).with_outputs(3), "the network has 3 outputs, but .* needs 2 for each"),
        (lambda: StudentT().nll(draw(3, 1), draw(3), {}), r"targets have shape \(3,\)"),
        (lambda: Poisson().nll(draw(3, 1), draw(3), {}), r"targets have shape \(3,\)"),
        (lambda: Poisson().check_targets("y", torch.tensor([[0.5]]), 1), "y has values that are no counts"),
        (lambda: Poisson().check_targets("y", torch.tensor([[-1.0]]), 1), "y has values that are no counts"),
        (lambda: Poisson().check_targets("y", torch.tensor([[math.inf]]), 1), "y has NaN or infinite values"),
        (lambda: Poisson().check_targets("y", torch.tensor([1.0]), 1), r"y has shape \(1,\), but expected"),
        (
            lambda: Gaussian(heteroscedastic=True).check_targets("y", draw(3, 2), 2),
            r"y has shape \(3, 2\), but expected \[..., num_examples, 1\]",
        ),
        (lambda: STUDENT_T.cdf(draw(3)), r"targets has shape \(3,\); expected \(3, 2\), as mean has"),
    ],
)
def test_refusals(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# What each is for: maximum likelihood of a linear model


def fit(likelihood: Likelihood, x: Tensor, y: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Returns weights, ``[2, num_outputs]`` (intercepts, slopes), and the likelihood's own parameters."""
    weights = torch.zeros(2, likelihood.num_outputs(1), dtype=torch.float64, requires_grad=True)
    own = {name: value.double().requires_grad_() for name, value in likelihood.initial_parameters().items()}
    optimizer = torch.optim.LBFGS([weights, *own.values()], max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = likelihood.nll(with_constant(x) @ weights, y, own).mean()
        value.backward()
        return value

    optimizer.step(loss)  # pyright: ignore[reportArgumentType]
    return weights.detach(), {name: value.detach() for name, value in own.items()}


def with_constant(x: Tensor) -> Tensor:
    return torch.cat([torch.ones_like(x), x], -1)


def held_out_nll(likelihood: Likelihood, fitted: tuple[Tensor, dict[str, Tensor]], x: Tensor, y: Tensor) -> float:
    weights, own = fitted
    return float(likelihood.predict((with_constant(x) @ weights)[None], own).nll(y).mean())


def test_student_t_beats_the_gaussian_on_data_with_outliers():
    x, noise, outlier = 2 * draw(3, 400, 1)
    is_outlier = draw(400, 1, seed=1) > 1.3
    y = 1 + 2 * x + torch.where(is_outlier, 15 * outlier, 0.1 * noise)
    known, rest = slice(0, 100), slice(100, None)
    robust, plain = (fit(likelihood, x[known], y[known]) for likelihood in (StudentT(), Gaussian()))
    assert (robust[0][:, 0] - torch.tensor([1.0, 2.0])).abs().max() < 0.1
    nll = [held_out_nll(one, two, x[rest], y[rest]) for one, two in ((StudentT(), robust), (Gaussian(), plain))]
    assert nll[0] < nll[1] - 0.5


def test_poisson_recovers_rates():
    x = draw(2000, 1)
    rate = torch.exp(1 + 0.5 * x)
    y = torch.poisson(rate, generator=torch.Generator().manual_seed(1))
    likelihood = Poisson().suited_to(y)
    assert likelihood.initial_rate == pytest.approx(float(y.mean()))
    weights, own = fit(likelihood, x, y)
    # Five standard errors by the Fisher information X^T diag(rate) X.
    information = with_constant(x).T @ (rate * with_constant(x))
    error = weights[:, 0] + torch.tensor([math.log(likelihood.initial_rate), 0.0]) - torch.tensor([1.0, 0.5])
    assert bool((error.abs() < 5 * torch.linalg.inv(information).diagonal().sqrt()).all())
    assert held_out_nll(likelihood, (weights, own), x, y) < held_out_nll(Gaussian(), fit(Gaussian(), x, y), x, y)


def test_heteroscedastic_noise_finds_where_the_noise_is():
    x, noise = draw(2, 4000, 1)
    y = 2 * x + torch.exp(0.5 * (-1 + 1.2 * x)) * noise
    likelihood = Gaussian(heteroscedastic=True)
    weights, own = fit(likelihood, x, y)
    prediction = likelihood.predict((with_constant(torch.tensor([[-1.0], [1.0]]).double()) @ weights)[None], own)
    # The log of a variance of n draws has the standard error sqrt(2 / n).
    found = torch.log(prediction.aleatoric[:, 0])
    torch.testing.assert_close(found, torch.tensor([-2.2, 0.2]).double(), rtol=0, atol=5 * 2 * (2 / 4000) ** 0.5)
    assert held_out_nll(likelihood, (weights, own), x, y) < held_out_nll(Gaussian(), fit(Gaussian(), x, y), x, y) - 0.1


@pytest.mark.parametrize("likelihood", ["student_t", "poisson", Gaussian(heteroscedastic=True)])
def test_from_data_to_a_saved_and_calibrated_model(likelihood, tmp_path):
    generator = np.random.default_rng(3)
    counts = [generator.poisson(4.0, size=(12, 2)) for _ in range(6)]
    tasks = [(generator.normal(size=(12, 2)), y if likelihood == "poisson" else y / 3) for y in counts]
    learner = MetaLearner(likelihood=likelihood).fit(tasks, num_steps=1).calibrate(2 * tasks)
    x, y = tasks[0]
    prediction = learner.adapt(x[:6], y[:6]).predict(x[6:])
    assert prediction.mean.shape == (6, 2) and isinstance(prediction.mean, np.ndarray)
    loaded = MetaLearner.load(learner.save(tmp_path))
    assert loaded.model.likelihood == learner.model.likelihood
    again = loaded.adapt(x[:6], y[:6]).predict(x[6:])
    np.testing.assert_array_equal(again.mean, prediction.mean)
    np.testing.assert_array_equal(again.quantile(0.9), prediction.quantile(0.9))
    assert loaded.evaluate(tasks[:3]) == learner.evaluate(tasks[:3])
    with pytest.raises(ValueError, match="x_query has NaN|not finite|NaN"):
        learner.adapt(x[:6], y[:6]).predict(x[6:] * np.nan)
