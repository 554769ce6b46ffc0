"""Results on test tasks, stored in the folder of the model that they are of."""

import csv
import hashlib
import io
import json
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from ibaml.atomic import atomic_write, read_json, write_text
from ibaml.learner.run_folder import EVALUATION
from ibaml.metrics import Estimate, Sizes, quantile_curve, reliability_curve, selective_curve
from ibaml.train.checkpoint import save_tensors
from ibaml.train.evaluate import Evaluation
from ibaml.types import Batch, Episode, Tensor

if TYPE_CHECKING:
    from ibaml.plots import Figure


class StoredEvaluation(NamedTuple):
    """An evaluation read back from a run folder.

    Attributes:
        tasks: What fixes the set of tasks: data, seed and number; equal for runs that can be paired.
        report: Each metric with its interval.
        per_task: Each metric for each task.
        step: Meta-step of the evaluated state.
        algorithm: Settings of the algorithm that adapted, as JSON.
    """

    tasks: dict[str, Any]
    report: dict[str, Estimate]
    per_task: dict[str, Tensor]
    step: int | None
    algorithm: dict[str, Any]


def write_evaluation(
    folder: Path, evaluation: Evaluation, *, tasks: Mapping[str, Any], step: int | None, algorithm: Mapping[str, Any]
) -> Path:
    """Writes an evaluation into the folder of its model and returns its subfolder.

    ``predictions.safetensors`` has leading axes ``[num_tasks, num_queries]`` where all tasks have as many queries; else
    the queries of all tasks follow one another, and ``num_queries`` says how many each task has.

    Args:
        folder: The folder of the model.
        evaluation: The results.
        tasks: What fixes the set of tasks, JSON values; ``num_tasks`` is added.
        step: Meta-step of the evaluated state.
        algorithm: Settings of the algorithm that adapted, as JSON.
    """
    target = folder / EVALUATION
    target.mkdir(exist_ok=True)
    report = {
        "tasks": {**tasks, "num_tasks": len(next(iter(evaluation.per_task.values())))},
        "num_support": Sizes.of(evaluation.num_support)._asdict(),
        "left_out": dict(evaluation.left_out),
        "step": step,
        "algorithm": algorithm,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "metrics": {name: value._asdict() for name, value in evaluation.report.items()},
    }
    save_tensors(target / "predictions.safetensors", _predictions(evaluation), {"tasks": tasks})
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(["task", *evaluation.per_task])
    for index, row in enumerate(zip(*(value.tolist() for value in evaluation.per_task.values()), strict=True)):
        writer.writerow([index, *row])
    write_text(target / "per_task.csv", text.getvalue())
    # Last, with checksums of what it belongs to and of itself.
    report["per_task_sha256"] = _sha256(text.getvalue())
    report["sha256"] = _sha256(_canonical(report))
    write_text(target / "report.json", json.dumps(report, indent=2) + "\n")
    return target


def require_place(folder: Path) -> None:
    """Makes the folder of an evaluation and a file in it, so that an unwritable place shows before any task is scored.

    Args:
        folder: The folder of the model.

    Raises:
        OSError: If it cannot be written, with what to do.
    """
    target = folder / EVALUATION
    try:
        target.mkdir(exist_ok=True)
        with atomic_write(target / "probe") as probe:
            probe.touch()
        (target / "probe").unlink()
    except OSError as error:
        raise OSError(
            f"an evaluation goes into {target}, which cannot be written ({error.strerror or error}): change its "
            "permissions, or evaluate a copy of the folder."
        ) from error


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _canonical(report: Mapping[str, Any]) -> str:
    """Returns all of a report but its own checksum as text, after the way through JSON."""
    return json.dumps(json.loads(json.dumps({**report, "sha256": None})), sort_keys=True)


def _predictions(evaluation: Evaluation) -> dict[str, Tensor]:
    """Returns targets and predictions by task; of tasks of unequal size in one row, with the size of each."""
    sizes = torch.tensor([len(of_task) for of_task in evaluation.query_targets])
    if len(sizes.unique()) == 1:
        return {"targets": evaluation.targets, **evaluation.tensors()}
    of_tasks = [prediction.tensors() for prediction in evaluation.predictions]
    joined = {name: torch.cat([one[name] for one in of_tasks]) for name in of_tasks[0]}
    return {"targets": torch.cat(list(evaluation.query_targets)), **joined, "num_queries": sizes}


