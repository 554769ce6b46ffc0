"""The evaluation of a model as one page: ``evaluation/report.html``, with its pictures in it."""

import base64
import html
import string
from collections.abc import Iterable, Sequence
from importlib.metadata import version
from pathlib import Path

from ibaml.atomic import write_text
from ibaml.learner.evaluations import StoredEvaluation, read_evaluation
from ibaml.learner.run_folder import EVALUATION, TRAINING, state_of, title_of

REPORT = "report.html"

_MEANINGS = {
    "accuracy": "share of right answers",
    "nll": "minus the log-probability of the truth, in nats: the lower the better; what training lowers",
    "brier": "mean squared error of the probabilities, in [0, 2]: the lower the better",
    "ece": "mean gap between confidence and accuracy, task by task; biased upwards in small tasks",
    "ece_pooled": "mean gap between confidence and accuracy, over the answers of all tasks together: 0 is calibrated",
    "mce": "largest gap between confidence and accuracy, task by task",
    "mce_pooled": "largest gap, over the answers of all tasks together; one answer alone in a bin can set it",
    "selective_area": "mean accuracy when only the surest answers are given, over all shares of answers",
    "out_of_task_auroc": "probability that a query of another task looks the more foreign: 0.5 is a coin, 1 ideal",
    "mse": "mean squared error, in the target's unit squared",
    "coverage_90": "share of targets in their 90% interval: 0.9 is right",
    "quantile_calibration_error": "mean gap between predicted and observed quantiles: 0 is calibrated",
}
_PICTURES = {
    "reliability.png": "How often answers of each confidence are right. On the diagonal they are as sure as right.",
    "selective.png": "Accuracy on the answers that the model is surest of.",
    "quantiles.png": "How many targets lie below each predicted quantile. On the diagonal intervals are right.",
    "example_task.png": "The first of the test tasks: what was known, and what was predicted.",
    TRAINING: "Training.",
}
_NUM_WORST = 5
_PAGE = string.Template(
    """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title: evaluation</title>
<style>
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60em; margin: 2em auto; padding: 0 1em; color: #1a1a1a; }
table { border-collapse: collapse; margin: 1em 0; }
th, td { padding: 0.3em 0.9em 0.3em 0; text-align: left; vertical-align: top; border-bottom: 1px solid #ddd; }
td.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
img { max-width: 100%; height: auto; }
figure { margin: 1.5em 0; }
figcaption, footer { color: #555; }
</style>
</head>
<body>
<h1>$title</h1>
$state
<h2>On $num_tasks test tasks</h2>
<p>Each number is a mean over tasks, with its 95% interval.</p>
$metrics
$pictures
<h2>The tasks with the highest $score</h2>
<p>Look at these first to find out what goes wrong; <code>per_task.csv</code> has all tasks.</p>
$worst
<h2>What was evaluated</h2>
$about
<footer>Written by ibaml $version.</footer>
</body>
</html>
"""
)


def write_report(folder: Path) -> Path:
    """Writes the page of the evaluation that a folder of a model holds, and returns its path.

    Args:
        folder: Folder of a model that was evaluated.

    Raises:
        FileNotFoundError: If it was not.
        ValueError: If a file is damaged.
        OSError: If the page cannot be written.
    """
    stored = read_evaluation(folder)
    score = "nll" if "nll" in stored.per_task else next(iter(stored.per_task))
    target = folder / EVALUATION
    page = _PAGE.substitute(
        title=html.escape(title_of(folder)[0]),
        state=_list(line.removeprefix("- ") for line in state_of(folder)),
        num_tasks=stored.tasks["num_tasks"],
        metrics=_metrics(stored),
        pictures="\n".join(_figure(path, text) for path, text in _pictures(target, folder)),
        score=html.escape(score),
        worst=_worst(stored, score),
        about=_list(f"{name}: {value}" for name, value in stored.tasks.items()),
        version=version("ibaml"),
    )
    write_text(target / REPORT, page)
    return target / REPORT


def _metrics(stored: StoredEvaluation) -> str:
    rows = [
        [name, f"{value.mean:.4f}", f"\u00b1 {value.half_width:.4f}", _MEANINGS.get(name, "")]
        for name, value in stored.report.items()
    ]
    return _table(["score", "mean", "95%", "what it is"], rows, numbers=(1, 2))


def _worst(stored: StoredEvaluation, score: str) -> str:
    order = stored.per_task[score].argsort(descending=True)[:_NUM_WORST].tolist()
    names = list(stored.per_task)
    rows = [[str(index), *(f"{float(stored.per_task[name][index]):.4f}" for name in names)] for index in order]
    return _table(["task", *names], rows, numbers=range(1, len(names) + 1))


def _pictures(target: Path, folder: Path) -> list[tuple[Path, str]]:
    places = {name: (folder if name == TRAINING else target) / name for name in _PICTURES}
    return [(path, _PICTURES[name]) for name, path in places.items() if path.is_file()]


def _figure(path: Path, text: str) -> str:
    data = base64.b64encode(path.read_bytes()).decode()
    text = html.escape(text)
    return f'<figure><img src="data:image/png;base64,{data}" alt="{text}"><figcaption>{text}</figcaption></figure>'


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]], *, numbers: Iterable[int]) -> str:
    right = set(numbers)

    def cell(column: int, text: str) -> str:
        return f"<td{' class=number' if column in right else ''}>{html.escape(text)}</td>"

    lines = ["<tr>" + "".join(f"<th>{html.escape(head)}</th>" for head in heads) + "</tr>"]
    lines += ["<tr>" + "".join(cell(*pair) for pair in enumerate(row)) + "</tr>" for row in rows]
    return "\n".join(["<table>", *lines, "</table>"])


def _list(lines: Iterable[str]) -> str:
    return "\n".join(["<ul>", *(f"<li>{html.escape(line)}</li>" for line in lines), "</ul>"])
