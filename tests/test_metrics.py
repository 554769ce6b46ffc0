"""Metrics against closed forms, numpy, scipy and torchmetrics; intervals against simulated coverage."""

import math
import re
from collections.abc import Callable

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchmetrics.functional.classification import binary_auroc, multiclass_calibration_error

from ibaml import metrics
from ibaml.metrics import Estimate
from ibaml.quantile_calibration import quantile_calibration_error
from ibaml.selective import selective_area
from ibaml.types import Tensor

ALGEBRA = 1e-12


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_predictions(
    num_tasks: int, num_examples: int, num_classes: int, seed: int = 0, sharpness: float = 2.0
) -> tuple[Tensor, Tensor]:
    source = generator(seed)
    logits = sharpness * torch.randn(num_tasks, num_examples, num_classes, generator=source, dtype=torch.float64)
    labels = torch.randint(num_classes, (num_tasks, num_examples), generator=source)
    return logits.softmax(-1), labels


def calibrated_predictions(num_tasks: int, num_examples: int, seed: int) -> tuple[Tensor, Tensor]:
    """Labels drawn from the very probabilities that are predicted."""
    probs, _ = random_predictions(num_tasks, num_examples, 5, seed, sharpness=1.5)
    drawn = torch.multinomial(probs.flatten(0, 1), 1, generator=generator(seed + 10_000))
    return probs, drawn.reshape(num_tasks, num_examples)


def numpy_calibration(probs: Tensor, labels: Tensor, num_bins: int) -> tuple[float, float]:
    """ECE and MCE of one task, bin by bin, as Guo et al. (2017) write them."""
    p, y = probs.numpy(), labels.numpy()
    confidence, correct = p.max(-1), p.argmax(-1) == y
    expected, largest = 0.0, 0.0
    for b in range(num_bins):
        inside = (confidence > b / num_bins) & (confidence <= (b + 1) / num_bins)
        if inside.any():
            gap = abs(correct[inside].mean() - confidence[inside].mean())
            expected += inside.mean() * gap
            largest = max(largest, gap)
    return expected, largest


# One confident hit, one confident miss, one unsure hit.
PROBS = torch.tensor([[[0.9, 0.1], [0.8, 0.2], [0.4, 0.6]]], dtype=torch.float64)
LABELS = torch.tensor([[0, 1, 1]])


