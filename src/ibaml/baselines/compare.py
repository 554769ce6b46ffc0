"""A learner and baselines on the same test tasks, in one table with paired differences."""

import csv
import dataclasses
import io
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ibaml import records
from ibaml.algorithms import make_algorithm
from ibaml.atomic import read_json, write_text
from ibaml.baselines.base import Baseline, Problem, fresh_network, pose
from ibaml.baselines.registry import BASELINES
from ibaml.baselines.timetable import Timetable
from ibaml.learner import MetaLearner
from ibaml.learner.compare import difference
from ibaml.learner.folder import read_metadata
from ibaml.learner.identity import digest_of_tasks
from ibaml.metrics import Estimate, estimate
from ibaml.train import TrainerSettings
from ibaml.train.evaluate import Evaluation
from ibaml.types import Tensor

RECORD = "baseline.json"
"""What a folder of a baseline is of, and what came out."""

_ANY = make_algorithm("maml")
"""In place of the learner's algorithm, of which baselines know nothing."""

_FAILURES = (RuntimeError, ValueError, FloatingPointError, MemoryError)
_OF_CLASSES = ("accuracy", "nll", "ece_pooled")
_OF_NUMBERS = ("rmse", "nll", "coverage_90")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Method:
    """One row of a comparison.

    Attributes:
        name: Name of the learner, or of the baseline.
        seconds: Seconds of training or fitting; None if not known.
        note: What was chosen; of a method that failed, why.
        report: Each score with its 95% interval; empty if the method failed.
        per_task: Scores of each task, which differences pair.
        learner: The fitted learner; None if the method failed.
    """

    name: str
    seconds: float | None
    note: str
    report: Mapping[str, Estimate] = dataclasses.field(default_factory=dict[str, Estimate])
    per_task: Mapping[str, Tensor] = dataclasses.field(default_factory=dict[str, Tensor])
    learner: MetaLearner | None = dataclasses.field(default=None, repr=False)

    @property
    def has_failed(self) -> bool:
        """Whether there are no results."""
        return not self.per_task


