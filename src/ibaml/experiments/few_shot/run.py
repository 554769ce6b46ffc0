"""What Table 1 and Fig. 3 share: train several recipes in slices of minutes, then evaluate all on the same test tasks.

Everything is kept in the output folder, so that a call does what is still to be done and no more:

| file | what |
|---|---|
| runs/NAME/ | the run folder of each recipe, as ``ibaml train`` makes it |
| slices.csv | a row for every slice of training: run, date, device, versions, steps, seconds |

A run that has all its meta-steps is not trained again, and a state that was evaluated on these tasks is not evaluated
again. The state that is evaluated has the lowest nll on validation tasks; test tasks choose nothing.
"""

import csv
import dataclasses
import difflib
import json
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple, get_args

import torch
from rich.console import Console

from ibaml import records
from ibaml.algorithms.gradient_based import num_inner_steps
from ibaml.algorithms.on_distribution import OnDistribution
from ibaml.data.sources import ImageSource, settings_of_tests
from ibaml.experiments.report import Place, describe_device, require_at_least
from ibaml.experiments.training import TrainedRun, read_run, run_folder
from ibaml.learner.evaluations import StoredEvaluation, read_evaluation
from ibaml.metrics import Estimate, paired_difference
from ibaml.recipes import Recipe, get_recipe, runs
from ibaml.recipes.few_shot import METHODS, Scale, recipe_name
from ibaml.train.devices import resolve_device

Source = Literal["tiny_imagenet", "mini_imagenet"]
Stage = Literal["both", "train", "evaluate"]
SLICES = "slices.csv"
REFERENCE = "maml_k5"
"""The method that the others are compared with, task by task."""

_DISPLAY_NAMES = {"maml": "MAML", "abml": "ABML", "ibaml": "iBaML"}
_LABELS: Mapping[tuple[Source, Scale], str] = {
    ("tiny_imagenet", "laptop"): "Tiny-ImageNet stand-in, laptop scale: not miniImageNet, nor the paper's settings",
    ("tiny_imagenet", "paper"): "Tiny-ImageNet stand-in, the paper's scale: not miniImageNet",
    ("mini_imagenet", "laptop"): "miniImageNet, laptop scale: not the paper's settings",
    ("mini_imagenet", "paper"): "miniImageNet, the paper's scale",
}
_SECONDS_BETWEEN_LINES = 20.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class FewShotSettings:
    """Settings of an experiment on few-shot image classification.

    Attributes:
        source: ``"tiny_imagenet"``, the stand-in, or ``"mini_imagenet"``, the paper's data.
        scale: ``"laptop"``: smaller images and network, fewer and larger steps, about ten minutes a method on one core.
            ``"paper"``: the paper's settings, for an accelerator.
        stage: ``"train"``, ``"evaluate"`` (the states that there are), or ``"both"``.
        max_minutes: Train each run for at most so long in this call, ready to go on in the next. None: to the end.
        steps: Meta-steps of every run, instead of the recipes'.
        num_tasks: Test tasks, at least 2.
        seed: Names the set of test tasks.
        device: ``"auto"`` (CUDA if present), ``"cpu"``, ``"cuda"``, ``"cuda:1"``, ...
        only: Restrict to these methods, such as ``("maml_k5", "ibaml_k10")``. Empty: all.
        changes: Further settings of every recipe as JSON, such as ``trainer.learning_rate 0.002``, for experiments
            beyond the paper's.
    """

    source: Source = "tiny_imagenet"
    scale: Scale = "laptop"
    stage: Stage = "both"
    max_minutes: float | None = None
    steps: int | None = None
    num_tasks: int = 1000
    seed: int = 0
    device: str = "auto"
    only: tuple[str, ...] = ()
    changes: Mapping[str, str] = dataclasses.field(default_factory=dict[str, str])

    methods: ClassVar[tuple[str, ...]] = tuple(METHODS)
    num_shots: ClassVar[int] = 5

    def __post_init__(self) -> None:
        """Refuses settings without a meaning."""
        for field, choices in (("source", get_args(Source)), ("scale", get_args(Scale)), ("stage", get_args(Stage))):
            if getattr(self, field) not in choices:
                raise ValueError(f"{field} must be one of {', '.join(choices)}, but is {getattr(self, field)!r}.")
        if self.max_minutes is not None and not self.max_minutes > 0:
            raise ValueError(
                f"max_minutes must be positive, but is {self.max_minutes}; to train no further use stage='evaluate'."
            )
        require_at_least(self, 1, "steps")
        require_at_least(self, 2, "num_tasks", reason="for an interval over tasks")
        for name in self.only:
            if name not in self.methods:
                nearest = difflib.get_close_matches(name, self.methods, n=1, cutoff=0.0)[0]
                raise ValueError(f"only names {name!r}; did you mean {nearest!r}? There are {', '.join(self.methods)}.")

    @property
    def label(self) -> str:
        """What data and which scale, and what was changed: to be shown with every result."""
        changed = ", ".join(f"{key} = {value}" for key, value in self._all_changes().items())
        return _LABELS[self.source, self.scale] + (f"; changed: {changed}" if changed else "")

    def recipes(self) -> dict[str, Recipe]:
        """Returns the recipe of each method, in the order of the methods, with the changes made.

        Raises:
            ValueError: If a change names no setting or a value is refused.
        """
        return {
            method: get_recipe(recipe_name(self.source, self.num_shots, method, self.scale)).replace(
                self._all_changes()
            )
            for method in self.methods
            if not self.only or method in self.only
        }

    def _all_changes(self) -> dict[str, Any]:
        changes = {name: _parse(text) for name, text in self.changes.items()}
        return changes | ({} if self.steps is None else {"trainer.num_steps": self.steps})


