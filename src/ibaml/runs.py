"""Run folders: what a training run leaves behind, and how it is read back.

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
import dataclasses
import json
import os
import platform
import sys
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ibaml.algorithms import MetaParameters
from ibaml.checkpoint import load_tensors, meta_from_tensors, save_tensors
from ibaml.evaluation import Evaluation
from ibaml.metrics import Estimate
from ibaml.model import Model
from ibaml.recipes import Recipe
from ibaml.trainer import BEST, CHECKPOINT, TrainingResult, first_difference
from ibaml.types import Tensor

RECIPE = "recipe.json"
EVALUATION = "evaluation"
_NOT_TRAINING = {"description": None, "num_test_tasks": None}


class StoredEvaluation(NamedTuple):
    """An evaluation read back from a run folder.

    Attributes:
        tasks: What fixes the set of tasks: data settings, seed and number; equal for runs that can be paired.
        report: Each metric with its interval.
        per_task: Each metric for each task.
    """

    tasks: dict[str, Any]
    report: dict[str, Estimate]
    per_task: dict[str, Tensor]


def open_run(folder: Path, recipe: Recipe) -> None:
    """Creates a run folder, or checks that an existing one holds the same recipe.

    Raises:
        ValueError: If the folder holds another recipe, or a checkpoint of the same one with other settings.
        OSError: If the folder cannot be written.
    """
    path = folder / RECIPE
    if path.exists():
        stored = read_recipe(folder)
        if stored.name != recipe.name:
            raise ValueError(
                f"{folder} holds a run of {stored.name!r}, not of {recipe.name!r}: choose another --run-folder."
            )
        # Before recipe.json is replaced, which has to describe the checkpoint beside it.
        old, new = ({**json.loads(one.to_json()), **_NOT_TRAINING} for one in (stored, recipe))
        difference = first_difference(old, new)
        if difference is not None and (folder / CHECKPOINT).exists():
            raise ValueError(
                f"{folder} was trained with other settings: {difference}. Use the same settings to resume, or another "
                "--run-folder to start anew."
            )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _write(path, recipe.to_json())
        _write(folder / "environment.json", json.dumps(describe_environment(), indent=2) + "\n")
    except OSError as error:
        raise OSError(
            f"run folder {folder} cannot be written ({error.strerror or error}): choose another with --run-folder, or "
            "change its permissions."
        ) from error


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
    bayesian = f", temperature {algorithm.temperature}" if algorithm.is_bayesian else ""
    steps = f"{result.num_steps} of {recipe.trainer.num_steps} meta-steps of {recipe.trainer.tasks_per_step} tasks"
    norm = recipe.network.arguments.get("norm", "batch" if recipe.network.name != "MLP" else "none")
    _write(
        folder / "README.md",
        f"""# {recipe.name}

{recipe.description}.

- {steps}; ended: {result.stop_reason}.
- Chosen checkpoint: step {result.best_step}, by validation nll.
- {algorithm.name}: {algorithm.estimator} gradient, {algorithm.num_inner_steps} inner steps{bayesian}.
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
        "temperature": recipe.algorithm.temperature if recipe.algorithm.is_bayesian else None,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "metrics": {name: value._asdict() for name, value in evaluation.report.items()},
    }
    _write(target / "report.json", json.dumps(report, indent=2) + "\n")
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
        return StoredEvaluation(report["tasks"], metrics, per_task)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{folder} has not been evaluated: run `ibaml evaluate {folder}` first.") from error
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise ValueError(f"{target} is damaged ({error!r}): run `ibaml evaluate {folder}` again.") from error


def describe_environment() -> dict[str, Any]:
    """Returns versions, hardware and command, for the record of a result."""
    packages = ("ibaml", "torch", "numpy", "torchmetrics", "safetensors")
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
    return {"data": dataclasses.asdict(recipe.data), "seed": seed, "num_tasks": num_tasks}


def _write(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text)
    os.replace(temporary, path)
