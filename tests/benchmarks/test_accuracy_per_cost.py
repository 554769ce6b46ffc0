"""The reference of the accuracy comparison is converged, and all methods are judged by the same rule."""

import dataclasses
import math

import pytest
import torch
from benchmarks.accuracy_per_cost import (
    PLAIN,
    TWO_RATES,
    Row,
    compare,
    conv_tasks,
    linear_regression,
    nrmse,
    plain_row,
    summary,
)
from benchmarks.conv_reference import build_conv_problem
from benchmarks.settings import AccuracySettings

from ibaml.solvers.inner import GradientDescent, NaturalGradient
from ibaml.solvers.linear import CG

SMALL = AccuracySettings(
    budgets=((3, 3),), relative_learning_rates=(0.5, 1.0), num_tuning_tasks=1, num_tasks=1, num_channels=2, image_size=8
)


@pytest.fixture(scope="module")
def conv():
    return build_conv_problem(SMALL, (-10.0, -9.0))


def test_reference_is_converged(conv):
    assert conv.inner_grad_norm < 1e-9
    assert conv.linear_residual < 1e-9
    assert conv.largest_curvature > 0


def test_a_long_descent_with_many_products_reaches_the_reference(conv):
    # The variances are the slow part: their curvature is the KL weight alone.
    few, many = (
        nrmse(
            conv.estimate(
                GradientDescent(num_steps=num_steps, learning_rate=1 / conv.largest_curvature),
                CG(max_steps=100, rtol=1e-9),
                [0],
                precondition=True,
            ),
            conv.exact[:1],
        )
        for num_steps in (3, 100)
    )
    natural = conv.estimate(
        NaturalGradient(num_steps=200, learning_rate=0.2), CG(max_steps=200, rtol=1e-9), [0], precondition=True
    )
    assert many < few
    assert nrmse(natural, conv.exact[:1]) < 1e-5


def test_nrmse_by_hand():
    exact = [{"w": torch.tensor([3.0, 0.0])}, {"w": torch.tensor([0.0, 4.0])}]
    estimates = [{"w": torch.tensor([3.0, 1.0])}, {"w": torch.tensor([2.0, 4.0])}]
    assert nrmse(estimates, exact) == pytest.approx(math.sqrt(5) / 5)
    assert nrmse([{"w": torch.tensor([math.nan, 0.0])}] * 2, exact) == math.inf


def test_learning_rates_are_chosen_on_other_tasks_than_judged():
    asked, progress = [], []

    def estimate(num_steps, num_products, rate, tasks):
        asked.append((num_steps, num_products, rate, list(tasks)))
        return [torch.tensor([1.0 + abs(rate - 0.5)]) for _ in tasks]

    settings = dataclasses.replace(SMALL, num_tuning_tasks=2, num_tasks=3, relative_learning_rates=(0.25, 0.5, 1.0))
    (row,) = compare("p", {PLAIN: estimate}, [torch.ones(1)] * 5, settings, progress.append)
    assert asked == [(3, 3, rate, [0, 1]) for rate in (0.25, 0.5, 1.0)] + [(3, 3, 0.5, [2, 3, 4])]
    assert (row.learning_rate, row.nrmse) == (0.5, 0.0)
    assert progress == [1.0]


def test_preconditioning_halves_the_error_on_fig_1():
    settings = dataclasses.replace(SMALL, budgets=((10, 10),), relative_learning_rates=(0.5, 0.7, 1.0, 1.4, 2.0))
    rows = linear_regression(settings)
    best = min(row.nrmse for row in rows if row.method == "natural gradient + preconditioned CG")
    assert best < 0.5 * plain_row(rows, rows[0]).nrmse


def test_two_rates_halve_the_error_on_the_conv4():
    settings = dataclasses.replace(SMALL, budgets=((10, 10),), relative_learning_rates=(1.0, 1.4))
    rows, _ = conv_tasks(settings, (-10.0, -9.0), lambda part: None)
    two_rates = next(row for row in rows if row.method == TWO_RATES)
    assert two_rates.nrmse < 0.5 * plain_row(rows, two_rates).nrmse


def test_summary_compares_with_the_plain_method():
    rows = [Row("p", 5, 5, PLAIN, 1.0, 0.8), Row("p", 5, 5, "other", 0.5, 0.2)]
    text = summary(rows, ["a note"], SMALL, "command")
    assert "| 5 | 5 | other | 0.5 | 0.2 | 0.25 |" in text
    assert "| p | 5 | 5 | other | 0.2 | 0.8 | 0.25 |" in text
    assert "- a note" in text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"budgets": ()}, "budgets must have at least one entry, but is empty"),
        ({"budgets": ((5, 0),)}, "budgets must be pairs of numbers of at least 1"),
        ({"relative_learning_rates": (0.0,)}, "relative_learning_rates must be positive"),
        ({"num_tasks": 0}, "num_tasks must be at least 1, but is 0"),
    ],
)
def test_settings_without_a_meaning_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SMALL, **changes)
