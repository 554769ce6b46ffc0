"""Runs an experiment and leaves a folder that explains itself.

| file | what |
|---|---|
| README.md | what was found, in words and tables |
| *.csv | every number |
| *.png | the pictures |
| settings.json, environment.json | what was asked for; versions, hardware, command, seconds |
| runs/ | training runs, for the experiments that train; call again to resume them |
"""

import csv
import dataclasses
import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from rich.console import Console

from ibaml import plots, runs
from ibaml.experiments import fig1, fig2, fig3, fsmol, groups, sinusoid, table1
from ibaml.train.trainer import require_writable

Settings = (
    fig1.Fig1Settings
    | fig2.Fig2Settings
    | table1.Table1Settings
    | fig3.Fig3Settings
    | sinusoid.SinusoidSettings
    | fsmol.FsmolSettings
    | groups.GroupsSettings
)
Rows = Sequence[Mapping[str, object]]


class Report(NamedTuple):
    """What an experiment has to say.

    Attributes:
        summary: Markdown.
        tables: File name without suffix to rows.
        figures: File name without suffix to figure.
    """

    summary: str
    tables: Mapping[str, Rows]
    figures: Mapping[str, plots.Figure]


def reproduce(
    settings: Settings,
    folder: Path,
    *,
    data: Path | None = None,
    console: Console | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> str:
    """Runs one experiment and writes its folder.

    Args:
        settings: Which experiment, and its settings.
        folder: Where everything goes; created if absent. Experiments that train resume what they find there.
        data: Folder with data files, searched before ``$IBAML_DATA`` and the per-user cache.
        console: Where training shows its progress.
        on_progress: Called with the number of finished and of all parts, by experiments that do not train.

    Returns:
        The summary, Markdown.

    Raises:
        ValueError: If a setting cannot be met, such as CUDA on a machine without.
        FileNotFoundError: If a data file is not found.
        OSError: If the folder cannot be written.
    """
    require_writable(folder)
    start = time.monotonic()
    report = _run(settings, folder, data, console, on_progress)
    environment = {**runs.describe_environment(), "seconds": round(time.monotonic() - start, 1)}
    runs.write_text(folder / "settings.json", json.dumps(dataclasses.asdict(settings), indent=2, default=str) + "\n")
    runs.write_text(folder / "environment.json", json.dumps(environment, indent=2) + "\n")
    for name, rows in report.tables.items():
        _write_table(folder / f"{name}.csv", rows)
    for name, figure in report.figures.items():
        plots.save(figure, folder / f"{name}.png")
    runs.write_text(folder / "README.md", report.summary)
    return report.summary


def experiment_name(settings: Settings) -> str:
    """Returns the name of an experiment on the command line: that of the module of its settings."""
    return type(settings).__module__.rpartition(".")[2]


def _run(
    settings: Settings,
    folder: Path,
    data: Path | None,
    console: Console | None,
    on_progress: Callable[[int, int], None] | None,
) -> Report:
    if isinstance(settings, fig1.Fig1Settings):
        errors = fig1.run(settings, on_progress=on_progress)
        tables = {"errors": fig1.rows(errors), "bounds": fig1.bound_rows(errors)}
        return Report(fig1.summary(errors), tables, {"fig1": plots.fig1(errors), "bounds": plots.fig1_bounds(errors)})
    if isinstance(settings, fig2.Fig2Settings):
        costs = fig2.run(settings, on_progress=on_progress)
        return Report(fig2.summary(costs), {"costs": fig2.rows(costs)}, {"fig2": plots.fig2(costs)})
    if isinstance(settings, table1.Table1Settings):
        accuracies = table1.run(settings, folder=folder, data=data, console=console)
        return Report(
            table1.summary(accuracies), {"table1": table1.rows(accuracies)}, {"table1": plots.table1(accuracies)}
        )
    if isinstance(settings, fig3.Fig3Settings):
        calibration = fig3.run(settings, folder=folder, data=data, console=console)
        tables = {"fig3": fig3.rows(calibration), "reliability": fig3.reliability_rows(calibration)}
        return Report(fig3.summary(calibration), tables, {"fig3": plots.fig3(calibration)})
    if isinstance(settings, fsmol.FsmolSettings):
        assays = fsmol.run(settings, folder=folder, data=data, console=console)
        tables = {"fsmol": fsmol.rows(assays), "assays": fsmol.assay_rows(assays)}
        return Report(fsmol.summary(assays), tables, {"fsmol": plots.fsmol(assays)})
    if isinstance(settings, groups.GroupsSettings):
        regressions = groups.run(settings, on_progress=on_progress)
        return Report(
            groups.summary(regressions), {"groups": groups.rows(regressions)}, {"groups": plots.groups(regressions)}
        )
    curves = sinusoid.run(settings, folder=folder, console=console)
    return Report(sinusoid.summary(curves), {"sinusoid": sinusoid.rows(curves)}, {"sinusoid": plots.sinusoid(curves)})


def _write_table(path: Path, rows: Rows) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]) if rows else [])
        writer.writeheader()
        writer.writerows(rows)
