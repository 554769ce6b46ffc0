"""Scores of real targets against closed forms, numpy and scipy."""

import math

import numpy as np
import pytest
import scipy.stats
import torch

from ibaml import metrics

ALGEBRA = 1e-12


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class TestRegression:
    def test_closed_forms(self) -> None:
        mean, variance = torch.zeros(1, 2, 2).double(), torch.tensor([[[1.0, 4.0], [1.0, 4.0]]]).double()
        targets = torch.tensor([[[1.0, 2.0], [0.0, 0.0]]]).double()
        assert metrics.mse(mean, targets).item() == pytest.approx(5 / 4, abs=ALGEBRA)
        expected = -scipy.stats.norm(0, [1, 2]).logpdf(targets.numpy()).sum(-1).mean()
        assert metrics.gaussian_nll(mean, variance, targets).item() == pytest.approx(expected, abs=ALGEBRA)

    def test_against_numpy(self) -> None:
        source = generator()
        mean, targets = torch.randn(2, 6, 9, 3, generator=source, dtype=torch.float64)
        variance = torch.rand(6, 9, 3, generator=source, dtype=torch.float64) + 0.1
        log_density = torch.distributions.Normal(mean, variance.sqrt()).log_prob(targets).sum(-1)
        squares = ((mean - targets) ** 2).numpy().mean((1, 2))
        np.testing.assert_allclose(metrics.mse(mean, targets).numpy(), squares, rtol=1e-12)
        torch.testing.assert_close(metrics.gaussian_nll(mean, variance, targets), -log_density.mean(-1))
        torch.testing.assert_close(metrics.density_nll(log_density), -log_density.mean(-1))
        flat = metrics.gaussian_nll(mean[..., 0], variance[..., 0], targets[..., 0])
        torch.testing.assert_close(flat, metrics.gaussian_nll(mean[..., :1], variance[..., :1], targets[..., :1]))

    def test_central_interval_and_coverage(self) -> None:
        mean = torch.randn(1, 40_000, generator=generator(), dtype=torch.float64)
        targets = mean + 2 * torch.randn(1, 40_000, generator=generator(1), dtype=torch.float64)
        for level in (0.5, 0.9, 0.99):
            lower, upper = metrics.central_interval(mean, torch.full_like(mean, 4.0), level)
            radius = scipy.stats.norm.ppf((1 + level) / 2) * 2
            torch.testing.assert_close(upper - mean, torch.full_like(mean, radius))
            torch.testing.assert_close(mean - lower, torch.full_like(mean, radius))
            error = metrics.coverage(lower, upper, targets).item() - level
            assert abs(error) < 5 * math.sqrt(level * (1 - level) / 40_000)

    def test_coverage_includes_the_ends(self) -> None:
        zeros = torch.zeros(1, 3)
        assert metrics.coverage(zeros, zeros, zeros).item() == 1.0


class TestReport:
    def test_regression_report(self) -> None:
        source = generator(9)
        mean = torch.randn(40, 25, 1, generator=source, dtype=torch.float64)
        variance = 0.5 + torch.rand(40, 25, 1, generator=source, dtype=torch.float64)
        targets = mean + variance.sqrt() * torch.randn(40, 25, 1, generator=source, dtype=torch.float64)
        report = metrics.regression_report(mean, variance, targets)
        assert list(report) == ["mse", "nll", "coverage_90", "quantile_calibration_error"]
        inside = metrics.coverage(*metrics.central_interval(mean, variance, 0.9), targets)
        assert report["coverage_90"] == metrics.estimate(inside)
        cdf = torch.from_numpy(scipy.stats.norm.cdf(targets, mean, variance.sqrt()))
        error = metrics.estimate(metrics.quantile_calibration_error(cdf))
        assert report["quantile_calibration_error"] == pytest.approx(error, abs=ALGEBRA)
        given_cdf = metrics.regression_report(mean, variance, targets, cdf=torch.full_like(mean, 0.04))
        assert given_cdf["coverage_90"].mean == 0
        # All values at 0.04: the integral of 1 - p above it and of p below.
        assert given_cdf["quantile_calibration_error"].mean == pytest.approx((0.96**2 + 0.04**2) / 2, abs=ALGEBRA)
        assert report["nll"] == metrics.estimate(metrics.gaussian_nll(mean, variance, targets))
        assert abs(report["coverage_90"].mean - 0.9) < 5 * math.sqrt(0.09 / 1000)
        log_density = torch.full((40, 25), -2.0)
        given_density = metrics.regression_report(
            mean, variance, targets, log_density=log_density, interval=(targets, targets)
        )
        assert given_density["nll"].mean == 2.0
        assert given_density["coverage_90"].mean == 1.0
