import math

import pytest
import torch

from ibaml.data import LinearRegressionTasks, closed_form_posterior


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def problem(num_examples: int = 7, num_features: int = 4, seed: int = 0):
    draw = generator(seed)
    x = torch.randn(num_examples, num_features, generator=draw, dtype=torch.float64)
    y = torch.randn(num_examples, generator=draw, dtype=torch.float64)
    prior_mean = torch.randn(num_features, generator=draw, dtype=torch.float64)
    prior_variance = torch.rand(num_features, generator=draw, dtype=torch.float64) + 0.2
    return x, y, prior_mean, prior_variance


def objective(mean, variance, x, y, prior_mean, prior_variance, noise_variance, kl_weight):
    """Mean expected nll plus weighted KL, written with torch.distributions."""
    residual = y - x @ mean
    nll = (residual**2 + (x**2) @ variance).mean() / (2 * noise_variance) + 0.5 * math.log(2 * math.pi * noise_variance)
    posterior = torch.distributions.Normal(mean, variance.sqrt())
    prior = torch.distributions.Normal(prior_mean, prior_variance.sqrt())
    return nll + kl_weight * torch.distributions.kl_divergence(posterior, prior).sum()


@pytest.mark.parametrize("kl_weight", [None, 0.01, 0.5, 3.0])
def test_posterior_minimises_the_objective(kl_weight):
    x, y, prior_mean, prior_variance = problem()
    weight = 1 / len(x) if kl_weight is None else kl_weight
    mean, variance = closed_form_posterior(x, y, prior_mean, prior_variance, 0.3, kl_weight=kl_weight)

    def value(step: torch.Tensor) -> torch.Tensor:
        return objective(mean + step[:4], variance * step[4:].exp(), x, y, prior_mean, prior_variance, 0.3, weight)

    centre, size = value(torch.zeros(8, dtype=torch.float64)), 1e-4
    for direction in torch.eye(8, dtype=torch.float64):
        ahead, behind = value(size * direction), value(-size * direction)
        assert abs(ahead - behind) / (2 * size) < 1e-6, "central difference of the objective at the posterior"
        assert ahead > centre and behind > centre


def test_default_weight_is_exact_bayes():
    x, y, prior_mean, prior_variance = problem()
    mean, variance = closed_form_posterior(x, y, prior_mean, prior_variance, 0.3)
    precision = x.T @ x / 0.3 + torch.diag(1 / prior_variance)
    full_mean = torch.linalg.inv(precision) @ (prior_mean / prior_variance + x.T @ y / 0.3)
    torch.testing.assert_close(mean, full_mean, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(variance, 1 / precision.diagonal(), rtol=1e-10, atol=1e-10)


def test_differentiable_with_respect_to_the_prior():
    x, y, prior_mean, prior_variance = problem()
    noise_variance = torch.tensor(0.3, dtype=torch.float64)
    inputs = (prior_mean, prior_variance, noise_variance)
    assert torch.autograd.gradcheck(
        lambda m, d, s: closed_form_posterior(x, y, m, d, s, kl_weight=0.2),
        [value.clone().requires_grad_() for value in inputs],
    )


def test_leading_axes_are_tasks():
    problems = [problem(seed=seed) for seed in range(3)]
    x, y = torch.stack([p[0] for p in problems]), torch.stack([p[1] for p in problems])
    prior_mean, prior_variance = problems[0][2:]
    mean, variance = closed_form_posterior(x, y.unsqueeze(-1), prior_mean, prior_variance, 0.3)
    for task in range(3):
        one = closed_form_posterior(x[task], y[task], prior_mean, prior_variance, 0.3)
        torch.testing.assert_close((mean[task], variance[task]), one, rtol=1e-10, atol=1e-10)
    mapped = torch.func.vmap(lambda a, b: closed_form_posterior(a, b, prior_mean, prior_variance, 0.3))(x, y)
    torch.testing.assert_close(mapped, (mean, variance), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(x=torch.zeros(3)), r"x must have shape \[..., num_examples, num_features\], got \(3,\)"),
        (dict(y=torch.zeros(4)), r"y must have shape \(3,\) or \(3, 1\) to match x, got \(4,\)"),
        (dict(prior_mean=torch.zeros(3)), "prior_mean must have 2 entries in its last axis"),
        (dict(prior_variance=torch.tensor(1.0)), "prior_variance must have 2 entries in its last axis"),
    ],
)
def test_closed_form_refuses(change, message):
    arguments = dict(
        x=torch.zeros(3, 2),
        y=torch.zeros(3),
        prior_mean=torch.zeros(2),
        prior_variance=torch.ones(2),
        noise_variance=1.0,
    )
    with pytest.raises(ValueError, match=message):
        closed_form_posterior(**(arguments | change))


