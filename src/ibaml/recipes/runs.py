"""Recipes trained and evaluated in run folders (``ibaml.learner.run_folder``)."""

import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from ibaml import records
from ibaml.atomic import read_json, write_text
from ibaml.baselines import BaselineComparison, compare_with_baselines
from ibaml.data.sources import settings_of_tests
from ibaml.learner import MetaLearner
from ibaml.learner.evaluations import draw_evaluation, require_place, write_evaluation
from ibaml.learner.files import read_table
from ibaml.learner.report import write_report
from ibaml.learner.run_folder import RECIPE, write_summary
from ibaml.learner.scores import EvaluationReport
from ibaml.posterior import FittedModel
from ibaml.recipes.settings import Recipe
from ibaml.train import TrainingResult
from ibaml.train.checkpoint import CHECKPOINT, first_difference, load_tensors
from ibaml.train.evaluate import Evaluation, draw_tasks
from ibaml.train.lock import only_training_in
from ibaml.train.processes import Processes
from ibaml.train.progress import say
from ibaml.train.signals import results_are_read

if TYPE_CHECKING:
    from rich.console import Console

_CPU = torch.device("cpu")
_NUM_TASKS = 600
_NOT_TRAINING = {"description": None, "num_test_tasks": None}


class EvaluatedRun(NamedTuple):
    """A run's chosen state on test tasks.

    Attributes:
        name: Name of its recipe, or of its folder.
        learner: The learner that adapted, with the changes made for this evaluation.
        evaluation: Metrics and predictions.
        seed: Name of the set of test tasks.
        target: Folder that the evaluation was written to.
        tasks: The test tasks; ``draw_tasks(tasks, ...)`` gives any of a sampler's again.
    """

    name: str
    learner: MetaLearner
    evaluation: Evaluation
    seed: int
    target: Path
    tasks: Any

    @property
    def step(self) -> int | None:
        """Meta-step of the state, if training stored it."""
        return self.learner.fitted_model.step

    @property
    def headline(self) -> str:
        """One line that says what was evaluated on what."""
        report = EvaluationReport(self.evaluation)
        temperature = getattr(self.learner.algorithm, "temperature", None)
        state = "" if self.step is None else f", state of step {self.step}"
        suffix = "" if temperature is None else f", temperature {temperature}"
        if self.learner.calibration_temperature != 1:
            suffix += f", output temperature {self.learner.calibration_temperature:.2f}"
        return f"{self.name}: test on {report.headline}; seed {self.seed}{state}{suffix}"


def train_run(
    recipe: Recipe,
    folder: Path,
    *,
    data: Path | None = None,
    device: torch.device = _CPU,
    max_minutes: float | None = None,
    console: "Console | None" = None,
    processes: Processes | None = None,
) -> TrainingResult:
    """Trains a recipe in a run folder, or resumes it where its checkpoint left off.

    It is ``recipe.learner().fit(...)`` on the recipe's tasks. Nothing is written before the data and the recipe in the
    folder have been found to fit.

    Args:
        recipe: What to train.
        folder: Run folder; made if missing.
        data: Folder with data files, searched before ``$IBAML_DATA`` and the per-user cache.
        device: Where to compute; with several processes, the device of this one.
        max_minutes: Stop after so many minutes, ready to resume.
        console: Where progress is shown; None is silent.
        processes: The processes that share each step's tasks; the first one alone writes and shows progress.

    Raises:
        FileNotFoundError: If a data file is not found.
        ValueError: If a data file is damaged, the tasks do not fit the network, the folder holds another run, or there
            are more processes than tasks in a step.
        OSError: If the folder cannot be written, or another training runs in it.
        TrainingDivergedError: If a loss or gradient is not finite.
        ProcessLostError: If another process has died or hangs.
    """
    processes = processes or Processes()
    train_tasks, validation_tasks = processes.first_then_others(
        lambda: tuple(recipe.data.sampler(split, data=data, device=device) for split in ("train", "validation"))
    )
    learner = processes.together(lambda: recipe.learner(device=device))
    with contextlib.ExitStack() as stack:
        # Before recipe.json is written, which another training in the folder would not fit.
        processes.on_first(lambda: _hold(folder, stack))
        stack.enter_context(results_are_read())
        processes.on_first(lambda: open_run(folder, recipe))
        return _train(learner, recipe, folder, train_tasks, validation_tasks, max_minutes, console, processes)


