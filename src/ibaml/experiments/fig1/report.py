"""What Fig. 1 says: tables of the errors and of what the theorems bound them by."""

from ibaml.experiments.fig1.run import UNROLLED, BoundPoint, Fig1Result, Fig1Settings, run
from ibaml.experiments.report import Experiment, Place, Report, interval_columns, markdown_table


def report(settings: Fig1Settings, place: Place) -> Report:
    """Measures all errors and bounds and returns them in words, tables and pictures."""
    from ibaml.experiments.fig1.plot import bounds_figure, errors_figure

    result = run(settings, on_progress=place.on_progress)
    return Report(
        summary(result),
        {"errors": rows(result), "bounds": bound_rows(result)},
        {"fig1": errors_figure(result), "bounds": bounds_figure(result)},
    )


def rows(result: Fig1Result) -> list[dict[str, object]]:
    """Returns the errors as rows of a table."""
    return [
        {
            "estimator": point.estimator,
            "condition_number": point.condition_number,
            "num_inner_steps": point.num_inner_steps,
            "num_gradients": point.num_gradients,
            "num_hvps": point.num_hvps,
            **interval_columns("nrmse", point.nrmse),
        }
        for point in result.errors
    ]


def bound_rows(result: Fig1Result) -> list[dict[str, object]]:
    """Returns what the theorems speak of as rows of a table."""
    return [point._asdict() for point in result.bounds]


def summary(result: Fig1Result) -> str:
    """Returns what was found, as Markdown."""
    settings = result.settings
    lines = [
        "# Fig. 1: error of hypergradients against the exact one",
        "",
        f"Bayesian linear regression, {settings.num_features} weights, {settings.num_shots} support and "
        f"{settings.num_queries} query rows, noise variance {settings.noise_variance}, temperature 1, "
        f"{settings.num_seeds} seeds of {settings.num_tasks} tasks. NRMSE, mean over seeds; K: inner steps, L: "
        "conjugate gradient steps.",
    ]
    for condition_number in settings.condition_numbers:
        table = {
            (point.estimator, point.num_inner_steps): point.nrmse
            for point in result.errors
            if point.condition_number == condition_number
        }
        names = list(dict.fromkeys(name for name, _ in table))
        cells = [
            [str(num_steps), *(f"{table[name, num_steps].mean:.3g}" for name in names)]
            for num_steps in settings.inner_steps
        ]
        lines += ["", f"## Condition number {condition_number:g}", "", *markdown_table(["K", *names], cells)]
        lines.append("")
        for name in names[1:]:
            better = [k for k in settings.inner_steps if table[name, k].mean < table[UNROLLED, k].mean]
            claim = (
                f"better than unrolled at K = {', '.join(map(str, better))}" if better else "never better than unrolled"
            )
            lines.append(f"- {name}: {claim}.")
    lines += [
        "",
        f"## Theorems 1 and 2, condition number {settings.shown_condition_number:g}",
        "",
        "Means over tasks; the largest error / bound is over all tasks and must not exceed 1.",
        "",
        *markdown_table(
            ["estimator", "K", "eps", "delta or delta'", "error", "bound", "largest error / bound"],
            [_bound_cells(point) for point in result.bounds],
        ),
    ]
    return "\n".join(lines) + "\n"


def _bound_cells(point: BoundPoint) -> list[str]:
    values = (point.distance, point.inexactness, point.error, point.bound, point.largest_ratio)
    return [point.estimator, str(point.num_inner_steps), *(f"{value:.3g}" for value in values)]


FIG1 = Experiment(
    settings=Fig1Settings,
    report=report,
    description="Error of hypergradients against the exact one; Theorems 1 and 2.",
)
