"""What the study of grouped tables says: a table per data set and a verdict per iBaML variant."""

from collections import Counter
from collections.abc import Mapping

from ibaml.experiments.groups import discrete
from ibaml.experiments.groups.discrete import DiscreteScores, Simulated
from ibaml.experiments.groups.run import DISPLAY_NAMES, GroupsResult, GroupsSettings, Scores, run
from ibaml.experiments.groups.tables import DATASETS
from ibaml.experiments.report import Experiment, Place, Report, half_width_columns, interval_columns, markdown_table
from ibaml.metrics import Estimate, estimate, paired_difference


def report(settings: GroupsSettings, place: Place) -> Report:
    """Predicts all tables with all methods and returns what was found in words, a table and a picture."""
    from ibaml.experiments.groups.plot import groups_figure

    result = run(settings, on_progress=place.on_progress)
    figures = {"groups": groups_figure(result)} if result.scores else {}
    return Report(summary(result), {"groups": rows(result), "discrete": discrete_rows(result)}, figures)


def rows(result: GroupsResult) -> list[dict[str, object]]:
    """Returns every mean with its 95% interval over groups, and the paired nll difference to the mixed model."""
    found: list[dict[str, object]] = []
    for name, by_method in result.scores.items():
        num_groups, num_rows = result.sizes[name]
        for method, one in by_method.items():
            row: dict[str, object] = {"dataset": name, "num_groups": num_groups, "num_rows": num_rows, "method": method}
            for metric in ("rmse", "nll", "coverage"):
                row |= interval_columns(metric, estimate(getattr(one, metric)))
            row |= half_width_columns("nll_minus_mixed_effects", _difference(one, by_method))
            found.append(row | {"seconds": round(one.seconds, 1), "milliseconds": round(one.milliseconds, 2)})
    return found


def discrete_rows(result: GroupsResult) -> list[dict[str, object]]:
    """Returns the same of tables of classes and counts."""
    found: list[dict[str, object]] = []
    for name, by_method in result.discrete.items():
        num_groups, num_rows = result.sizes[name]
        for method, one in by_method.items():
            row: dict[str, object] = {"dataset": name, "num_groups": num_groups, "num_rows": num_rows, "method": method}
            for metric in ("rmse", "nll"):
                row |= interval_columns(metric, estimate(getattr(one, metric)))
            row |= half_width_columns("nll_minus_mixed_effects", _difference(one, by_method))
            found.append(row | {"seconds": round(one.seconds, 1), "milliseconds": round(one.milliseconds, 2)})
    return found


def summary(result: GroupsResult) -> str:
    """Returns what was found, as Markdown: a table per data set and a verdict per iBaML variant."""
    settings = result.settings
    lines = [
        "# Hierarchical regression",
        "",
        f"Groups left out in {settings.num_folds} folds; a left-out group shows {settings.num_support} random rows, "
        f"{settings.num_draws} draws per group, the same for every method. +- is a 95% interval over groups. rmse is "
        "in the target's unit, nll in nats per row. In brackets: the paired nll difference to the mixed-effects model.",
    ]
    for name, by_method in result.scores.items():
        num_groups, num_rows = result.sizes[name]
        dataset = DATASETS[name]
        lines += ["", f"## {name}: {dataset.title}", ""]
        lines += [f"{num_groups} groups, {num_rows:,} rows ({dataset.package}::{dataset.table}).", ""]
        lines += markdown_table(
            ["", "rmse", "nll", "inside 90% intervals", "learned in (CPU s)", "a group predicted in (ms)"],
            [_cells(method, one, by_method) for method, one in by_method.items()],
        )
        lines += _chosen(by_method)
    tried = next(iter(result.scores.values()), {})
    verdicts = [verdict(result, method) for method in tried if method.startswith("ibaml") or method == "alpaca"]
    of_discrete = [line for name in result.discrete for line in _discrete_table(result, name)]
    return "\n".join([*lines, "", *verdicts, *of_discrete]) + "\n"


def _discrete_table(result: GroupsResult, name: str) -> list[str]:
    (num_groups, num_rows), by_method = result.sizes[name], result.discrete[name]
    dataset = discrete.DATASETS[name]
    where = "simulated" if isinstance(dataset, Simulated) else f"{dataset.package}::{dataset.table}"
    lines = ["", f"## {name}: {dataset.title}", "", f"{num_groups} groups, {num_rows:,} rows ({where}).", ""]
    lines += markdown_table(
        ["", "rmse of the mean", "nll", "learned in (CPU s)", "a group predicted in (ms)"],
        [
            [
                DISPLAY_NAMES[method],
                f"{estimate(one.rmse)}",
                _nll(method, one, by_method),
                f"{one.seconds:.1f}",
                f"{one.milliseconds:.2f}",
            ]
            for method, one in by_method.items()
        ],
    )
    return lines + _chosen(by_method)


def verdict(result: GroupsResult, method: str) -> str:
    """Returns one sentence: on how many tables a method's coverage and nll are as good as asked for."""
    covered = [name for name, one in result.scores.items() if 0.85 <= float(one[method].coverage.mean()) <= 0.95]
    no_worse: list[str] = []
    for name, by_method in result.scores.items():
        difference = _difference(by_method[method], by_method)
        if difference is not None and difference.low <= 0:
            no_worse.append(name)
    both = [name for name in covered if name in no_worse]
    return (
        f"- {DISPLAY_NAMES[method]}: coverage within 85-95% on {len(covered)} of {len(result.scores)} tables; nll not "
        f"worse than the mixed-effects model's (the interval of the difference reaches zero or below) on "
        f"{len(no_worse)}; both on {len(both)}: {', '.join(both) or 'none'}."
    )


def _chosen(by_method: Mapping[str, Scores | DiscreteScores]) -> list[str]:
    if "ibaml" not in by_method:
        return []
    counts = Counter(by_method["ibaml"].choices)
    chosen = ", ".join(f"{choice} ({number})" for choice, number in counts.most_common())
    return ["", f"The default chose, in so many folds: {chosen}."]


def _nll(method: str, one: Scores | DiscreteScores, by_method: Mapping[str, Scores | DiscreteScores]) -> str:
    nll, difference = f"{estimate(one.nll)}", _difference(one, by_method)
    if method != "mixed_effects" and difference is not None:
        nll += f" ({difference:+.3f})"
    return nll


def _cells(method: str, one: Scores, by_method: Mapping[str, Scores]) -> list[str]:
    return [
        DISPLAY_NAMES[method],
        f"{estimate(one.rmse)}",
        _nll(method, one, by_method),
        f"{estimate(one.coverage):.1%}",
        f"{one.seconds:.1f}",
        f"{one.milliseconds:.2f}",
    ]


def _difference(one: Scores | DiscreteScores, by_method: Mapping[str, Scores | DiscreteScores]) -> Estimate | None:
    if "mixed_effects" not in by_method:
        return None
    return paired_difference(one.nll, by_method["mixed_effects"].nll)


GROUPS = Experiment(
    settings=GroupsSettings,
    report=report,
    description="Grouped tables of numbers, classes and counts beside mixed-effects models.",
)
