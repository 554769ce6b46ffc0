"""Comparisons of runs on the same tasks, with intervals and paired differences."""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ibaml.metrics import Estimate, estimate, paired_difference
from ibaml.plots.style import COLORS, GREY, MARKERS, STYLE, new_figure, shorten
from ibaml.types import Tensor


class _Metric(NamedTuple):
    """How the comparison shows one metric and its differences."""

    label: str
    scale: float
    unit: str
    unit_of_difference: str
    spec: str


_COMPARED = {
    "accuracy": _Metric("Accuracy", 100.0, "%, higher is better", "% points, higher is better", ".2f"),
    "nll": _Metric("Negative log-likelihood", 1.0, "nats, lower is better", "nats, lower is better", ".3f"),
    "ece": _Metric("Calibration error (ECE)", 100.0, "%, lower is better", "% points, lower is better", ".2f"),
}


def comparison(per_task: Mapping[str, Mapping[str, Tensor]], *, title: str = "Comparison of runs") -> Figure:
    """Accuracy, nll and ECE of each run with 95% intervals, and the paired differences to the first run.

    A difference is filled when its interval excludes zero. Differences pair the runs task by task, so all runs must
    have been evaluated on the same tasks in the same order.

    Examples:
        >>> import torch
        >>> runs = {"MAML": {"accuracy": torch.tensor([0.6, 0.7])}, "iBaML": {"accuracy": torch.tensor([0.7, 0.7])}}
        >>> len(comparison(runs).axes)
        2

    Args:
        per_task: Run name to metric name (``accuracy``, ``nll``, ``ece``; others are ignored) to per-task values of
            shape ``[num_tasks]``, as the functions of ``ibaml.metrics`` return them.
        title: Title of the figure.

    Returns:
        The figure; the row of differences is missing when there is a single run.

    Raises:
        ValueError: If no metric is common to all runs, or the numbers of tasks differ.
    """
    runs = list(per_task)
    shown = [name for name in _COMPARED if runs and all(name in per_task[run] for run in runs)]
    if not shown:
        raise ValueError(
            f"per_task holds { {run: sorted(values) for run, values in per_task.items()} }; "
            f"expected every run to hold at least one same metric of {list(_COMPARED)}."
        )
    for name in shown:
        counts = {run: len(per_task[run][name]) for run in runs}
        if len(set(counts.values())) > 1:
            raise ValueError(
                f"per_task has {counts} values of {name}; expected the same number for each run: "
                "evaluate the runs on the same tasks."
            )
    num_rows = 2 if len(runs) > 1 else 1
    num_tasks = len(per_task[runs[0]][shown[0]])
    with mpl.rc_context(STYLE):
        # Proportional to the number of rows plus the room above the first.
        heights = [len(runs) + 0.3, len(runs) - 0.7][:num_rows]
        figure = new_figure(max(3.0 * len(shown), 6.6), 1.0 + sum(1.0 + 0.48 * height for height in heights))
        grid = figure.add_gridspec(num_rows, len(shown), height_ratios=heights)
        figure.suptitle(title)
        for column, name in enumerate(shown):
            metric = _COMPARED[name]
            axes = figure.add_subplot(grid[0, column])
            values = [estimate(per_task[run][name]) for run in runs]
            _draw_estimates(axes, runs, values, metric, named=column == 0, difference=False)
            axes.set_title(metric.label)
            if num_rows == 2:
                below = figure.add_subplot(grid[1, column])
                changes = [_difference(per_task[run][name], per_task[runs[0]][name]) for run in runs[1:]]
                _draw_estimates(below, runs[1:], changes, metric, named=column == 0, difference=True)
                below.set_title(f"Difference to {shorten(runs[0], 14)}", size=11, weight="normal")
        note = f"Means over {num_tasks:,} tasks with 95% intervals."
        if num_rows == 2:
            note += " Filled difference: interval excludes zero."
        figure.supxlabel(note, size=10, color=GREY)
    return figure


def _difference(values: Tensor, reference: Tensor) -> Estimate:
    if (values.isinf() & reference.isinf()).any():
        # Infinity minus infinity on some task.
        return Estimate(math.nan, math.nan, len(values))
    return paired_difference(values, reference)


def _draw_estimates(
    axes: Axes, runs: Sequence[str], estimates: Sequence[Estimate], metric: _Metric, *, named: bool, difference: bool
) -> None:
    # The first run keeps its colour in the upper row, so the differences start at the second.
    offset = 1 if difference else 0
    if difference:
        axes.axvline(0.0, color=GREY, lw=1.2, ls="--")
    for row, value in enumerate(estimates):
        if not math.isfinite(value.mean):
            text = "undefined" if math.isnan(value.mean) else "infinite" if value.mean > 0 else "minus infinite"
            axes.text(0.03, row, text, transform=axes.get_yaxis_transform(), va="center", color=GREY)
            continue
        mean, half_width = metric.scale * value.mean, metric.scale * value.half_width
        color, marker = COLORS[(row + offset) % len(COLORS)], MARKERS[(row + offset) % len(MARKERS)]
        hollow = difference and not abs(value.mean) > value.half_width
        axes.errorbar(
            mean,
            row,
            xerr=half_width if math.isfinite(half_width) else None,
            fmt=marker,
            ms=7,
            color=color,
            mfc="white" if hollow else color,
            mew=1.6,
            capsize=3,
            lw=1.8,
        )
        text = f"{mean:{'+' if difference else ''}{metric.spec}} ± {half_width:{metric.spec}}".replace("-", "−")
        axes.annotate(
            text,
            (mean, row),
            (0, 8),
            textcoords="offset points",
            ha="center",
            va="bottom",
            size=9.5,
            bbox={"facecolor": "white", "alpha": 0.85, "edgecolor": "none", "pad": 0.8},
        )
    axes.set_ylim(len(estimates) - 0.5, -0.8)
    axes.set_yticks(range(len(runs)), [shorten(run, 16) for run in runs] if named else [""] * len(runs))
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.grid(axis="x")
    # Room for the numbers, which are wider than a short interval.
    axes.margins(x=0.35)
    axes.xaxis.set_major_locator(MaxNLocator(3))
    axes.set_xlabel(metric.unit_of_difference if difference else metric.unit)
