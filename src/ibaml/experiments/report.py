"""What all experiments share: a folder that explains itself, Markdown tables, columns of intervals.

| file of the folder | what |
|---|---|
| README.md | what was found, in words and tables |
| *.csv | every number |
| *.png | the pictures |
| settings.json, environment.json | what was asked for; versions, hardware, command, seconds |
| runs/ | training runs, for the experiments that train; call again to resume them |
"""

import contextlib
import csv
import dataclasses
import json
import platform
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, TypeVar

import torch
from rich.console import Console

from ibaml.atomic import write_text
from ibaml.learner.run_folder import describe_environment
from ibaml.metrics import Estimate
from ibaml.train.checkpoint import require_writable

if TYPE_CHECKING:
    from ibaml.plots import Figure

Settings = TypeVar("Settings")
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
    figures: "Mapping[str, Figure]"


class Place(NamedTuple):
    """Where an experiment finds its data, keeps its runs and shows how far it is.

    Attributes:
        folder: Output folder.
        data: Folder with data files, searched before ``$IBAML_DATA`` and the per-user cache.
        console: Where training shows its progress; None is silent.
        on_progress: Called with the number of finished and of all parts, by experiments that do not train.
    """

    folder: Path
    data: Path | None = None
    console: Console | None = None
    on_progress: Callable[[int, int], None] | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Experiment(Generic[Settings]):
    """An experiment that ``ibaml reproduce`` can run.

    Attributes:
        settings: Its settings, a dataclass whose defaults are the experiment as published.
        report: Runs it.
        description: One sentence for the command line.
        trains: Whether it trains recipes, which show a progress bar of their own and can be resumed.
    """

    settings: type[Settings]
    report: Callable[[Settings, Place], Report]
    description: str
    trains: bool = False


def run_experiment(experiment: Experiment[Settings], settings: Settings, place: Place) -> str:
    """Runs an experiment and writes its folder.

    Args:
        experiment: Which one.
        settings: Its settings.
        place: Where everything goes; the folder is made if absent. Experiments that train resume what they find there.

    Returns:
        The summary, Markdown.

    Raises:
        ValueError: If a setting cannot be met, such as CUDA on a machine without.
        FileNotFoundError: If a data file is not found.
        OSError: If the folder cannot be written.
    """
    from ibaml import plots

    folder = place.folder
    require_writable(folder)
    start = time.monotonic()
    report = experiment.report(settings, place)
    environment = {**describe_environment(), "seconds": round(time.monotonic() - start, 1)}
    asked: Any = settings
    write_text(folder / "settings.json", json.dumps(dataclasses.asdict(asked), indent=2, default=str) + "\n")
    write_text(folder / "environment.json", json.dumps(environment, indent=2) + "\n")
    for name, rows in report.tables.items():
        _write_csv(folder / f"{name}.csv", rows)
    for name, figure in report.figures.items():
        plots.save(figure, folder / f"{name}.png")
    write_text(folder / "README.md", report.summary)
    return report.summary


def markdown_table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Returns the lines of a Markdown table, its first column to the left and the others to the right.

    Args:
        heads: Heads of the columns.
        rows: Cells of each row.

    Examples:
        >>> markdown_table(["", "nll"], [["MAML", "0.97"]])
        ['|  | nll |', '| --- | ---: |', '| MAML | 0.97 |']
    """
    return [f"| {' | '.join(cells)} |" for cells in (heads, ["---", *["---:"] * (len(heads) - 1)], *rows)]


def interval_columns(name: str, value: Estimate | None) -> dict[str, object]:
    """Returns a mean and the ends of its interval as columns of a table; None for what is not known.

    Examples:
        >>> interval_columns("nll", Estimate(1.0, 0.25, 9))
        {'nll': 1.0, 'nll_low': 0.75, 'nll_high': 1.25}
    """
    known = (None, None, None) if value is None else (value.mean, value.low, value.high)
    return dict(zip((name, f"{name}_low", f"{name}_high"), known, strict=True))


def half_width_columns(name: str, value: Estimate | None) -> dict[str, object]:
    """Returns a mean and half the width of its interval as columns of a table; None for what is not known.

    Examples:
        >>> half_width_columns("nll", None)
        {'nll': None, 'nll_half_width': None}
    """
    known = (None, None) if value is None else (value.mean, value.half_width)
    return dict(zip((name, f"{name}_half_width"), known, strict=True))


def percent(value: Estimate, spec: str = ".1f") -> str:
    """Returns a fraction and its interval in per cent, without the sign that a column's head has.

    Examples:
        >>> percent(Estimate(-0.125, 0.02, 9), "+.1f")
        '-12.5 +- 2.0'
    """
    return format(Estimate(100 * value.mean, 100 * value.half_width, value.num_tasks), spec)


def require_at_least(settings: object, least: int, *fields: str, reason: str = "") -> None:
    """Refuses settings that are too small; None is left to whoever reads the setting.

    Args:
        settings: The settings.
        least: Smallest value allowed.
        fields: Names of the settings, each a number or None.
        reason: Why not less, for the message.

    Raises:
        ValueError: If one is smaller.
    """
    for field in fields:
        value = getattr(settings, field)
        if value is not None and value < least:
            raise ValueError(f"{field} must be at least {least}{reason and f', {reason}'}, but is {value}.")


def describe_device(device: torch.device) -> str:
    """Returns the name of the hardware and, of a CPU, the number of threads, for a result file."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError, StopIteration):
        # Linux leaves the name of the processor out of what Python's platform module asks for.
        info = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.partition(":")[2].strip() for line in info if line.startswith("model name"))
    return f"{name}, {torch.get_num_threads()} thread(s)"


def _write_csv(path: Path, rows: Rows) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]) if rows else [])
        writer.writeheader()
        writer.writerows(rows)
