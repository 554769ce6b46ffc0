"""Selective prediction against every order of tied examples, and against known extremes."""

import itertools

import numpy as np
import pytest
import torch

from ibaml.metrics import selective_accuracy, selective_area, selective_curve


def examples(num_tasks: int = 3, num_examples: int = 7, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Uncertainties of four levels only, so that most are tied."""
    generator = torch.Generator().manual_seed(seed)
    levels = torch.randint(4, (num_tasks, num_examples), generator=generator)
    return levels.double() / 3, torch.rand(num_tasks, num_examples, generator=generator) < 0.6


def over_all_orders(uncertainty: torch.Tensor, correct: torch.Tensor) -> np.ndarray:
    """Accuracy of the k surest, the mean over all orders of the examples that sort them by uncertainty."""
    u, hit = uncertainty.numpy(), correct.numpy()
    curves = [
        [hit[list(order[:k])].mean() for k in range(1, len(u) + 1)]
        for order in itertools.permutations(range(len(u)))
        if all(u[a] <= u[b] for a, b in itertools.pairwise(order))
    ]
    return np.mean(curves, axis=0)


@pytest.mark.parametrize("seed", range(4))
def test_curve_area_and_accuracy_are_means_over_all_orders_of_ties(seed):
    uncertainty, correct = examples(seed=seed)
    expected = [over_all_orders(u, c) for u, c in zip(uncertainty, correct, strict=True)]
    np.testing.assert_allclose(selective_area(uncertainty, correct), [c.mean() for c in expected], atol=1e-12)
    for num_answered in range(1, 8):
        found = selective_accuracy(uncertainty, correct, coverage=num_answered / 7)
        np.testing.assert_allclose(found, [c[num_answered - 1] for c in expected], atol=1e-12)
    curve = selective_curve(uncertainty[:1], correct[:1])
    np.testing.assert_allclose(curve.accuracy, expected[0], atol=1e-12)
    np.testing.assert_allclose(curve.coverage, np.arange(1, 8) / 7)
    assert curve.area == pytest.approx(expected[0].mean(), abs=1e-12)


def test_curve_pools_tasks():
    uncertainty, correct = examples()
    pooled = selective_curve(uncertainty, correct)
    torch.testing.assert_close(
        pooled.accuracy, selective_curve(uncertainty.reshape(1, -1), correct.reshape(1, -1)).accuracy
    )
    assert pooled.accuracy[-1].item() == pytest.approx(correct.double().mean().item(), abs=1e-12)


def test_an_uncertainty_that_says_nothing_gives_the_accuracy_and_a_perfect_one_the_most():
    _, correct = examples(num_examples=40, seed=5)
    rate = correct.double().mean(1)
    torch.testing.assert_close(selective_area(torch.zeros(3, 40), correct), rate)
    perfect, worst = selective_area((~correct).double(), correct), selective_area(correct.double(), correct)
    for seed in range(5):
        drawn = torch.rand(3, 40, generator=torch.Generator().manual_seed(seed))
        area = selective_area(drawn, correct)
        assert bool(((worst <= area) & (area <= perfect)).all())
    # All hits first: accuracy 1 up to the rate, then hits / k.
    hits = correct.sum(1)
    expected = [(h + sum(h / k for k in range(h + 1, 41))) / 40 for h in hits.tolist()]
    torch.testing.assert_close(perfect, torch.tensor(expected, dtype=torch.float64))


def test_only_the_order_counts():
    uncertainty, correct = examples()
    torch.testing.assert_close(selective_area(uncertainty, correct), selective_area(uncertainty.exp() * 9, correct))
    assert bool((selective_area(torch.full((1, 2), torch.inf), torch.tensor([[True, False]])) == 0.5).all())


@pytest.mark.parametrize(("coverage", "answered"), [(0.07, 7), (0.071, 8), (1.0, 100), (0.001, 1), (1e-12, 1)])
def test_coverage_is_rounded_up_to_whole_examples(coverage, answered):
    uncertainty = torch.arange(100.0).unsqueeze(0)
    # Hits at even places: the accuracy tells how many were answered.
    correct = (torch.arange(100) % 2 == 0).unsqueeze(0)
    found = selective_accuracy(uncertainty, correct, coverage=coverage).item()
    assert found == pytest.approx((answered + 1) // 2 / answered, abs=1e-12)


@pytest.mark.parametrize(
    ("uncertainty", "correct", "error", "message"),
    [
        (torch.zeros(1, 2, dtype=torch.int64), torch.ones(1, 2).bool(), TypeError, "uncertainty has dtype torch.int64"),
        (torch.zeros(1, 2), torch.ones(1, 2), TypeError, "correct has dtype torch.float32; expected bool"),
        (torch.zeros(2), torch.ones(2).bool(), ValueError, r"uncertainty has shape \[2\]; expected"),
        (torch.zeros(2, 0), torch.ones(2, 0).bool(), ValueError, r"uncertainty has shape \[2, 0\]"),
        (torch.zeros(2, 3), torch.ones(3, 2).bool(), ValueError, r"correct has shape \[3, 2\]; expected \[2, 3\]"),
        (torch.full((1, 2), torch.nan), torch.ones(1, 2).bool(), ValueError, "uncertainty holds 2 nan"),
    ],
)
@pytest.mark.parametrize("function", [selective_curve, selective_area])
def test_bad_input_is_refused(function, uncertainty, correct, error, message):
    with pytest.raises(error, match=message):
        function(uncertainty, correct)


@pytest.mark.parametrize("coverage", [0.0, 1.1, torch.nan])
def test_bad_coverage_is_refused(coverage):
    with pytest.raises(ValueError, match="coverage is .*; expected a share above 0"):
        selective_accuracy(torch.zeros(1, 2), torch.ones(1, 2).bool(), coverage=coverage)
