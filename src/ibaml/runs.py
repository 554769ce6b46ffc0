"""Run folders: what a training run leaves behind, how it is read back, and recipes trained and evaluated in them.

| file | what |
|---|---|
| recipe.json | the complete configuration |
| environment.json | versions, hardware, command |
| README.md | what this folder is and what to do with it |
| metrics.csv, tensorboard/, training.png | what was measured while training |
| checkpoint.safetensors | the state to resume from |
| best.safetensors | the meta-parameters chosen on validation tasks |
| evaluation/ | report.json, per_task.csv, predictions.safetensors, pictures |
"""

import csv
import json
import os
import platform
import sys
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console

from ibaml import records
from ibaml.algorithms import MetaParameters
from ibaml.evaluation import Evaluation, evaluate
from ibaml.metrics import Estimate
from ibaml.model import Model
from ibaml.processes import Processes
from ibaml.recipes import Recipe
from ibaml.train.checkpoint import load_tensors, meta_from_tensors, save_tensors
from ibaml.train.trainer import BEST, CHECKPOINT, Trainer, TrainingResult, first_difference
from ibaml.types import TaskSampler, Tensor

RECIPE = "recipe.json"
EVALUATION = "evaluation"
_CPU = torch.device("cpu")
_NOT_TRAINING = {"description": None, "num_test_tasks": None}


class StoredEvaluation(NamedTuple):
    """An evaluation read back from a run folder.

    Attributes:
        tasks: What fixes the set of tasks: data settings, seed and number; equal for runs that can be paired.
        report: Each metric with its interval.
        per_task: Each metric for each task.
        step: Meta-step of the evaluated state.
        algorithm: Settings of the algorithm that adapted, as JSON; None in reports of earlier versions.
    """

    tasks: dict[str, Any]
    report: dict[str, Estimate]
    per_task: dict[str, Tensor]
    step: int
    algorithm: dict[str, Any] | None


class EvaluatedRun(NamedTuple):
    """A run's chosen state on test tasks.

    Attributes:
        recipe: The run's recipe, with the changes made for this evaluation.
        evaluation: Metrics and predictions.
        step: Meta-step of the state.
        target: Folder that the evaluation was written to.
        sampler: Source of the test tasks; ``draw_tasks(sampler, ...)`` gives any of them again.
    """

    recipe: Recipe
    evaluation: Evaluation
    step: int
    target: Path
    sampler: TaskSampler


def train_run(
    recipe: Recipe,
    folder: Path,
    *,
    data: Path | None = None,
    device: torch.device = _CPU,
    max_minutes: float | None = None,
    console: Console | None = None,
    processes: Processes | None = None,
) -> TrainingResult:
    """Trains a recipe in a run folder, or resumes it where its checkpoint left off.

    Nothing is written before the data, the network and the folder's recipe have been found to fit.

    Args:
        recipe: What to train.
        folder: Run folder; made if missing.
        data: Folder with data files, searched before ``$IBAML_DATA`` and the per-user cache.
        device: Where to compute; with several processes, the device of this one.
        max_minutes: Stop after so many minutes, ready to resume.
        console: Where progress is shown; None is silent.
        processes: The processes that share each step's tasks; the first one alone writes and shows progress.

    Raises:
        FileNotFoundError: If a data file is not found.
        ValueError: If a data file is damaged, the tasks do not fit the network, the folder holds another run, or there
            are more processes than tasks in a step.
        OSError: If the folder cannot be written.
        TrainingDivergedError: If a loss or gradient is not finite.
        ProcessLostError: If another process has died or hangs.
    """
    processes = processes or Processes()
    train_tasks, validation_tasks = processes.first_then_others(
        lambda: tuple(recipe.data.sampler(split, data=data, device=device) for split in ("train", "validation"))
    )
    trainer = processes.together(
        lambda: Trainer(
            recipe.build_model(),
            recipe.algorithm,
            recipe.trainer,
            run_folder=folder,
            device=device,
            console=console,
            processes=processes,
        )
    )
    processes.on_first(lambda: open_run(folder, recipe, processes))
    if console is not None and processes.is_first:
        where = device.type if processes.size == 1 else f"{processes.size} processes on {device.type}"
        console.print(
            f"Training {recipe.name} on {where}: {recipe.trainer.num_steps:,} meta-steps of "
            f"{recipe.trainer.tasks_per_step} tasks. Everything goes to {folder}.",
            soft_wrap=True,
            markup=False,
        )
    result = trainer.fit(train_tasks, validation_tasks, max_minutes=max_minutes)
    processes.on_first(lambda: write_summary(folder, recipe, result))
    return result


