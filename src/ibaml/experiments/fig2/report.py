"""What Fig. 2 says: every cost, how it grows with the number of inner steps, and ratios between algorithms."""

import statistics
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from ibaml.experiments.fig2.process import INNER_LEARNING_RATE, PROXIMAL_STRENGTH, TEMPERATURE
from ibaml.experiments.fig2.run import run
from ibaml.experiments.fig2.settings import (
    DISPLAY_NAMES,
    AlgorithmName,
    CostPoint,
    Duration,
    Fig2Result,
    Fig2Settings,
    curve_name,
)
from ibaml.experiments.report import Experiment, Place, Report, markdown_table

_HEADS = ("algorithm", "K", "backward, s", "forward + backward, s", "peak memory, MB", "gradients", "HVPs")


class Slope(NamedTuple):
    """How the cost of one curve depends on the number of inner steps.

    Attributes:
        algorithm: Of the curve.
        num_linear_steps: Of the curve.
        first: The smaller number of inner steps that is compared.
        last: The larger one.
        backward_seconds: ``cost(last) / cost(first) - 1`` for the shortest backward time.
        total_seconds: The same for the shortest time of both halves.
        peak_bytes: The same for peak memory.
        backward_seconds_bend: Largest distance of the shortest backward times from their least-squares line in K, over
            their mean: near 0 if the time is linear in K. All K count.
        peak_bytes_bend: The same for peak memory.
    """

    algorithm: AlgorithmName
    num_linear_steps: int | None
    first: int
    last: int
    backward_seconds: float
    total_seconds: float
    peak_bytes: float
    backward_seconds_bend: float
    peak_bytes_bend: float


def report(settings: Fig2Settings, place: Place) -> Report:
    """Measures all costs and returns them in words, a table and a picture."""
    from ibaml.experiments.fig2.plot import costs_figure

    result = run(settings, on_progress=place.on_progress)
    return Report(summary(result), {"costs": rows(result)}, {"fig2": costs_figure(result)})


def slope(points: Iterable[CostPoint], *, first: int | None = None, last: int | None = None) -> list[Slope]:
    """Compares the cost at a large number of inner steps with that at a small one, curve by curve.

    Args:
        points: Points of a result; every curve has the same numbers of inner steps.
        first: Smaller number of inner steps. None: 5, or the smallest if 5 is not one of several.
        last: Larger number of inner steps. None: the largest.

    Raises:
        ValueError: If ``first`` or ``last`` was not measured, or ``first`` is not below ``last``.
    """
    curves: dict[tuple[AlgorithmName, int | None], dict[int, CostPoint]] = {}
    for point in points:
        curves.setdefault((point.algorithm, point.num_linear_steps), {})[point.num_inner_steps] = point
    slopes: list[Slope] = []
    for (algorithm, num_linear_steps), curve in curves.items():
        end = last if last is not None else max(curve)
        start = first if first is not None else (5 if 5 in curve and end > 5 else min(curve))
        if start not in curve or end not in curve or start >= end:
            raise ValueError(
                f"first and last must be two of the numbers of inner steps {sorted(curve)}, the smaller one first, but "
                f"are {start} and {end}."
            )
        backward = {k: point.backward_seconds.shortest for k, point in curve.items()}
        total = {k: point.total_seconds.shortest for k, point in curve.items()}
        memory = {k: float(point.peak_bytes) for k, point in curve.items()}
        slopes.append(
            Slope(
                algorithm,
                num_linear_steps,
                start,
                end,
                backward_seconds=backward[end] / backward[start] - 1,
                total_seconds=total[end] / total[start] - 1,
                peak_bytes=memory[end] / memory[start] - 1,
                backward_seconds_bend=_bend(backward),
                peak_bytes_bend=_bend(memory),
            )
        )
    return slopes


def rows(result: Fig2Result) -> list[dict[str, object]]:
    """Returns one flat row per point, for a CSV file; times in seconds, memory in bytes."""
    table: list[dict[str, object]] = []
    for point in result.points:
        row: dict[str, object] = {}
        for name, value in point._asdict().items():
            if isinstance(value, Duration):
                row |= {f"{name}_{statistic}": seconds for statistic, seconds in value._asdict().items()}
            else:
                row[name] = value
        table.append(row)
    return table