class TestClassification:
    def test_closed_forms(self) -> None:
        assert metrics.accuracy(PROBS, LABELS).item() == 2 / 3
        expected_nll = -(math.log(0.9) + math.log(0.2) + math.log(0.6)) / 3
        assert metrics.nll(PROBS.log(), LABELS).item() == pytest.approx(expected_nll, abs=ALGEBRA)
        expected_brier = 2 * (0.1**2 + 0.8**2 + 0.4**2) / 3
        assert metrics.brier(PROBS, LABELS).item() == pytest.approx(expected_brier, abs=ALGEBRA)
        # Two bins: all three examples lie in (0.5, 1].
        gap = (0.9 + 0.8 + 0.6) / 3 - 2 / 3
        assert metrics.ece(PROBS, LABELS, num_bins=2).item() == pytest.approx(gap, abs=ALGEBRA)
        # Fifteen bins: each alone.
        assert metrics.ece(PROBS, LABELS).item() == pytest.approx((0.1 + 0.8 + 0.4) / 3, abs=ALGEBRA)
        assert metrics.mce(PROBS, LABELS).item() == pytest.approx(0.8, abs=ALGEBRA)

    def test_uniform_prediction(self) -> None:
        probs = torch.full((2, 10, 5), 0.2, dtype=torch.float64)
        labels = torch.arange(5).repeat(2, 2)
        torch.testing.assert_close(metrics.nll(probs.log(), labels), torch.full((2,), math.log(5)).double())
        torch.testing.assert_close(metrics.brier(probs, labels), torch.full((2,), 0.8).double())
        torch.testing.assert_close(metrics.ece(probs, labels), torch.zeros(2).double(), atol=ALGEBRA, rtol=0)

    def test_accuracy_of_ties_takes_the_first_class(self) -> None:
        probs = torch.full((1, 2, 4), 0.25)
        assert metrics.accuracy(probs, torch.tensor([[0, 1]])).item() == 0.5

    def test_accuracy_equals_a_plain_count_exactly(self) -> None:
        probs, labels = random_predictions(7, 15, 5)
        expected = (probs.numpy().argmax(-1) == labels.numpy()).sum(-1) / 15
        assert metrics.accuracy(probs, labels).tolist() == expected.tolist()

    def test_a_single_class_is_allowed(self) -> None:
        assert metrics.accuracy(torch.ones(1, 3, 1), torch.zeros(1, 3, dtype=torch.int64)).item() == 1.0

    def test_nll_survives_a_probability_that_underflows(self) -> None:
        log_probs = torch.tensor([[[0.0, -800.0]]])
        assert metrics.nll(log_probs, torch.tensor([[1]])).item() == 800.0

    def test_nll_of_probability_zero_is_infinite(self) -> None:
        assert metrics.nll(torch.tensor([[[0.0, -math.inf]]]), torch.tensor([[1]])).item() == math.inf

    @pytest.mark.parametrize("num_bins", [1, 2, 10, 15, 40])
    @pytest.mark.parametrize("num_examples", [1, 75])
    def test_calibration_against_numpy(self, num_bins: int, num_examples: int) -> None:
        probs, labels = random_predictions(6, num_examples, 5, seed=num_bins)
        ece, mce = metrics.ece(probs, labels, num_bins=num_bins), metrics.mce(probs, labels, num_bins=num_bins)
        for task in range(6):
            expected = numpy_calibration(probs[task], labels[task], num_bins)
            assert ece[task].item() == pytest.approx(expected[0], abs=ALGEBRA)
            assert mce[task].item() == pytest.approx(expected[1], abs=ALGEBRA)

    @pytest.mark.parametrize(("norm", "metric"), [("l1", metrics.ece), ("max", metrics.mce)])
    def test_calibration_against_torchmetrics(self, norm: str, metric: Callable[..., Tensor]) -> None:
        probs, labels = random_predictions(5, 75, 5, seed=3)
        expected = [
            multiclass_calibration_error(p, y, num_classes=5, n_bins=15, norm=norm)  # pyright: ignore[reportArgumentType]
            for p, y in zip(probs, labels, strict=True)
        ]
        torch.testing.assert_close(metric(probs, labels), torch.stack(expected).double(), atol=1e-6, rtol=0)

    def test_saturated_confidence_stays_in_the_last_bin(self) -> None:
        # torchmetrics gives confidence 1 a bin beyond the last: 0.52 here, for the 0.48 that one bin defines.
        probs = torch.tensor([[[1.0, 0.0], [0.96, 0.04]]], dtype=torch.float64)
        labels = torch.tensor([[1, 0]])
        assert metrics.ece(probs, labels, num_bins=1).item() == pytest.approx(0.98 - 0.5, abs=ALGEBRA)
        beyond = multiclass_calibration_error(probs[0], labels[0], num_classes=2, n_bins=1)
        assert beyond.item() == pytest.approx(0.52, abs=1e-6)

    def test_rounding_above_one_changes_nothing(self) -> None:
        probs, labels = random_predictions(1, 30, 3)
        probs[0, 0] = torch.tensor([1.0, 0.0, 0.0])
        rounded = probs.clone()
        rounded[0, 0, 0] += 1.2e-7
        torch.testing.assert_close(metrics.ece(rounded, labels), metrics.ece(probs, labels), atol=1e-6, rtol=0)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
    def test_every_metric_is_float64(self, dtype: torch.dtype) -> None:
        probs, labels = random_predictions(4, 20, 5)
        probs, labels = probs.to(dtype), labels.to(torch.int32)
        for metric in (metrics.accuracy, metrics.brier, metrics.ece, metrics.mce):
            assert metric(probs, labels).dtype == torch.float64
        value = metrics.nll(probs.float().log().to(dtype), labels)
        assert value.dtype == torch.float64
        assert value.shape == (4,)

    def test_no_gradient_is_tracked(self) -> None:
        probs, labels = random_predictions(2, 5, 3)
        assert not metrics.brier(probs.requires_grad_(), labels).requires_grad


