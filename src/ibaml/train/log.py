"""What a training run shows and writes while it goes on: a progress bar, ``metrics.csv`` and TensorBoard."""

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ibaml.atomic import atomic_write
from ibaml.train.progress import ProgressBar

if TYPE_CHECKING:
    from rich.console import Console

METRICS = "metrics.csv"


class TrainingLog:
    """``metrics.csv`` and TensorBoard. Rows after the resumed step are dropped, so each step appears once.

    Args:
        run_folder: Where they are. None: nothing is written.
        step: Steps taken before.
        running: The sums since the last row, of a run that is resumed.

    Raises:
        ValueError: If the file of metrics is damaged.
    """

    def __init__(self, run_folder: Path | None, step: int, running: Mapping[str, Any] | None = None) -> None:
        self._rows: list[dict[str, float]] = []
        self._sums: dict[str, float] = dict((running or {}).get("sums", {}))
        self._count: int = (running or {}).get("count", 0)
        self._path = None if run_folder is None else run_folder / METRICS
        self._writer = None
        if run_folder is not None:
            # Imported here: it pulls in tensorboard, which only a run with a folder needs.
            from torch.utils.tensorboard import SummaryWriter

            assert self._path is not None
            if self._path.exists():
                self._rows = [row for row in read_metrics(self._path) if row["step"] <= step]
            self._writer = SummaryWriter(str(run_folder / "tensorboard"), purge_step=step + 1)

    def __enter__(self) -> "TrainingLog":
        return self

    def __exit__(self, *_: object) -> None:
        if self._writer is not None:
            self._writer.close()

    @property
    def running(self) -> dict[str, Any]:
        """The sums since the last row, as JSON values for a checkpoint."""
        return {"sums": dict(self._sums), "count": self._count}

    def add(self, row: Mapping[str, float]) -> None:
        """Adds one step to the running averages."""
        for name, value in row.items():
            self._sums[name] = self._sums.get(name, 0.0) + value
        self._count += 1

    def write(self, step: int, seconds: float, extra: Mapping[str, float] | None = None) -> None:
        """Writes the averages since the last row, or ``extra`` alone."""
        if extra is None and self._count == 0:
            return
        values = extra or {name: value / self._count for name, value in self._sums.items()}
        if extra is None:
            self._sums, self._count = {}, 0
        if self._path is None or self._writer is None:
            return
        if extra is not None:
            # A validation that is made again after a kill has one row.
            self._rows = [row for row in self._rows if row["step"] != step or not extra.keys() <= row.keys()]
        self._rows.append({"step": step, "seconds": round(seconds, 2), **values})
        columns = list(dict.fromkeys(name for row in self._rows for name in row))
        with atomic_write(self._path) as temporary, temporary.open("w", newline="") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows(self._rows)
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)


def read_metrics(path: Path) -> list[dict[str, float]]:
    """Reads a ``metrics.csv``; empty cells are left out of their rows.

    Raises:
        ValueError: If it is damaged.
    """
    try:
        with path.open(newline="") as file:
            rows = [
                {name: float(value) for name, value in row.items() if value not in ("", None)}
                for row in csv.DictReader(file, strict=True)
            ]
        if not all("step" in row for row in rows):
            raise ValueError("a row has no step")
    except (ValueError, TypeError, csv.Error) as error:
        raise ValueError(
            f"{path} is damaged ({error}): restore it from a copy, or remove it to go on without the history of "
            "metrics; the model and its checkpoint do not need it."
        ) from error
    return rows


class TrainingBar(ProgressBar):
    """Progress of training, with running averages of what a step measures."""

    def __init__(self, console: "Console | None", num_steps: int, step: int) -> None:
        super().__init__(console, "step", num_steps, done=step)
        self._step = step
        self._smooth: dict[str, float] = {}

    def advance(self, row: Mapping[str, float]) -> None:
        """Shows one more step."""
        self._step += 1
        for name, value in row.items():
            self._smooth[name] = 0.9 * self._smooth.get(name, value) + 0.1 * value
        shown = self._smooth
        score = f"acc {shown['accuracy']:.3f}" if "accuracy" in shown else f"mse {shown['mse']:.3g}"
        status = (
            f"loss {shown['loss']:.3f} {score} inner grad {shown['inner_grad_norm']:.1e} "
            f"residual {shown['linear_residual']:.1e} {shown['tasks_per_second']:.1f} tasks/s"
        )
        self.update(self._step, status=status)
