"""Scores and calibration of class probabilities against closed forms, numpy and torchmetrics."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchmetrics.functional.classification import multiclass_calibration_error

from ibaml import metrics
from ibaml.metrics import calibration
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

    def test_a_confidence_on_an_edge_belongs_to_the_bin_below(self) -> None:
        probs, labels = torch.tensor([[[0.5, 0.5], [0.75, 0.25]]]), torch.tensor([[0, 1]])
        assert metrics.ece(probs, labels, num_bins=2).item() == (abs(1 - 0.5) + abs(0 - 0.75)) / 2

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
        monkeypatch.setattr(calibration, "_BOOTSTRAP_BLOCK", 4 * 12)
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


class TestReports:
    def test_classification_report(self) -> None:
        probs, labels = random_predictions(25, 15, 5)
        report = metrics.classification_report(probs.log(), labels)
        assert list(report) == ["accuracy", "nll", "brier", "ece", "mce", "selective_area", "ece_pooled", "mce_pooled"]
        entropy = torch.distributions.Categorical(probs).entropy()
        area = metrics.selective_area(entropy, probs.argmax(-1) == labels)
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