def _hold(folder: Path, stack: contextlib.ExitStack) -> None:
    stack.enter_context(only_training_in(folder))


def _train(
    learner: MetaLearner,
    recipe: Recipe,
    folder: Path,
    train_tasks: Any,
    validation_tasks: Any,
    max_minutes: float | None,
    console: "Console | None",
    processes: Processes,
) -> TrainingResult:
    if console is not None and processes.is_first:
        device = learner.device
        where = device.type if processes.size == 1 else f"{processes.size} processes on {device.type}"
        say(
            console,
            f"Training {recipe.name} on {where}: {recipe.trainer.num_steps:,} meta-steps of "
            f"{recipe.trainer.tasks_per_step} tasks. Everything goes to {folder}.",
        )
    learner.fit(
        train_tasks,
        validation_tasks,
        settings=recipe.trainer,
        run_folder=folder,
        max_minutes=max_minutes,
        progress=console or False,
        processes=processes,
    )
    assert learner.training_result is not None
    return learner.training_result


def evaluate_run(
    folder: Path,
    *,
    recipe: Recipe | None = None,
    test: Path | None = None,
    num_support: int | None = None,
    num_tasks: int | None = None,
    seed: int = 0,
    out_of_task: bool = False,
    data: Path | None = None,
    device: torch.device = _CPU,
    on_progress: Callable[[int, int], None] | None = None,
) -> EvaluatedRun:
    """Evaluates a trained model on a fixed, seeded set of test tasks and stores the result in its folder.

    Args:
        folder: Folder of the model.
        recipe: The run's recipe with other data settings, or other settings of its algorithm, for this evaluation
            alone. None: as it was trained, if a recipe was.
        test: Test tasks instead of the recipe's: a table or a folder of class folders of images.
        num_support: Known rows of each task of ``test``; see ``MetaLearner.evaluate``.
        num_tasks: Number of test tasks, instead of the recipe's.
        seed: Names the set of test tasks; the same seed gives every run of the same data the same tasks.
        out_of_task: Whether queries of another task are predicted as well; see ``MetaLearner.evaluate``.
        data: Folder with data files, searched before ``$IBAML_DATA`` and the per-user cache.
        device: Where to compute.
        on_progress: Called with the number of finished tasks and of all. None: a bar on a terminal.

    Raises:
        FileNotFoundError: If the folder holds no trained model, or a data file is not found.
        ValueError: If a file is damaged, a setting is refused, there are no test tasks, ``num_tasks`` is not
            positive, or ``num_support`` does not suit the tasks.
        FloatingPointError: If predictions are not finite, naming the task.
    """
    if num_support is not None and test is None:
        raise ValueError(
            "num_support splits the rows of --test; the tasks of a recipe come with a support, whose size is a setting "
            "of its data: `ibaml evaluate RUN --help` lists them."
        )
    learner = MetaLearner.load(folder, device=device)
    if (folder / RECIPE).is_file():
        stored = read_recipe(folder)
        _require_own(folder, stored, learner)
        recipe = recipe or stored
    if recipe is not None and recipe.algorithm != learner.algorithm:
        learner = learner.adapting_with(recipe.algorithm)
    if test is not None:
        tasks: Any = read_table(test) if test.is_file() else test
        # Without a number of known rows as before there was one, so that evaluations of both times can be paired.
        known = {} if num_support is None else {"num_support": num_support}
        described, count = {"test": str(test.resolve()), **known}, num_tasks or _NUM_TASKS
    elif recipe is not None:
        tasks = recipe.data.sampler("test", data=data, device=device)
        described, count = settings_of_tests(recipe.data), recipe.num_test_tasks if num_tasks is None else num_tasks
    else:
        raise ValueError(f"{folder} was not trained by a recipe, which would name its test tasks: give --test.")
    require_place(folder)
    try:
        evaluation = learner.evaluate_in_full(
            tasks,
            num_support=num_support,
            num_tasks=count,
            seed=seed,
            out_of_task=out_of_task,
            on_progress=None if on_progress is None else lambda done: on_progress(done, count),
        )
    except TypeError as error:
        if test is None:
            raise
        # What a file holds is a value, even where in a program it would be an argument's type.
        raise ValueError(str(error)) from error
    target = write_evaluation(
        folder,
        evaluation,
        tasks={"data": described, "seed": seed},
        step=learner.fitted_model.step,
        algorithm=records.to_json(learner.algorithm),
    )
    name = folder.name if recipe is None else recipe.name
    first = None if test is not None else draw_tasks(tasks, 0, 1, seed=seed)
    draw_evaluation(target, evaluation, first, title=name)
    write_report(folder)
    write_summary(folder)
    return EvaluatedRun(name, learner, evaluation, seed, target, tasks)


