"""The AUROC of an uncertainty against scipy and torchmetrics; its intervals against simulated coverage."""

import math

import pytest
import scipy.stats
import torch
from torchmetrics.functional.classification import binary_auroc

from ibaml import metrics
from ibaml.metrics import Estimate

ALGEBRA = 1e-12


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class TestOutOfDistribution:
    def test_against_scipy_and_torchmetrics(self) -> None:
        source = generator()
        # Rounded, so that there are ties; large, where a sigmoid would saturate.
        inside = (100 + 10 * torch.randn(80, generator=source)).round()
        outside = (105 + 10 * torch.randn(50, generator=source)).round()
        expected = scipy.stats.mannwhitneyu(outside.numpy(), inside.numpy()).statistic / (80 * 50)
        result = metrics.ood_auroc(inside, outside)
        assert result.mean == pytest.approx(expected, abs=ALGEBRA)
        scores = torch.cat([inside, outside])
        area = binary_auroc(scores / 1000, torch.cat([torch.zeros(80), torch.ones(50)]).long())
        assert result.mean == pytest.approx(area.item(), abs=1e-6)

    def test_large_uncertainties_are_no_ties(self) -> None:
        # torchmetrics takes scores above 1 for logits: the sigmoid of every one of these is 1 in float32.
        inside = 30 + torch.randn(200, generator=generator())
        outside = 32 + torch.randn(200, generator=generator(1))
        labels = torch.cat([torch.zeros(200), torch.ones(200)]).long()
        assert binary_auroc(torch.cat([inside, outside]), labels).item() == 0.5
        assert metrics.ood_auroc(inside, outside).low > 0.85

    def test_delong_variance(self) -> None:
        source = generator(4)
        inside = torch.randn(30, generator=source, dtype=torch.float64)
        outside = 0.5 + torch.randn(20, generator=source, dtype=torch.float64)
        wins = (outside[None] > inside[:, None]).double() + 0.5 * (outside[None] == inside[:, None]).double()
        variance = wins.mean(1).var() / 30 + wins.mean(0).var() / 20
        result = metrics.ood_auroc(inside, outside)
        expected = scipy.stats.norm.ppf(0.975) * math.sqrt(variance.item())
        assert result.half_width == pytest.approx(expected, abs=ALGEBRA)
        assert result.num_tasks == 50

    def test_monotone_transforms_change_nothing(self) -> None:
        source = generator(6)
        inside = torch.randn(9, 7, generator=source, dtype=torch.float64)
        outside = torch.randn(9, 5, generator=source, dtype=torch.float64)
        result = metrics.ood_auroc(inside, outside)
        assert metrics.ood_auroc(inside.exp(), outside.exp()) == result
        assert metrics.ood_auroc(-inside, -outside).mean == pytest.approx(1 - result.mean, abs=ALGEBRA)
        assert metrics.ood_auroc(outside, inside).mean == pytest.approx(1 - result.mean, abs=ALGEBRA)

    def test_tasks_of_one_example_differ_from_pooling_only_by_the_covariance(self) -> None:
        source = generator(7)
        inside, outside = torch.randn(2, 40, 1, generator=source, dtype=torch.float64)
        wins = (outside.T > inside).double()
        a, b = wins.mean(1), wins.mean(0)
        covariance = ((a - a.mean()) * (b - b.mean())).sum() / 39
        variance = (a.var() + b.var() + 2 * covariance) / 40
        result = metrics.ood_auroc(inside, outside)
        expected = scipy.stats.norm.ppf(0.975) * math.sqrt(variance.item())
        assert result.half_width == pytest.approx(expected, abs=ALGEBRA)
        assert result.num_tasks == 40

    def test_clustered_interval_covers(self) -> None:
        # A strong effect of the task on all its examples; marginally N(0, 2) against N(1, 2).
        repetitions, num_tasks = 600, 80
        truth = scipy.stats.norm.cdf(1 / 2)
        source = generator(8)
        covered = pooled_covered = 0
        for _ in range(repetitions):
            effect_in = torch.randn(num_tasks, 1, generator=source)
            effect_out = torch.randn(num_tasks, 1, generator=source)
            inside = effect_in + torch.randn(num_tasks, 10, generator=source)
            outside = 1 + effect_out + torch.randn(num_tasks, 10, generator=source)
            result = metrics.ood_auroc(inside, outside)
            covered += result.low <= truth <= result.high
            pooled = metrics.ood_auroc(inside.flatten(), outside.flatten())
            pooled_covered += pooled.low <= truth <= pooled.high
        assert abs(covered / repetitions - 0.95) < 5 * math.sqrt(0.95 * 0.05 / repetitions)
        assert pooled_covered / repetitions < 0.8

    def test_perfect_detection_and_too_few_units(self) -> None:
        result = metrics.ood_auroc(torch.zeros(3), torch.ones(3))
        assert result == Estimate(1.0, 0.0, 6)
        assert math.isnan(metrics.ood_auroc(torch.zeros(1), torch.ones(3)).half_width)