class TestCalibrationProperties:
    @settings(max_examples=60, deadline=None)
    @given(
        seed=st.integers(0, 10_000),
        num_examples=st.integers(1, 60),
        num_classes=st.integers(2, 7),
        num_bins=st.integers(1, 30),
        sharpness=st.floats(0.0, 50.0),
    )
    def test_bounds_order_and_permutation(
        self, seed: int, num_examples: int, num_classes: int, num_bins: int, sharpness: float
    ) -> None:
        probs, labels = random_predictions(2, num_examples, num_classes, seed, sharpness)
        ece, mce = metrics.ece(probs, labels, num_bins=num_bins), metrics.mce(probs, labels, num_bins=num_bins)
        assert bool((ece >= 0).all() and (mce <= 1 + ALGEBRA).all())
        assert bool((ece <= mce + ALGEBRA).all())
        order = torch.randperm(num_examples, generator=generator(seed))
        torch.testing.assert_close(metrics.ece(probs[:, order], labels[:, order], num_bins=num_bins), ece)
        classes = torch.randperm(num_classes, generator=generator(seed))
        # Column c of the permuted prediction is the old class classes[c]. A constant prediction has ties, whose
        # winner is the first class and so does change.
        if sharpness > 0.01:
            renamed = metrics.ece(probs[..., classes], classes.argsort()[labels], num_bins=num_bins)
            torch.testing.assert_close(renamed, ece)

    def test_perfect_calibration_tends_to_zero(self) -> None:
        small = [metrics.ece(*calibrated_predictions(1, 500, seed)).item() for seed in range(10)]
        large = [metrics.ece(*calibrated_predictions(1, 50_000, seed)).item() for seed in range(10)]
        assert max(large) < 0.4 * math.sqrt(15 / 50_000)
        # The bias falls as 1 / sqrt(n): by 10 here.
        assert 7 < np.mean(small) / np.mean(large) < 14

    def test_one_bin_is_the_gap_of_the_means(self) -> None:
        probs, labels = random_predictions(3, 40, 4)
        gap = (metrics.accuracy(probs, labels) - probs.amax(-1).mean(-1)).abs()
        torch.testing.assert_close(metrics.ece(probs, labels, num_bins=1), gap)
        torch.testing.assert_close(metrics.mce(probs, labels, num_bins=1), gap)


class TestReliabilityCurve:
    def test_against_numpy(self) -> None:
        probs, labels = random_predictions(4, 50, 3)
        curve = metrics.reliability_curve(probs, labels, 10)
        confidence = probs.amax(-1).flatten().numpy()
        correct = (probs.argmax(-1) == labels).flatten().numpy().astype(float)
        inside = np.ceil(confidence * 10).astype(int) - 1
        np.testing.assert_allclose(curve.bin_edges.numpy(), np.linspace(0, 1, 11), atol=ALGEBRA)
        assert curve.count.tolist() == np.bincount(inside, minlength=10).tolist()
        for b in range(10):
            if (inside == b).any():
                assert curve.confidence[b].item() == pytest.approx(confidence[inside == b].mean(), abs=ALGEBRA)
                assert curve.accuracy[b].item() == pytest.approx(correct[inside == b].mean(), abs=ALGEBRA)
            else:
                assert math.isnan(curve.confidence[b].item())
                assert math.isnan(curve.accuracy[b].item())

    def test_errors_are_those_of_the_pooled_examples(self) -> None:
        probs, labels = random_predictions(4, 50, 3)
        curve = metrics.reliability_curve(probs, labels)
        expected = numpy_calibration(probs.flatten(0, 1), labels.flatten(), 15)
        assert (curve.ece, curve.mce) == pytest.approx(expected, abs=ALGEBRA)


