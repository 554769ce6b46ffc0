"""Trains the cells of the study and judges each on validation tasks; no test task is drawn.

Every cell has a folder ``runs/DATA-FACTOR-OPTION`` of the one format of trained models; it is trained once and read
afterwards. Its output temperature is chosen on the validation tasks of training, and it is judged on others of the
validation split, the same for all cells of a data set.
"""

import dataclasses
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from ibaml import records
from ibaml.atomic import write_text
from ibaml.experiments.report import Place, require_at_least
from ibaml.experiments.study.options import DATA_SETS, DEFAULT, Cell, Option, cells
from ibaml.experiments.training import run_folder
from ibaml.learner import MetaLearner
from ibaml.learner.evaluations import read_evaluation, write_evaluation
from ibaml.learner.folder import MODEL, read_metadata
from ibaml.metrics import Estimate
from ibaml.recipes.runs import open_run, read_recipe
from ibaml.train import TrainingDivergedError
from ibaml.train.checkpoint import first_difference
from ibaml.train.devices import resolve_device
from ibaml.types import TaskSampler, Tensor

COST = "cost.json"
"""File of a complete cell: CPU seconds of its training, and why it failed if it did."""

_JUDGE_SEED = 2 * 10**6  # The trainer chooses on validation tasks of its seed plus 10**6.


@dataclasses.dataclass(frozen=True, kw_only=True)
class StudySettings:
    """Settings of the study.

    Attributes:
        data_sets: Names of data sets, run in this order.
        factors: Settings that are varied, such as "head" or "prior"; all if empty.
        scale: Length of each training: 1 is about ten seconds of one core.
        num_tasks: Validation tasks that each cell is judged on.
        max_minutes: Begin no cell after so many minutes; the next call goes on. 0: report what is there. None: all.
        seed: Seed of training, and of the validation tasks.
        device: ``"auto"`` (CUDA if present), ``"cpu"``, ``"cuda"``, ``"cuda:1"``, ...
    """

    data_sets: tuple[str, ...] = tuple(DATA_SETS)
    factors: tuple[str, ...] = ()
    scale: float = 1.0
    num_tasks: int = 200
    max_minutes: float | None = None
    seed: int = 0
    device: str = "cpu"

    def __post_init__(self) -> None:
        """Refuses unknown names and values out of range."""
        unknown = [name for name in self.data_sets if name not in DATA_SETS]
        if unknown or not self.data_sets:
            named = f"names {', '.join(unknown)}" if self.data_sets else "is empty"
            raise ValueError(f"data_sets {named}; there are {', '.join(DATA_SETS)}.")
        if not self.scale > 0:
            raise ValueError(f"scale must be positive, but is {self.scale}.")
        require_at_least(self, 2, "num_tasks", reason="for an interval")
        require_at_least(self, 0, "max_minutes")
        known = {cell.option.factor: None for name in self.data_sets for cell in self._all(name)}
        if unknown := [factor for factor in self.factors if factor not in known]:
            raise ValueError(f"factors names {', '.join(unknown)}; there are {', '.join(known)}.")

    def cells(self, name: str) -> list[Cell]:
        """Returns the cells of a data set, the default first."""
        wanted = (DEFAULT, *self.factors)
        return [cell for cell in self._all(name) if not self.factors or cell.option.factor in wanted]

    def _all(self, name: str) -> list[Cell]:
        return cells(name, scale=self.scale, seed=self.seed)


class Judged(NamedTuple):
    """A cell that has been trained and judged.

    Attributes:
        option: What differs from the default.
        report: Scores with their 95% intervals over tasks.
        per_task: Scores of each task, the same tasks for all cells of a data set.
        temperature: Output temperature.
        seconds: CPU seconds of training.
    """

    option: Option
    report: Mapping[str, Estimate]
    per_task: Mapping[str, Tensor]
    temperature: float
    seconds: float


class StudyResult(NamedTuple):
    """What is known so far.

    Attributes:
        settings: What was asked for.
        judged: Data set to the cells that are finished, in the order of the options.
        failed: Data set to options whose training or adaptation diverged, with the reason.
        num_cells: Data set to the number of its cells.
    """

    settings: StudySettings
    judged: Mapping[str, list[Judged]]
    failed: Mapping[str, list[tuple[Option, str]]]
    num_cells: Mapping[str, int]


def run(settings: StudySettings, place: Place) -> StudyResult:
    """Trains and judges the cells that are not there yet, and reads the others.

    Args:
        settings: What to do.
        place: The output folder and the data. A further call with the same folder goes on where the last stopped.

    Raises:
        FileNotFoundError: If a data file is not found.
        ValueError: If a data file is damaged, or the folder holds cells with other settings.
        OSError: If the folder cannot be written.
        KeyboardInterrupt: If training was interrupted; the cells before are saved.
    """
    minutes = settings.max_minutes
    deadline = None if minutes is None else time.monotonic() + 60 * minutes
    judged: dict[str, list[Judged]] = {}
    failed: dict[str, list[tuple[Option, str]]] = {}
    all_cells = {name: settings.cells(name) for name in settings.data_sets}
    for name, of_name in all_cells.items():
        judged[name], failed[name] = [], []
        data = _Data(of_name[0], place, settings)
        for cell in of_name:
            if not _is_done(cell, data):
                if deadline is not None and time.monotonic() >= deadline:
                    continue
                if place.console is not None:
                    place.console.print(f"Training {cell.recipe.name}.", markup=False, highlight=False)
                _train_and_judge(cell, data)
            reason = _read_cost(data.folder(cell))[1]
            if reason is None:
                judged[name].append(_read(cell, data))
            else:
                failed[name].append((cell.option, reason))
    return StudyResult(settings, judged, failed, {name: len(of_name) for name, of_name in all_cells.items()})


