"""Thresholds on confidence: sums written out, the bound against scipy, and what a threshold promises in simulation."""

import math
import re

import pytest
import scipy.stats
import torch

from ibaml.metrics import AbstentionCurve, abstention_curve
from ibaml.types import Tensor


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def calibrated(num_tasks: int, num_examples: int, seed: int, clustered: bool = False) -> tuple[Tensor, Tensor]:
    """Confidences of hard and easy tasks, and hits with these probabilities; clustered: some tasks go better."""
    source = generator(seed)
    ease = 1.5 + torch.randn(num_tasks, 1, generator=source, dtype=torch.float64)
    logit = ease + 2 * torch.randn(num_tasks, num_examples, generator=source, dtype=torch.float64)
    luck = clustered * torch.randn(num_tasks, 1, generator=source, dtype=torch.float64)
    draw = torch.rand(num_tasks, num_examples, generator=source, dtype=torch.float64)
    return torch.sigmoid(logit), draw < torch.sigmoid(logit + luck)


def test_error_and_coverage_are_counts() -> None:
    source = generator()
    confidence = [(10 * torch.rand(n, generator=source, dtype=torch.float64)).round() / 10 for n in (7, 20, 3)]
    correct = [torch.rand(len(one), generator=source) < 0.7 for one in confidence]
    curve = abstention_curve(confidence, correct)
    every, hits = torch.cat(confidence), torch.cat(correct)
    assert curve.confidence.tolist() == sorted(set(every.tolist()))
    for threshold, coverage, error, bound in zip(*curve, strict=True):
        answered = every >= threshold
        assert float(coverage) == pytest.approx(float(answered.double().mean()), abs=1e-12)
        assert float(error) == pytest.approx(float((~hits)[answered].double().mean()), abs=1e-12)
        assert error <= bound <= 1
    assert all(value.dtype == torch.float64 for value in curve)


def test_few_thresholds_divide_the_answers_evenly() -> None:
    confidence, correct = calibrated(10, 100, 0)
    curve = abstention_curve(list(confidence), list(correct), num_thresholds=4)
    assert curve.coverage.tolist() == [1.0, 0.75, 0.5, 0.25]


def test_bound_of_independent_answers_is_that_of_clopper_and_pearson() -> None:
    """As many tasks as make Student's quantile the normal one, with the same number of misses in each."""
    confidence = [torch.full((10,), 0.5).double()] * 4000
    correct = [torch.tensor([False] + [True] * 9)] * 4000
    (bound,) = abstention_curve(confidence, correct).error_bound.tolist()
    expected = scipy.stats.binomtest(4000, 40_000, alternative="less").proportion_ci(0.95, "exact").high
    assert bound == pytest.approx(expected, rel=1e-4)
    right = abstention_curve(confidence, [torch.ones(10, dtype=torch.bool)] * 4000)
    assert float(right.error_bound) == pytest.approx(1 - 0.05 ** (1 / 40_000), rel=1e-2)
    wrong = abstention_curve(confidence, [torch.zeros(10, dtype=torch.bool)] * 4000)
    assert wrong.error_bound.tolist() == [1.0]


def test_tasks_that_are_wrong_as_a_whole_count_as_one_answer_each() -> None:
    confidence = [torch.full((50,), 0.5).double()] * 400
    correct = [torch.full((50,), index >= 40) for index in range(400)]
    (bound,) = abstention_curve(confidence, correct).error_bound.tolist()
    expected = scipy.stats.binomtest(40, 400, alternative="less").proportion_ci(0.95, "exact").high
    assert bound == pytest.approx(expected, rel=0.01)


def test_a_single_task_promises_nothing() -> None:
    curve = abstention_curve([torch.tensor([0.9, 0.8])], [torch.tensor([True, True])])
    assert curve.error_bound.tolist() == [1.0, 1.0] and curve.min_confidence(0.5) == math.inf


def test_the_least_confidence_that_will_do_is_taken() -> None:
    values = torch.tensor([0.2, 0.4, 0.6, 0.8], dtype=torch.float64)
    curve = AbstentionCurve(values, values, values, torch.tensor([0.3, 0.1, 0.2, 0.05]).double())
    assert [curve.min_confidence(share) for share in (0.5, 0.15, 0.07, 0.01)] == [0.2, 0.4, 0.8, math.inf]


@pytest.mark.parametrize("clustered", [False, True])
def test_the_error_of_new_tasks_is_at_most_what_was_asked_for(clustered: bool) -> None:
    num_sets, max_error = 200, 0.05
    new, hits = (value.flatten() for value in calibrated(3000, 40, 10**6, clustered))
    exceeded, errors, coverages = 0, [], []
    for seed in range(num_sets):
        confidence, correct = calibrated(100, 40, seed, clustered)
        answered = new >= abstention_curve(list(confidence), list(correct)).min_confidence(max_error)
        errors.append(float((~hits)[answered].double().mean()))
        coverages.append(float(answered.double().mean()))
        exceeded += errors[-1] > max_error
    # 5% promised for one threshold, somewhat more for the best of many; five standard errors of 200 sets.
    assert exceeded / num_sets < 0.07 + 5 * math.sqrt(0.07 * 0.93 / num_sets)
    mean = sum(errors) / num_sets
    assert 0.6 * max_error < mean < max_error
    # Nor is it had by answering next to nothing.
    assert sum(coverages) / num_sets > 0.25


@pytest.mark.parametrize(
    ("confidence", "correct", "error", "message"),
    [
        ([], [], ValueError, "there are 0 vectors of confidence and 0 of correct; expected one of each"),
        ([torch.ones(2)], [], ValueError, "there are 1 vectors of confidence and 0 of correct"),
        ([torch.ones(2, 1)], [torch.ones(2) > 0], ValueError, "confidence of task 0 has shape [2, 1]; expected"),
        ([torch.ones(2).long()], [torch.ones(2) > 0], TypeError, "confidence of task 0 has dtype torch.int64"),
        ([torch.ones(2)], [torch.ones(2)], TypeError, "correct of task 0 has dtype torch.float32; expected bool"),
        ([torch.ones(2)], [torch.ones(3) > 0], ValueError, "correct of task 0 has shape [3]; expected [2]"),
        ([torch.tensor([math.nan])], [torch.ones(1) > 0], ValueError, "confidence of task 0 holds 1 nan"),
    ],
)
def test_refusals(confidence: list[Tensor], correct: list[Tensor], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        abstention_curve(confidence, correct)


def test_thresholds_have_to_be_some() -> None:
    with pytest.raises(ValueError, match="num_thresholds is 0; expected at least 1"):
        abstention_curve([torch.ones(1)], [torch.ones(1) > 0], num_thresholds=0)
