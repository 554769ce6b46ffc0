"""Calibration of regression against integration on a fine grid, scipy, and what theory says of calibrated models."""

import math

import numpy as np
import pytest
import scipy.stats
import torch

from ibaml.metrics import central_coverage, quantile_calibration_error, quantile_curve


def draws(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def on_a_grid(values: np.ndarray, num_points: int = 200_001) -> float:
    levels = (np.arange(num_points) + 0.5) / num_points
    frequency = np.searchsorted(np.sort(values), levels, side="right") / len(values)
    return float(np.abs(frequency - levels).mean())


@pytest.mark.parametrize("num_examples", [1, 2, 9, 50])
def test_error_is_the_area_between_the_curve_and_the_diagonal(num_examples):
    cdf = draws(4, num_examples, seed=num_examples) ** 2
    expected = [on_a_grid(task.numpy()) for task in cdf]
    np.testing.assert_allclose(quantile_calibration_error(cdf), expected, atol=2e-5)


def test_error_is_the_wasserstein_distance_from_uniform():
    cdf = draws(1, 30, seed=1) ** 3
    uniform = (np.arange(100_000) + 0.5) / 100_000
    distance = scipy.stats.wasserstein_distance(cdf[0].numpy(), uniform)
    assert quantile_calibration_error(cdf).item() == pytest.approx(distance, abs=1e-5)


def test_known_values():
    torch.testing.assert_close(quantile_calibration_error(torch.ones(1, 8)), torch.tensor([0.5]).double())
    # Half of the targets below everything, half above: the curve is flat at one half.
    torch.testing.assert_close(quantile_calibration_error(torch.tensor([[0.0, 1.0]])), torch.tensor([0.25]).double())
    # The middles of n equal stretches are the best that n values can do.
    middles = (torch.arange(10, dtype=torch.float64) + 0.5).unsqueeze(0) / 10
    torch.testing.assert_close(quantile_calibration_error(middles), torch.tensor([1 / 40]).double())


def test_a_calibrated_model_has_the_bias_that_the_docstring_says():
    num_examples = 100
    errors = quantile_calibration_error(draws(4000, num_examples, seed=2))
    half_width = 4 * errors.std().item() / math.sqrt(4000)
    assert errors.mean().item() == pytest.approx(0.3133 / math.sqrt(num_examples), abs=half_width + 2e-4)


def test_outputs_count_as_examples_and_order_does_not_matter():
    cdf = draws(2, 6, 3)
    flat = cdf.flatten(1)
    torch.testing.assert_close(quantile_calibration_error(cdf), quantile_calibration_error(flat.flip(1)))
    torch.testing.assert_close(quantile_curve(cdf).frequency, quantile_curve(flat).frequency)


def test_curve_counts():
    cdf = draws(3, 40, seed=3) ** 2
    curve = quantile_curve(cdf, num_levels=9)
    np.testing.assert_allclose(curve.level, np.arange(1, 10) / 10)
    np.testing.assert_allclose(curve.frequency, [(cdf.numpy() <= level).mean() for level in curve.level.numpy()])
    assert quantile_curve(torch.full((1, 4), 0.5)).frequency.tolist() == [0.0] * 9 + [1.0] * 10


def test_overconfident_and_cautious_models_bend_the_curve_in_opposite_ways():
    generator = torch.Generator().manual_seed(4)
    targets = torch.randn(1, 20_000, generator=generator, dtype=torch.float64)
    sure, cautious = (quantile_curve(torch.special.ndtr(targets / width), num_levels=19) for width in (0.5, 2.0))
    assert sure.frequency[1] > sure.level[1] + 0.05 and sure.frequency[-2] < sure.level[-2] - 0.05
    assert cautious.frequency[1] < cautious.level[1] - 0.05 and cautious.frequency[-2] > cautious.level[-2] + 0.05


@pytest.mark.parametrize(
    ("cdf", "error", "message"),
    [
        (torch.zeros(1, 2, dtype=torch.int64), TypeError, "cdf has dtype torch.int64"),
        (torch.zeros(2), ValueError, r"cdf has shape \[2\]; expected"),
        (torch.zeros(0, 2), ValueError, r"cdf has shape \[0, 2\]"),
        (torch.tensor([[0.5, 1.5, torch.nan]]), ValueError, r"cdf has 2 values outside \[0, 1\]"),
    ],
)
@pytest.mark.parametrize("function", [quantile_curve, quantile_calibration_error, central_coverage])
def test_bad_input_is_refused(function, cdf, error, message):
    with pytest.raises(error, match=message):
        function(cdf)


@pytest.mark.parametrize("level", [0.0, 1.0])
def test_a_level_out_of_range_is_refused(level):
    with pytest.raises(ValueError, match=f"level is {level}; expected a probability strictly between 0 and 1"):
        central_coverage(torch.zeros(1, 2), level=level)


@pytest.mark.parametrize("level", [0.5, 0.9])
def test_central_coverage_is_the_share_between_the_quantiles(level):
    skewed = scipy.stats.gamma(2.0)
    targets = torch.from_numpy(scipy.stats.norm(2, 2).rvs((3, 50), random_state=0))
    low, high = skewed.interval(level)
    found = central_coverage(torch.from_numpy(skewed.cdf(targets.numpy())), level=level)
    torch.testing.assert_close(found, ((low <= targets) & (targets <= high)).double().mean(1))


def test_a_target_at_the_end_of_its_interval_lies_inside():
    assert central_coverage(torch.tensor([[0.25, 0.75, 0.8]]), level=0.5).item() == pytest.approx(2 / 3)


def test_bad_number_of_levels_is_refused():
    with pytest.raises(ValueError, match="num_levels is 0; expected at least 1"):
        quantile_curve(torch.zeros(1, 2), num_levels=0)


def test_one_level_is_the_median():
    cdf = torch.tensor([[[0.1], [0.4], [0.5], [0.9], [0.95]]], dtype=torch.float64)
    level, observed = quantile_curve(cdf, num_levels=1)
    assert level.tolist() == [0.5] and observed.tolist() == pytest.approx([0.6])
