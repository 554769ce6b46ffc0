"""How many known rows a task needs: held-out rows are judged for each number of known ones."""

import dataclasses
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch

from ibaml import metrics
from ibaml.data.prepare import SplitSettings, is_folder, is_raw, table_splits
from ibaml.data.preprocessing import encode_tasks
from ibaml.data.ragged import row_groups
from ibaml.data.tables import read_tasks
from ibaml.learner.features import tasks_of_features
from ibaml.learner.held_out import columns_of
from ibaml.metrics import Estimate, LearningCurve
from ibaml.posterior import FittedModel
from ibaml.seeds import task_generator
from ibaml.train.evaluate import Evaluation, evaluate
from ibaml.types import Batch, Episode

if TYPE_CHECKING:
    from rich.console import Console

_OF_CLASSES = ("nll", "accuracy", "ece_pooled")
_OF_NUMBERS = ("nll", "rmse", "coverage_90")


def learning_curve(
    fitted: FittedModel,
    tasks: Any,
    splits: SplitSettings,
    num_support: Iterable[int],
    *,
    seed: int,
    console: "Console | None" = None,
) -> LearningCurve:
    """Scores the same held-out rows for each number of known rows; see ``MetaLearner.learning_curve``.

    Args:
        fitted: The fitted model.
        tasks: Data.
        splits: How tasks are split, but for the number of support examples.
        num_support: Numbers of known rows.
        seed: Seed of the splits.
        console: Where progress is shown, if anywhere.
    """
    numbers = _checked(num_support)
    if numbers[0] == 0:
        fitted.require_prior()
    episodes, num_left_out = _split(fitted, tasks, splits, numbers, seed=seed)
    found: list[dict[str, Estimate]] = []
    for number in numbers:
        # Nested: the first rows of one support set, beside one query set.
        nested = [Episode(Batch(*(part[:number] for part in one.support)), one.query) for one in episodes]
        found.append(_scores(evaluate(fitted, nested, seed=seed, console=console)))
    return LearningCurve(
        num_support=numbers,
        scores={name: tuple(each[name] for each in found) for name in found[0]},
        num_tasks=len(episodes),
        num_left_out=num_left_out,
    )


def _checked(num_support: Any) -> tuple[int, ...]:
    if not isinstance(num_support, Iterable):
        raise TypeError(f"num_support is {num_support!r}; expected numbers of rows such as [0, 1, 2, 5, 10].")
    given: list[Any] = list(num_support)
    for number in given:
        if not hasattr(number, "__index__"):
            raise TypeError(f"num_support holds {number!r}, a {type(number).__name__}; expected integers.")
    numbers = tuple(sorted({int(number) for number in given}))
    if not numbers or numbers[0] < 0:
        raise ValueError(f"num_support is {given}; expected numbers of rows such as [0, 1, 2, 5, 10].")
    return numbers


def _split(
    fitted: FittedModel, tasks: Any, splits: SplitSettings, numbers: tuple[int, ...], *, seed: int
) -> tuple[list[Episode], int]:
    """Returns tasks with the largest support and all else as query, and how many tasks are too small for it."""
    preprocessing, largest = fitted.preprocessing, max(numbers[-1], 1)
    if preprocessing is None or is_raw(tasks) or is_folder(tasks):
        raise TypeError(
            f"tasks is a {type(tasks).__name__}, but a learning curve splits the rows of tasks: fit on data and give a "
            "DataFrame or (X, y) pairs."
        )
    tasks = tasks_of_features(fitted, tasks, splits)
    table = read_tasks(tasks, **columns_of(preprocessing, tasks))
    sizes = [_num_different(task, splits) for task in encode_tasks(preprocessing, table, dtype=torch.float64)]
    large = tuple(task for task, size in zip(table.tasks, sizes, strict=True) if size > largest)
    too_large = ValueError(
        f"num_support goes up to {largest}, but no task has {largest} rows and one more to predict (rows that agree "
        f"count once); the largest has {max(sizes)}: leave large numbers out."
    )
    if not large:
        raise too_large
    split = dataclasses.replace(splits, num_support=None)
    sampler = table_splits(preprocessing, table._replace(tasks=large), split, dtype=fitted.dtype)
    fitting = torch.nonzero(sampler.capacities > largest).flatten().tolist()
    if not fitting:
        raise too_large
    if isinstance(sampler.num_ways, int) and numbers[0] < sampler.num_ways:
        raise ValueError(
            f"num_support holds {numbers[0]}, but each task has {sampler.num_ways} classes of its own and needs a "
            "known row of each: leave smaller numbers out."
        )
    episodes = [sampler.episode(index, largest, generator=task_generator(seed, index)) for index in fitting]
    return episodes, len(table.tasks) - len(fitting)


def _num_different(task: Batch, splits: SplitSettings) -> int:
    return len(row_groups(task).unique()) if splits.group_duplicates else len(task.y)


def _scores(evaluation: Evaluation) -> dict[str, Estimate]:
    report = dict(evaluation.report)
    if "mse" in evaluation.per_task:
        report["rmse"] = metrics.estimate(evaluation.per_task["mse"].sqrt())
    names = _OF_CLASSES if "accuracy" in report else _OF_NUMBERS
    return {name: report[name] for name in names}
