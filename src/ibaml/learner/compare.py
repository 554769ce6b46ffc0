"""Models that were evaluated on the same test tasks, compared task by task."""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ibaml.learner.evaluations import StoredEvaluation, read_evaluation
from ibaml.metrics import paired_difference
from ibaml.types import Tensor

_LOWER_IS_BETTER = ("nll", "brier", "ece", "mce", "mse", "rmse", "quantile_calibration_error")


class Comparison(NamedTuple):
    """A table of metrics.

    Attributes:
        header: ``metric``, the names of the models, and the differences of the others to the first.
        rows: One for each metric that all models have, as text.
        num_tasks: Number of paired tasks.
        folder: Where the table and the picture are.
    """

    header: list[str]
    rows: list[list[str]]
    num_tasks: int
    folder: Path


def compare(folders: Sequence[Path], out: Path | None = None) -> Comparison:
    """Compares evaluated models by metrics with 95% intervals, and stores ``comparison.csv`` and ``comparison.png``.

    Args:
        folders: Two or more folders of models; differences are to the first.
        out: Folder for the results. None: ``runs/compare_...``.

    Raises:
        FileNotFoundError: If a model has not been evaluated.
        ValueError: If there are fewer than two, one is named twice, or they were evaluated on different tasks.
    """
    # Imported here: it pulls in matplotlib, which nothing else needs.
    from ibaml import plots

    stored = _read([folder.expanduser() for folder in folders])
    names = list(stored)
    first = stored[names[0]]
    out = (
        Path(out).expanduser() if out else Path("runs") / ("compare_" + "_vs_".join(Path(name).name for name in names))
    )
    header = ["metric", *names, *(f"{name} - {names[0]}" for name in names[1:])]
    common = [metric for metric in first.per_task if all(metric in one.per_task for one in stored.values())]
    if not common:
        raise ValueError(f"{', '.join(names)} have no metric in common: compare models of the same kind of targets.")
    rows = [_row(metric, stored) for metric in common]
    out.mkdir(parents=True, exist_ok=True)
    with (out / "comparison.csv").open("w", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    figure = plots.comparison(
        {name: {metric: one.per_task[metric] for metric in common} for name, one in stored.items()}
    )
    plots.save(figure, out / "comparison.png")
    return Comparison(header, rows, first.tasks["num_tasks"], out)


def _read(folders: Sequence[Path]) -> dict[str, StoredEvaluation]:
    if len(folders) < 2:
        raise ValueError(f"compare needs at least two run folders, but got {len(folders)}.")
    for index, folder in enumerate(folders):
        if folder.resolve() in (other.resolve() for other in folders[:index]):
            raise ValueError(f"{folder} is named twice: compare needs different run folders.")
    names = [folder.name for folder in folders]
    if len({*names}) < len(names):
        names = [str(folder) for folder in folders]
    stored = dict(zip(names, (read_evaluation(folder) for folder in folders), strict=True))
    first = stored[names[0]]
    for name, other in stored.items():
        if difference := _describe_difference(first.tasks, other.tasks):
            raise ValueError(
                f"{names[0]} and {name} were evaluated on different tasks ({difference}): evaluate both with the same "
                "--tasks and --seed, on the same data."
            )
    return stored


def _row(metric: str, stored: Mapping[str, StoredEvaluation]) -> list[str]:
    first, *others = stored.values()
    differences = (difference(metric, other.per_task[metric], first.per_task[metric]) for other in others)
    return [metric, *(f"{one.report[metric]:.4f}" for one in stored.values()), *differences]


def difference(metric: str, values: Tensor, reference: Tensor) -> str:
    """Returns a paired difference with its 95% interval and, where that excludes zero, a verdict.

    Args:
        metric: Name of the metric.
        values: Per-task values of one model, ``[num_tasks]``.
        reference: Those of the other on the same tasks.

    Examples:
        >>> import torch
        >>> difference("nll", torch.tensor([0.5, 0.75]), torch.tensor([0.25, 0.5]))
        '+0.2500 +- 0.0000 worse'
    """
    found = paired_difference(values, reference)
    verdict = ""
    # Of a coverage neither more nor less is better, only nearer to its level.
    if metric != "coverage_90" and abs(found.mean) > found.half_width:
        better = (found.mean < 0) == (metric in _LOWER_IS_BETTER)
        verdict = " better" if better else " worse"
    return f"{found:+.4f}{verdict}"


def _describe_difference(first: Mapping[str, Any], second: Mapping[str, Any]) -> str:
    """Returns in what two sets of test tasks differ; nothing if they are the same."""
    one, two = ({**tasks["data"], **tasks} for tasks in (first, second))
    keys = [key for key in {**one, **two} if key != "data"]
    return ", ".join(f"{key} {one.get(key)} and {two.get(key)}" for key in keys if one.get(key) != two.get(key))
