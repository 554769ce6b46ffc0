"""Curves of selective prediction and of the calibration of regression."""

from collections.abc import Mapping, Sized

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ibaml.metrics import QuantileCurve, SelectiveCurve
from ibaml.plots.style import COLORS, GREY, MARKERS, STYLE, new_figure


def selective_curves(curves: Mapping[str, SelectiveCurve], *, title: str = "Does it know when it is right?") -> Figure:
    """Accuracy against the share of examples that are answered, the surest first; the area in the legend.

    Examples:
        >>> import torch
        >>> curve = SelectiveCurve(torch.tensor([0.5, 1.0]), torch.tensor([1.0, 0.5]))
        >>> selective_curves({"iBaML": curve}).axes[0].get_xlabel()
        'Share of examples answered'

    Args:
        curves: Method name to its curve, from ``ibaml.selective.selective_curve``; at most seven.
        title: Title of the figure.

    Raises:
        ValueError: If there is no curve, or more than can be told apart.
    """
    _check_number(curves)
    with mpl.rc_context(STYLE):
        figure, axes = _new_axes(title, "Share of examples answered", "Accuracy on them")
        for (name, curve), color, marker in zip(curves.items(), COLORS, MARKERS, strict=False):
            coverage, accuracy = curve.coverage.numpy(), curve.accuracy.numpy()
            label = f"{name}, area {curve.area:.3f}"
            axes.plot(coverage, accuracy, marker=marker, markevery=0.1, color=color, ms=5, lw=1.6, label=label)
        # The first few examples swing between 0 and 1 and would take up most of the panel.
        lowest = min(float(curve.accuracy[curve.coverage >= 0.1].min()) for curve in curves.values())
        axes.set(xlim=(0, 1), ylim=(max(0.0, lowest - 0.1), 1.005))
        axes.legend(loc="lower left")
    return figure


def quantile_curves(curves: Mapping[str, QuantileCurve], *, title: str = "Are the quantiles right?") -> Figure:
    """Share of targets below their predictive quantiles against the level of these; the diagonal is calibrated.

    Examples:
        >>> import torch
        >>> curve = QuantileCurve(torch.tensor([0.25, 0.5, 0.75]), torch.tensor([0.1, 0.5, 0.9]))
        >>> quantile_curves({"iBaML": curve}).axes[0].get_xlabel()
        'Level of the predictive quantile'

    Args:
        curves: Method name to its curve, from ``ibaml.quantile_calibration.quantile_curve``; at most seven.
        title: Title of the figure.

    Raises:
        ValueError: If there is no curve, or more than can be told apart.
    """
    _check_number(curves)
    with mpl.rc_context(STYLE):
        figure, axes = _new_axes(title, "Level of the predictive quantile", "Share of targets below it")
        axes.plot([0, 1], [0, 1], "--", color=GREY, lw=1.2, label="calibrated")
        for (name, curve), color, marker in zip(curves.items(), COLORS, MARKERS, strict=False):
            level, frequency = curve.level.numpy(), curve.frequency.numpy()
            axes.plot(level, frequency, marker + "-", color=color, ms=5, lw=1.5, clip_on=False, zorder=3, label=name)
        axes.set(xlim=(0, 1), ylim=(0, 1))
        axes.legend(loc="upper left")
    return figure


def _new_axes(title: str, xlabel: str, ylabel: str) -> tuple[Figure, Axes]:
    figure = new_figure(5.4, 4.6)
    figure.suptitle(title)
    axes = figure.add_subplot()
    axes.set(xlabel=xlabel, ylabel=ylabel)
    axes.grid(True)
    return figure, axes


def _check_number(curves: Sized) -> None:
    if not 1 <= len(curves) <= len(COLORS):
        raise ValueError(f"curves holds {len(curves)} methods; expected 1 to {len(COLORS)}.")