def read_evaluation(folder: Path) -> StoredEvaluation:
    """Reads the evaluation of a model.

    Raises:
        FileNotFoundError: If the model has not been evaluated.
        ValueError: If a file is damaged.
    """
    target = folder / EVALUATION
    try:
        report = read_json(target / "report.json")
        text = (target / "per_task.csv").read_bytes().decode()
        # Evaluations of an earlier version have no checksums.
        if "sha256" in report and report["sha256"] != _sha256(_canonical(report)):
            raise ValueError("report.json was changed")
        if "sha256" in report and report["per_task_sha256"] != _sha256(text):
            raise ValueError("per_task.csv is of another evaluation than report.json, or was changed")
        rows = list(csv.DictReader(io.StringIO(text, newline="")))
        per_task = {
            name: torch.tensor([float(row[name]) for row in rows], dtype=torch.float64)
            for name in rows[0]
            if name != "task"
        }
        if len(rows) != report["tasks"]["num_tasks"]:
            raise ValueError(f"per_task.csv has {len(rows)} tasks, report.json {report['tasks']['num_tasks']}")
        metrics = {name: Estimate(**value) for name, value in report["metrics"].items()}
        return StoredEvaluation(report["tasks"], metrics, per_task, report["step"], report["algorithm"])
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{folder} has not been evaluated: run `ibaml evaluate {folder}` first.") from error
    except (KeyError, IndexError, TypeError, ValueError, AttributeError, RecursionError, csv.Error) as error:
        raise ValueError(f"{target} is damaged ({error!r}): run `ibaml evaluate {folder}` again.") from error


def draw_evaluation(target: Path, evaluation: Evaluation, first: Episode | None, *, title: str) -> None:
    """Draws the pictures of an evaluation, and removes those of an evaluation before it.

    Of classes a reliability diagram and the accuracy on the surest answers, of numbers the share of targets below their
    quantiles, all tasks together; and one task, if it can be shown.

    Args:
        target: Folder of the pictures.
        evaluation: The results.
        first: The first task, with a leading axis of length one; None: no task is shown.
        title: Name of the model.
    """
    # Imported here: it pulls in matplotlib, which nothing else needs.
    from ibaml import plots

    for stale in target.glob("*.png"):
        stale.unlink()
    pooled = _pooled(evaluation)
    if pooled.probs is not None:
        curve = reliability_curve(pooled.probs, pooled.targets)
        plots.save(plots.reliability_diagram({title: curve}), target / "reliability.png")
        entropy, correct = torch.special.entr(pooled.probs).sum(-1), pooled.probs.argmax(-1) == pooled.targets
        plots.save(plots.selective_curves({title: selective_curve(entropy, correct)}), target / "selective.png")
    elif pooled.cdf is not None:
        plots.save(plots.quantile_curves({title: quantile_curve(pooled.cdf)}), target / "quantiles.png")
    if first is not None and (figure := _one_task(evaluation, first, title)) is not None:
        plots.save(figure, target / "example_task.png")


class _Pooled(NamedTuple):
    """The queries of all tasks as those of one; probabilities are None for numbers, and where tasks differ in classes.

    Shapes are ``[1, num_queries, num_classes]``, ``[1, num_queries]``, and for numbers ``[1, num_queries]``.
    """

    probs: Tensor | None
    cdf: Tensor | None
    targets: Tensor


def _pooled(evaluation: Evaluation) -> _Pooled:
    targets = torch.cat(list(evaluation.query_targets)).unsqueeze(0)
    predictions: Any = evaluation.predictions
    if hasattr(predictions[0], "cdf"):
        pairs = zip(predictions, evaluation.query_targets, strict=True)
        # Some of several targets may not be measured.
        return _Pooled(None, torch.cat([one.cdf(y)[~y.isnan()] for one, y in pairs]).unsqueeze(0), targets)
    log_probs = [one.tensors()["log_probs"] for one in predictions]
    if len({one.shape[-1] for one in log_probs}) > 1:
        return _Pooled(None, None, targets)
    return _Pooled(torch.cat(log_probs).exp().unsqueeze(0), None, targets)


def _one_task(evaluation: Evaluation, first: Episode, title: str) -> "Figure | None":
    """Returns the picture of the first task: of images, or of one target on one input."""
    from ibaml import plots

    support, query = (Batch(batch.x[0].cpu(), batch.y[0].cpu()) for batch in first)
    predicted = evaluation.predictions[0].tensors()
    if "log_probs" in predicted:
        if support.x.ndim != 4:
            return None
        probs = predicted["log_probs"].exp()
        return plots.example_task(Episode(support, query), probs, title=f"{title}: one test task")
    has_curve = support.x.shape[-1] == 1 and support.y.shape[1:] in {(), (1,)}
    if not has_curve or not {"mean", "variance"} <= predicted.keys():
        return None
    mean, variance = predicted["mean"], predicted["variance"]
    return plots.example_regression(Episode(support, query), mean, variance, title=f"{title}: one task")
