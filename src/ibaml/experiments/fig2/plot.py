"""Fig. 2 of Zhang et al. 2023: the cost of one hypergradient against the number of inner steps."""

from collections.abc import Callable
from typing import NamedTuple

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, MaxNLocator

from ibaml.experiments.fig2.settings import AlgorithmName, CostPoint, Duration, Fig2Result, curve_name
from ibaml.plots.style import BLUE, GREEN, SKY, STYLE, VERMILION, WIDTH, new_figure


class _Panel(NamedTuple):
    """One quantity; its spread over the repeats is drawn if it has one."""

    title: str
    values: Callable[[CostPoint], Duration | float]
    integer: bool = False


_PANELS = (
    _Panel("Backward time (s)", lambda point: point.backward_seconds),
    _Panel("Peak memory (MB)", lambda point: point.peak_bytes / 1e6),
    _Panel("Forward + backward time (s)", lambda point: point.total_seconds),
    _Panel("Hessian-vector products", lambda point: point.num_hvps, integer=True),
)
# Where a Gaussian costs what plain weights do, the small marker is seen inside the large hollow one.
_COLORS = {"maml": BLUE, "imaml": SKY, "abml": VERMILION, "ibaml": GREEN}
_MARKERS = {"maml": "o", "imaml": "D", "abml": "o", "ibaml": "D"}
_HOLLOW = ("abml", "ibaml")
_DASHES = ("--", ":", "-.", (0, (1, 1)), (0, (5, 1)))


def costs_figure(result: Fig2Result) -> Figure:
    """Backward time, peak memory, time of both halves and Hessian-vector products against K, all from zero.

    Times are medians, with a bar down to the shortest repeat: what else happens on a machine only adds to a time, and
    a single disturbed repeat may take ten times as long. Explicit algorithms have solid lines, implicit ones a broken
    line for each number L of conjugate gradient steps.

    Args:
        result: What ``ibaml.experiments.fig2.run.run`` returned.

    Returns:
        The figure, two panels in a row.

    Raises:
        ValueError: If the result has no points.
    """
    if not result.points:
        raise ValueError("result has no points; expected what ibaml.experiments.fig2.run returns.")
    with mpl.rc_context(STYLE):
        figure = new_figure(WIDTH, 7.4)
        figure.suptitle(f"Cost of one hypergradient: {result.device}", fontsize=12)
        first: Axes | None = None
        for index, panel in enumerate(_PANELS):
            axes = figure.add_subplot(2, 2, index + 1, sharex=first)
            first = first or axes
            _draw(axes, panel, result)
        assert first is not None
        handles, labels = first.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=min(3, len(labels)), handlelength=4)
    return figure


def _draw(axes: Axes, panel: _Panel, result: Fig2Result) -> None:
    linear_steps = list(dict.fromkeys(p.num_linear_steps for p in result.points if p.num_linear_steps is not None))
    curves: dict[tuple[AlgorithmName, int | None], list[CostPoint]] = {}
    for point in result.points:
        curves.setdefault((point.algorithm, point.num_linear_steps), []).append(point)
    highest = 0.0
    for (algorithm, num_linear_steps), curve in curves.items():
        curve.sort(key=lambda point: point.num_inner_steps)
        dashes = "-" if num_linear_steps is None else _DASHES[linear_steps.index(num_linear_steps) % len(_DASHES)]
        hollow = algorithm in _HOLLOW
        values = [panel.values(point) for point in curve]
        centre = [value.median if isinstance(value, Duration) else value for value in values]
        highest = max(highest, *centre)
        steps = [point.num_inner_steps for point in curve]
        axes.plot(
            steps,
            centre,
            color=_COLORS[algorithm],
            linestyle=dashes,
            linewidth=1.6,
            marker=_MARKERS[algorithm],
            markersize=8 if hollow else 4,
            markerfacecolor="none" if hollow else None,
            label=curve_name(algorithm, num_linear_steps),
        )
        spread = [value for value in values if isinstance(value, Duration)]
        if spread:
            low, high = [value.shortest for value in spread], [value.median for value in spread]
            axes.vlines(steps, low, high, color=_COLORS[algorithm], linewidth=1.2)
    axes.set_title(panel.title, loc="left")
    axes.set_xlabel("Inner steps K")
    axes.set_xlim(left=0)
    axes.set_ylim(0, 1.1 * highest)
    axes.grid(visible=True, axis="y")
    measured = sorted({point.num_inner_steps for point in result.points})
    axes.xaxis.set_major_locator(FixedLocator(measured) if len(measured) <= 8 else MaxNLocator(integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(nbins=6, integer=panel.integer))
