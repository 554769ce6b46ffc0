"""Tasks of held-out data with as many known rows as are asked for, and all others to predict."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from ibaml.data.columns import is_table
from ibaml.data.prepare import SplitSettings, is_folder, is_raw, table_splits
from ibaml.data.preprocessing import Preprocessing, encode_tasks
from ibaml.data.ragged import TaskSplits, row_groups
from ibaml.data.tables import read_tasks
from ibaml.learner.features import tasks_of_features
from ibaml.posterior import FittedModel
from ibaml.seeds import task_generator
from ibaml.types import Batch, Episode, TaskSampler


class HeldOut(NamedTuple):
    """Held-out tasks.

    Attributes:
        tasks: The tasks, or a sampler of them.
        left_out: Names of tasks that were given as well and could not be used, and why.
    """

    tasks: TaskSampler | Sequence[Episode]
    left_out: Mapping[str, str]


def numbers_of_rows(num_support: Iterable[Any]) -> tuple[int, ...]:
    """Returns numbers of known rows in ascending order, each once.

    Raises:
        TypeError: If one is no integer.
        ValueError: If one is negative, or there are none.
    """
    given = list(num_support)
    for number in given:
        if not hasattr(number, "__index__"):
            raise TypeError(f"num_support holds {number!r}, a {type(number).__name__}; expected integers.")
    numbers = tuple(sorted({int(number) for number in given}))
    if not numbers or numbers[0] < 0:
        raise ValueError(f"num_support is {given}; expected numbers of rows such as [0, 1, 2, 5, 10].")
    return numbers


def split_rows(
    fitted: FittedModel, tasks: Any, splits: SplitSettings, numbers: Sequence[int], *, seed: int
) -> tuple[list[Episode], dict[str, str]]:
    """Splits each task once, into as many known rows as the largest number and the rest.

    Args:
        fitted: The fitted model.
        tasks: Data.
        splits: How tasks are split, but for the number of support examples.
        numbers: Numbers of known rows; ``nested`` takes fewer than the largest.
        seed: Seed of the splits.

    Returns:
        The tasks with rows enough; the names of the others, and why they are left out.

    Raises:
        TypeError: If tasks are split already.
        ValueError: If no task has rows enough, or a number is too small for a task with classes of its own.
    """
    preprocessing, largest = fitted.preprocessing, max(numbers)
    if preprocessing is None or is_raw(tasks) or is_folder(tasks):
        raise TypeError(
            f"tasks is a {type(tasks).__name__}, but num_support splits the rows of data: fit on data and give a table "
            "or (X, y) pairs; samplers and Episodes have the support that they were built with."
        )
    tasks = tasks_of_features(fitted, tasks, splits)
    table = read_tasks(tasks, **columns_of(preprocessing, tasks))
    sizes = [_num_different(task, splits) for task in encode_tasks(preprocessing, table, dtype=torch.float64)]
    # A sampler wants two rows of each task, one for either side.
    large = tuple(task for task, size in zip(table.tasks, sizes, strict=True) if size > max(largest, 1))
    too_large = ValueError(
        f"num_support asks for {largest} known rows, but no task has {largest} rows and one more to predict (rows that "
        f"agree count once); the largest has {max(sizes)}: ask for fewer."
    )
    if not large:
        raise too_large
    sampler = table_splits(
        preprocessing,
        table._replace(tasks=large),
        SplitSettings(stratify=splits.stratify, group_duplicates=splits.group_duplicates),
        dtype=fitted.dtype,
        all_classes=fitted.algorithm.serves_any_number_of_outputs,
    )
    refuse_more_classes(sampler, preprocessing)
    fitting = torch.nonzero(sampler.capacities > largest).flatten().tolist()
    if not fitting:
        raise too_large
    _require_every_class(sampler, fitting, min(numbers))
    episodes = [sampler.episode(index, largest, generator=task_generator(seed, index)) for index in fitting]
    used = {sampler.names[index] for index in fitting}
    left_out = {
        task.name: f"has {size} different rows, too few for {largest} known ones and others to predict"
        for task, size in zip(table.tasks, sizes, strict=True)
        if task.name not in used
    }
    return episodes, left_out


def nested(episodes: Sequence[Episode], number: int) -> list[Episode]:
    """Returns tasks with the first rows of their support alone, and the same query."""
    return [Episode(Batch(*(part[:number] for part in one.support)), one.query) for one in episodes]


def refuse_more_classes(sampler: TaskSplits, preprocessing: Preprocessing) -> None:
    """Refuses tasks with more classes than a model tells apart: some of them would be scored as if they were the task.

    Raises:
        ValueError: Naming the first such task.
    """
    if not isinstance(sampler.num_ways, int):
        return
    for name, task in zip(sampler.names, sampler.tasks, strict=True):
        if (found := len(task.y.unique())) > preprocessing.num_outputs:
            raise ValueError(
                f"task {name!r} has {found} classes, but the model tells {preprocessing.num_outputs} apart: give "
                "tasks of as many classes, or use an algorithm that serves any number, such as algorithm='head'."
            )


def columns_of(preprocessing: Preprocessing, tasks: Any) -> dict[str, Any]:
    """Returns ``task``, ``target`` and ``features`` of a long table as training had them; nothing for other data."""
    if not is_table(tasks):
        return {}
    target: Any = preprocessing.target_columns
    if preprocessing.is_vector and target is not None:
        target = target[0]
    return {"task": preprocessing.task_column, "target": target, "features": preprocessing.feature_names}


def _require_every_class(sampler: TaskSplits, indices: Sequence[int], least: int) -> None:
    if sampler.num_ways is None:
        return
    for index in indices:
        if (needed := int(sampler.smallest_supports[index])) > least:
            raise ValueError(
                f"num_support asks for {least} known rows, but task {sampler.names[index]!r} has {needed} classes of "
                "its own and needs a known row of each: ask for more."
            )


def _num_different(task: Batch, splits: SplitSettings) -> int:
    return len(row_groups(task).unique()) if splits.group_duplicates else len(task.y)
