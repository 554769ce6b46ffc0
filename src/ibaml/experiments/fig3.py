"""Fig. 3 of Zhang et al. 2023: how well calibrated MAML, ABML and iBaML are, 5-way 1-shot.

The paper's finding on miniImageNet: iBaML has the lowest expected and the lowest maximum calibration error (ECE, MCE).

Both errors depend on the bins and on how many predictions share them, so each is given twice, with the bins stated: the
mean over tasks of each task's own error, which is biased upwards by the few queries of a task, and the error of the
queries of all tasks pooled.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar, NamedTuple

import torch
from rich.console import Console

from ibaml import metrics, runs
from ibaml.experiments.few_shot import REFERENCE, FewShotSettings, RunResult, display_name, notes, run_methods
from ibaml.metrics import Estimate, ReliabilityCurve
from ibaml.train.checkpoint import load_tensors
from ibaml.types import Tensor

NUM_BINS = 15
"""Equal-width bins of the top-class confidence."""


class Fig3Settings(FewShotSettings):
    """Settings of the experiment: those of ``FewShotSettings``, for three methods and one support image a class."""

    methods: ClassVar[tuple[str, ...]] = ("maml_k5", "abml_k5", "ibaml_k5")
    num_shots: ClassVar[int] = 1


class Calibration(NamedTuple):
    """How well calibrated a method is.

    Attributes:
        curve: Accuracy against confidence over the queries of all tasks.
        per_task: ``ece`` and ``mce``: the mean over tasks of each task's own error.
        pooled: ``ece`` and ``mce`` of the queries of all tasks together, with a bootstrap interval over tasks.
        differences: ``ece`` and ``mce`` of a task minus those of the reference, paired; empty for the reference.
    """

    curve: ReliabilityCurve
    per_task: Mapping[str, Estimate]
    pooled: Mapping[str, Estimate]
    differences: Mapping[str, Estimate]


class Fig3Result(NamedTuple):
    """What the experiment found.

    Attributes:
        settings: The settings.
        runs: How far each method has come.
        calibrations: Method to its calibration, for the methods that have been evaluated.
    """

    settings: Fig3Settings
    runs: tuple[RunResult, ...]
    calibrations: Mapping[str, Calibration]


def run(
    settings: Fig3Settings, *, folder: Path, data: Path | None = None, console: Console | None = None
) -> Fig3Result:
    """Trains the methods, in slices if asked to, and measures their calibration on the same test tasks.

    Arguments and errors are those of ``ibaml.experiments.few_shot.run_recipes``; a further call with the same folder
    goes on where the last stopped.

    Cost:
        At the paper's scale 80,000 hypergradients a method, hours on an accelerator; at laptop scale minutes a method.
    """
    results = run_methods(settings, folder=folder, data=data, console=console)
    # From the stored predictions, with the bins stated here rather than those of whoever wrote the report.
    predictions = {
        one.method: load_tensors(one.folder / runs.EVALUATION / "predictions.safetensors")[0]
        for one in results
        if one.evaluation is not None
    }
    probs = {method: tensors["log_probs"].exp() for method, tensors in predictions.items()}
    calibrations = {
        method: calibration(
            values, predictions[method]["targets"], None if method == REFERENCE else probs.get(REFERENCE)
        )
        for method, values in probs.items()
    }
    return Fig3Result(settings, results, calibrations)


def calibration(probs: Tensor, labels: Tensor, reference: Tensor | None = None) -> Calibration:
    """Measures the calibration of predictions, with ``NUM_BINS`` bins.

    Args:
        probs: Predictive probabilities, shape ``[num_tasks, num_examples, num_classes]``.
        labels: Class indices, shape ``[num_tasks, num_examples]``.
        reference: Probabilities of the method to compare with, for the same examples.
    """
    per_task = {"ece": metrics.ece, "mce": metrics.mce}
    pooled = {"ece": metrics.pooled_ece, "mce": metrics.pooled_mce}
    values = {name: function(probs, labels, num_bins=NUM_BINS) for name, function in per_task.items()}
    return Calibration(
        curve=metrics.reliability_curve(probs, labels, NUM_BINS),
        per_task={name: metrics.estimate(value) for name, value in values.items()},
        pooled={
            name: function(probs, labels, generator=torch.Generator().manual_seed(0), num_bins=NUM_BINS)
            for name, function in pooled.items()
        },
        differences={}
        if reference is None
        else {
            name: metrics.paired_difference(value, per_task[name](reference, labels, num_bins=NUM_BINS))
            for name, value in values.items()
        },
    )


def rows(result: Fig3Result) -> list[dict[str, object]]:
    """Returns ECE and MCE, a row for each method; what is not known None."""
    table: list[dict[str, object]] = []
    for one in result.runs:
        evaluation, found = one.evaluation, result.calibrations.get(one.method)
        row: dict[str, object] = {
            "method": one.method,
            "recipe": one.recipe.name,
            "num_steps": one.num_steps,
            "num_steps_planned": one.recipe.trainer.num_steps,
            "seconds": round(one.seconds, 1),
            "devices": "; ".join(one.devices),
            "step": None if evaluation is None else evaluation.step,
            "num_tasks": None if evaluation is None else evaluation.tasks["num_tasks"],
            "seed": None if evaluation is None else evaluation.tasks["seed"],
            "accuracy": None if evaluation is None else evaluation.report["accuracy"].mean,
            "nll": None if evaluation is None else evaluation.report["nll"].mean,
            "num_bins": NUM_BINS,
        }
        for metric in ("ece", "mce"):
            estimates = {
                metric: None if found is None else found.per_task[metric],
                f"{metric}_pooled": None if found is None else found.pooled[metric],
                f"{metric}_difference": None if found is None else found.differences.get(metric),
            }
            for name, value in estimates.items():
                row[name] = None if value is None else value.mean
                row[f"{name}_half_width"] = None if value is None else value.half_width
        table.append(row)
    return table


def reliability_rows(result: Fig3Result) -> list[dict[str, object]]:
    """Returns the reliability diagrams, a row for each bin that holds predictions."""
    table: list[dict[str, object]] = []
    for method, found in result.calibrations.items():
        curve = found.curve
        columns = (curve.bin_edges[:-1], curve.bin_edges[1:], curve.confidence, curve.accuracy, curve.count)
        for low, high, confidence, accuracy, count in zip(*(column.tolist() for column in columns), strict=True):
            if count:
                row = {"low": low, "high": high, "confidence": confidence, "accuracy": accuracy, "count": int(count)}
                table.append({"method": method, **row})
    return table


def summary(result: Fig3Result) -> str:
    """Returns ECE and MCE as Markdown, with what they are of and how far training went."""
    settings = result.settings
    heads = ["method", "ECE per task", "MCE per task", "ECE pooled", "MCE pooled", "ECE - MAML", "MCE - MAML"]
    heads += ["accuracy (%)", "meta-steps", "state of step"]
    lines = [
        f"Fig. 3, {settings.num_shots}-shot: **{settings.label}**.",
        "",
        f"| {' | '.join(heads)} |",
        f"| --- |{' ---: |' * (len(heads) - 1)}",
    ]
    for one in result.runs:
        cells = [display_name(one.recipe), *["-"] * (len(heads) - 1)]
        cells[8] = f"{one.num_steps:,} of {one.recipe.trainer.num_steps:,}"
        if one.evaluation is not None and one.method in result.calibrations:
            found, accuracy = result.calibrations[one.method], one.evaluation.report["accuracy"]
            cells[1:3] = (f"{found.per_task[metric]:.3f}" for metric in ("ece", "mce"))
            cells[3:5] = (f"{found.pooled[metric]:.3f}" for metric in ("ece", "mce"))
            if found.differences:
                cells[5:7] = (f"{found.differences[metric]:+.3f}".replace("+- +", "+- ") for metric in ("ece", "mce"))
            cells[7] = f"{100 * accuracy.mean:.1f} +- {100 * accuracy.half_width:.1f}"
            cells[9] = f"{one.evaluation.step:,}"
        lines.append(f"| {' | '.join(cells)} |")
    bins = (
        f"ECE and MCE with {NUM_BINS} equal-width bins of the top-class confidence, lower is better. Per task: mean "
        "over tasks of the error of a task's own queries. Pooled: the error of the queries of all tasks, with a "
        "bootstrap interval over tasks. Differences are per task. A bin with few predictions can set an MCE."
    )
    lines += ["", f"- {bins}", *(f"- {note}" for note in notes(settings, result.runs))]
    lines.append("- The paper, on miniImageNet: iBaML has the lowest ECE and the lowest MCE.")
    return "\n".join(lines) + "\n"