class RunResult(NamedTuple):
    """How far a run has come, and how good its chosen state is.

    Attributes:
        method: Name of the method, such as ``"ibaml_k10"``.
        trained: How far training has come.
        devices: What it was trained on, without repetition.
        evaluation: The chosen state on the test tasks; None if it was not asked for.
        differences: Each metric minus that of the reference, over paired tasks; empty for the reference itself, and
            without one.
    """

    method: str
    trained: TrainedRun
    devices: tuple[str, ...]
    evaluation: StoredEvaluation | None
    differences: Mapping[str, Estimate]

    @property
    def recipe(self) -> Recipe:
        """The run's recipe."""
        return self.trained.recipe

    def columns(self) -> dict[str, object]:
        """Returns what was run as columns of a table; what is not known None."""
        evaluation = self.evaluation
        return {
            "method": self.method,
            "recipe": self.recipe.name,
            "num_inner_steps": num_inner_steps(self.recipe.algorithm),
            "num_steps": self.trained.num_steps,
            "num_steps_planned": self.recipe.trainer.num_steps,
            "seconds": round(self.trained.seconds, 1),
            "devices": "; ".join(self.devices),
            "step": None if evaluation is None else evaluation.step,
            "num_tasks": None if evaluation is None else evaluation.tasks["num_tasks"],
            "seed": None if evaluation is None else evaluation.tasks["seed"],
        }


def run_methods(settings: FewShotSettings, place: Place) -> tuple[RunResult, ...]:
    """Runs the methods of an experiment by its settings; errors are those of ``run_recipes``.

    Args:
        settings: What to do.
        place: The output folder, the data and where progress is shown.

    Raises:
        ValueError: Also if a setting is refused, or CUDA is asked for and absent.
    """
    return run_recipes(
        settings.recipes(),
        place,
        reference=REFERENCE,
        stage=settings.stage,
        max_minutes=settings.max_minutes,
        num_tasks=settings.num_tasks,
        seed=settings.seed,
        device=resolve_device(settings.device),
    )