@dataclasses.dataclass(frozen=True)
class BaselineComparison:
    """A learner and baselines on the same test tasks.

    Attributes:
        methods: The learner first.
    """

    methods: tuple[Method, ...]

    def __getitem__(self, name: str) -> Method:
        """Returns the row of a method."""
        return next(method for method in self.methods if method.name == name)

    @property
    def num_tasks(self) -> int:
        """Number of test tasks."""
        return len(self.methods[0].per_task["nll"])

    @property
    def metrics(self) -> tuple[str, ...]:
        """What the table shows: accuracy, nll and pooled ECE of classes; rmse, nll and coverage of numbers."""
        return _OF_CLASSES if "accuracy" in self.methods[0].per_task else _OF_NUMBERS

    @property
    def header(self) -> list[str]:
        """Heads of the columns; differences are to the learner."""
        first = self.methods[0].name
        differences = [f"{metric} - {first}'s" for metric in self._paired]
        return ["method", *self.metrics, *differences, "seconds", "note"]

    def printed(self) -> list[list[list[str]]]:
        """Returns the table in parts that fit a terminal: scores, differences, and what was chosen; heads first."""
        table = [self.header, *self.rows]
        last_score = 1 + len(self.metrics)
        heads = ["minus the first", *self._paired, "seconds"]
        differences = [heads, *([row[0], *row[last_score:-1]] for row in self.rows)]
        return [[row[:last_score] for row in table], differences, [[row[0], row[-1]] for row in table if row[-1]]]

    @property
    def rows(self) -> list[list[str]]:
        """Cells of the table, a row for each method."""
        return [self._row(method) for method in self.methods]

    def to_csv(self) -> str:
        """Returns the table as CSV."""
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows([self.header, *self.rows])
        return text.getvalue()

    def to_markdown(self) -> str:
        """Returns the table as Markdown."""
        rows = [self.header, ["---"] * len(self.header), *self.rows]
        return "".join(f"| {' | '.join(cell.replace('|', '/') for cell in row)} |\n" for row in rows)

    def to_json(self) -> str:
        """Returns all numbers, those of single tasks as well, as JSON."""
        methods = [
            {
                "name": method.name,
                "failed": method.has_failed,
                "seconds": method.seconds,
                "note": method.note,
                "metrics": {name: value._asdict() for name, value in method.report.items()},
                "per_task": {name: value.tolist() for name, value in method.per_task.items()},
            }
            for method in self.methods
        ]
        return json.dumps({"num_tasks": self.num_tasks, "methods": methods}, indent=2) + "\n"

    def write(self, folder: Path) -> None:
        """Writes ``comparison.json``, ``comparison.csv``, ``comparison.md`` and ``comparison.png``.

        Args:
            folder: Created if absent.
        """
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / "comparison.json", self.to_json())
        write_text(folder / "comparison.csv", self.to_csv())
        write_text(folder / "comparison.md", self.to_markdown())
        # Imported here: it pulls in matplotlib, which nothing else needs.
        from ibaml import plots

        drawn = {method.name: method.per_task for method in self.methods if not method.has_failed}
        plots.save(plots.comparison(drawn, title="Comparison with baselines"), folder / "comparison.png")

    @property
    def _paired(self) -> tuple[str, ...]:
        return self.metrics[1], self.metrics[0]

    def _row(self, method: Method) -> list[str]:
        seconds = "" if method.seconds is None else f"{method.seconds:.1f}"
        if method.has_failed:
            empty = [""] * (len(self.metrics) + len(self._paired) - 1)
            return [method.name, "failed", *empty, seconds, method.note]
        first = self.methods[0]
        differences = [
            "" if method is first else difference(metric, method.per_task[metric], first.per_task[metric])
            for metric in self._paired
        ]
        return [
            method.name,
            *(f"{method.report[metric]:.4f}" for metric in self.metrics),
            *differences,
            seconds,
            method.note,
        ]