def _require_own(folder: Path, recipe: Recipe, learner: MetaLearner) -> None:
    """Refuses a model that the recipe beside it did not train.

    Raises:
        ValueError: With the first difference.
    """
    made = {"algorithm": records.to_json(recipe.algorithm)}
    found = {"algorithm": records.to_json(learner.algorithm)}
    difference = first_difference(made, found)
    if difference is not None:
        raise ValueError(
            f"{folder} holds a model that its {RECIPE} did not train: by the recipe, {difference} in the model. "
            "Restore the folder from a copy."
        )


def compare_run_with_baselines(
    folder: Path,
    *,
    baselines: Sequence[str] = (),
    seconds: float | None = None,
    num_tasks: int | None = None,
    seed: int = 0,
    data: Path | None = None,
    device: torch.device = _CPU,
    out: Path | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> tuple[BaselineComparison, Path]:
    """Puts baselines beside a recipe's run, on the recipe's tasks; see ``compare_with_baselines``.

    Args:
        folder: Folder of the run.
        baselines: Names of baselines; none: all that suit the tasks.
        seconds: Time of training. None: what the run took.
        num_tasks: Number of test tasks, instead of the recipe's.
        seed: Names the set of test tasks, as of ``evaluate_run``.
        data: Folder with data files, searched before ``$IBAML_DATA`` and the per-user cache.
        device: Where to compute.
        out: Folder for the fitted baselines and the table. None: ``baselines`` in the folder of the run.
        say: Called with lines of how long it takes; see ``compare_with_baselines``.

    Returns:
        The comparison, and the folder of its tables.

    Raises:
        FileNotFoundError: If the folder holds no trained model, or a data file is not found.
        ValueError: If the run is not of a recipe, a file is damaged, a baseline is unknown or does not suit the tasks,
            or the time is not known.
        FloatingPointError: If predictions of the run's model are not finite.
    """
    learner = MetaLearner.load(folder, device=device)
    if not (folder / RECIPE).is_file():
        raise ValueError(
            f"{folder} was not trained by a recipe, which would name its tasks: use "
            "ibaml.baselines.compare_with_baselines."
        )
    recipe = read_recipe(folder)
    trained_seconds = None
    if (folder / CHECKPOINT).is_file():
        trained_seconds = float(load_tensors(folder / CHECKPOINT)[1]["seconds"])
    elif seconds is None:
        raise ValueError(f"{folder} has no {CHECKPOINT}, which would say how long it was trained: give --seconds.")
    samplers = [recipe.data.sampler(split, data=data, device=device) for split in ("train", "validation", "test")]
    target = out or folder / "baselines"
    comparison = compare_with_baselines(
        learner,
        *samplers,
        baselines=tuple(baselines) or None,
        seconds=seconds,
        trained_seconds=trained_seconds,
        settings=recipe.trainer,
        num_tasks=recipe.num_test_tasks if num_tasks is None else num_tasks,
        seed=seed,
        folder=target,
        name=recipe.name,
        say=say,
    )
    return comparison, target


def load_fitted(folder: Path, *, backbone: Any = None, device: torch.device = _CPU) -> FittedModel:
    """Loads a trained model for predictions from files; one of a recipe learns how its source reads them.

    Args:
        folder: Folder of the model.
        backbone: The feature extractor that it was trained with, if it had one.
        device: Where to compute.

    Raises:
        FileNotFoundError: If the folder holds no trained model.
        ValueError: If a file is damaged, or the backbone is missing or another one.
    """
    fitted = MetaLearner.load(folder, backbone=backbone, device=device).fitted_model
    if fitted.preprocessing is not None or not (folder / RECIPE).is_file():
        return fitted
    return dataclasses.replace(fitted, preprocessing=read_recipe(folder).data.preprocessing())


def load_learner(folder: Path | str, *, device: torch.device | str = "cpu") -> MetaLearner:
    """Loads the learner of a recipe's run so that it takes images of 0..255, as its source reads them.

    ``MetaLearner.load`` takes what the recipe's sampler gives, tensors of its range. For sources that take no data of a
    user, and for models that no recipe made, both are the same.

    Args:
        folder: Folder of the run.
        device: Where to compute.

    Raises:
        FileNotFoundError: If the folder holds no trained model.
        ValueError: If a file is damaged.
    """
    folder, device = Path(folder).expanduser(), torch.device(device)
    learner = MetaLearner.load(folder, device=device)
    return learner.with_fitted(load_fitted(folder, device=device))


def open_run(folder: Path, recipe: Recipe) -> None:
    """Creates a run folder, or checks that an existing one holds the same recipe.

    Raises:
        ValueError: If the folder holds another recipe, or a checkpoint of the same one with other settings.
        OSError: If the folder cannot be written.
    """
    # Before recipe.json is replaced, which has to describe the checkpoint beside it.
    check_run(folder, recipe)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        text = json.loads(recipe.to_json())
        write_text(folder / RECIPE, json.dumps({**text, "sha256": _sha256(text)}, indent=2) + "\n")
    except OSError as error:
        raise OSError(
            f"run folder {folder} cannot be written ({error.strerror or error}): choose another with --run-folder, or "
            "change its permissions."
        ) from error


def check_run(folder: Path, recipe: Recipe) -> None:
    """Refuses a folder that holds a run of another recipe; a folder without a run is accepted.

    Raises:
        ValueError: If the folder holds another recipe, or a checkpoint of the same one with other settings.
    """
    if not (folder / RECIPE).exists():
        return
    stored = read_recipe(folder)
    if stored.name != recipe.name:
        raise ValueError(
            f"{folder} holds a run of {stored.name!r}, not of {recipe.name!r}: choose another --run-folder."
        )
    old, new = (_training(one) for one in (stored, recipe))
    difference = first_difference(old, new)
    if difference is not None and (folder / CHECKPOINT).exists():
        raise ValueError(
            f"{folder} was trained with other settings: {difference}. Use the same settings to resume, or another "
            "--run-folder to start anew."
        )


def read_recipe(folder: Path) -> Recipe:
    """Reads the recipe of a run.

    Raises:
        FileNotFoundError: If the folder is no run of a recipe.
        ValueError: If the file is no recipe of this version.
    """
    path = folder / RECIPE
    if not path.is_file():
        raise FileNotFoundError(f"{folder} is no run of a recipe: it has no {RECIPE}. `ibaml train` makes one.")
    try:
        try:
            text = read_json(path)
        except ValueError as error:
            raise ValueError(f"this is no recipe of this version of ibaml: {error}") from error
        # A recipe of an earlier version has no checksum.
        known = text.pop("sha256", None)
        if known is not None and known != _sha256(text):
            raise ValueError("it was changed since training wrote it: settings of an evaluation are flags")
        return Recipe.from_json(json.dumps(text))
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ValueError(
            f"{path} cannot be read ({error or type(error).__name__}): restore it from a copy, or train in another "
            "folder."
        ) from error


def _sha256(values: Any) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _training(recipe: Recipe) -> dict[str, Any]:
    return {**json.loads(recipe.to_json()), **_NOT_TRAINING}