def run_recipes(
    recipes: Mapping[str, Recipe],
    place: Place,
    *,
    reference: str | None = None,
    stage: Stage = "both",
    max_minutes: float | None = None,
    num_tasks: int = 1000,
    seed: int = 0,
    device: torch.device,
) -> tuple[RunResult, ...]:
    """Trains each recipe for a slice, if it is not finished, and evaluates each chosen state on the same tasks.

    Args:
        recipes: Method name to recipe; all have the same data settings.
        place: The output folder (call again with the same one to go on), the data and where progress is shown.
        reference: Method to which the others are compared task by task; ignored if it is not among ``recipes``.
        stage: ``"train"``, ``"evaluate"`` or ``"both"``.
        max_minutes: Longest slice of each run.
        num_tasks: Test tasks, at least 2.
        seed: Names the set of test tasks.
        device: Where to compute.

    Raises:
        FileNotFoundError: If a data file is not found, or a run is to be evaluated that was never trained.
        ValueError: If the folder holds a run with other settings, a file is damaged, or the recipes' tasks differ.
        OSError: If the folder cannot be written.
        TrainingDivergedError: If a loss or gradient is not finite; what the runs before it have is kept.
        FloatingPointError: If predictions are not finite, naming the task.
        KeyboardInterrupt: If training was interrupted; everything is saved.

    Cost:
        A call that finds everything done reads the stored results only.
    """
    if not recipes:
        raise ValueError("recipes is empty; expected at least one method.")
    if num_tasks < 2:
        raise ValueError(f"num_tasks must be at least 2, for an interval over tasks, but is {num_tasks}.")
    first = next(iter(recipes))
    for method, recipe in recipes.items():
        if recipe.data != recipes[first].data:
            raise ValueError(
                f"{first} and {method} have different data settings ({recipes[first].data} and {recipe.data}): methods "
                "can be compared on the same tasks only."
            )
    # All before any work: the last of five runs should not fail after hours for what was known at the start.
    for recipe in recipes.values():
        runs.check_run(run_folder(recipe, place.folder), recipe)
    if stage == "evaluate":
        untrained = [name for name, recipe in recipes.items() if read_run(recipe, place.folder).best_step is None]
        if untrained:
            raise FileNotFoundError(
                f"{', '.join(untrained)} cannot be evaluated before any training: there is no state in "
                f"{place.folder / 'runs'}. Train first (stage 'train' or 'both'), or name the trained methods with "
                "`only`."
            )
    else:
        for recipe in recipes.values():
            _train_slice(recipe, place, device, max_minutes)
    evaluations: dict[str, StoredEvaluation | None] = dict.fromkeys(recipes)
    if stage != "train":
        for method, recipe in recipes.items():
            evaluations[method] = _evaluation(recipe, place, num_tasks, seed, device)
    devices = _devices(place.folder / SLICES)
    base = None if reference is None else evaluations.get(reference)
    results: list[RunResult] = []
    for method, recipe in recipes.items():
        evaluation = evaluations[method]
        differences: dict[str, Estimate] = {}
        if evaluation is not None and base is not None and method != reference:
            differences = {
                name: paired_difference(value, base.per_task[name]) for name, value in evaluation.per_task.items()
            }
        known = devices.get(recipe.name, ("unknown",))
        results.append(RunResult(method, read_run(recipe, place.folder), known, evaluation, differences))
    return tuple(results)


def display_name(recipe: Recipe) -> str:
    """Returns how a method is called in tables and figures, such as ``iBaML, K = 10``."""
    algorithm = recipe.algorithm
    return f"{_DISPLAY_NAMES.get(algorithm.name, algorithm.name)}, K = {num_inner_steps(algorithm)}"