def compare_with_baselines(
    learner: MetaLearner,
    train_tasks: Any,
    validation_tasks: Any,
    test_tasks: Any,
    *,
    baselines: Sequence[str | Baseline] | None = None,
    seconds: float | None = None,
    trained_seconds: float | None = None,
    settings: TrainerSettings | None = None,
    num_tasks: int = 600,
    seed: int = 0,
    folder: str | Path | None = None,
    name: str = "learner",
    say: Callable[[str], None] = lambda line: None,
) -> BaselineComparison:
    """Puts baselines beside a fitted learner, on the same test tasks.

    Baselines are fitted on the training tasks and tuned on the validation tasks. Those that train do so for as long as
    the learner has, on its network with initial weights where they need a network. All have their confidence fitted on
    the validation tasks (``ibaml.baselines.choosing``); of the learner do the same with ``calibrate`` before. A method
    that fails is a row that says so.

    Args:
        learner: The fitted learner.
        train_tasks: Its training tasks, in any form that ``fit`` takes.
        validation_tasks: Its validation tasks, or the share of the training tasks.
        test_tasks: Tasks in any form that ``evaluate`` takes.
        baselines: Names of ``BASELINES``, or baselines of one's own. None: all that suit the tasks.
        seconds: Time of training. None: what the learner's training took.
        trained_seconds: What it took. None: as its ``training_result`` says, which a loaded learner has not.
        settings: Outer loop of baselines that train, such as the learner's own; the number of steps follows from the
            time. None: what ``fit`` takes by default.
        num_tasks: Number of test tasks to draw from a sampler or an image folder.
        seed: Names the set of test tasks, or their splits.
        folder: Folder for the baselines and the tables. Baselines that are there with the same settings, data and time
            are used again, and training that was interrupted goes on.
        name: How the learner is called.
        say: Called with lines of how long it takes: before it starts, and for each baseline and trial that starts.

    Raises:
        NotFittedError: If the learner has not been fitted.
        TypeError: If tasks are of no accepted form.
        ValueError: If tasks do not fit the learner, a name is unknown or does not suit the tasks, or the time is not
            known.
        FloatingPointError: If predictions of the learner itself are not finite.

    Cost:
        The learner's training time by the clock for each baseline that trains, and a quarter of it for each of its
        two to five settings.

    Examples:
        >>> import numpy as np
        >>> from ibaml.baselines import compare_with_baselines
        >>> rng = np.random.default_rng(0)
        >>> tasks = [(x, x @ rng.normal(size=2)) for x in rng.normal(size=(30, 12, 2))]
        >>> learner = MetaLearner(likelihood="gaussian").fit(tasks[:20], 0.2, num_steps=2)
        >>> found = compare_with_baselines(learner, tasks[:20], 0.2, tasks[20:], baselines=["ridge", "pooled"])
        >>> found.header[:4], [row[0] for row in found.rows]
        (['method', 'rmse', 'nll', 'coverage_90'], ['learner', 'ridge', 'pooled'])
    """
    if trained_seconds is None and learner.training_result is not None:
        trained_seconds = learner.training_result.seconds
    seconds = trained_seconds if seconds is None else seconds
    if seconds is None:
        raise ValueError("the learner does not know how long it was trained, having been loaded: give seconds.")
    if not seconds > 0:
        raise ValueError(f"seconds must be positive, but is {seconds}.")
    problem = pose(learner, train_tasks, validation_tasks, settings=settings, say=say)
    chosen = _select(problem, baselines)
    own = learner.evaluate_in_full(test_tasks, num_tasks=num_tasks, seed=seed)
    # Fitted before any of them is evaluated, by a function that has not seen the test tasks.
    folder = None if folder is None else Path(folder).expanduser()
    fitted = _fit_all(chosen, problem, seconds, folder)

    def judged(method: Method) -> Method:
        if method.learner is None:
            return method
        try:
            evaluation = method.learner.evaluate_in_full(test_tasks, num_tasks=num_tasks, seed=seed)
        except _FAILURES as error:
            return _failed(method.name, error, seconds=method.seconds)
        _require_equal_tasks(method.name, evaluation, own)
        return _scored(method, evaluation)

    first = Method(
        name=name,
        seconds=trained_seconds,
        note="" if learner.calibration_temperature != 1 else "not calibrated",
        learner=learner,
    )
    found = BaselineComparison((_scored(first, own), *map(judged, fitted)))
    if folder is not None:
        found.write(folder)
    return found


def _select(problem: Problem, baselines: Sequence[str | Baseline] | None) -> list[Baseline]:
    if baselines is None:
        return [baseline for baseline in BASELINES.values() if baseline.suits(problem)]
    chosen: list[Baseline] = []
    for baseline in baselines:
        if isinstance(baseline, str):
            if baseline not in BASELINES:
                raise ValueError(f"there is no baseline {baseline!r}; there are {', '.join(BASELINES)}.")
            baseline = BASELINES[baseline]
        if not baseline.suits(problem):
            suitable = ", ".join(name for name, one in BASELINES.items() if one.suits(problem))
            raise ValueError(f"baseline {baseline.name!r} does not suit these tasks; those that do are {suitable}.")
        if baseline.name in (one.name for one in chosen):
            raise ValueError(f"baseline {baseline.name!r} is named twice.")
        chosen.append(baseline)
    return chosen


