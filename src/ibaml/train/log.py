"""What a training run shows and writes while it goes on: a progress bar, ``metrics.csv`` and TensorBoard."""

import contextlib
import csv
import hashlib
import os
import warnings
from collections.abc import Generator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ibaml.atomic import atomic_write
from ibaml.train.progress import ProgressBar

if TYPE_CHECKING:
    from rich.console import Console

METRICS = "metrics.csv"


class TrainingLog:
    """``metrics.csv`` and TensorBoard. Rows that the checkpoint does not know are dropped: each step appears once.

    Args:
        run_folder: Where they are. None: nothing is written.
        step: Steps taken before.
        running: What ``running`` was, of a run that is resumed.

    Raises:
        ValueError: If the file of metrics is damaged, or was changed since training wrote it.
    """

    def __init__(self, run_folder: Path | None, step: int, running: Mapping[str, Any] | None = None) -> None:
        self._rows: list[dict[str, float]] = []
        self._sums: dict[str, float] = dict((running or {}).get("sums", {}))
        self._count: int = (running or {}).get("count", 0)
        self._columns: list[str] = []
        self._digest = hashlib.sha256()
        self._path = None if run_folder is None else run_folder / METRICS
        if self._path is not None and self._path.exists():
            self._take_up(self._path, step, (running or {}).get("written"))
        self._tensorboard = None if run_folder is None else _Tensorboard(run_folder / "tensorboard", step + 1)

    def __enter__(self) -> "TrainingLog":
        return self

    def __exit__(self, *_: object) -> None:
        if self._tensorboard is not None:
            self._tensorboard.close()

    @property
    def running(self) -> dict[str, Any]:
        """The sums since the last row, and which rows there are, as JSON values for a checkpoint."""
        written = {"num_rows": len(self._rows), "sha256": self._digest.hexdigest()}
        return {"sums": dict(self._sums), "count": self._count, "written": written}

    def _take_up(self, path: Path, step: int, written: Mapping[str, Any] | None) -> None:
        """Reads the rows of a run that is resumed, and checks that they are what its checkpoint says."""
        rows = read_metrics(path)
        # A checkpoint of an earlier version does not say.
        rows = rows[: written["num_rows"]] if written is not None else [row for row in rows if row["step"] <= step]
        for row in rows:
            self._take(row)
        if written is not None and written["sha256"] != self._digest.hexdigest():
            raise _damaged(path, "it was changed since training wrote it")

    def _take(self, row: dict[str, float]) -> None:
        self._rows.append(row)
        text = " ".join(f"{name}={float(value)!r}" for name, value in sorted(row.items()))
        self._digest.update(f"{text}\n".encode())

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
        if self._path is None or self._tensorboard is None:
            return
        row = {"step": step, "seconds": round(seconds, 2), **values}
        self._take(row)
        if row.keys() <= set(self._columns) and self._path.is_file():
            self._append(self._path, row)
        else:
            self._columns = list(dict.fromkeys(name for one in self._rows for name in one))
            self._write_anew(self._path)
        self._tensorboard.add(values, step)

    def _write_anew(self, path: Path) -> None:
        with atomic_write(path) as temporary, temporary.open("w", newline="") as file:
            writer = csv.DictWriter(file, self._columns)
            writer.writeheader()
            writer.writerows(self._rows)

    def _append(self, path: Path, row: dict[str, float]) -> None:
        """Adds one row to the file, which costs the same however long that is."""
        with path.open("a", newline="") as file:
            csv.DictWriter(file, self._columns).writerow(row)
            file.flush()
            # Before the checkpoint of its step, which says that the row is there.
            os.fsync(file.fileno())


class _Tensorboard:
    """TensorBoard's copy of the metrics. What keeps it from being written ends no training.

    Args:
        folder: Where it is; made again if it is removed meanwhile.
        step: What a run that ended has written of this step and later is hidden.
    """

    def __init__(self, folder: Path, step: int) -> None:
        # Imported here: it pulls in tensorboard, which only a run with a folder needs.
        from torch.utils.tensorboard import SummaryWriter

        self._folder = folder
        self._writer: SummaryWriter | None = None
        with self._unless_it_fails():
            self._writer = SummaryWriter(str(folder), purge_step=step)

    def add(self, values: Mapping[str, float], step: int) -> None:
        """Adds values of a step."""
        with self._unless_it_fails():
            if self._writer is not None:
                # Its thread opens the file each time that it writes, and ends with a traceback where it cannot: it has
                # written before anybody removes the folder.
                self._folder.mkdir(exist_ok=True)
                for name, value in values.items():
                    self._writer.add_scalar(name, value, step)
                self._writer.flush()

    def close(self) -> None:
        """Writes what is left."""
        with self._unless_it_fails():
            if self._writer is not None:
                self._folder.mkdir(exist_ok=True)
                self._writer.close()

    @contextlib.contextmanager
    def _unless_it_fails(self) -> Generator[None]:
        try:
            yield
        # ValueError: a path with letters that the system's file names do not have.
        except (OSError, ValueError) as error:
            self._writer = None
            warnings.warn(
                f"{self._folder} cannot be written ({error}): TensorBoard gets no more of this training, which goes "
                f"on; {METRICS} has all of it.",
                RuntimeWarning,
                stacklevel=3,
            )


def read_metrics(path: Path) -> list[dict[str, float]]:
    """Reads a ``metrics.csv``; empty cells are left out of their rows, and so is a row that was cut off.

    Raises:
        ValueError: If it is damaged.
    """
    try:
        # A row that a killed process has begun has no end, and what there is of a number may look like another one.
        whole, end, _ = path.read_bytes().decode().rpartition("\n")
        if not end:
            raise ValueError("it has not one whole line")
        rows = [
            {name: float(value) for name, value in row.items() if value not in ("", None)}
            for row in csv.DictReader(whole.splitlines(), strict=True)
        ]
        if not all("step" in row for row in rows):
            raise ValueError("a row has no step")
    except (ValueError, TypeError, csv.Error) as error:
        raise _damaged(path, str(error)) from error
    return rows


def _damaged(path: Path, reason: str) -> ValueError:
    return ValueError(
        f"{path} is damaged ({reason}): restore it from a copy, or remove it to go on without the history of metrics; "
        "the model and its checkpoint do not need it."
    )


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