class TestPooled:
    def test_point_equals_numpy_and_is_reproducible(self) -> None:
        probs, labels = random_predictions(30, 20, 5)
        expected = numpy_calibration(probs.flatten(0, 1), labels.flatten(), 15)
        ece = metrics.pooled_ece(probs, labels, generator=generator())
        mce = metrics.pooled_mce(probs, labels, generator=generator())
        assert (ece.mean, mce.mean) == pytest.approx(expected, abs=ALGEBRA)
        assert ece == metrics.pooled_ece(probs, labels, generator=generator())
        assert ece != metrics.pooled_ece(probs, labels, generator=generator(1))

    def test_resampling_equals_recomputing(self, monkeypatch: pytest.MonkeyPatch) -> None:
        probs, labels = random_predictions(12, 20, 5)
        result = metrics.pooled_ece(probs, labels, generator=generator(), num_resamples=50)
        draws = torch.randint(12, (50, 12), generator=generator())
        values = [numpy_calibration(probs[d].flatten(0, 1), labels[d].flatten(), 15)[0] for d in draws]
        low, high = np.quantile(values, [0.025, 0.975])
        assert result.half_width == pytest.approx((high - low) / 2, abs=ALGEBRA)
        # In blocks of four resamples the generator is read in the same order.
        monkeypatch.setattr(metrics, "_BOOTSTRAP_BLOCK", 4 * 12)
        assert metrics.pooled_ece(probs, labels, generator=generator(), num_resamples=50) == pytest.approx(
            result, abs=ALGEBRA
        )

    def test_tasks_of_unequal_sizes(self) -> None:
        tasks = [random_predictions(1, size, 3, seed=size) for size in (3, 40, 11, 1, 25)]
        probs, labels = [p[0] for p, _ in tasks], [y[0] for _, y in tasks]
        ece = metrics.pooled_ece(probs, labels, generator=generator(), num_resamples=60)
        mce = metrics.pooled_mce(probs, labels, generator=generator(), num_resamples=60)
        assert (ece.mean, mce.mean) == pytest.approx(
            numpy_calibration(torch.cat(probs), torch.cat(labels), 15), abs=ALGEBRA
        )
        draws = torch.randint(5, (60, 5), generator=generator())
        values = np.array(
            [numpy_calibration(torch.cat([probs[i] for i in d]), torch.cat([labels[i] for i in d]), 15) for d in draws]
        )
        low, high = np.quantile(values, [0.025, 0.975], axis=0)
        assert (ece.half_width, mce.half_width) == pytest.approx(tuple((high - low) / 2), abs=ALGEBRA)
        assert ece.num_tasks == 5

    def test_a_sequence_of_equal_tasks_is_the_stack_of_them(self) -> None:
        probs, labels = random_predictions(6, 20, 5)
        assert metrics.pooled_ece([*probs], [*labels], generator=generator()) == metrics.pooled_ece(
            probs, labels, generator=generator()
        )

    def test_a_single_task_has_no_interval(self) -> None:
        result = metrics.pooled_mce(*random_predictions(1, 20, 5), generator=generator())
        assert math.isnan(result.half_width)

    def test_interval_covers_the_error_of_a_miscalibrated_predictor(self) -> None:
        # Always confidence 0.8; correct with probability 0.6 + task effect. The pooled ECE is 0.2 in the limit.
        repetitions, num_tasks, num_examples = 400, 60, 20
        source = generator(5)
        covered = 0
        for _ in range(repetitions):
            effect = 0.6 + 0.2 * (torch.rand(num_tasks, 1, generator=source) - 0.5)
            labels = (torch.rand(num_tasks, num_examples, generator=source) > effect).long()
            probs = torch.tensor([0.8, 0.2]).expand(num_tasks, num_examples, 2)
            result = metrics.pooled_ece(probs, labels, generator=source, num_resamples=400)
            covered += result.low <= 0.2 <= result.high
        # The percentile bootstrap of 60 tasks is a little narrow (about 94%).
        assert abs(covered / repetitions - 0.94) < 5 * math.sqrt(0.94 * 0.06 / repetitions)