def _fit_all(baselines: Sequence[Baseline], problem: Problem, seconds: float, folder: Path | None) -> list[Method]:
    """Fits baselines one after the other, or finds them fitted in their folders."""
    identities = {one.name: _identity(one, problem, seconds) for one in baselines}
    folders = {one.name: None if folder is None else folder / one.name for one in baselines}
    stored = {name: _read_record(place, identities[name]) for name, place in folders.items() if place is not None}
    timetable = Timetable(problem, seconds, [one for one in baselines if stored.get(one.name) is None])
    timetable.announce()

    def found(baseline: Baseline) -> Method:
        name, place = baseline.name, folders[baseline.name]
        if place is not None and (known := stored[name]) is not None:
            return _load(name, problem, known, place)
        with timetable.fitting(name):
            return _fit(baseline, problem, seconds, identities[name], place)

    return [found(one) for one in baselines]


def _load(name: str, problem: Problem, stored: Mapping[str, Any], folder: Path) -> Method:
    problem.say(f"{name}: as fitted in {folder}")
    learner = problem.learner
    is_known = read_metadata(folder)["learner"]["network"] is not None
    network = None if is_known else fresh_network(learner)
    loaded = MetaLearner.load(folder, network=network, device=learner.device)
    return Method(name=name, seconds=stored["seconds"], note=stored["chosen"], learner=loaded)


def _fit(
    baseline: Baseline, problem: Problem, seconds: float, record: Mapping[str, Any], folder: Path | None
) -> Method:
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / RECORD, json.dumps({"of": record, "result": None}, indent=2) + "\n")
    try:
        found = baseline.fit(problem, seconds=seconds, folder=folder)
    except _FAILURES as error:
        return _failed(baseline.name, error, seconds=None)
    fitted = dataclasses.replace(found.learner.fitted_model, preprocessing=problem.learner.preprocessing)
    predictor = found.learner.with_fitted(fitted, problem.learner.splits)
    if folder is not None:
        predictor.save(folder)
        result = {"chosen": found.chosen, "seconds": found.seconds}
        write_text(folder / RECORD, json.dumps({"of": record, "result": result}, indent=2) + "\n")
    return Method(name=baseline.name, seconds=found.seconds, note=found.chosen, learner=predictor)


def _identity(baseline: Baseline, problem: Problem, seconds: float) -> dict[str, Any]:
    """Returns JSON values that agree for fits that would be the same."""
    learner = problem.learner
    return {
        "baseline": repr(baseline),
        "seconds": seconds,
        "trainer": dataclasses.asdict(problem.settings),
        "learner": records.to_json(dataclasses.replace(learner.settings, algorithm=_ANY)),
        "network": repr(learner.network),
        "seed": learner.seed,
        "tasks": [digest_of_tasks(problem.train), digest_of_tasks(problem.validation)],
    }


def _read_record(folder: Path, wanted: Mapping[str, Any]) -> dict[str, Any] | None:
    """Returns the result that a folder holds; clears a folder of another fit."""
    path = folder / RECORD
    if not path.is_file():
        return None
    try:
        stored = read_json(path)
        if stored["of"] == json.loads(json.dumps(wanted)):
            return stored["result"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error}): remove {folder} to fit it again.") from error
    shutil.rmtree(folder)
    return None


def _failed(name: str, error: Exception, *, seconds: float | None) -> Method:
    return Method(name=name, seconds=seconds, note=f"{type(error).__name__}: {error}")


def _scored(method: Method, evaluation: Evaluation) -> Method:
    report, per_task = dict(evaluation.report), dict(evaluation.per_task)
    if "mse" in per_task:
        per_task["rmse"] = per_task["mse"].sqrt()
        report["rmse"] = estimate(per_task["rmse"])
    return dataclasses.replace(method, report=report, per_task=per_task)


def _require_equal_tasks(name: str, evaluation: Evaluation, own: Evaluation) -> None:
    pairs = zip(evaluation.query_targets, own.query_targets, strict=True)
    if not all(torch.equal(one, other) for one, other in pairs):
        raise ValueError(
            f"{name} was evaluated on other test tasks than the learner: test_tasks gives different tasks for the same "
            "generator, so that nothing can be paired. Give a sequence of Episodes instead."
        )
