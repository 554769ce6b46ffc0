"""Fig. 3 of Zhang et al. 2023: how well calibrated MAML, ABML and iBaML are, 5-way 1-shot.

The paper's finding on miniImageNet: iBaML has the lowest expected and the lowest maximum calibration error (ECE, MCE).

Both errors depend on the bins and on how many predictions share them, so each is given twice, with the bins stated: the
mean over tasks of each task's own error, which is biased upwards by the few queries of a task, and the error of the
queries of all tasks pooled.
"""

from collections.abc import Mapping
from typing import ClassVar, NamedTuple

from ibaml.experiments.few_shot.calibration import NUM_BINS, Calibration, calibration
from ibaml.experiments.few_shot.run import REFERENCE, FewShotSettings, RunResult, display_name, notes, run_methods
from ibaml.experiments.report import Experiment, Place, Report, half_width_columns, markdown_table, percent
from ibaml.learner.run_folder import EVALUATION
from ibaml.train.checkpoint import load_tensors


class Fig3Settings(FewShotSettings):
    """Settings of the experiment: those of ``FewShotSettings``, for three methods and one support image a class."""

    methods: ClassVar[tuple[str, ...]] = ("maml_k5", "abml_k5", "ibaml_k5")
    num_shots: ClassVar[int] = 1


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


def run(settings: Fig3Settings, place: Place) -> Fig3Result:
    """Trains the methods, in slices if asked to, and measures their calibration on the same test tasks.

    Arguments and errors are those of ``ibaml.experiments.few_shot.run.run_methods``; a further call with the same
    folder goes on where the last stopped.

    Cost:
        At the paper's scale 80,000 hypergradients a method, hours on an accelerator; at laptop scale minutes a method.
    """
    results = run_methods(settings, place)
    # From the stored predictions, with the bins stated here rather than those of whoever wrote the report.
    predictions = {
        one.method: load_tensors(one.trained.folder / EVALUATION / "predictions.safetensors")[0]
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


def report(settings: Fig3Settings, place: Place) -> Report:
    """Trains and evaluates the methods and returns what was found in words, tables and a picture."""
    from ibaml.experiments.few_shot.plot import fig3_figure

    result = run(settings, place)
    tables = {"fig3": rows(result), "reliability": reliability_rows(result)}
    return Report(summary(result), tables, {"fig3": fig3_figure(settings, result.runs, result.calibrations)})


def rows(result: Fig3Result) -> list[dict[str, object]]:
    """Returns ECE and MCE, a row for each method; what is not known None."""
    table: list[dict[str, object]] = []
    for one in result.runs:
        evaluation, found = one.evaluation, result.calibrations.get(one.method)
        row = one.columns()
        row |= {name: None if evaluation is None else evaluation.report[name].mean for name in ("accuracy", "nll")}
        row["num_bins"] = NUM_BINS
        for metric in ("ece", "mce"):
            row |= half_width_columns(metric, None if found is None else found.per_task[metric])
            row |= half_width_columns(f"{metric}_pooled", None if found is None else found.pooled[metric])
            row |= half_width_columns(f"{metric}_difference", None if found is None else found.differences.get(metric))
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
    table = [_cells(one, result.calibrations.get(one.method)) for one in result.runs]
    lines = [f"Fig. 3, {settings.num_shots}-shot: **{settings.label}**.", "", *markdown_table(heads, table)]
    bins = (
        f"ECE and MCE with {NUM_BINS} equal-width bins of the top-class confidence, lower is better. Per task: mean "
        "over tasks of the error of a task's own queries. Pooled: the error of the queries of all tasks, with a "
        "bootstrap interval over tasks. Differences are per task. A bin with few predictions can set an MCE."
    )
    lines += ["", f"- {bins}", *(f"- {note}" for note in notes(settings, result.runs))]
    lines.append("- The paper, on miniImageNet: iBaML has the lowest ECE and the lowest MCE.")
    return "\n".join(lines) + "\n"


def _cells(one: RunResult, found: Calibration | None) -> list[str]:
    errors, accuracy, step = ["-"] * 6, "-", "-"
    if one.evaluation is not None and found is not None:
        errors[:2] = (f"{found.per_task[metric]:.3f}" for metric in ("ece", "mce"))
        errors[2:4] = (f"{found.pooled[metric]:.3f}" for metric in ("ece", "mce"))
        if found.differences:
            errors[4:] = (f"{found.differences[metric]:+.3f}" for metric in ("ece", "mce"))
        accuracy, step = percent(one.evaluation.report["accuracy"]), f"{one.evaluation.step:,}"
    return [display_name(one.recipe), *errors, accuracy, one.trained.progress, step]


FIG3 = Experiment(
    settings=Fig3Settings,
    report=report,
    description="Calibration, 5-way 1-shot, with reliability diagrams. Resumable.",
    trains=True,
)
