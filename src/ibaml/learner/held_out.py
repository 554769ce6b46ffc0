"""Held-out tasks in any form as encoded tasks, and evaluation and calibration on them."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from ibaml.data.columns import is_table
from ibaml.data.prepare import SplitSettings, image_sampler, is_folder, is_raw, table_splits
from ibaml.data.preprocessing import Preprocessing
from ibaml.data.tables import read_tasks
from ibaml.learner.features import tasks_of_features
from ibaml.posterior import FittedModel
from ibaml.seeds import task_generator
from ibaml.train.evaluate import Evaluation, evaluate, tempered
from ibaml.train.temperature import fit_abstention, output_temperature
from ibaml.types import ClassScope, Episode, TaskSampler


def evaluate_held_out(
    fitted: FittedModel,
    tasks: Any,
    splits: SplitSettings,
    classes: ClassScope,
    *,
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
        num_tasks: Tasks of a sampler or an image folder; others are used once each.
        seed: Seed of the tasks, or of the splits.
        **how: Further arguments of ``evaluate``.

    Raises:
        ValueError: If a task does not fit, or foreign queries are asked for and tasks have no classes of their own.
    """
    held_out = held_out_tasks(fitted, tasks, splits, seed=seed)
    of_classes = fitted.model.likelihood.target_kind == "classes"
    has_own = classes == "per_task" or hasattr(held_out, "sample_classes")
    if how.get("out_of_task") and of_classes and not has_own:
        raise ValueError(
            "out_of_task needs tasks with classes of their own, but labels mean the same in all tasks: build the "
            "learner with classes='per_task' if they do not."
        )
    return evaluate(fitted, held_out, num_tasks=None if isinstance(held_out, Sequence) else num_tasks, seed=seed, **how)


def calibrated(fitted: FittedModel, held_out: Evaluation) -> FittedModel:
    """Returns the model with the output temperature, and the errors at each confidence, of an untempered evaluation."""
    temperature = output_temperature(held_out.predictions, held_out.query_targets)
    held_out = tempered(fitted.model.likelihood, held_out, temperature)
    abstention = fit_abstention(held_out.predictions, held_out.query_targets)
    return dataclasses.replace(fitted, temperature=temperature, abstention=abstention)


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
    if sampler.num_ways is not None and not any_number:
        for name, task in zip(sampler.names, sampler.tasks, strict=True):
            # A draw of some of its classes would be scored as if it were the task.
            if (found := len(task.y.unique())) > preprocessing.num_outputs:
                raise ValueError(
                    f"task {name!r} has {found} classes, but the model tells {preprocessing.num_outputs} apart: give "
                    "tasks of as many classes, or use an algorithm that serves any number, such as algorithm='head'."
                )
    return [sampler.episode(index, generator=task_generator(seed, index)) for index in range(len(sampler))]


def columns_of(preprocessing: Preprocessing, tasks: Any) -> dict[str, Any]:
    """Returns ``task``, ``target`` and ``features`` of a long table as training had them; nothing for other data."""
    if not is_table(tasks):
        return {}
    target: Any = preprocessing.target_columns
    if preprocessing.is_vector and target is not None:
        target = target[0]
    return {"task": preprocessing.task_column, "target": target, "features": preprocessing.feature_names}