def summary(result: Fig2Result) -> str:
    """Returns all numbers and how they came about as Markdown."""
    settings = result.settings
    lines = [
        "# Fig. 2: cost of one hypergradient",
        "",
        f"One hypergradient of Conv4-{settings.num_channels} (max-pooling, batch normalisation), "
        f"{settings.image_size} x {settings.image_size} x 3 random images, {settings.num_ways}-way "
        f"{settings.num_shots}-shot, {settings.num_queries} query images a class, "
        f"{settings.num_samples} weight sample(s), float32; {result.device}. Times are medians of "
        f"{settings.num_repeats} interleaved repeats (shortest to longest) in a process per point; memory is the peak "
        "of what torch's allocator handed out during both halves. Forward: inner solve and outer loss. Gradients "
        "(forward + backward) and Hessian-vector products are counted, per batch and weight sample. Conjugate "
        "gradients run L steps without a tolerance; so that they meet no negative curvature, the strength of iMAML's "
        f"proximal term is {PROXIMAL_STRENGTH:g} (temperature of ABML and iBaML {TEMPERATURE:g}, inner learning rate "
        f"{INNER_LEARNING_RATE:g}).",
        "",
        *markdown_table(_HEADS, [_cells(point) for point in result.points]),
    ]
    if len(settings.inner_steps) > 1:
        slopes = slope(result.points)
        lines += [
            "",
            f"From K = {slopes[0].first} to K = {slopes[0].last}, shortest times; in brackets the largest distance "
            "from a straight line through all K, relative to the mean:",
            "",
            *markdown_table(
                ["algorithm", "backward time", "forward + backward", "peak memory"],
                [_slope_cells(each) for each in slopes],
            ),
        ]
    ratios = _ratios(result)
    if ratios:
        lines += ["", "Ratios, median over the points that both have:", "", *ratios]
    early = [point for point in result.points if point.num_hvps < _num_hvps_asked(settings, point)]
    if early:
        names = ", ".join(f"{curve_name(p.algorithm, p.num_linear_steps)} at K = {p.num_inner_steps}" for p in early)
        lines += ["", f"Conjugate gradients stopped before step L, so that the cost is too low: {names}."]
    return "\n".join(lines) + "\n"


def _cells(point: CostPoint) -> list[str]:
    backward, total = point.backward_seconds, point.total_seconds
    return [
        curve_name(point.algorithm, point.num_linear_steps),
        str(point.num_inner_steps),
        f"{backward.median:.3f} ({backward.shortest:.3f} to {backward.longest:.3f})",
        f"{total.median:.3f} ({total.shortest:.3f} to {total.longest:.3f})",
        f"{point.peak_bytes / 1e6:.1f}",
        f"{point.num_forward_gradients} + {point.num_backward_gradients}",
        str(point.num_hvps),
    ]


def _slope_cells(each: Slope) -> list[str]:
    return [
        curve_name(each.algorithm, each.num_linear_steps),
        f"{each.backward_seconds:+.1%} ({each.backward_seconds_bend:.1%})",
        f"{each.total_seconds:+.1%}",
        f"{each.peak_bytes:+.2%} ({each.peak_bytes_bend:.2%})",
    ]


def _num_hvps_asked(settings: Fig2Settings, point: CostPoint) -> int:
    per_sample = point.num_inner_steps if point.num_linear_steps is None else point.num_linear_steps
    return per_sample * (settings.num_samples if point.algorithm in ("abml", "ibaml") else 1)


def _bend(curve: dict[int, float]) -> float:
    steps, values = np.array(list(curve), dtype=np.float64), np.array(list(curve.values()))
    line = np.polynomial.Polynomial.fit(steps, values, deg=min(1, len(steps) - 1))
    return float(np.abs(values - line(steps)).max() / values.mean())


def _ratios(result: Fig2Result) -> list[str]:
    """Compares Gaussians with weights at equal K and L, and implicit with explicit at K = L."""
    points = {(point.algorithm, point.num_inner_steps, point.num_linear_steps): point for point in result.points}
    compared: dict[str, list[tuple[CostPoint, CostPoint]]] = {}
    for (algorithm, num_inner_steps, num_linear_steps), point in points.items():
        for plain, bayesian in (("maml", "abml"), ("imaml", "ibaml")):
            other = points.get((bayesian, num_inner_steps, num_linear_steps))
            if algorithm == plain and other is not None:
                name = f"{DISPLAY_NAMES[bayesian]} / {DISPLAY_NAMES[plain]} at equal K and L"
                compared.setdefault(name, []).append((other, point))
        for explicit, implicit in (("maml", "imaml"), ("abml", "ibaml")):
            other = points.get((explicit, num_inner_steps, None))
            if algorithm == implicit and num_linear_steps == num_inner_steps and other is not None:
                name = f"{DISPLAY_NAMES[implicit]} / {DISPLAY_NAMES[explicit]} at K = L"
                compared.setdefault(name, []).append((point, other))
    return [
        f"- {name}: backward time {statistics.median(_backward_ratio(*pair) for pair in pairs):.2f}, peak memory "
        f"{statistics.median(a.peak_bytes / b.peak_bytes for a, b in pairs):.2f}"
        for name, pairs in compared.items()
    ]


def _backward_ratio(a: CostPoint, b: CostPoint) -> float:
    return a.backward_seconds.shortest / b.backward_seconds.shortest


FIG2 = Experiment(
    settings=Fig2Settings,
    report=report,
    description="Time and memory of one hypergradient over the number of steps.",
)