def evaluate_run(
    folder: Path,
    *,
    num_tasks: int | None = None,
    seed: int = 0,
    data: Path | None = None,
    device: torch.device = _CPU,
    changes: Mapping[str, str] | None = None,
    on_progress: Callable[[int], None] | None = None,
) -> EvaluatedRun:
    """Evaluates a run's best state on a fixed, seeded set of test tasks and stores the result in the run folder.

    Args:
        folder: Run folder.
        num_tasks: Number of test tasks, instead of the recipe's.
        seed: Names the set of test tasks; the same seed gives every run of the same data the same tasks.
        data: Folder with data files, searched before ``$IBAML_DATA`` and the per-user cache.
        device: Where to compute.
        changes: Settings to change for this evaluation alone, as for ``Recipe.override``.
        on_progress: Called with the number of finished tasks.

    Raises:
        FileNotFoundError: If the folder is no run, the run has not been trained, or a data file is not found.
        ValueError: If a file is damaged, a setting is refused, or ``num_tasks`` is not positive.
        FloatingPointError: If predictions are not finite, naming the task.
    """
    recipe = read_recipe(folder).override(changes or {})
    model = recipe.build_model().to(device)
    meta, step = load_best(folder, recipe, model)
    sampler = recipe.data.sampler("test", data=data, device=device)
    evaluation = evaluate(
        model,
        recipe.algorithm,
        meta,
        sampler,
        num_tasks=recipe.num_test_tasks if num_tasks is None else num_tasks,
        seed=seed,
        tasks_per_chunk=recipe.trainer.tasks_per_chunk,
        on_progress=on_progress,
    )
    target = write_evaluation(folder, evaluation, recipe, seed=seed, step=step)
    return EvaluatedRun(recipe, evaluation, step, target, sampler)


def resolve_device(name: str) -> torch.device:
    """Returns the device of a name; ``"auto"`` is CUDA if present.

    Raises:
        ValueError: If it is no device of this kind, or CUDA is asked for and absent.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device must be auto, cpu, cuda or cuda:N, but is {name!r}.") from error
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= count:
            raise ValueError(f"device is {name!r}, but this torch finds {count or 'no'} CUDA device(s): use cpu.")
    return device


def open_run(folder: Path, recipe: Recipe, processes: Processes | None = None) -> None:
    """Creates a run folder, or checks that an existing one holds the same recipe.

    Raises:
        ValueError: If the folder holds another recipe, or a checkpoint of the same one with other settings.
        OSError: If the folder cannot be written.
    """
    # Before recipe.json is replaced, which has to describe the checkpoint beside it.
    check_run(folder, recipe)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / RECIPE, recipe.to_json())
        environment = {**describe_environment(), "processes": (processes or Processes()).size}
        write_text(folder / "environment.json", json.dumps(environment, indent=2) + "\n")
    except OSError as error:
        raise OSError(
            f"run folder {folder} cannot be written ({error.strerror or error}): choose another with --run-folder, or "
            "change its permissions."
        ) from error


def check_run(folder: Path, recipe: Recipe) -> None:
    """Refuses a folder that holds a run of another recipe; a folder without a run is accepted.

    Raises:
        ValueError: If the folder holds another recipe, or a checkpoint of the same one with other settings.
    """
    if not (folder / RECIPE).exists():
        return
    stored = read_recipe(folder)
    if stored.name != recipe.name:
        raise ValueError(
            f"{folder} holds a run of {stored.name!r}, not of {recipe.name!r}: choose another --run-folder."
        )
    old, new = ({**json.loads(one.to_json()), **_NOT_TRAINING} for one in (stored, recipe))
    difference = first_difference(old, new)
    if difference is not None and (folder / CHECKPOINT).exists():
        raise ValueError(
            f"{folder} was trained with other settings: {difference}. Use the same settings to resume, or another "
            "--run-folder to start anew."
        )


def read_recipe(folder: Path) -> Recipe:
    """Reads the recipe of a run.

    Raises:
        FileNotFoundError: If the folder is no run.
        ValueError: If the file is no recipe of this version.
    """
    path = folder / RECIPE
    if not path.is_file():
        raise FileNotFoundError(f"{folder} is no run folder: it has no {RECIPE}. `ibaml train` makes one.")
    return Recipe.from_json(path.read_text())


def load_best(folder: Path, recipe: Recipe, model: Model) -> tuple[MetaParameters, int]:
    """Reads the chosen meta-parameters of a run and the step that they are from.

    Raises:
        FileNotFoundError: If training has not saved any yet.
        ValueError: If the file is damaged or belongs to another network.
    """
    path = folder / BEST
    if not path.is_file():
        raise FileNotFoundError(f"{folder} has no {BEST}: train it first (`ibaml train {recipe.name}`).")
    tensors, metadata = load_tensors(path)
    like = recipe.algorithm.init(model.adapted, model.shared, generator=torch.Generator())
    return meta_from_tensors(tensors, like=like, source=str(path)), int(metadata["step"])


def write_summary(folder: Path, recipe: Recipe, result: TrainingResult) -> None:
    """Writes the run folder's README.md."""
    algorithm = recipe.algorithm
    steps = f"{result.num_steps} of {recipe.trainer.num_steps} meta-steps of {recipe.trainer.tasks_per_step} tasks"
    norm = recipe.network.arguments.get("norm", "batch" if recipe.network.name != "MLP" else "none")
    write_text(
        folder / "README.md",
        f"""# {recipe.name}

{recipe.description}.

- {steps}; ended: {result.stop_reason}.
- Chosen checkpoint: step {result.best_step}, by validation nll.
- {algorithm.name}: {algorithm.describe()}.
- {recipe.network.name}, normalisation policy: {norm}.

| file | what |
|---|---|
| recipe.json | the complete configuration |
| environment.json | versions, hardware, command |
| metrics.csv, tensorboard/, training.png | what was measured while training |
| checkpoint.safetensors | the state to resume from |
| best.safetensors | the chosen meta-parameters |
| evaluation/ | test results, once `ibaml evaluate` has run |

Resume or extend: `ibaml train {recipe.name} --run-folder {folder}`. Evaluate: `ibaml evaluate {folder}`.
""",
    )


