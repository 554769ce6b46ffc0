"""What training leaves beside the model: a run folder.

| file | what |
|---|---|
| model.safetensors, model.json | the chosen state, for ``MetaLearner.load`` (``ibaml.learner.folder``) |
| checkpoint.safetensors | the state to resume from |
| previous.checkpoint.safetensors | the one before, for when that is damaged |
| recipe.json | the complete configuration, if a recipe was trained |
| environment.json | versions, hardware, command, and what tells the data |
| README.md | what this folder is and what to do with it |
| metrics.csv, tensorboard/, training.png | what was measured while training |
| evaluation/ | report.html, report.json, per_task.csv, predictions.safetensors, pictures, once it was evaluated |
"""

import json
import platform
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from ibaml import records
from ibaml.atomic import read_json, write_text
from ibaml.learner.folder import MODEL, RECORDS, SETTINGS, read_metadata
from ibaml.train.checkpoint import CHECKPOINT, PREVIOUS, as_json, first_difference, load_tensors
from ibaml.train.log import METRICS, read_metrics

ENVIRONMENT = "environment.json"
EVALUATION = "evaluation"
README = "README.md"
RECIPE = "recipe.json"
TRAINING = "training.png"

_FILES = {
    MODEL: "the chosen state",
    SETTINGS: "its settings, to read",
    CHECKPOINT: "the state to resume training from",
    PREVIOUS: "the one before",
    RECIPE: "the complete configuration",
    ENVIRONMENT: "versions, hardware, command, and what tells the data",
    METRICS: "what was measured while training",
    "tensorboard": "the same for TensorBoard",
    TRAINING: "the same as a picture",
    EVALUATION: "results on test tasks; report.html is a page of all",
}


def describe_environment() -> dict[str, Any]:
    """Returns versions, hardware and command, for the record of a result."""
    packages = ("ibaml", "torch", "numpy", "safetensors")
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "python": platform.python_version(),
        "packages": {name: version(name) for name in packages},
        "platform": f"{platform.system()} {platform.machine()}",
        "threads": torch.get_num_threads(),
        "cuda": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def write_environment(folder: Path, *, num_processes: int, data: Mapping[str, Any] | None = None) -> None:
    """Writes ``environment.json``.

    Args:
        folder: The run folder.
        num_processes: How many processes shared the work.
        data: What tells the data of the run from others, for ``require_same_data``.

    Raises:
        OSError: If it cannot be written.
    """
    environment = {**describe_environment(), "processes": num_processes, "data": data}
    write_text(folder / ENVIRONMENT, json.dumps(environment, indent=2) + "\n")


def require_same_data(folder: Path, data: Mapping[str, Any]) -> None:
    """Refuses a folder whose model is of other data: it would be replaced without a word.

    Args:
        folder: A run folder, or one to be; a folder without a model or without a record of its data is taken.
        data: As ``write_environment`` is given it.

    Raises:
        ValueError: If the data differ, with the first difference, or the record is damaged.
    """
    if not ((folder / MODEL).is_file() and (folder / ENVIRONMENT).is_file()):
        return
    try:
        known = read_json(folder / ENVIRONMENT).get("data")
    except (ValueError, AttributeError) as error:
        raise ValueError(
            f"{folder / ENVIRONMENT} is damaged ({error}), and nothing else says on which data the model beside it was "
            "trained: choose another run folder, or remove that file if the data are the same."
        ) from error
    difference = None if known is None else first_difference({"data": known}, {"data": as_json(data)})
    if difference is not None:
        raise ValueError(
            f"{folder} holds a model that was trained on other data: {difference}. Use the same data, or another run "
            "folder to start anew."
        )


def draw_training(folder: Path) -> None:
    """Draws ``training.png`` from the metrics in the folder, if there are any.

    Raises:
        OSError: If the picture cannot be written.
        ValueError: If the metrics are damaged.
    """
    # Imported here: it pulls in matplotlib, which nothing else needs.
    from ibaml import plots

    if (folder / METRICS).is_file() and (history := read_metrics(folder / METRICS)):
        plots.save(plots.training_curves(history, title=title_of(folder)[0]), folder / TRAINING)


def write_summary(folder: Path) -> None:
    """Writes ``README.md`` from what is in the folder, naming the files that are there.

    Raises:
        OSError: If it cannot be written.
        ValueError: If a file is damaged.
    """
    title, description = title_of(folder)
    lines = [f"# {title}", "", *([f"{description}.", ""] if description else []), *state_of(folder), ""]
    lines += [line for picture in _pictures(folder) for line in (f"![{picture.stem}]({picture})", "")]
    lines += ["| file | what |", "|---|---|"]
    lines += [f"| {name} | {what} |" for name, what in _FILES.items() if (folder / name).exists()]
    lines += ["", *_uses(folder)]
    write_text(folder / README, "\n".join(lines) + "\n")


def _pictures(folder: Path) -> list[Path]:
    """Returns the pictures that are there, relative to the folder."""
    found = [folder / TRAINING, *sorted((folder / EVALUATION).glob("*.png"))]
    return [path.relative_to(folder) for path in found if path.is_file()]


def title_of(folder: Path) -> tuple[str, str]:
    """Returns the name of what is in a folder and, of a recipe, its description."""
    if not (folder / RECIPE).is_file():
        return "A trained MetaLearner", ""
    recipe = read_json(folder / RECIPE)
    return recipe["name"], recipe["description"]


def state_of(folder: Path) -> list[str]:
    """Returns what is known of the chosen state, as lines of a Markdown list.

    Raises:
        ValueError: If a file is damaged.
    """
    lines: list[str] = []
    if (folder / CHECKPOINT).is_file():
        progress = load_tensors(folder / CHECKPOINT)[1]
        trainer = progress["description"]["trainer"]
        taken, planned = progress["step"], trainer["num_steps"]
        chosen = "lowest validation nll" if progress["best_nll"] is not None else "the last one"
        lines.append(f"- {taken:,} of {max(taken, planned):,} meta-steps of {trainer['tasks_per_step']} tasks.")
        lines.append(f"- Chosen state: step {progress['best_step']:,}, {chosen}.")
    if (folder / MODEL).is_file():
        learner = read_metadata(folder)["learner"]
        network = learner["network"]
        algorithm = records.from_json(learner["algorithm"], RECORDS)
        lines.append(f"- {algorithm.name}: {algorithm.describe()}.")
        if network is None:
            lines.append("- Network: a module of your own, which `MetaLearner.load` needs.")
        else:
            norm = network["arguments"].get("norm", "none" if network["name"] == "MLP" else "batch")
            lines.append(f"- Network: {network['name']}, normalisation policy: {norm}.")
    return lines


def _uses(folder: Path) -> list[str]:
    if not (folder / MODEL).is_file():
        return ["There is no model yet: training has not reached its first validation."]
    lines = [f'Use it: `ibaml.MetaLearner.load("{folder}")`, or `ibaml predict {folder} --support ... --query ...`.']
    if (folder / RECIPE).is_file():
        name = title_of(folder)[0]
        lines += [f"Evaluate it: `ibaml evaluate {folder}`."]
        lines += [f"Resume or extend it: `ibaml train {name} --run-folder {folder}`."]
    return lines
