"""Sinusoid regression: squared error over inner steps, predictions before and after adaptation, coverage."""

from collections.abc import Sequence
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MultipleLocator, NullFormatter, StrMethodFormatter

from ibaml.experiments.sinusoid.run import LEVELS, REFERENCE, SinusoidExample, SinusoidResult, SinusoidRun
from ibaml.metrics import central_interval
from ibaml.plots.style import BLACK, COLORS, GREY, MARKERS, PALE, STYLE, WIDTH, new_figure
from ibaml.types import Tensor

_BAND = 0.9


def sinusoid_figure(result: SinusoidResult) -> Figure:
    """Squared errors beside the reference, coverage of the intervals, and a few tasks before and after adaptation.

    Top: a panel of squared errors for each number of shots, with 95% intervals over tasks, and for the Bayesian methods
    the fraction of query points inside their predictive intervals against the nominal one. Below: a row of test tasks
    for each Bayesian method with the fewest shots; the grey band is the prediction before adaptation, the coloured one
    that after it.

    Args:
        result: What ``ibaml.experiments.sinusoid.run.run`` returned.

    Returns:
        The figure; without Bayesian methods the top row's squared errors alone.
    """
    shots = sorted({one.num_shots for one in result.runs})
    methods = list(dict.fromkeys(one.display_name for one in result.runs))
    bayesian = [one for one in result.runs if one.recipe.algorithm.is_bayesian]
    pictured = [one for one in bayesian if one.num_shots == shots[0] and one.examples]
    num_examples = max((len(one.examples) for one in pictured), default=0)
    with mpl.rc_context(STYLE):
        figure = new_figure(WIDTH, 4.2 + 2.3 * len(pictured))
        unfinished = "" if all(one.trained.is_finished for one in result.runs) else " (training is not finished)"
        figure.suptitle(f"Sinusoid regression{unfinished}")
        height_ratios = [3.1, 2.1 * len(pictured)][: 1 + bool(pictured)]
        grid = figure.add_gridspec(len(height_ratios), 1, height_ratios=height_ratios)
        num_columns = len(shots) + bool(bayesian)
        above = grid[0].subgridspec(1, num_columns)
        first: Axes | None = None
        for column, num_shots in enumerate(shots):
            axes = figure.add_subplot(above[0, column], sharey=first)
            first = first or axes
            shown = [one for one in result.runs if one.num_shots == num_shots]
            _draw_errors(axes, shown, methods, named=column == 0)
            axes.set_title(f"Squared error, {num_shots} shots")
        if bayesian:
            axes = figure.add_subplot(above[0, num_columns - 1])
            _draw_coverage(axes, bayesian, methods, shots)
        if pictured:
            below = grid[1].subgridspec(len(pictured), num_examples)
            _draw_examples(figure, below, pictured, methods)
        handles: dict[str, Any] = {}
        for axes in figure.axes:
            for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
                handles.setdefault(label, handle)
        figure.legend(list(handles.values()), list(handles), loc="outside lower center", ncols=4)
    return figure


def _draw_errors(axes: Axes, shown: Sequence[SinusoidRun], methods: Sequence[str], *, named: bool) -> None:
    for one in shown:
        index = methods.index(one.display_name)
        axes.errorbar(
            [point.num_inner_steps for point in one.points],
            [point.mse.mean for point in one.points],
            yerr=[point.mse.half_width for point in one.points],
            color=COLORS[index % len(COLORS)],
            marker=MARKERS[index % len(MARKERS)],
            ms=6,
            lw=1.8,
            capsize=3,
            label=one.display_name,
        )
    reference = REFERENCE.get(shown[0].num_shots, {})
    axes.plot(
        list(reference),
        list(reference.values()),
        "*",
        ms=12,
        mfc="white",
        mec=BLACK,
        label="MAML, independent (70,000)",
    )
    steps = sorted({*reference, *(point.num_inner_steps for one in shown for point in one.points)})
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_xticks(steps)
    axes.grid(axis="y", which="both")
    axes.set_xlabel("Inner steps K")
    axes.margins(x=0.08)
    if named:
        axes.set_ylabel("Mean squared error")
    else:
        axes.tick_params(labelleft=False)


