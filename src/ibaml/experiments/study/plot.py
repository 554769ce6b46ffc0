"""The study: paired nll differences of the options to the default, a panel for each data set."""

from collections.abc import Mapping

import matplotlib as mpl
from matplotlib.figure import Figure

from ibaml.experiments.study.options import DEFAULT
from ibaml.metrics import Estimate
from ibaml.plots.style import BLACK, BLUE, GREY, STYLE, VERMILION, WIDTH, new_figure

_LINEAR = 0.01  # Nats within which the axis is linear.


def study_figure(found: Mapping[str, Mapping[tuple[str, str], Estimate]]) -> Figure:
    """One panel for each data set, options sorted by their difference, with 95% intervals.

    Args:
        found: Data set to factor and option to the paired difference of its nll to the default's.

    Returns:
        The figure.
    """
    num_columns = min(2, len(found))
    num_rows = -(-len(found) // 2)
    most = max(map(len, found.values()))
    with mpl.rc_context(STYLE):
        figure = new_figure(WIDTH, num_rows * (1.1 + 0.2 * most) + 0.6)
        panels = figure.subplots(num_rows, num_columns, squeeze=False).flatten()
        for axes in panels[len(found) :]:
            axes.set_axis_off()
        for axes, (name, differences) in zip(panels, found.items(), strict=False):
            ordered = sorted(differences.items(), key=lambda item: item[1].mean)
            for place, ((factor, _), value) in enumerate(ordered):
                color = GREY
                if factor != DEFAULT and abs(value.mean) > value.half_width:
                    color = BLUE if value.mean < 0 else VERMILION
                marker = "o" if factor not in (DEFAULT, "seed") else "D"
                axes.errorbar(
                    value.mean, place, xerr=value.half_width, color=color, marker=marker, markersize=4, capsize=2
                )
            axes.axvline(0, color=BLACK, linewidth=1, zorder=0)
            labels = [factor if factor == DEFAULT else f"{factor}: {option}" for (factor, option), _ in ordered]
            axes.set_yticks(range(len(ordered)), labels, fontsize=8)
            axes.invert_yaxis()
            # A tenth of what one option loses is more than others differ by.
            axes.set_xscale("symlog", linthresh=_LINEAR)
            furthest = max(abs(end) for value in differences.values() for end in (value.low, value.high))
            ticks = [tick for tick in (0.01, 0.1, 1.0, 10.0) if tick <= max(furthest, _LINEAR)]
            axes.set_xticks([*(-tick for tick in reversed(ticks)), 0, *ticks])
            axes.set_xticklabels([f"{tick:g}" for tick in axes.get_xticks()])
            axes.minorticks_off()
            axes.set_title(name, fontsize=11)
            axes.grid(axis="x")
            axes.set_xlabel("nll minus the default's (nats)", fontsize=9)
        figure.suptitle("One setting changed at a time: left of zero is better than the default")
    return figure
