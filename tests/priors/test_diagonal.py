"""DiagonalGaussian against torch.distributions, and sampling against its moments."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributions import Normal
from torch.distributions import kl_divergence as reference_kl

from ibaml import tree
from ibaml.priors import DiagonalGaussian
from ibaml.priors import diagonal as gaussian
from ibaml.types import Params, Tensor

ALGEBRA = 1e-10

seeds = st.integers(0, 2**20)
spreads = st.floats(0.01, 5.0)


def random_gaussian(seed: int, spread: float = 1.0, centre: float = 0.0) -> DiagonalGaussian:
    source = torch.Generator().manual_seed(seed)

    def draw() -> Params:
        return {
            "weight": spread * torch.randn(2, 3, generator=source, dtype=torch.float64),
            "bias": spread * torch.randn(2, generator=source, dtype=torch.float64),
        }

    return DiagonalGaussian(mean=draw(), log_var=tree.map(lambda x: x + centre, draw()))


def reference(distribution: DiagonalGaussian) -> list[Normal]:
    return [
        Normal(mean, (0.5 * log_var).exp())
        for mean, log_var in zip(tree.leaves(distribution.mean), tree.leaves(distribution.log_var), strict=True)
    ]


def close(value: Tensor, oracle: Tensor) -> None:
    torch.testing.assert_close(value, oracle, rtol=ALGEBRA, atol=ALGEBRA)


@settings(deadline=None, max_examples=50)
@given(seed=seeds, spread=spreads, centre=st.sampled_from([0.0, -10.0]))
def test_kl_equals_torch_distributions(seed: int, spread: float, centre: float) -> None:
    posterior, prior = random_gaussian(seed, spread, centre), random_gaussian(seed + 1, spread, centre)
    pairs = zip(reference(posterior), reference(prior), strict=True)
    close(gaussian.kl_divergence(posterior, prior), torch.stack([reference_kl(q, p).sum() for q, p in pairs]).sum())


@settings(deadline=None, max_examples=50)
@given(seed=seeds, spread=spreads)
def test_log_prob_and_entropy_equal_torch_distributions(seed: int, spread: float) -> None:
    distribution, value = random_gaussian(seed, spread), random_gaussian(seed + 1, spread).mean
    normals = reference(distribution)
    log_probs = [normal.log_prob(x).sum() for normal, x in zip(normals, tree.leaves(value), strict=True)]
    close(distribution.log_prob(value), torch.stack(log_probs).sum())
    close(distribution.entropy(), torch.stack([normal.entropy().sum() for normal in normals]).sum())


@pytest.mark.parametrize("log_ratio", [1e-2, 1e-3])
def test_kl_of_nearly_equal_variances_keeps_its_digits_in_float32(log_ratio: float) -> None:
    # (r - 1 - log r) / 2 with log r = e is e^2 / 4 + e^3 / 12 + O(e^4): computed as printed it has no digit left.
    ratio = float(torch.tensor(log_ratio, dtype=torch.float32))
    posterior = DiagonalGaussian({"w": torch.zeros(1)}, {"w": torch.tensor([log_ratio], dtype=torch.float32)})
    prior = DiagonalGaussian({"w": torch.zeros(1)}, {"w": torch.zeros(1)})
    exact = 0.5 * (math.expm1(ratio) - ratio)
    kl = float(gaussian.kl_divergence(posterior, prior))
    # expm1 and its argument are exact to half a unit in the last place, so what cancels is eps * e out of e^2 / 2.
    assert abs(kl - exact) <= 4 * torch.finfo(torch.float32).eps / log_ratio * exact
    naive = 0.5 * (torch.exp(posterior.log_var["w"]) - 1 - posterior.log_var["w"])
    assert abs(float(naive) - exact) > 10 * abs(kl - exact)


def test_kl_gradient_equals_its_closed_form() -> None:
    posterior, prior = random_gaussian(0), random_gaussian(1)
    gradient = torch.func.grad(lambda q: gaussian.kl_divergence(q, prior))(posterior)
    for name in posterior.mean:
        variance = prior.log_var[name].exp()
        close(gradient.mean[name], (posterior.mean[name] - prior.mean[name]) / variance)
        close(gradient.log_var[name], 0.5 * (posterior.log_var[name].exp() / variance - 1))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_parameters_give_float32_results(dtype: torch.dtype) -> None:
    posterior, prior = (tree.map(lambda x: x.to(dtype), random_gaussian(seed)) for seed in (0, 1))
    wide_posterior, wide_prior = (tree.map(lambda x: x.to(torch.float64), g) for g in (posterior, prior))
    for value, oracle in (
        (gaussian.kl_divergence(posterior, prior), gaussian.kl_divergence(wide_posterior, wide_prior)),
        (posterior.log_prob(prior.mean), wide_posterior.log_prob(wide_prior.mean)),
        (posterior.entropy(), wide_posterior.entropy()),
    ):
        assert value.dtype == torch.float32
        torch.testing.assert_close(value.double(), oracle, rtol=1e-5, atol=1e-5)


def test_float64_parameters_stay_float64() -> None:
    posterior = random_gaussian(0)
    assert gaussian.kl_divergence(posterior, random_gaussian(1)).dtype == torch.float64
    assert posterior.entropy().dtype == posterior.log_prob(posterior.mean).dtype == torch.float64


def test_map_to_wide_widens_half_precision_only() -> None:
    (widened,) = gaussian.map_to_wide(
        {"half": torch.ones(1, dtype=torch.float16), "double": torch.ones(1, dtype=torch.float64)}
    )
    assert widened["half"].dtype == torch.float32
    assert widened["double"].dtype == torch.float64


def test_kl_refuses_different_parameter_names_and_names_them() -> None:
    posterior, prior = random_gaussian(0), random_gaussian(1)
    renamed = DiagonalGaussian({"weight": prior.mean["weight"]}, {"weight": prior.log_var["weight"]})
    with pytest.raises(ValueError, match=r"same parameter names, but differ in \['bias'\]: build the posterior from"):
        gaussian.kl_divergence(posterior, renamed)


def test_sample_is_the_reparameterised_map() -> None:
    distribution, noise = random_gaussian(0), random_gaussian(1).mean
    draw = distribution.sample(noise)
    for name in noise:
        close(draw[name], distribution.mean[name] + distribution.log_var[name].exp().sqrt() * noise[name])
    many = distribution.sample(tree.map(lambda e: torch.stack([e, 2 * e]), noise))
    for name in noise:
        assert torch.equal(many[name][0], draw[name])


def test_sample_moments_lie_within_five_standard_errors() -> None:
    distribution = random_gaussian(3)
    num_samples = 20_000
    generator = torch.Generator().manual_seed(0)
    draws = distribution.sample(gaussian.sample_noise(distribution.mean, num_samples, generator=generator))
    for name in draws:
        variance = distribution.log_var[name].exp()
        mean_error = (draws[name].mean(0) - distribution.mean[name]).abs()
        assert (mean_error <= 5 * (variance / num_samples).sqrt()).all()
        # The sample variance of Gaussian draws has variance 2 sigma^4 / (n - 1).
        variance_error = (draws[name].var(0) - variance).abs()
        assert (variance_error <= 5 * variance * math.sqrt(2 / (num_samples - 1))).all()


def test_mean_log_prob_of_draws_is_minus_the_entropy() -> None:
    distribution = random_gaussian(4)
    num_samples = 20_000
    noise = gaussian.sample_noise(distribution.mean, num_samples, generator=torch.Generator().manual_seed(1))
    log_probs = torch.func.vmap(distribution.log_prob)(distribution.sample(noise))
    error = log_probs.mean() + distribution.entropy()
    assert error.abs() <= 5 * log_probs.std() / math.sqrt(num_samples)


def test_mean_log_ratio_of_draws_is_the_kl() -> None:
    posterior, prior = random_gaussian(5, 0.5), random_gaussian(6, 0.5)
    num_samples = 20_000
    noise = gaussian.sample_noise(posterior.mean, num_samples, generator=torch.Generator().manual_seed(2))
    draws = posterior.sample(noise)
    ratios = torch.func.vmap(lambda w: posterior.log_prob(w) - prior.log_prob(w))(draws)
    error = ratios.mean() - gaussian.kl_divergence(posterior, prior)
    assert error.abs() <= 5 * ratios.std() / math.sqrt(num_samples)


def test_antithetic_noise_makes_an_odd_function_average_to_zero() -> None:
    noise = gaussian.sample_noise(
        torch.zeros(5, dtype=torch.float64), 8, generator=torch.Generator().manual_seed(0), antithetic=True
    )
    assert (noise**3).mean().abs() <= ALGEBRA
    assert (noise**2).mean() > 0.1


@pytest.mark.parametrize("num_samples", [0, -1])
def test_noise_refuses_too_few_samples(num_samples: int) -> None:
    with pytest.raises(ValueError, match=f"num_samples must be at least 1, but is {num_samples}."):
        gaussian.sample_noise(torch.zeros(1), num_samples, generator=torch.Generator())


def test_noise_refuses_an_odd_number_of_antithetic_samples() -> None:
    with pytest.raises(ValueError, match="num_samples must be even with antithetic=True, but is 3: add or drop one."):
        gaussian.sample_noise(torch.zeros(1), 3, generator=torch.Generator(), antithetic=True)