class _Data:
    """The tasks of a data set, loaded when the first cell asks for them."""

    def __init__(self, default: Cell, place: Place, settings: StudySettings) -> None:
        self.place, self.num_tasks = place, settings.num_tasks
        self.seed = settings.seed + _JUDGE_SEED
        self.device = resolve_device(settings.device)
        # Examples that belong to none of a task's classes come from other tasks, where these have other classes.
        self.out_of_task = default.recipe.classes == "per_task"
        self._source = default.recipe.data
        self._samplers: tuple[TaskSampler, TaskSampler] | None = None

    def samplers(self) -> tuple[TaskSampler, TaskSampler]:
        """Returns the samplers of training and validation tasks."""
        if self._samplers is None:
            data, device = self.place.data, self.device
            train = self._source.sampler("train", data=data, device=device)
            self._samplers = train, self._source.sampler("validation", data=data, device=device)
        return self._samplers

    def folder(self, cell: Cell) -> Path:
        """Returns the run folder of a cell."""
        return run_folder(cell.recipe, self.place.folder)

    @property
    def tasks(self) -> dict[str, object]:
        """What fixes the tasks that cells are judged on."""
        data = json.loads(json.dumps(records.to_json(self._source)))
        return {
            "data": data,
            "split": "validation",
            "seed": self.seed,
            "num_tasks": self.num_tasks,
            "out_of_task": self.out_of_task,
        }


def _is_done(cell: Cell, data: _Data) -> bool:
    """Whether a cell was trained and judged on these tasks, or failed.

    Raises:
        ValueError: If another was trained in its place.
    """
    folder = data.folder(cell)
    if not (folder / COST).is_file():
        return False
    difference = first_difference(*(json.loads(one.to_json()) for one in (read_recipe(folder), cell.recipe)))
    if difference is not None:
        raise ValueError(
            f"{folder} was trained with other settings: {difference}. Use the same settings to go on, or another --out."
        )
    return _read_cost(folder)[1] is not None or read_evaluation(folder).tasks == data.tasks


def _train_and_judge(cell: Cell, data: _Data) -> None:
    """Trains a cell in memory, a matter of seconds, and stores it whole; one that is there is judged on other tasks."""
    folder = data.folder(cell)
    if (folder / COST).is_file():
        _judge(MetaLearner.load(folder, device=data.device), folder, data)
        return
    data.samplers()
    start, reason = time.process_time(), None
    open_run(folder, cell.recipe)
    try:
        learner = _trained(cell, data)
        seconds = time.process_time() - start
        learner.save(folder)
        _judge(learner, folder, data)
    except (TrainingDivergedError, FloatingPointError) as error:
        seconds, reason = time.process_time() - start, str(error)
    # Last: what makes a cell complete.
    write_text(folder / COST, json.dumps({"cpu_seconds": seconds, "failure": reason}) + "\n")


def _trained(cell: Cell, data: _Data) -> MetaLearner:
    train, validation = data.samplers()
    trainer = cell.recipe.trainer
    trained = None if cell.trained_as is None else run_folder(cell.trained_as, data.place.folder)
    if trained is not None and (trained / MODEL).is_file():
        learner = MetaLearner.load(trained, device=data.device).adapting_with(cell.recipe.algorithm)
        # The tasks on which the trainer fits the output temperature.
        return learner.calibrate(validation, num_tasks=trainer.num_validation_tasks, seed=trainer.seed + 10**6)
    learner = cell.recipe.learner(device=data.device).fit(train, validation, settings=trainer)
    assert learner.training_result is not None
    if learner.training_result.stop_reason == "interrupted":
        raise KeyboardInterrupt
    return learner


def _judge(learner: MetaLearner, folder: Path, data: _Data) -> None:
    evaluation = learner.evaluate_in_full(
        data.samplers()[1], num_tasks=data.num_tasks, seed=data.seed, out_of_task=data.out_of_task
    )
    algorithm = records.to_json(learner.algorithm)
    write_evaluation(folder, evaluation, tasks=data.tasks, step=learner.fitted_model.step, algorithm=algorithm)


def _read(cell: Cell, data: _Data) -> Judged:
    folder = data.folder(cell)
    stored = read_evaluation(folder)
    temperature = read_metadata(folder)["calibration_temperature"]
    return Judged(cell.option, stored.report, stored.per_task, temperature, _read_cost(folder)[0])


def _read_cost(folder: Path) -> tuple[float, str | None]:
    found = json.loads((folder / COST).read_text())
    return found["cpu_seconds"], found["failure"]