def make_tasks(**change) -> LinearRegressionTasks:
    settings = dict(
        prior_mean=torch.tensor([1.0, -2.0, 0.5]),
        prior_variance=torch.tensor([0.5, 1.0, 2.0]),
        noise_variance=0.25,
        num_shots=6,
        num_queries=2,
        dtype=torch.float64,
    )
    return LinearRegressionTasks(**(settings | change))


def test_weights_noise_and_inputs_have_the_stated_moments():
    num_tasks = 4000
    tasks = make_tasks(condition_number=100.0)
    assert tasks.input_shape == (3,) and tasks.num_outputs == 1
    episode = tasks.sample(num_tasks, generator=generator())
    assert episode.support.x.shape == (num_tasks, 6, 3) and episode.query.y.shape == (num_tasks, 2, 1)
    assert episode.query.x.dtype == episode.query.y.dtype == torch.float64
    torch.testing.assert_close(tasks.input_variance, torch.tensor([1.0, 0.1, 0.01], dtype=torch.float64))
    second = (episode.support.x**2).mean((0, 1))
    assert ((second / tasks.input_variance - 1).abs() < 5 * math.sqrt(2 / (num_tasks * 6))).all()
    # Given x, y has mean x^T m and variance sum_j x_j^2 D_j + s2; queries and supports share the weights.
    spread = (episode.query.x**2 @ tasks.prior_variance + 0.25).sqrt()
    standard = (episode.query.y.squeeze(-1) - episode.query.x @ tasks.prior_mean) / spread
    first = standard[:, 0]
    assert abs(first.mean()) < 5 / math.sqrt(num_tasks)
    assert abs(first.var() - 1) < 5 * math.sqrt(2 / num_tasks)


def test_noise_is_what_is_left_of_an_exact_fit():
    tasks = make_tasks(num_shots=500, prior_variance=torch.full((3,), 4.0))
    episode = tasks.sample(20, generator=generator())
    fit = torch.linalg.lstsq(episode.support.x, episode.support.y).solution
    residual = episode.support.y - episode.support.x @ fit
    variance = float((residual**2).sum() / (20 * 497))
    assert abs(variance - 0.25) < 5 * 0.25 * math.sqrt(2 / (20 * 497))


def test_orthogonal_design_has_the_exact_covariance():
    tasks = make_tasks(design="orthogonal", condition_number=1000.0)
    x = tasks.sample(5, generator=generator()).support.x
    expected = torch.diag(tasks.input_variance).expand(5, 3, 3)
    torch.testing.assert_close(x.mT @ x / 6, expected, rtol=1e-10, atol=1e-10)
    assert float(torch.linalg.cond(x.mT @ x).mean()) == pytest.approx(1000.0, rel=1e-8)


def test_seed_alone_decides():
    tasks = make_tasks()
    assert torch.equal(tasks.sample(2, generator=generator(1)).query.y, tasks.sample(2, generator=generator(1)).query.y)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(dtype=torch.int64), TypeError, "dtype must be a floating-point type, got torch.int64"),
        (dict(prior_mean=torch.zeros(1, 3)), ValueError, r"prior_mean must have shape \[num_features\], got \(1, 3\)"),
        (dict(prior_variance=torch.ones(2)), ValueError, r"prior_variance must have the shape of prior_mean, \(3,\)"),
        (dict(prior_variance=torch.tensor([1.0, 0.0, 1.0])), ValueError, "prior_variance must be positive"),
        (dict(noise_variance=0.0), ValueError, "noise_variance must be a finite positive number, got 0.0"),
        (dict(condition_number=0.5), ValueError, "condition_number must be a finite number of at least 1, got 0.5"),
        (dict(design="latin"), ValueError, "design must be one of .*gaussian.*orthogonal.*, got 'latin'"),
        (dict(design="orthogonal", num_shots=2), ValueError, "needs num_shots >= num_features, got 2 < 3"),
        (dict(num_shots=0), ValueError, "num_shots must be at least 1"),
        (dict(num_queries="1"), TypeError, "num_queries must be an int"),
    ],
)
def test_tasks_refuse(change, error, message):
    with pytest.raises(error, match=message):
        make_tasks(**change)


def test_sample_refuses():
    with pytest.raises(ValueError, match="num_tasks must be at least 1"):
        make_tasks().sample(0, generator=generator())
    with pytest.raises(TypeError, match="generator must be a torch.Generator"):
        make_tasks().sample(1, generator=None)
