"""Means and their intervals against scipy and against simulated coverage."""

import math

import pytest
import scipy.stats
import torch

from ibaml import metrics
from ibaml.metrics import Estimate


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class TestEstimate:
    @pytest.mark.parametrize("degrees", [1, 2, 3, 4, 5, 9, 10, 30, 99, 100, 101, 600, 10_000])
    def test_student_quantile(self, degrees: int) -> None:
        # Values whose standard error is one.
        num_tasks = degrees + 1
        values = torch.linspace(-1, 1, num_tasks, dtype=torch.float64)
        values = values / values.std() * math.sqrt(num_tasks)
        expected = scipy.stats.t.ppf(0.975, degrees)
        assert metrics.estimate(values).half_width == pytest.approx(expected, rel=1e-9)

    @pytest.mark.parametrize("num_tasks", [2, 8, 1000])
    def test_against_scipy(self, num_tasks: int) -> None:
        values = torch.randn(num_tasks, generator=generator(), dtype=torch.float64)
        result = metrics.estimate(values)
        low, high = scipy.stats.t.interval(0.95, num_tasks - 1, values.mean(), scipy.stats.sem(values))
        assert (result.low, result.high) == pytest.approx((low, high), rel=1e-8)
        assert result.num_tasks == num_tasks

    @pytest.mark.parametrize("num_tasks", [3, 20])
    def test_interval_covers_ninety_five_percent(self, num_tasks: int) -> None:
        repetitions = 2000
        draws = 1.5 + torch.randn(repetitions, num_tasks, generator=generator(1), dtype=torch.float64)
        covered = sum(result.low <= 1.5 <= result.high for result in map(metrics.estimate, draws))
        assert abs(covered / repetitions - 0.95) < 5 * math.sqrt(0.95 * 0.05 / repetitions)

    def test_paired_difference(self) -> None:
        source = generator(2)
        shared = 10 * torch.randn(50, generator=source, dtype=torch.float64)
        a = shared + 1 + 0.1 * torch.randn(50, generator=source, dtype=torch.float64)
        b = shared + 0.1 * torch.randn(50, generator=source, dtype=torch.float64)
        result = metrics.paired_difference(a, b)
        interval = scipy.stats.ttest_rel(a.numpy(), b.numpy()).confidence_interval(0.95)
        assert (result.low, result.high) == pytest.approx((interval.low, interval.high), rel=1e-8)
        assert result.half_width < metrics.estimate(a).half_width / 20

    def test_undefined_intervals_are_nan(self) -> None:
        assert math.isnan(metrics.estimate(torch.ones(1)).half_width)
        infinite = metrics.estimate(torch.tensor([1.0, math.inf]))
        assert infinite.mean == math.inf
        assert math.isnan(infinite.half_width)

    def test_formatting(self) -> None:
        result = Estimate(0.98213, 0.0041, 600)
        assert str(result) == f"{result}" == "0.982 +- 0.004"
        assert f"{result:.1%}" == "98.2% +- 0.4%"
        assert (result.low, result.high) == pytest.approx((0.97803, 0.98623))
