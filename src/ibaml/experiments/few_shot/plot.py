"""Table 1 and Fig. 3: few-shot accuracy, nll and calibration of several methods on the same tasks."""

import textwrap
from collections.abc import Mapping, Sequence

import matplotlib as mpl
import matplotlib.colors
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ibaml.experiments.few_shot.calibration import NUM_BINS, Calibration
from ibaml.experiments.few_shot.run import FewShotSettings, RunResult, display_name
from ibaml.metrics import Estimate, ReliabilityCurve
from ibaml.plots.comparison import comparison
from ibaml.plots.style import BLUE, GREY, SKY, STYLE, VERMILION, WIDTH, new_figure

_ERRORS = {"ece": "Expected calibration error (ECE)", "mce": "Maximum calibration error (MCE)"}


def table1_figure(settings: FewShotSettings, runs: Sequence[RunResult]) -> Figure:
    """Nll and accuracy of each method with 95% intervals, and the paired differences to the first.

    A difference is filled when its interval excludes zero. Methods that have not been evaluated are left out.

    Args:
        settings: The settings.
        runs: How far each method has come and how good it is.

    Returns:
        The figure; a note alone if no method has been evaluated.
    """
    shown = {
        _name(one): {metric: one.evaluation.per_task[metric] for metric in ("nll", "accuracy")}
        for one in runs
        if one.evaluation is not None
    }
    heading = f"Table 1: 5-way {settings.num_shots}-shot"
    if not shown:
        return _nothing(heading)
    return comparison(shown, title=_title(heading, settings.label, runs, 44))


def fig3_figure(
    settings: FewShotSettings, runs: Sequence[RunResult], calibrations: Mapping[str, Calibration]
) -> Figure:
    """Reliability diagram of each method over the same tasks; below, ECE and MCE with 95% intervals.

    Bars below the dashed line are overconfident; hatched is what lies between accuracy and confidence. Errors are given
    as the mean over tasks and for all queries pooled. Methods that have not been evaluated are left out.

    Args:
        settings: The settings.
        runs: How far each method has come.
        calibrations: Method to its calibration, for the methods that have been evaluated.

    Returns:
        The figure; a note alone if no method has been evaluated.
    """
    evaluated = [one for one in runs if one.method in calibrations]
    heading = f"Fig. 3: calibration, 5-way {settings.num_shots}-shot"
    if not evaluated:
        return _nothing(heading)
    found = {_name(one): calibrations[one.method] for one in evaluated}
    with mpl.rc_context(STYLE):
        figure = new_figure(WIDTH, 8.2)
        figure.suptitle(_title(heading, settings.label, evaluated, 64))
        above, below = figure.add_gridspec(2, 1, height_ratios=(1.25, 1))
        highest = max(float((one.curve.count / one.curve.count.sum()).max()) for one in found.values())
        # Room for three panels even if fewer are drawn: a lone square would fill the page.
        panels = above.subgridspec(2, max(3, len(found)), height_ratios=(3, 1))
        for column, (name, one) in enumerate(found.items()):
            top = figure.add_subplot(panels[0, column])
            bottom = figure.add_subplot(panels[1, column], sharex=top)
            _draw_reliability(top, bottom, one.curve, highest)
            top.set_title(name)
            if column == 0:
                top.set_ylabel("Accuracy")
                bottom.set_ylabel("Share of\npredictions")
                # Above the diagonal on the left is where a reliability diagram is emptiest.
                top.legend(loc="upper left", fontsize=9, borderaxespad=0.2, handlelength=1.6)
            else:
                top.tick_params(labelleft=False)
                bottom.tick_params(labelleft=False)
        errors = below.subgridspec(1, len(_ERRORS))
        for column, (metric, label) in enumerate(_ERRORS.items()):
            axes = figure.add_subplot(errors[0, column])
            _draw_errors(axes, metric, found)
            axes.set_title(label, size=11)
            if column == 0:
                num_tasks = next(iter(found.values())).per_task[metric].num_tasks
                figure.legend(
                    *axes.get_legend_handles_labels(),
                    loc="outside lower center",
                    ncols=2,
                    title=f"{num_tasks:,} tasks, {NUM_BINS} equal-width bins of the confidence, 95% intervals; "
                    "lower is better",
                )
    return figure


def _draw_reliability(top: Axes, bottom: Axes, curve: ReliabilityCurve, highest: float) -> None:
    filled = curve.count.numpy() > 0
    edges, confidence, accuracy = curve.bin_edges.numpy(), curve.confidence.numpy(), curve.accuracy.numpy()
    left, width = edges[:-1][filled], np.diff(edges)[filled]
    confidence, accuracy = confidence[filled], accuracy[filled]
    top.bar(left, accuracy, width, align="edge", color=SKY, edgecolor="white", lw=0.8, label="accuracy")
    top.bar(
        left,
        np.abs(confidence - accuracy),
        width,
        bottom=np.minimum(confidence, accuracy),
        align="edge",
        facecolor=(*matplotlib.colors.to_rgb(VERMILION), 0.18),
        edgecolor=VERMILION,
        hatch="////",
        lw=0.8,
        label="gap",
    )
    top.plot([0, 1], [0, 1], "--", color=GREY, lw=1.2, label="calibrated")
    top.set(xlim=(0, 1), ylim=(0, 1))
    top.tick_params(labelbottom=False)
    share = (curve.count / curve.count.sum()).numpy()
    bottom.bar(edges[:-1], share, np.diff(edges), align="edge", color=GREY, edgecolor="white", lw=0.8)
    bottom.set(xlabel="Confidence", ylim=(0, 1.08 * highest))
    bottom.set_xticks([0, 0.5, 1], ["0", "0.5", "1"])


def _draw_errors(axes: Axes, metric: str, found: Mapping[str, Calibration]) -> None:
    places = np.arange(len(found))
    kinds: Sequence[tuple[str, list[Estimate], str, str]] = (
        ("mean over tasks", [one.per_task[metric] for one in found.values()], BLUE, ""),
        ("all queries pooled", [one.pooled[metric] for one in found.values()], SKY, "///"),
    )
    for index, (label, values, color, hatch) in enumerate(kinds):
        where = places + 0.38 * (index - 0.5)
        means = [value.mean for value in values]
        axes.bar(where, means, 0.36, color=color, hatch=hatch, edgecolor="white", label=label)
        axes.errorbar(where, means, [value.half_width for value in values], fmt="none", ecolor=GREY, capsize=3, lw=1.4)
        for x, value in zip(where, values, strict=True):
            axes.annotate(
                f"{value.mean:.3f}",
                (x, value.mean + value.half_width),
                (0, 3),
                textcoords="offset points",
                ha="center",
                va="bottom",
                size=9.5,
            )
    axes.set_xticks(places, list(found))
    axes.tick_params(axis="x", length=0)
    axes.margins(y=0.15)
    axes.set_ylim(bottom=0)
    axes.grid(axis="y")


def _name(one: RunResult) -> str:
    return display_name(one.recipe) + ("" if one.trained.is_finished else " *")


def _title(heading: str, label: str, runs: Sequence[RunResult], width: int) -> str:
    lines = [heading, *textwrap.wrap(label, width)]
    if not all(one.trained.is_finished for one in runs):
        lines.append("* training is not finished")
    return "\n".join(lines)


def _nothing(heading: str) -> Figure:
    with mpl.rc_context(STYLE):
        figure = new_figure(6.0, 1.6)
        figure.suptitle(heading)
        figure.text(0.5, 0.35, "No method has been evaluated yet.", ha="center", va="center", color=GREY)
    return figure