def write_evaluation(folder: Path, evaluation: Evaluation, recipe: Recipe, *, seed: int, step: int) -> Path:
    """Writes an evaluation into a run folder and returns its subfolder."""
    target = folder / EVALUATION
    target.mkdir(exist_ok=True)
    num_tasks = len(next(iter(evaluation.per_task.values())))
    report = {
        "tasks": _task_key(recipe, seed=seed, num_tasks=num_tasks),
        "step": step,
        "temperature": recipe.algorithm.temperature,
        "algorithm": records.to_json(recipe.algorithm),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "metrics": {name: value._asdict() for name, value in evaluation.report.items()},
    }
    write_text(target / "report.json", json.dumps(report, indent=2) + "\n")
    temporary = target / f".per_task.{os.getpid()}"
    with temporary.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["task", *evaluation.per_task])
        for index, row in enumerate(zip(*(value.tolist() for value in evaluation.per_task.values()), strict=True)):
            writer.writerow([index, *row])
    os.replace(temporary, target / "per_task.csv")
    fields = ("targets", "log_probs", "mean", "variance")
    predictions = {name: value for name in fields if (value := getattr(evaluation, name)) is not None}
    save_tensors(target / "predictions.safetensors", predictions, {"recipe": recipe.name, "seed": seed})
    return target


def read_evaluation(folder: Path) -> StoredEvaluation:
    """Reads the evaluation of a run.

    Raises:
        FileNotFoundError: If the run has not been evaluated.
        ValueError: If a file is damaged.
    """
    target = folder / EVALUATION
    try:
        report = json.loads((target / "report.json").read_text())
        with (target / "per_task.csv").open(newline="") as file:
            rows = list(csv.DictReader(file))
        per_task = {
            name: torch.tensor([float(row[name]) for row in rows], dtype=torch.float64)
            for name in rows[0]
            if name != "task"
        }
        if len(rows) != report["tasks"]["num_tasks"]:
            raise ValueError(f"per_task.csv has {len(rows)} tasks, report.json {report['tasks']['num_tasks']}")
        metrics = {name: Estimate(**value) for name, value in report["metrics"].items()}
        return StoredEvaluation(report["tasks"], metrics, per_task, report["step"], report.get("algorithm"))
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{folder} has not been evaluated: run `ibaml evaluate {folder}` first.") from error
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise ValueError(f"{target} is damaged ({error!r}): run `ibaml evaluate {folder}` again.") from error


def describe_environment() -> dict[str, Any]:
    """Returns versions, hardware and command, for the record of a result."""
    packages = ("ibaml", "torch", "numpy", "scipy", "safetensors")
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "python": platform.python_version(),
        "packages": {name: version(name) for name in packages},
        "platform": f"{platform.system()} {platform.machine()}",
        "threads": torch.get_num_threads(),
        "cuda": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def _task_key(recipe: Recipe, *, seed: int, num_tasks: int) -> dict[str, Any]:
    return {"data": records.to_json(recipe.data), "seed": seed, "num_tasks": num_tasks}


def write_text(path: Path, text: str) -> None:
    """Writes a text file in one move: a reader sees the old file or the new, never a part."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text)
    os.replace(temporary, path)
