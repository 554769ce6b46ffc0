"""Held-out tasks in any form as encoded tasks, and evaluation and calibration on them."""

import dataclasses
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ibaml.data.prepare import SplitSettings, image_sampler, is_folder, is_raw, table_splits
from ibaml.data.tables import read_tasks
from ibaml.learner.features import tasks_of_features
from ibaml.learner.known_rows import HeldOut, columns_of, nested, numbers_of_rows, refuse_more_classes, split_rows
from ibaml.posterior import FittedModel
from ibaml.seeds import task_generator
from ibaml.train.evaluate import Evaluation, evaluate
from ibaml.train.temperature import fit_abstention, recalibrate
from ibaml.types import ClassScope, Episode, TaskSampler

if TYPE_CHECKING:
    from rich.console import Console


def evaluate_held_out(
    fitted: FittedModel,
    tasks: Any,
    splits: SplitSettings,
    classes: ClassScope,
    *,
    num_support: int | None = None,
    num_tasks: int,
    seed: int,
    **how: Any,
) -> Evaluation:
    """Evaluates on held-out tasks; see ``held_out_tasks`` and ``ibaml.train.evaluate``.

    Args:
        fitted: The fitted model.
        tasks: Tasks in any form.
        splits: How tasks are split.
        classes: Whether class labels mean the same in all tasks.
        num_support: Known rows of each task. None: as ``splits`` says.
        num_tasks: Tasks of a sampler or an image folder; others are used once each.
        seed: Seed of the tasks, or of the splits.
        **how: Further arguments of ``evaluate``.

    Raises:
        TypeError: If a number of known rows is asked for of tasks that are split already.
        ValueError: If a task does not fit, or foreign queries are asked for and tasks have no classes of their own.

    Warns:
        RuntimeWarning: If tasks are left out because they have too few rows.
    """
    numbers = (None,) if num_support is None else numbers_of_rows([num_support])
    (held_out,) = _held_out(fitted, tasks, splits, numbers, seed=seed)
    of_classes = fitted.model.likelihood.target_kind == "classes"
    has_own = classes == "per_task" or hasattr(held_out.tasks, "sample_classes")
    if how.get("out_of_task") and of_classes and not has_own:
        raise ValueError(
            "out_of_task needs tasks with classes of their own, but labels mean the same in all tasks: build the "
            "learner with classes='per_task' if they do not."
        )
    return _evaluate(fitted, held_out, num_tasks=num_tasks, seed=seed, **how)


def calibrate_held_out(
    fitted: FittedModel,
    tasks: Any,
    splits: SplitSettings,
    *,
    num_support: int | Iterable[int] | None,
    num_tasks: int,
    seed: int,
    console: "Console | None" = None,
) -> FittedModel:
    """Returns the model with an output temperature of held-out tasks; see ``MetaLearner.calibrate``.

    Args:
        fitted: The fitted model.
        tasks: Tasks in any form.
        splits: How tasks are split.
        num_support: Known rows of each task, one number or several, each of which every task is used with.
        num_tasks: Tasks of a sampler or an image folder; others are used once each.
        seed: Seed of the tasks, or of the splits.
        console: Where progress is shown, if anywhere.

    Raises:
        TypeError, ValueError: As of ``evaluate_held_out``.

    Warns:
        RuntimeWarning: Likewise, and if there are too few tasks.
    """
    numbers = (None,)
    if num_support is not None:
        numbers = numbers_of_rows(num_support if isinstance(num_support, Iterable) else [num_support])
    untempered = dataclasses.replace(fitted, temperature=1.0)
    found = [
        _evaluate(untempered, held_out, num_tasks=num_tasks, seed=seed, console=console)
        for held_out in _held_out(untempered, tasks, splits, numbers, seed=seed)
    ]
    # Calling it twice is calling it once: what stays is what fit found.
    before = fitted.temperature if fitted.recalibration is None else fitted.recalibration.before
    result = calibrated(untempered, found, before=before)
    assert result.recalibration is not None
    if result.recalibration.num_tasks < result.recalibration.least_tasks:
        warnings.warn(
            f"{result.recalibration} to know a temperature. Give calibrate more tasks that training has not seen.",
            RuntimeWarning,
            stacklevel=3,
        )
    return result


