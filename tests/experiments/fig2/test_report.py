"""Slopes by hand; what the rows and the summary say."""

import re

import pytest

from ibaml.experiments.fig2.report import rows, slope, summary
from ibaml.experiments.fig2.settings import (
    AlgorithmName,
    CostPoint,
    Duration,
    Fig2Result,
    Fig2Settings,
    curve_name,
)

ALGORITHMS: tuple[AlgorithmName, ...] = ("maml", "imaml", "abml", "ibaml")


def point(
    algorithm: AlgorithmName, num_inner_steps: int, num_linear_steps: int | None, backward: float, peak: int, hvps: int
) -> CostPoint:
    return CostPoint(
        algorithm,
        num_inner_steps,
        num_linear_steps,
        forward_seconds=Duration(0.5, 0.25, 1.0),
        # The median is far off, as on a busy machine.
        backward_seconds=Duration(9 * backward, backward, 10 * backward),
        total_seconds=Duration(10 * backward, 1 + backward, 11 * backward),
        peak_bytes=peak,
        num_forward_gradients=num_inner_steps + 1,
        num_backward_gradients=1,
        num_hvps=hvps,
    )


POINTS = [
    *(point("maml", k, None, 1.0 + k, 100 + 10 * k, k) for k in (1, 5, 30)),
    point("imaml", 1, 5, 3.0, 120, 5),
    point("imaml", 5, 5, 5.0, 120, 5),
    point("imaml", 30, 5, 4.0, 150, 5),
    *(point("abml", k, None, 2.0 + 2 * k, 300 + 30 * k, k) for k in (1, 5, 30)),
]
RESULT = Fig2Result(
    Fig2Settings(inner_steps=(1, 5, 30), linear_steps=(5,), algorithms=("maml", "imaml", "abml")), "a machine", POINTS
)


def test_slopes_by_hand() -> None:
    maml, imaml, abml = slope(POINTS)
    assert (maml.algorithm, maml.num_linear_steps, maml.first, maml.last) == ("maml", None, 5, 30)
    assert maml[4:] == pytest.approx((31 / 6 - 1, 32 / 7 - 1, 400 / 150 - 1, 0, 0), abs=1e-12)
    assert (imaml.algorithm, imaml.num_linear_steps) == ("imaml", 5)
    assert (imaml.backward_seconds, imaml.total_seconds, imaml.peak_bytes) == (
        pytest.approx(-0.2),
        pytest.approx(-1 / 6),
        pytest.approx(0.25),
    )
    # Least squares by hand: mean K is 12 and mean time is 4, the slope is (-11 * -1 + -7 * 1 + 18 * 0) / 494.
    residuals = [value - 4 - 4 / 494 * (k - 12) for k, value in [(1, 3.0), (5, 5.0), (30, 4.0)]]
    assert imaml.backward_seconds_bend == pytest.approx(max(map(abs, residuals)) / 4)
    assert abml.backward_seconds == pytest.approx(maml.backward_seconds)


def test_slopes_between_other_numbers_of_inner_steps() -> None:
    assert [(each.first, each.last) for each in slope(POINTS[:2])] == [(1, 5)]
    (maml,) = slope(POINTS[:3], first=1, last=5)
    assert maml.backward_seconds == pytest.approx(2)
    assert (maml.first, maml.last) == (1, 5)


@pytest.mark.parametrize("steps", [{"first": 2}, {"last": 29}, {"first": 30}, {"first": 5, "last": 1}])
def test_slopes_between_what_was_not_measured_are_refused(steps: dict[str, int]) -> None:
    start, end = steps.get("first", 5), steps.get("last", 30)
    message = (
        "first and last must be two of the numbers of inner steps [1, 5, 30], the smaller one first, but are "
        f"{start} and {end}."
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        slope(POINTS, **steps)


def test_rows_are_flat_and_complete() -> None:
    table = rows(RESULT)
    assert len(table) == len(POINTS)
    assert table[3] == {
        "algorithm": "imaml",
        "num_inner_steps": 1,
        "num_linear_steps": 5,
        "forward_seconds_median": 0.5,
        "forward_seconds_shortest": 0.25,
        "forward_seconds_longest": 1.0,
        "backward_seconds_median": 27.0,
        "backward_seconds_shortest": 3.0,
        "backward_seconds_longest": 30.0,
        "total_seconds_median": 30.0,
        "total_seconds_shortest": 4.0,
        "total_seconds_longest": 33.0,
        "peak_bytes": 120,
        "num_forward_gradients": 2,
        "num_backward_gradients": 1,
        "num_hvps": 5,
    }


def test_the_summary_has_every_number_and_how_it_was_measured() -> None:
    text = summary(RESULT)
    assert "5-way 1-shot, 15 query images a class, 1 weight sample(s), float32; a machine." in text
    assert "proximal term is 30 (temperature of ABML and iBaML 0.01, inner learning rate 0.005)." in text
    assert "| MAML | 30 | 279.000 (31.000 to 310.000) | 310.000 (32.000 to 341.000) | 0.0 | 31 + 1 | 30 |" in text
    assert text.count("\n| iMAML, L = 5 |") == 4
    assert "From K = 5 to K = 30, shortest times" in text
    assert "| MAML | +416.7% (0.0%) | +357.1% | +166.67% (0.00%) |" in text
    assert "- ABML / MAML at equal K and L: backward time 2.00, peak memory 3.00" in text
    assert "- iMAML / MAML at K = L: backward time 0.83, peak memory 0.80" in text
    assert "| iBaML" not in text
    assert "iBaML /" not in text
    assert "stopped before" not in text


def test_the_summary_of_a_single_number_of_inner_steps_has_no_slopes() -> None:
    text = summary(Fig2Result(Fig2Settings(inner_steps=(5,), algorithms=("maml",)), "a machine", POINTS[1:2]))
    assert "From K" not in text
    assert "Ratios" not in text


def test_the_summary_names_the_points_where_the_solver_stopped_early() -> None:
    points = [point("imaml", 1, 5, 3.0, 120, 4), point("ibaml", 1, 5, 3.0, 120, 10), point("ibaml", 5, 5, 3.0, 120, 9)]
    settings = Fig2Settings(inner_steps=(1,), linear_steps=(5,), num_samples=2)
    text = summary(Fig2Result(settings, "a machine", points))
    assert text.endswith("so that the cost is too low: iMAML, L = 5 at K = 1, iBaML, L = 5 at K = 5.\n")


def test_names_for_readers() -> None:
    assert [curve_name(name, None) for name in ALGORITHMS] == ["MAML", "iMAML", "ABML", "iBaML"]
