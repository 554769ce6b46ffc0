"""Table 1 of Zhang et al. 2023: nll and accuracy of MAML, ABML and iBaML, 5-way 5-shot.

The paper's order on miniImageNet: with K = 5 inner steps iBaML is level with MAML and ABML; with K = 10 and 15, which
cost an implicit gradient no more memory, it has the lowest nll and the highest accuracy.
"""

from pathlib import Path
from typing import NamedTuple

from rich.console import Console

from ibaml.algorithms.gradient_based import num_inner_steps
from ibaml.experiments.few_shot import FewShotSettings, RunResult, display_name, notes, run_methods
from ibaml.metrics import Estimate


class PaperRow(NamedTuple):
    """What the paper prints for a method, on miniImageNet and over 1,000 test tasks of its own.

    Attributes:
        nll: Nats per example.
        accuracy: In ``[0, 1]``.
    """

    nll: Estimate
    accuracy: Estimate


PAPER = {
    "maml_k5": PaperRow(Estimate(0.967, 0.017, 1000), Estimate(0.631, 0.0092, 1000)),
    "abml_k5": PaperRow(Estimate(0.957, 0.016, 1000), Estimate(0.628, 0.0074, 1000)),
    "ibaml_k5": PaperRow(Estimate(0.965, 0.018, 1000), Estimate(0.632, 0.0074, 1000)),
    "ibaml_k10": PaperRow(Estimate(0.947, 0.017, 1000), Estimate(0.640, 0.0075, 1000)),
    "ibaml_k15": PaperRow(Estimate(0.943, 0.017, 1000), Estimate(0.640, 0.0074, 1000)),
}
"""The paper's Table 1. To be shown as ``paper, miniImageNet`` only: other data, so no target for these runs."""


class Table1Settings(FewShotSettings):
    """Settings of the experiment: those of ``FewShotSettings``, for five methods and five support images a class."""


class Table1Result(NamedTuple):
    """What the experiment found.

    Attributes:
        settings: The settings.
        runs: How far each method has come and how good it is, in the paper's order.
    """

    settings: Table1Settings
    runs: tuple[RunResult, ...]


def run(
    settings: Table1Settings, *, folder: Path, data: Path | None = None, console: Console | None = None
) -> Table1Result:
    """Trains the methods, in slices if asked to, and evaluates them on the same test tasks.

    Arguments and errors are those of ``ibaml.experiments.few_shot.run_recipes``; a further call with the same folder
    goes on where the last stopped.

    Cost:
        At the paper's scale 80,000 hypergradients a method, hours on an accelerator; at laptop scale minutes a method.
    """
    return Table1Result(settings, run_methods(settings, folder=folder, data=data, console=console))


def rows(result: Table1Result) -> list[dict[str, object]]:
    """Returns the table, a row for each method; accuracies in ``[0, 1]``, what is not known None."""
    return [_row(one) | _paper_columns(one.method) for one in result.runs]


def summary(result: Table1Result) -> str:
    """Returns the table as Markdown, with what it is of, what the paper has, and how far training went."""
    settings = result.settings
    heads = [
        "method",
        "nll",
        "accuracy (%)",
        "nll - MAML",
        "accuracy - MAML (points)",
        "meta-steps",
        "state of step",
        "training (s)",
        "paper, miniImageNet: nll",
        "paper, miniImageNet: accuracy (%)",
    ]
    lines = [
        f"Table 1, {settings.num_shots}-shot: **{settings.label}**.",
        "",
        _line(heads),
        _line(["---", *["---:"] * (len(heads) - 1)]),
    ]
    for one in result.runs:
        evaluation, paper = one.evaluation, PAPER[one.method]
        found = ["-"] * 4
        if evaluation is not None:
            found = [f"{evaluation.report['nll']:.3f}", _percent(evaluation.report["accuracy"]), "-", "-"]
        if one.differences:
            found[2:] = [f"{one.differences['nll']:+.3f}", _percent(one.differences["accuracy"], sign="+")]
        lines.append(
            _line(
                [
                    display_name(one.recipe),
                    *(text.replace("+- +", "+- ") for text in found),
                    f"{one.num_steps:,} of {one.recipe.trainer.num_steps:,}",
                    "-" if evaluation is None else f"{evaluation.step:,}",
                    f"{one.seconds:,.0f}",
                    f"{paper.nll:.3f}",
                    _percent(paper.accuracy),
                ]
            )
        )
    lines += ["", *(f"- {note}" for note in notes(settings, result.runs))]
    if settings.source != "mini_imagenet" or settings.scale != "paper":
        lines.append(
            "- The paper's columns are of other data or other settings: only the order of the methods can be compared."
        )
    return "\n".join(lines) + "\n"


def _row(one: RunResult) -> dict[str, object]:
    row: dict[str, object] = {
        "method": one.method,
        "recipe": one.recipe.name,
        "num_inner_steps": num_inner_steps(one.recipe.algorithm),
        "num_steps": one.num_steps,
        "num_steps_planned": one.recipe.trainer.num_steps,
        "seconds": round(one.seconds, 1),
        "devices": "; ".join(one.devices),
        "step": None if one.evaluation is None else one.evaluation.step,
        "num_tasks": None if one.evaluation is None else one.evaluation.tasks["num_tasks"],
        "seed": None if one.evaluation is None else one.evaluation.tasks["seed"],
    }
    for metric in ("nll", "accuracy"):
        value = None if one.evaluation is None else one.evaluation.report[metric]
        difference = one.differences.get(metric)
        row[metric] = None if value is None else value.mean
        row[f"{metric}_half_width"] = None if value is None else value.half_width
        row[f"{metric}_difference"] = None if difference is None else difference.mean
        row[f"{metric}_difference_half_width"] = None if difference is None else difference.half_width
    return row


def _paper_columns(method: str) -> dict[str, object]:
    paper = PAPER[method]
    return {
        f"paper_mini_imagenet_{name}": number
        for metric, value in paper._asdict().items()
        for name, number in ((metric, value.mean), (f"{metric}_half_width", value.half_width))
    }


def _percent(value: Estimate, sign: str = "") -> str:
    return f"{100 * value.mean:{sign}.1f} +- {100 * value.half_width:.1f}"


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"
