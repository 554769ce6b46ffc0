"""Predictions over Gaussian outputs against integrals on a fine grid, for values that surprise and that do not."""

import math
from typing import Any

import pytest
import torch

from ibaml import tree
from ibaml.likelihoods import LIKELIHOODS, Likelihood
from ibaml.likelihoods.quadrature import expectation, log_expectation
from ibaml.types import Tensor

DOUBLE = torch.float64
COUNTS = [0.0, 1.0, 3.0, 10.0, 100.0, 1000.0]
REALS = [-8.0, -1.0, 0.0, 0.3, 2.0, 9.0]
SETTINGS: dict[str, dict[str, Any]] = {
    "poisson": {"initial_rate": 2.0},
    "negative_binomial": {"initial_rate": 2.0, "initial_size": 1.5},
    "student_t": {"initial_scale": 0.2, "initial_degrees": 3.0},
    "gaussian": {"initial_noise_variance": 0.3},
    "unit_gaussian": {},
}
names = pytest.mark.parametrize("name", SETTINGS)
deviations = pytest.mark.parametrize("deviation", [0.01, 0.3, 1.0, 3.0])


def case(name: str, deviation: float) -> tuple[Likelihood, dict[str, Tensor], Tensor, Tensor, Tensor]:
    """A likelihood, its parameters, the outputs' mean and variance, and targets."""
    likelihood = LIKELIHOODS[name](**SETTINGS[name])
    targets = torch.tensor(COUNTS if likelihood.target_kind == "counts" else REALS, dtype=DOUBLE).unsqueeze(-1)
    parameters = tree.map(lambda leaf: leaf.double(), likelihood.initial_parameters())
    mean = torch.full((1, len(targets), 1), 0.4, dtype=DOUBLE)
    return likelihood, parameters, mean, torch.full_like(mean, deviation**2), targets


def on_a_grid(mean: Tensor, variance: Tensor) -> tuple[Tensor, Tensor]:
    """Values of the output, ``[num_values, num_examples, 1]``, and logarithms of their weights."""
    reach = torch.linspace(-35, 35, 300_001, dtype=DOUBLE)
    at = mean + variance.sqrt() * reach[:, None, None]
    log_weight = -0.5 * reach**2
    return at, (log_weight - torch.logsumexp(log_weight, 0))[:, None]


@names
@deviations
def test_nll_is_the_integral_over_the_outputs(name: str, deviation: float) -> None:
    likelihood, parameters, mean, variance, targets = case(name, deviation)
    found: Any = likelihood.predict(mean, parameters, output_variance=variance)
    at, log_weight = on_a_grid(mean, variance)
    expected = -torch.logsumexp(log_weight - likelihood.nll(at, targets.expand_as(at), parameters), 0)
    torch.testing.assert_close(found.nll(targets), expected, rtol=0, atol=3e-6 if deviation > 1 else 1e-8)


