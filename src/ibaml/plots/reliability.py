"""Reliability diagrams: are the confidences right?"""

import math
from collections.abc import Mapping

import matplotlib as mpl
import matplotlib.colors
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, StrMethodFormatter

from ibaml.metrics import ReliabilityCurve
from ibaml.plots.style import BLUE, GREY, STYLE, VERMILION, WIDTH, new_figure

_LEAST_PREDICTIONS = 3


def reliability_diagram(curves: Mapping[str, ReliabilityCurve], *, title: str = "Are the confidences right?") -> Figure:
    """Accuracy against confidence for each method, the gap to the diagonal shaded, the number of predictions below.

    Points below the diagonal are overconfident. The line joins bins of at least three predictions. ECE and MCE are
    those of the pooled predictions.

    Examples:
        >>> import torch
        >>> curve = ReliabilityCurve(
        ...     torch.tensor([0.0, 0.5, 1.0]),
        ...     torch.tensor([0.4, 0.8]),
        ...     torch.tensor([0.5, 0.7]),
        ...     torch.tensor([3.0, 9.0]),
        ... )
        >>> [axes.get_ylabel() for axes in reliability_diagram({"iBaML": curve}).axes]
        ['Accuracy', 'Predictions']

    Args:
        curves: Method name to its curve, from ``ibaml.metrics.reliability_curve``.
        title: Title of the figure.

    Returns:
        The figure, up to three methods in a row.

    Raises:
        ValueError: If there is no curve or one holds no predictions.
    """
    if not curves:
        raise ValueError("curves is empty; expected at least one method.")
    for name, curve in curves.items():
        if not curve.count.sum() > 0:
            raise ValueError(f"curves[{name!r}] holds no predictions; expected a positive count in some bin.")
    num_columns = min(len(curves), 3)
    num_rows = math.ceil(len(curves) / num_columns)
    highest = max(float(curve.count.max()) for curve in curves.values())
    with mpl.rc_context(STYLE):
        # A lone panel need not be as wide as three.
        width = {1: 5.4, 2: 7.6}.get(num_columns, WIDTH)
        figure = new_figure(width, 0.9 + num_rows * (width / num_columns + 1.3))
        figure.suptitle(title)
        grid = figure.add_gridspec(2 * num_rows, num_columns, height_ratios=(3, 1) * num_rows)
        top = None
        for index, (name, curve) in enumerate(curves.items()):
            row, column = divmod(index, num_columns)
            top = figure.add_subplot(grid[2 * row, column])
            bottom = figure.add_subplot(grid[2 * row + 1, column], sharex=top)
            _draw_reliability(top, bottom, curve, highest)
            top.set_title(name)
            if column == 0:
                top.set_ylabel("Accuracy")
                bottom.set_ylabel("Predictions")
            else:
                top.tick_params(labelleft=False)
                bottom.tick_params(labelleft=False)
        figure.align_ylabels()
        if top is not None:
            figure.legend(*top.get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure


def _draw_reliability(top: Axes, bottom: Axes, curve: ReliabilityCurve, highest: float) -> None:
    edges = curve.bin_edges.detach().cpu().numpy()
    count = curve.count.detach().cpu().numpy()
    filled = count > 0
    confidence = curve.confidence.detach().cpu().numpy()[filled]
    accuracy = curve.accuracy.detach().cpu().numpy()[filled]
    left, width = edges[:-1][filled], np.diff(edges)[filled]
    base = np.minimum(accuracy, confidence)
    top.bar(left, base, width, align="edge", color=BLUE, alpha=0.25, edgecolor="white", lw=0.8)
    top.bar(
        left,
        np.abs(confidence - accuracy),
        width,
        bottom=base,
        align="edge",
        facecolor=(*matplotlib.colors.to_rgb(VERMILION), 0.18),
        edgecolor=VERMILION,
        hatch="////",
        lw=0.8,
        label="gap to the mean confidence",
    )
    top.plot([0, 1], [0, 1], "--", color=GREY, lw=1.2, label="calibrated")
    # A bin of one or two predictions may have any accuracy: the line passes it over.
    firm = count[filled] >= _LEAST_PREDICTIONS
    top.plot(confidence[firm], accuracy[firm], "-", color=BLUE, lw=1.5, clip_on=False, zorder=3)
    # Accuracies of exactly 0 and 1 are drawn whole.
    top.plot(confidence, accuracy, "o", color=BLUE, ms=5, clip_on=False, zorder=3, label="accuracy")
    top.set(xlim=(0, 1), ylim=(0, 1))
    top.tick_params(labelbottom=False)
    # Above the diagonal on the left is where a reliability diagram is emptiest.
    top.text(
        0.03,
        0.97,
        f"ECE {curve.ece:.3f}\nMCE {curve.mce:.3f}",
        transform=top.transAxes,
        va="top",
        zorder=4,
        bbox={"facecolor": "white", "alpha": 0.8, "edgecolor": "none", "pad": 1.5},
    )
    bottom.bar(edges[:-1], count, np.diff(edges), align="edge", color=GREY, edgecolor="white", lw=0.8)
    bottom.set(xlabel="Confidence", ylim=(0, 1.08 * highest))
    bottom.yaxis.set_major_locator(MaxNLocator(3, integer=True))
    bottom.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    bottom.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0", "0.25", "0.5", "0.75", "1"])