def notes(settings: FewShotSettings, results: Sequence[RunResult]) -> list[str]:
    """Returns the sentences that belong below every table: tasks, choice of state, settings, how far training went."""
    recipe = results[0].recipe
    data = recipe.data
    assert isinstance(data, ImageSource)
    bayesian = next((result.recipe.algorithm for result in results if result.recipe.algorithm.is_bayesian), None)
    norm = recipe.network.arguments.get("norm", "batch")
    transductive = " statistics of the queries classified together (transductive)" if norm == "batch" else ""
    lines = [
        f"Data and scale: {settings.label}.",
        f"{settings.num_tasks:,} test tasks, the same for every method (seed {settings.seed}), "
        f"{data.num_ways}-way {data.num_shots}-shot with {data.num_test_queries} query images a "
        "class; intervals are 95% over tasks, differences are paired by task.",
        "State: the lowest nll on validation tasks.",
        f"{recipe.network.name}, {recipe.network.arguments['channels']} channels, "
        f"{data.image_size} x {data.image_size} images, normalisation: {norm}{transductive}.",
    ]
    if isinstance(bayesian, OnDistribution):
        lines.append(
            f"Temperature {bayesian.temperature:g}, {bayesian.num_samples} weight samples in training and "
            f"{bayesian.num_evaluation_samples} in prediction."
        )
    lines.append(f"Trained on: {'; '.join(dict.fromkeys(name for result in results for name in result.devices))}.")
    if unfinished := [result for result in results if not result.trained.is_finished]:
        steps = ", ".join(f"{display_name(result.recipe)} at {result.trained.progress}" for result in unfinished)
        lines.append(f"**Training is not finished**: {steps} meta-steps.")
    return lines


def _train_slice(recipe: Recipe, place: Place, device: torch.device, max_minutes: float | None) -> None:
    before = read_run(recipe, place.folder)
    if before.is_finished:
        _say(place.console, f"{recipe.name} has its {recipe.trainer.num_steps:,} meta-steps.")
        return
    date = datetime.now(UTC).isoformat(timespec="seconds")
    result = runs.train_run(
        recipe, before.folder, data=place.data, device=device, max_minutes=max_minutes, console=place.console
    )
    after = read_run(recipe, place.folder)
    row = {
        "run": recipe.name,
        "date": date,
        "device": describe_device(device),
        "torch": torch.__version__,
        "first_step": before.num_steps,
        "last_step": result.num_steps,
        "seconds": round(after.seconds - before.seconds, 1),
        "stop_reason": result.stop_reason,
    }
    slices = place.folder / SLICES
    is_new = not slices.exists()
    with slices.open("a", newline="") as file:
        writer = csv.DictWriter(file, list(row))
        if is_new:
            writer.writeheader()
        writer.writerow(row)
    if result.stop_reason == "interrupted":
        raise KeyboardInterrupt
    _say(place.console, f"{recipe.name}: step {after.progress}, {result.stop_reason}.")


def _evaluation(recipe: Recipe, place: Place, num_tasks: int, seed: int, device: torch.device) -> StoredEvaluation:
    """Returns the stored evaluation if it is of this state, algorithm and set of tasks, or makes it anew."""
    trained = read_run(recipe, place.folder)
    try:
        stored = read_evaluation(trained.folder)
    except FileNotFoundError:
        stored = None
    tasks = {"data": settings_of_tests(recipe.data), "seed": seed, "num_tasks": num_tasks}
    expected = (trained.best_step, tasks, records.to_json(recipe.algorithm))
    if stored is not None and (stored.step, stored.tasks, stored.algorithm) == expected:
        return stored
    _say(place.console, f"Evaluating {recipe.name}, state of step {trained.best_step:,}, on {num_tasks:,} test tasks.")
    last_line = time.monotonic()

    def on_progress(done: int, _: int) -> None:
        nonlocal last_line
        if time.monotonic() - last_line > _SECONDS_BETWEEN_LINES:
            last_line = time.monotonic()
            _say(place.console, f"{done:,} of {num_tasks:,} tasks")

    runs.evaluate_run(
        trained.folder, num_tasks=num_tasks, seed=seed, data=place.data, device=device, on_progress=on_progress
    )
    return read_evaluation(trained.folder)


def _devices(slices: Path) -> dict[str, tuple[str, ...]]:
    """Returns what each run was trained on."""
    if not slices.is_file():
        return {}
    with slices.open(newline="") as file:
        found = [(row["run"], row["device"]) for row in csv.DictReader(file)]
    return {run: tuple(dict.fromkeys(device for name, device in found if name == run)) for run, _ in found}


def _parse(text: str) -> Any:
    """Returns the value of a JSON text; what is no JSON is a string."""
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        return text
    return tuple(value) if isinstance(value, list) else value


def _say(console: Console | None, line: str) -> None:
    if console is not None:
        console.print(line, soft_wrap=True, markup=False, highlight=False)
