"""Grouped regression: nll beside the mixed-effects model's and coverage, for each table."""

from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

from ibaml.experiments.groups.run import DISPLAY_NAMES, GroupsResult
from ibaml.metrics import estimate, paired_difference
from ibaml.plots.style import BLACK, GREY, PALE, STYLE, WIDTH, look, new_figure


def groups_figure(result: GroupsResult) -> Figure:
    """Paired nll differences to the first method that is no iBaML, and coverage of 90% intervals, with 95% intervals.

    Args:
        result: What ``ibaml.experiments.groups.run.run`` returned.

    Returns:
        The figure.
    """
    tables = list(result.scores)
    methods = list(result.scores[tables[0]])
    reference = "mixed_effects" if "mixed_effects" in methods else methods[-1]
    with mpl.rc_context(STYLE):
        figure = new_figure(WIDTH, 1.6 + 0.8 * len(tables))
        left, right = figure.subplots(1, 2, sharey=True)
        right.axvspan(85, 95, color=PALE, zorder=0)
        for place, method in enumerate(methods):
            heights = [row + 0.8 / len(methods) * (place - (len(methods) - 1) / 2) for row in range(len(tables))]
            style: dict[str, Any] = {
                **look(place),
                "linestyle": "none",
                "markersize": 5,
                "capsize": 2,
            }
            if method != reference:
                found = [
                    paired_difference(result.scores[name][method].nll, result.scores[name][reference].nll)
                    for name in tables
                ]
                left.errorbar([one.mean for one in found], heights, xerr=[one.half_width for one in found], **style)
            covered = [estimate(100 * result.scores[name][method].coverage) for name in tables]
            right.errorbar(
                [one.mean for one in covered],
                heights,
                xerr=[one.half_width for one in covered],
                label=DISPLAY_NAMES[method],
                **style,
            )
        left.axvline(0, color=BLACK, linewidth=1)
        # Pooled fits may be nats away, while a hundredth of a nat is worth seeing between the others.
        left.set_xscale("symlog", linthresh=0.1)
        left.set_xticks([-1, -0.1, 0, 0.1, 1], ["-1", "-0.1", "0", "0.1", "1"])
        left.set_yticks(range(len(tables)), tables)
        left.invert_yaxis()
        left.set_xlabel(f"nll minus that of {DISPLAY_NAMES[reference]} (nats; left is better)")
        right.axvline(90, color=GREY, linewidth=1)
        right.set_xlabel("Inside 90% intervals (%)")
        for axes in (left, right):
            axes.grid(axis="x")
        handles, labels = right.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=5)
        figure.suptitle("Left-out groups: error of the prediction and honesty of its intervals")
    return figure