class TestEstimate:
    @pytest.mark.parametrize("degrees", [1, 2, 3, 4, 5, 9, 10, 30, 99, 100, 101, 600, 10_000])
    def test_student_quantile(self, degrees: int) -> None:
        assert metrics._student_975(degrees) == pytest.approx(scipy.stats.t.ppf(0.975, degrees), rel=1e-9)

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


class TestReports:
    def test_classification_report(self) -> None:
        probs, labels = random_predictions(25, 15, 5)
        report = metrics.classification_report(probs.log(), labels)
        assert list(report) == ["accuracy", "nll", "brier", "ece", "mce", "selective_area", "ece_pooled", "mce_pooled"]
        entropy = torch.distributions.Categorical(probs).entropy()
        area = selective_area(entropy, probs.argmax(-1) == labels)
        assert report["selective_area"] == pytest.approx(metrics.estimate(area), abs=ALGEBRA)
        for name, metric in (
            ("accuracy", metrics.accuracy),
            ("brier", metrics.brier),
            ("ece", metrics.ece),
            ("mce", metrics.mce),
        ):
            assert report[name] == pytest.approx(metrics.estimate(metric(probs, labels)), abs=ALGEBRA)
        assert report["nll"] == metrics.estimate(metrics.nll(probs.log(), labels))
        pooled = metrics.pooled_ece(probs, labels, generator=generator())
        assert report["ece_pooled"] == pytest.approx(pooled, abs=ALGEBRA)
        assert report == metrics.classification_report(probs.log(), labels)
        assert report != metrics.classification_report(probs.log(), labels, generator=generator(1))

    def test_classification_report_on_infinite_nll(self) -> None:
        log_probs = torch.tensor([[[0.0, -math.inf]], [[0.0, -math.inf]]])
        report = metrics.classification_report(log_probs, torch.tensor([[1], [0]]))
        assert report["nll"].mean == math.inf
        assert report["accuracy"].mean == 0.5

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
        error = metrics.estimate(quantile_calibration_error(cdf))
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