@names
@deviations
def test_moments_and_cdf_are_the_integrals_over_the_outputs(name: str, deviation: float) -> None:
    likelihood, parameters, mean, variance, targets = case(name, deviation)
    found: Any = likelihood.predict(mean, parameters, output_variance=variance)
    at, log_weight = on_a_grid(mean[:, :1], variance[:, :1])
    each: Any = likelihood.predict(at[::20], parameters)
    weight = torch.softmax(log_weight[::20], 0).unsqueeze(-1)

    def over(values: Tensor) -> Tensor:
        return (weight * values).sum(0)

    expected = over(each.components.mean)
    torch.testing.assert_close(found.mean[:1], expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(found.epistemic[:1], over((each.components.mean - expected) ** 2), rtol=1e-7, atol=1e-9)
    aleatoric = over(each.components.aleatoric.expand_as(each.components.mean))
    torch.testing.assert_close(found.aleatoric[:1], aleatoric, rtol=1e-9, atol=1e-9)
    cdf = torch.stack([over(each.components.cdf(target))[0] for target in targets])
    # The distribution function of large counts is a step for wide outputs; see `expectation`.
    torch.testing.assert_close(found.cdf(targets), cdf, rtol=0, atol=0.02 if name.startswith(("p", "neg")) else 1e-8)


@names
def test_quantiles_reach_their_probability(name: str) -> None:
    likelihood, parameters, mean, variance, _ = case(name, 0.7)
    found: Any = likelihood.predict(mean, parameters, output_variance=variance)
    for probability in (0.05, 0.5, 0.95):
        quantile = found.quantile(probability)
        assert (found.cdf(quantile) >= probability - 1e-9).all()
        if likelihood.target_kind == "counts":
            assert (found.cdf(quantile - 1) < probability).all()
        else:
            torch.testing.assert_close(found.cdf(quantile), torch.full_like(quantile, probability))


@names
def test_derivatives_of_the_nll_are_those_of_the_integral(name: str) -> None:
    likelihood, parameters, mean, variance, targets = case(name, 0.7)

    def nll(at: Any) -> Tensor:
        location, spread, own = at
        return likelihood.predict(location, own, output_variance=spread).nll(targets).sum()

    start = (mean, variance, parameters)
    found, wanted = torch.func.grad(nll)(start), _differences(nll, start)
    for one, other in zip(tree.leaves(found), tree.leaves(wanted), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)
    pairs = tree.map(lambda leaf: torch.stack([leaf, leaf]), start)
    torch.testing.assert_close(torch.func.vmap(nll)(pairs), nll(start).expand(2), rtol=1e-12, atol=0)


@names
def test_float32_is_computed_in_float64(name: str) -> None:
    likelihood, parameters, mean, variance, targets = case(name, 0.7)
    narrow = tree.map(lambda leaf: leaf.float(), (mean, parameters, variance))
    found: Any = likelihood.predict(narrow[0], narrow[1], output_variance=narrow[2])
    expected: Any = likelihood.predict(mean, parameters, output_variance=variance)
    assert found.nll(targets).dtype == (DOUBLE if "gaussian" in name else torch.float32)
    torch.testing.assert_close(found.nll(targets).double(), expected.nll(targets), rtol=1e-5, atol=1e-5)


@names
def test_a_temperature_multiplies_the_deviation_of_outputs(name: str) -> None:
    likelihood, parameters, mean, variance, _ = case(name, 0.5)
    tempered: Any = likelihood.predict(mean, parameters, output_variance=variance).tempered(2.0)
    wider: Any = likelihood.predict(mean, parameters, output_variance=4 * variance)
    torch.testing.assert_close(tempered.mean[:1], wider.mean[:1])
    torch.testing.assert_close(tempered.epistemic, wider.epistemic)


def test_a_log_expectation_of_a_gaussian_is_the_closed_form() -> None:
    value, mean = torch.tensor([-30.0, 0.0, 2.0], dtype=DOUBLE), torch.zeros(3, dtype=DOUBLE)
    noise, variance = 0.01, torch.tensor([4.0, 1e-6, 0.3], dtype=DOUBLE)

    def log_prob(f: Tensor) -> Tensor:
        return -0.5 * ((value - f) ** 2 / noise + math.log(2 * math.pi * noise))

    def slopes(f: Tensor) -> tuple[Tensor, Tensor]:
        return (f - value) / noise, torch.full_like(f, 1 / noise)

    found = log_expectation(log_prob, slopes, value, mean, variance)
    expected = torch.distributions.Normal(mean, (noise + variance).sqrt()).log_prob(value)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_an_expectation_of_an_exponential_is_the_closed_form() -> None:
    mean, variance = torch.tensor([-1.0, 3.0], dtype=DOUBLE), torch.tensor([0.0, 2.0], dtype=DOUBLE)
    found = expectation(torch.exp, mean, variance)
    torch.testing.assert_close(found, torch.exp(mean + 0.5 * variance), rtol=1e-6, atol=0)


def _differences(function: Any, at: Any) -> Any:
    flat, unravel = tree.ravel(at)
    units = 1e-5 * torch.eye(len(flat), dtype=DOUBLE)
    slopes = [(function(unravel(flat + unit)) - function(unravel(flat - unit))) / 2e-5 for unit in units]
    return unravel(torch.stack(slopes))
