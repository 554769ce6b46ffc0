"""Fig. 1 of Zhang et al. 2023, and what its theorems bound."""

from collections.abc import Sequence

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from ibaml.experiments.fig1.run import (
    EXACT_SOLVE,
    PRECONDITIONED_BOTH,
    PRECONDITIONED_CG,
    PRECONDITIONED_INNER,
    UNROLLED,
    BoundPoint,
    ErrorPoint,
    Fig1Result,
    implicit_name,
)
from ibaml.plots.style import BLACK, COLORS, GREY, MARKERS, STYLE, WIDTH, new_figure


def errors_figure(result: Fig1Result) -> Figure:
    """Error of hypergradients over the number of inner steps: the paper's figure, and three panels beyond it.

    Top left, the paper's: unrolled against implicit with L conjugate gradient steps. Top right: with preconditioners,
    at the same numbers of gradients and products. Bottom left: the same errors over the cost. Bottom right: every
    condition number. Bands are 95% intervals over seeds.
    """
    settings = result.settings
    implicit = [implicit_name(num_products) for num_products in settings.linear_steps]
    reference = implicit_name(2) if 2 in settings.linear_steps else implicit[-1]
    with mpl.rc_context(STYLE):
        figure = new_figure(WIDTH, 8.2)
        figure.suptitle("Error of the hypergradient against the exact one")
        (paper, beyond), (cost, conditions) = figure.subplots(2, 2)
        shown = settings.shown_condition_number

        paper.set_title(f"As in the paper (condition number {shown:g})")
        _draw_errors(paper, result, [UNROLLED, *implicit, EXACT_SOLVE], shown)
        beyond.set_title("With preconditioners, same K and L")
        _draw_errors(
            beyond, result, [UNROLLED, reference, PRECONDITIONED_CG, PRECONDITIONED_INNER, PRECONDITIONED_BOTH], shown
        )
        cost.set_title("The same over cost")
        _draw_errors(cost, result, [UNROLLED, reference, PRECONDITIONED_BOTH], shown, over_cost=True)
        conditions.set_title(f"Unrolled (solid), {reference} (dashed)")
        for index, condition_number in enumerate(settings.condition_numbers):
            for name, line in ((UNROLLED, "-"), (reference, "--")):
                points = _points(result, name, condition_number)
                label = f"condition number {condition_number:g}" if name == UNROLLED else None
                steps, errors = [p.num_inner_steps for p in points], [p.nrmse.mean for p in points]
                conditions.plot(steps, errors, line, color=COLORS[index % len(COLORS)], label=label)
        _finish(conditions, "Inner steps K", "NRMSE")
    return figure


def bounds_figure(result: Fig1Result) -> Figure:
    """What Theorems 1 and 2 speak of: the distances on the left, the errors and their bounds on the right."""
    implicit = [implicit_name(num_products) for num_products in result.settings.linear_steps]
    with mpl.rc_context(STYLE):
        figure = new_figure(WIDTH, 4.4)
        figure.suptitle("Theorems 1 and 2, every constant computed; means over tasks")
        distances, bounds = figure.subplots(1, 2)

        points = _bound_points(result, UNROLLED)
        steps = [point.num_inner_steps for point in points]
        distances.set_title("What the bounds are made of")
        distances.plot(
            steps, [point.distance for point in points], "-o", color=BLACK, markersize=4, label="eps, distance of v"
        )
        distances.plot(
            steps, [point.inexactness for point in points], "-s", color=COLORS[0], markersize=4, label="delta, Jacobian"
        )
        for index, name in enumerate(implicit, start=1):
            inexactness = [point.inexactness for point in _bound_points(result, name)]
            label = f"delta', linear solver, {name.removeprefix('implicit, ')}"
            distances.plot(
                steps, inexactness, "--", marker=MARKERS[index], markersize=4, color=COLORS[index], label=label
            )
        _finish(distances, "Inner steps K", "Euclidean or spectral norm")

        bounds.set_title("Error (solid) and bound (dotted)")
        for index, name in enumerate([UNROLLED, *implicit]):
            points = _bound_points(result, name)
            color = COLORS[index]
            bounds.plot(
                steps, [p.error for p in points], "-", marker=MARKERS[index], markersize=4, color=color, label=name
            )
            bounds.plot(steps, [p.bound for p in points], ":", marker=MARKERS[index], markersize=3, color=color)
        _finish(bounds, "Inner steps K", "Norm of the error")
    return figure


def _points(result: Fig1Result, name: str, condition_number: float) -> list[ErrorPoint]:
    return [p for p in result.errors if p.estimator == name and p.condition_number == condition_number]


def _bound_points(result: Fig1Result, name: str) -> list[BoundPoint]:
    return [point for point in result.bounds if point.estimator == name]


def _draw_errors(
    axes: Axes, result: Fig1Result, names: Sequence[str], condition_number: float, *, over_cost: bool = False
) -> None:
    for index, name in enumerate(names):
        points = _points(result, name, condition_number)
        # A product with second derivatives costs about two gradients.
        where = [p.num_gradients + 2 * p.num_hvps if over_cost else p.num_inner_steps for p in points]
        color = BLACK if name == UNROLLED else COLORS[index - 1]
        axes.plot(where, [p.nrmse.mean for p in points], marker=MARKERS[index], markersize=4, color=color, label=name)
        axes.fill_between(where, [p.nrmse.low for p in points], [p.nrmse.high for p in points], color=color, alpha=0.15)
    _finish(axes, "Cost in gradients (a product counts two)" if over_cost else "Inner steps K", "NRMSE")


def _finish(axes: Axes, xlabel: str, ylabel: str) -> None:
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    axes.grid(visible=True, which="major")
    axes.tick_params(which="minor", colors=GREY)
    # Room for the legend above the curves.
    low, high = axes.get_ylim()
    axes.set_ylim(low, high * (high / low) ** (0.055 * len(axes.get_legend_handles_labels()[0])))
    axes.legend(fontsize=8, loc="upper right")
