"""Table 1 of Zhang et al. 2023: nll and accuracy of MAML, ABML and iBaML, 5-way 5-shot.

The paper's order on miniImageNet: with K = 5 inner steps iBaML is level with MAML and ABML; with K = 10 and 15, which
cost an implicit gradient no more memory, it has the lowest nll and the highest accuracy.
"""

from typing import NamedTuple

from ibaml.experiments.few_shot.run import FewShotSettings, RunResult, display_name, notes, run_methods
from ibaml.experiments.report import Experiment, Place, Report, half_width_columns, markdown_table, percent
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


def run(settings: Table1Settings, place: Place) -> Table1Result:
    """Trains the methods, in slices if asked to, and evaluates them on the same test tasks.

    Arguments and errors are those of ``ibaml.experiments.few_shot.run.run_methods``; a further call with the same
    folder goes on where the last stopped.

    Cost:
        At the paper's scale 80,000 hypergradients a method, hours on an accelerator; at laptop scale minutes a method.
    """
    return Table1Result(settings, run_methods(settings, place))


def report(settings: Table1Settings, place: Place) -> Report:
    """Trains and evaluates the methods and returns what was found in words, a table and a picture."""
    from ibaml.experiments.few_shot.plot import table1_figure

    result = run(settings, place)
    return Report(summary(result), {"table1": rows(result)}, {"table1": table1_figure(result.settings, result.runs)})


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
        *markdown_table(heads, [_cells(one) for one in result.runs]),
    ]
    lines += ["", *(f"- {note}" for note in notes(settings, result.runs))]
    if settings.source != "mini_imagenet" or settings.scale != "paper":
        lines.append(
            "- The paper's columns are of other data or other settings: only the order of the methods can be compared."
        )
    return "\n".join(lines) + "\n"


def _cells(one: RunResult) -> list[str]:
    evaluation, paper = one.evaluation, PAPER[one.method]
    found = ["-"] * 4
    if evaluation is not None:
        found[:2] = [f"{evaluation.report['nll']:.3f}", percent(evaluation.report["accuracy"])]
    if one.differences:
        found[2:] = [f"{one.differences['nll']:+.3f}", percent(one.differences["accuracy"], "+.1f")]
    return [
        display_name(one.recipe),
        *found,
        one.trained.progress,
        "-" if evaluation is None else f"{evaluation.step:,}",
        f"{one.trained.seconds:,.0f}",
        f"{paper.nll:.3f}",
        percent(paper.accuracy),
    ]


def _row(one: RunResult) -> dict[str, object]:
    row = one.columns()
    for metric in ("nll", "accuracy"):
        row |= half_width_columns(metric, None if one.evaluation is None else one.evaluation.report[metric])
        row |= half_width_columns(f"{metric}_difference", one.differences.get(metric))
    return row


def _paper_columns(method: str) -> dict[str, object]:
    paper = PAPER[method]
    return half_width_columns("paper_mini_imagenet_nll", paper.nll) | half_width_columns(
        "paper_mini_imagenet_accuracy", paper.accuracy
    )


TABLE1 = Experiment(
    settings=Table1Settings,
    report=report,
    description="nll and accuracy, 5-way 5-shot, on paired test tasks. Resumable.",
    trains=True,
)