P = torch.full((2, 3, 4), 0.25)
Y = torch.zeros(2, 3, dtype=torch.int64)
R = torch.zeros(2, 3)
NAN = torch.full((2, 3), math.nan)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: metrics.accuracy(P[0], Y), ValueError, "probs has shape [3, 4]; expected [num_tasks, num_examples,"),
        (lambda: metrics.accuracy(P[:0], Y[:0]), ValueError, "probs has shape [0, 3, 4]; expected"),
        (lambda: metrics.accuracy(P.long(), Y), TypeError, "probs has dtype torch.int64; expected a floating-point"),
        (lambda: metrics.accuracy(P, R), TypeError, "labels has dtype torch.float32; expected class indices"),
        (lambda: metrics.brier(P, Y[:, :2]), ValueError, "labels has shape [2, 2]; expected [2, 3]"),
        (lambda: metrics.brier(P, Y + 4), ValueError, "labels range from 4 to 4; expected class indices from 0 to 3"),
        (lambda: metrics.brier(P, Y - 1), ValueError, "labels range from -1 to -1"),
        (lambda: metrics.ece(P * math.nan, Y), ValueError, "probs holds 24 nan"),
        (lambda: metrics.ece(-P, Y), ValueError, "probs goes down to -0.25"),
        (lambda: metrics.mce(2 * P, Y), ValueError, "probs has a row whose sum is off by 1;"),
        (lambda: metrics.mce(P, Y, num_bins=0), ValueError, "num_bins is 0; expected at least 1"),
        (lambda: metrics.nll(P, Y), ValueError, "log_probs has a row whose exponentials sum to 1 +- 4.136"),
        (lambda: metrics.nll(P * math.nan, Y), ValueError, "log_probs holds 24 nan"),
        (lambda: metrics.nll(P[0], Y), ValueError, "log_probs has shape [3, 4]"),
        (lambda: metrics.reliability_curve(P, Y, 0), ValueError, "num_bins is 0"),
        (
            lambda: metrics.pooled_ece(P, Y, generator=generator(), num_resamples=1),
            ValueError,
            "num_resamples is 1; expected at least 2",
        ),
        (
            lambda: metrics.pooled_ece([*P], [Y[0]], generator=generator()),
            ValueError,
            "probs has 2 tasks and labels 1; expected as many of each, at least one",
        ),
        (
            lambda: metrics.pooled_mce([], [], generator=generator()),
            ValueError,
            "probs has 0 tasks and labels 0; expected as many",
        ),
        (
            lambda: metrics.pooled_ece([P[0], 2 * P[1]], [*Y], generator=generator()),
            ValueError,
            "task 1 by itself: probs has a row whose sum is off by 1;",
        ),
        (
            lambda: metrics.pooled_ece([*P], [Y[0], R[0]], generator=generator()),
            TypeError,
            "task 1 by itself: labels has dtype torch.float32",
        ),
        (lambda: metrics.mse(R[0], R[0]), ValueError, "targets has shape [3]; expected [num_tasks, num_examples] or"),
        (lambda: metrics.mse(R[:1], R), ValueError, "mean has shape [1, 3]; expected [2, 3], the shape of targets"),
        (lambda: metrics.mse(NAN, R), ValueError, "mean holds 6 values that are not finite"),
        (lambda: metrics.mse(Y, R), TypeError, "mean has dtype torch.int64"),
        (lambda: metrics.gaussian_nll(R, R, R), ValueError, "variance goes down to 0; expected positive"),
        (lambda: metrics.density_nll(NAN), ValueError, "log_density holds 6 nan or +inf"),
        (lambda: metrics.density_nll(R[0]), ValueError, "log_density has shape [3]"),
        (lambda: metrics.density_nll(Y), TypeError, "log_density has dtype torch.int64"),
        (lambda: metrics.coverage(R, R - 1, R), ValueError, "upper lies below lower in 6 places"),
        (lambda: metrics.central_interval(R, R, 1.0), ValueError, "level is 1.0; expected a probability strictly"),
        (lambda: metrics.estimate(R), ValueError, "values has shape [2, 3]; expected [num_tasks]"),
        (lambda: metrics.estimate(R[0, :0]), ValueError, "values has shape [0]"),
        (lambda: metrics.estimate(NAN[0]), ValueError, "values holds 3 nan of 3"),
        (lambda: metrics.estimate(Y[0]), TypeError, "values has dtype torch.int64"),
        (lambda: metrics.paired_difference(R[0], R[0, :2]), ValueError, "b has shape [2]; expected [3]"),
        (lambda: metrics.paired_difference(R[0], Y[0]), TypeError, "b has dtype torch.int64"),
        (lambda: metrics.ood_auroc(NAN, R), ValueError, "uncertainty_in holds 6 nan"),
        (lambda: metrics.ood_auroc(R, Y), TypeError, "uncertainty_out has dtype torch.int64"),
        (lambda: metrics.ood_auroc(R, R[0]), ValueError, "uncertainty_out has shape [3]; expected as many axes"),
        (lambda: metrics.ood_auroc(R, R[:1]), ValueError, "uncertainty_out has 1 tasks; expected 2"),
        (lambda: metrics.ood_auroc(P, P), ValueError, "uncertainty_in has shape [2, 3, 4]"),
        (
            lambda: metrics.regression_report(R, R + 1, R, log_density=R[0]),
            ValueError,
            "log_density has shape [3]; expected [2, 3]",
        ),
        (
            lambda: metrics.regression_report(R, R + 1, R, cdf=R[:1]),
            ValueError,
            "cdf has shape [1, 3]; expected [2, 3], the shape of targets",
        ),
        (
            lambda: metrics.regression_report(R, R + 1, R, cdf=R + 2),
            ValueError,
            "cdf has 6 values outside [0, 1]",
        ),
    ],
)
def test_bad_input_is_refused(call: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        call()