def _draw_coverage(axes: Axes, bayesian: Sequence[SinusoidRun], methods: Sequence[str], shots: Sequence[int]) -> None:
    axes.plot([0, 100], [0, 100], "--", color=GREY, lw=1.2, label="calibrated")
    for one in bayesian:
        index = methods.index(one.display_name)
        color = COLORS[index % len(COLORS)]
        few = one.num_shots == shots[0]
        covered = one.own_point.coverage
        axes.errorbar(
            [100 * level for level in LEVELS],
            [100 * covered[level].mean for level in LEVELS],
            yerr=[100 * covered[level].half_width for level in LEVELS],
            color=color,
            marker=MARKERS[index % len(MARKERS)],
            mfc=color if few else "white",
            ls="-" if few else ":",
            ms=6,
            lw=1.5,
            capsize=3,
        )
    axes.set_title("Inside the intervals")
    if len(shots) > 1:
        note = f"filled: {shots[0]} shots\nopen: {' and '.join(map(str, shots[1:]))} shots"
        axes.text(0.04, 0.96, note, transform=axes.transAxes, va="top", size=10, color=GREY)
    lowest = 100 * min(estimate.low for one in bayesian for estimate in one.own_point.coverage.values())
    axes.set(xlim=(45, 100), ylim=(min(45.0, lowest - 5), 100), xlabel="Nominal (%)", ylabel="Observed (%)")
    axes.xaxis.set_major_locator(MultipleLocator(10))
    axes.yaxis.set_major_locator(MultipleLocator(10))
    axes.grid()


def _draw_examples(figure: Figure, grid: Any, pictured: Sequence[SinusoidRun], methods: Sequence[str]) -> None:
    low, high = _limits([example for one in pictured for example in one.examples])
    for row, one in enumerate(pictured):
        color = COLORS[methods.index(one.display_name) % len(COLORS)]
        for column, example in enumerate(one.examples):
            axes = figure.add_subplot(grid[row, column])
            x = example.task.query.x[:, 0].numpy()
            _draw_band(axes, example, before=True, color=GREY)
            _draw_band(axes, example, before=False, color=color)
            axes.plot(x, example.task.query.y[:, 0].numpy(), "--", color=BLACK, lw=1.2, label="truth")
            support = example.task.support
            axes.plot(
                support.x[:, 0].numpy(),
                support.y[:, 0].numpy(),
                "X",
                ms=8,
                mfc=BLACK,
                mec="white",
                label="support",
                zorder=4,
            )
            axes.set(ylim=(low, high))
            axes.grid(color=PALE)
            if column == 0:
                axes.set_ylabel(f"{one.display_name}\n{one.num_shots} shots, K = {one.own_point.num_inner_steps}")
            else:
                axes.tick_params(labelleft=False)
            if row == len(pictured) - 1:
                axes.set_xlabel("x")
            else:
                axes.tick_params(labelbottom=False)
            if row == 0:
                axes.set_title(f"Test task {column}", size=11, weight="normal")


def _draw_band(axes: Axes, example: SinusoidExample, *, before: bool, color: str) -> None:
    mean, variance = (example.prior_mean, example.prior_variance) if before else (example.mean, example.variance)
    x = example.task.query.x[:, 0].numpy()
    lower, upper = central_interval(mean[:, 0], variance[:, 0], _BAND)
    axes.fill_between(
        x,
        lower.numpy(),
        upper.numpy(),
        color=color,
        alpha=0.25,
        lw=0,
        # The colour after adaptation is that of the method, which the legend has from the panels above.
        label=f"before adaptation, {_BAND:.0%} band" if before else None,
    )
    axes.plot(x, mean[:, 0].numpy(), color=color, lw=1.8)


def _limits(examples: Sequence[SinusoidExample]) -> tuple[float, float]:
    """Returns one range of y for all tasks, so that their amplitudes can be compared."""

    def ends(mean: Tensor, variance: Tensor) -> tuple[float, float]:
        lower, upper = central_interval(mean, variance, _BAND)
        return float(lower.min()), float(upper.max())

    spans = [ends(example.mean, example.variance) for example in examples]
    spans += [(float(batch.y.min()), float(batch.y.max())) for example in examples for batch in example.task]
    margin = 0.05 * (max(high for _, high in spans) - min(low for low, _ in spans))
    return min(low for low, _ in spans) - margin, max(high for _, high in spans) + margin