def calibrated(fitted: FittedModel, held_out: Sequence[Evaluation], *, before: float = 1.0) -> FittedModel:
    """Returns the model with the output temperature, and the errors at each confidence, of untempered evaluations.

    Args:
        fitted: The model, of temperature 1.
        held_out: Evaluations of the same tasks, such as with several numbers of known rows.
        before: The temperature that stays if the gain of another one is not clear.
    """
    predictions = [one for each in held_out for one in each.predictions]
    targets = [one for each in held_out for one in each.query_targets]
    sources = [one for each in held_out for one in each.sources]
    num_support = [one for each in held_out for one in each.num_support]
    found = recalibrate(predictions, targets, before=before, sources=sources, num_support=num_support)
    predictions = [one.tempered(found.temperature) for one in predictions]
    abstention = fit_abstention(predictions, targets, sources=sources)
    return dataclasses.replace(fitted, temperature=found.temperature, abstention=abstention, recalibration=found)


def _evaluate(fitted: FittedModel, held_out: HeldOut, *, num_tasks: int, seed: int, **how: Any) -> Evaluation:
    number = None if isinstance(held_out.tasks, Sequence) else num_tasks
    found = evaluate(fitted, held_out.tasks, num_tasks=number, seed=seed, **how)
    return dataclasses.replace(found, left_out=held_out.left_out)


def _held_out(
    fitted: FittedModel, tasks: Any, splits: SplitSettings, numbers: Sequence[int | None], *, seed: int
) -> list[HeldOut]:
    """Returns the tasks with each number of known rows."""
    if is_folder(tasks):
        found = [held_out_tasks(fitted, tasks, _with_shots(fitted, splits, number), seed=seed) for number in numbers]
        return [HeldOut(one, {}) for one in found]
    known = [number for number in numbers if number is not None]
    if not known:
        found = held_out_tasks(fitted, tasks, splits, seed=seed)
        return [HeldOut(found, getattr(found, "left_out", {}))]
    if known[0] == 0:
        fitted.require_prior()
    episodes, left_out = split_rows(fitted, tasks, splits, known, seed=seed)
    if left_out:
        _tell_left_out(left_out, len(episodes) + len(left_out))
    return [HeldOut(nested(episodes, number), left_out) for number in known]


def _with_shots(fitted: FittedModel, splits: SplitSettings, num_support: int | None) -> SplitSettings:
    """Returns the splits of images with as many known ones, shared out evenly among the classes of a task."""
    if num_support is None or fitted.preprocessing is None:
        return splits
    num_ways = fitted.preprocessing.num_outputs
    if num_support == 0 or num_support % num_ways:
        raise ValueError(
            f"num_support is {num_support}, but each task of the folder has {num_ways} classes and as many known "
            f"images of each: give a multiple of {num_ways}."
        )
    return dataclasses.replace(splits, num_shots=num_support // num_ways)


def _tell_left_out(left_out: Mapping[str, str], num_tasks: int) -> None:
    shown = "; ".join(f"{name!r} {why}" for name, why in list(left_out.items())[:3])
    more = f"; and {len(left_out) - 3} more" if len(left_out) > 3 else ""
    warnings.warn(f"{len(left_out)} of {num_tasks} tasks left out: {shown}{more}.", RuntimeWarning, stacklevel=5)


def held_out_tasks(
    fitted: FittedModel, tasks: Any, splits: SplitSettings, *, seed: int
) -> TaskSampler | Sequence[Episode]:
    """Returns held-out tasks as a sampler or as episodes.

    Args:
        fitted: The fitted model.
        tasks: Data (each task is split once, with half of it as support unless ``splits`` says otherwise, and all the
            rest as query), Episodes, a sampler or an image folder.
        splits: How tasks are split.
        seed: Seed of the splits.

    Raises:
        TypeError: If the tasks are of no accepted form.
        ValueError: If a task does not fit or cannot be split.
    """
    preprocessing = fitted.preprocessing
    tasks = tasks_of_features(fitted, tasks, splits)
    if is_raw(tasks):
        return tasks
    if is_folder(tasks):
        if preprocessing is None or preprocessing.image_size is None:
            raise ValueError(f"test_tasks is the folder {tasks}, but the model was not trained on images.")
        return image_sampler(preprocessing, tasks, splits)
    if preprocessing is None:
        raise TypeError(
            f"the model was fitted on tensors, but tasks is a {type(tasks).__name__}: give a sampler or a sequence of "
            "Episodes."
        )
    table = read_tasks(tasks, **columns_of(preprocessing, tasks))
    any_number = fitted.algorithm.serves_any_number_of_outputs
    sampler = table_splits(preprocessing, table, splits, dtype=fitted.dtype, all_classes=any_number)
    refuse_more_classes(sampler, preprocessing)
    return [sampler.episode(index, generator=task_generator(seed, index)) for index in range(len(sampler))]
