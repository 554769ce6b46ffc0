"""What the study says: the paired difference of every option to the default, and all scores of every data set."""

from collections.abc import Mapping, Sequence

from ibaml.experiments.report import (
    Experiment,
    Place,
    Report,
    half_width_columns,
    interval_columns,
    markdown_table,
)
from ibaml.experiments.study.options import DEFAULT
from ibaml.experiments.study.run import Judged, StudyResult, StudySettings, run
from ibaml.metrics import Estimate, estimate, paired_difference

SEED = "seed"
"""The factor whose options are the default once more."""

_SCORES: Mapping[str, str] = {
    "accuracy": "accuracy",
    "rmse": "rmse",
    "nll": "nll",
    "ece_pooled": "pooled ECE",
    "coverage_90": "inside 90%",
    "out_of_task_auroc": "out-of-task AUROC",
}


def report(settings: StudySettings, place: Place) -> Report:
    """Trains what is missing and returns what is known so far in words, a table and a picture."""
    from ibaml.experiments.study.plot import study_figure

    result = run(settings, place)
    found = {name: differences(judged) for name, judged in result.judged.items()}
    drawn = {name: one for name, one in found.items() if len(one) > 1}
    figures = {"study": study_figure(drawn)} if drawn else {}
    return Report(summary(result), {"study": rows(result)}, figures)


def scores(cell: Judged) -> dict[str, Estimate]:
    """Returns all scores of a cell; of numbers the root mean squared error of a task as well."""
    found = dict(cell.report)
    if "mse" in cell.per_task:
        found["rmse"] = estimate(cell.per_task["mse"].sqrt())
    return found


def differences(judged: Sequence[Judged]) -> dict[tuple[str, str], Estimate]:
    """Returns the nll of each option minus the default's, paired over tasks; nothing without the default."""
    default = next((cell for cell in judged if cell.option.factor == DEFAULT), None)
    if default is None:
        return {}
    return {
        (cell.option.factor, cell.option.name): paired_difference(cell.per_task["nll"], default.per_task["nll"])
        for cell in judged
    }


def rows(result: StudyResult) -> list[dict[str, object]]:
    """Returns every score of every cell that is there."""
    names = {name for judged in result.judged.values() for cell in judged for name in scores(cell)}
    found: list[dict[str, object]] = []
    for data_set, judged in result.judged.items():
        difference = differences(judged)
        for cell in judged:
            own, (factor, option) = scores(cell), cell.option[:2]
            row: dict[str, object] = {"data_set": data_set, "factor": factor, "option": option}
            row |= half_width_columns("nll_difference", difference.get((factor, option)))
            for name in sorted(names):
                row |= interval_columns(name, own.get(name))
            found.append(row | {"temperature": cell.temperature, "cpu_seconds": round(cell.seconds, 2)})
    return found


def summary(result: StudyResult) -> str:
    """Returns what was found, as Markdown: differences to the default, who is ahead, and all scores."""
    settings = result.settings
    num_judged, num_cells = sum(map(len, result.judged.values())), sum(result.num_cells.values())
    seconds = sum(cell.seconds for judged in result.judged.values() for cell in judged)
    lines = [
        "# The study: which head, prior and settings",
        "",
        f"{num_judged} of {num_cells} cells, {seconds:.0f} CPU seconds of training. One setting at a time is changed "
        f"from the default; all trainings of a data set have the same number of meta-steps (scale {settings.scale:g}). "
        f"Judged on {settings.num_tasks} tasks of the validation split that chose no temperature; no "
        "test task was drawn.",
        "",
        "nll of an option minus that of the default, nats, paired; +- is a 95% interval over tasks, bold where it "
        "leaves out zero, and below zero the option is better. The interval knows nothing of how trainings differ by "
        "chance: for that there are the rows *seed*, which are the default once more.",
    ]
    for names in _by_kind(result):
        lines += ["", *_difference_table({name: differences(result.judged[name]) for name in names})]
    lines += ["", "## Ahead of the default, or behind it", "", *_verdicts(result)]
    for name, judged in result.judged.items():
        if judged:
            lines += ["", f"## {name} ({len(judged)} of {result.num_cells[name]} cells)", "", *_score_table(judged)]
        for option, reason in result.failed[name]:
            lines += ["", f"{option.factor}, {option.name}: failed. {reason}"]
    return "\n".join(lines) + "\n"


def noise(difference: Mapping[tuple[str, str], Estimate]) -> float:
    """Returns the largest distance of the default under another seed to the default; 0 if there is none."""
    return max((abs(value.mean) for (factor, _), value in difference.items() if factor == SEED), default=0.0)


def _by_kind(result: StudyResult) -> list[list[str]]:
    """Returns the data sets of classes and those of numbers, whose options are not the same."""
    found: dict[bool, list[str]] = {}
    for name, judged in result.judged.items():
        if len(judged) > 1:
            found.setdefault("mse" in judged[0].per_task, []).append(name)
    return list(found.values())


def _difference_table(found: Mapping[str, Mapping[tuple[str, str], Estimate]]) -> list[str]:
    every = dict.fromkeys(option for of_data in found.values() for option in of_data if option[0] != DEFAULT)
    factors = list(dict.fromkeys(factor for factor, _ in every))
    return markdown_table(
        ["", *found],
        [
            [f"{factor}: {name}", *(_cell(of_data.get((factor, name))) for of_data in found.values())]
            for factor, name in sorted(every, key=lambda option: factors.index(option[0]))
        ],
    )


def _cell(value: Estimate | None) -> str:
    if value is None:
        return ""
    text = format(value, "+.3f")
    return f"**{text}**" if abs(value.mean) > value.half_width else text


def _verdicts(result: StudyResult) -> list[str]:
    """Returns a sentence for each data set: options that differ by more than their interval and than the seeds."""
    lines: list[str] = []
    for name, judged in result.judged.items():
        found = differences(judged)
        if len(found) < 2:
            continue
        least = noise(found)
        clear = {
            f"{factor} {option} ({value.mean:+.3f})": value.mean
            for (factor, option), value in sorted(found.items(), key=lambda item: item[1].mean)
            if factor not in (DEFAULT, SEED) and abs(value.mean) > max(value.half_width, least)
        }
        ahead = [text for text, mean in clear.items() if mean < 0] or ["none"]
        behind = [text for text, mean in clear.items() if mean > 0] or ["none"]
        lines.append(
            f"- {name}, beyond the interval and the {least:.3f} of other seeds: ahead {', '.join(ahead)}; behind "
            f"{', '.join(behind)}."
        )
    return lines or ["Not yet: a default and an option are needed."]


def _score_table(judged: Sequence[Judged]) -> list[str]:
    shown = [name for name in _SCORES if name in scores(judged[0])]
    found = differences(judged)

    def order(cell: Judged) -> float:
        return found[cell.option[:2]].mean if found else 0.0

    return markdown_table(
        ["", *(_SCORES[name] for name in shown), "nll - default", "temperature", "CPU s"],
        [
            [
                "default" if cell.option.factor == DEFAULT else f"{cell.option.factor}: {cell.option.name}",
                *(str(scores(cell)[name]) for name in shown),
                _cell(found.get(cell.option[:2])) if cell.option.factor != DEFAULT else "",
                f"{cell.temperature:.2f}",
                f"{cell.seconds:.1f}",
            ]
            for cell in sorted(judged, key=order)
        ],
    )


STUDY = Experiment(
    settings=StudySettings,
    report=report,
    description="The study from which the defaults follow, judged on validation tasks. Resumable.",
    trains=True,
)
