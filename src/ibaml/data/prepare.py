"""From tasks in any form to samplers that training can draw from, with the preprocessing that belongs to them."""

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ibaml.data.augmentation import UNCHANGED, Augmentation
from ibaml.data.columns import is_table
from ibaml.data.episodes import EpisodeSampler
from ibaml.data.fixed_episodes import FixedEpisodes
from ibaml.data.formulas import Formula, read_formula
from ibaml.data.images import ClassImages
from ibaml.data.preprocessing import Preprocessing, encode_tasks, fit_preprocessing, image_preprocessing
from ibaml.data.ragged import TaskSplits, row_groups
from ibaml.data.sources.image_folder import load_class_folder
from ibaml.data.tables import TaskTable, read_tasks, target_names
from ibaml.likelihoods import TargetKind
from ibaml.types import Batch, ClassScope, Episode, TaskSampler


@dataclasses.dataclass(frozen=True, kw_only=True)
class SplitSettings:
    """How tasks are split into support and query.

    Attributes:
        num_support: Support examples of a task. None: varies from draw to draw in training (see ``TaskSplits``), half
            of the task in evaluation.
        num_query: Largest number of query examples of a draw in training.
        stratify: Whether the support of a task holds every class that the task has, for classes that all tasks share.
            False: rows come as they come, as they do for who adapts to a new task without choosing them.
        group_duplicates: Whether rows that agree in inputs and target stay on one side.
        num_ways: Classes of a task where each task has its own. None: the smallest number that a task has; 5 for
            images.
        num_shots: Image folders: support images of a class.
        num_query_images: Image folders: query images of a class.
        image_size: Image folders: side, or height and width, to which images are resized.
        channels: Image folders: 3 for colour, 1 for grey.
        augmentation: Image folders: how images of training tasks are changed at every draw.
    """

    num_support: int | None = None
    num_query: int = 64
    stratify: bool = False
    group_duplicates: bool = True
    num_ways: int | None = None
    num_shots: int = 5
    num_query_images: int = 5
    image_size: int | tuple[int, int] | None = None
    channels: int = 3
    augmentation: Augmentation = UNCHANGED

    def __post_init__(self) -> None:
        """Reads settings that version 0.2.0 stored, where None said that images stay as they are."""
        if self.augmentation is None:  # pyright: ignore[reportUnnecessaryComparison]
            object.__setattr__(self, "augmentation", UNCHANGED)


class Source(NamedTuple):
    """Tasks ready for training.

    Attributes:
        train: Sampler of training tasks.
        validation: Sampler of validation tasks, if there are any.
        preprocessing: How data become tensors; None if they came as tensors.
    """

    train: TaskSampler
    validation: TaskSampler | None
    preprocessing: Preprocessing | None


def is_raw(tasks: Any) -> bool:
    """Tells tasks that are tensors already (a sampler, or a sequence of Episodes) from data."""
    if isinstance(tasks, Sequence) and not isinstance(tasks, str | bytes):
        return len(tasks) == 0 or isinstance(tasks[0], Episode)
    return hasattr(tasks, "sample") and hasattr(tasks, "input_shape")


def is_folder(tasks: Any) -> bool:
    """Tells whether the tasks are the path of a folder."""
    return isinstance(tasks, str | Path)


def as_sampler(tasks: Any) -> TaskSampler:
    """Returns a sampler over raw tasks."""
    return FixedEpisodes(tasks) if isinstance(tasks, Sequence) else tasks


def prepare(
    tasks: Any,
    validation: Any,
    *,
    target_kind: TargetKind,
    classes: ClassScope,
    splits: SplitSettings,
    seed: int,
    dtype: torch.dtype,
    columns: dict[str, Any],
    formula: str | None = None,
    preprocessing: Preprocessing | None = None,
) -> Source:
    """Reads tasks, fits the preprocessing on those of training alone unless it is given, and builds samplers.

    Args:
        tasks: Training tasks in any form that ``MetaLearner.fit`` takes.
        validation: Validation tasks of the same form; a share in (0, 1) holds out that part of the training tasks
            (classes, for images), chosen by the seed; None: none.
        target_kind: What the targets are.
        classes: Whether labels mean the same in all tasks.
        splits: How tasks are split.
        seed: Seed of the held-out choice.
        dtype: Of the tensors.
        columns: ``task``, ``target`` and ``features`` of a long table.
        formula: Says of a long table what ``target`` and ``features`` are, and what becomes of them.
        preprocessing: That of a fitted model, for data as it takes them.

    Raises:
        TypeError: If the tasks are of no accepted form.
        ValueError: If they do not fit, or too few remain.
    """
    read = None if formula is None else read_formula(formula)
    if read is not None:
        columns = _columns_of(read, tasks, columns)
    if is_raw(tasks):
        if isinstance(validation, float):
            raise ValueError("a share of validation tasks needs data: give a sampler or a sequence of Episodes.")
        if any(value is not None for value in columns.values()):
            raise TypeError("task, target and features name columns of a pandas DataFrame: leave them out.")
        return Source(as_sampler(tasks), None if validation is None else as_sampler(validation), None)
    if is_folder(tasks):
        if target_kind != "classes":
            raise ValueError("a folder of class folders holds classes: use likelihood='categorical'.")
        splits = splits if preprocessing is None else _splits_of_images(preprocessing, splits)
        images = _load(tasks, splits)
        images, held_out = _hold_out_classes(images, validation, splits, seed)
        preprocessing = preprocessing or image_preprocessing(images.image_shape, splits.num_ways or 5)
        train = _episodes(images, splits, augmentation=splits.augmentation)
        return Source(train, None if held_out is None else _episodes(held_out, splits), preprocessing)
    table = read_tasks(tasks, **columns)
    held_out = None
    if isinstance(validation, float):
        table, held_out = _hold_out_tasks(table, validation, seed)
    elif validation is not None:
        held_out = read_tasks(validation, **columns)
    preprocessing = preprocessing or fit_preprocessing(
        table, target_kind=target_kind, classes=classes, num_ways=splits.num_ways, formula=read
    )
    train = table_splits(preprocessing, table, splits, dtype=dtype)
    if held_out is None:
        return Source(train, None, preprocessing)
    return Source(
        train, _fixed_sizes(table_splits(preprocessing, held_out, splits, dtype=dtype), splits.num_query), preprocessing
    )


def _columns_of(formula: Formula, tasks: Any, columns: dict[str, Any]) -> dict[str, Any]:
    """Returns the names of columns with those that a formula gives.

    Raises:
        TypeError: If the tasks are no table.
        ValueError: If the target or the features are named twice, or the target nowhere.
    """
    if not is_table(tasks):
        raise TypeError(
            f"formula names columns of a table such as a pandas DataFrame, but tasks is a {type(tasks).__name__}: "
            "leave it out."
        )
    if columns["features"] is not None:
        raise ValueError(f"features and formula {formula.text!r} both name the inputs: leave one out.")
    target = columns["target"]
    if formula.targets:
        if target is not None and target_names(target)[0] != formula.targets:
            raise ValueError(
                f"target is {target!r}, but the left-hand side of formula {formula.text!r} names "
                f"{', '.join(formula.targets)}: leave one out."
            )
        target = formula.targets[0] if len(formula.targets) == 1 else formula.targets
    elif target is None:
        raise ValueError(f"formula {formula.text!r} has no left-hand side: write 'target ~ ...', or give target=....")
    return {**columns, "target": target, "features": formula.variables}


def table_splits(
    preprocessing: Preprocessing,
    table: TaskTable,
    splits: SplitSettings,
    *,
    dtype: torch.dtype,
    all_classes: bool = False,
) -> TaskSplits:
    """Returns the sampler over the tasks of a table.

    Args:
        preprocessing: How data become tensors.
        table: The tasks.
        splits: How tasks are split.
        dtype: Of the tensors.
        all_classes: Where each task has classes of its own, whether a draw takes all of them rather than as many as the
            network has outputs.

    Raises:
        ValueError: If a task does not fit the preprocessing or cannot be split.
    """
    per_task = not preprocessing.is_regression and preprocessing.class_labels is None
    # In float64, in which rows that differ stay different.
    encoded = encode_tasks(preprocessing, table, dtype=torch.float64)
    return TaskSplits(
        [Batch(x.to(dtype), y.to(dtype) if y.is_floating_point() else y) for x, y in encoded],
        num_outputs=preprocessing.num_outputs,
        num_ways=("all" if all_classes else preprocessing.num_outputs) if per_task else None,
        num_support=splits.num_support,
        num_query=splits.num_query,
        stratify=splits.stratify,
        group_duplicates=splits.group_duplicates,
        groups=[row_groups(task) for task in encoded],
        names=[task.name for task in table.tasks],
    )


def image_sampler(preprocessing: Preprocessing, folder: str | Path, splits: SplitSettings) -> EpisodeSampler:
    """Returns the sampler of few-shot tasks over a folder of class folders, for evaluation.

    Raises:
        ValueError: If the folder does not fit.
    """
    fixed = _splits_of_images(preprocessing, splits)
    return _episodes(_load(folder, fixed), fixed)


def _splits_of_images(preprocessing: Preprocessing, splits: SplitSettings) -> SplitSettings:
    return dataclasses.replace(
        splits,
        image_size=preprocessing.image_size,
        channels=preprocessing.input_shape[0],
        num_ways=preprocessing.num_outputs,
    )


def _load(folder: str | Path, splits: SplitSettings) -> ClassImages:
    return load_class_folder(folder, image_size=splits.image_size, channels=splits.channels)


def _episodes(images: ClassImages, splits: SplitSettings, *, augmentation: Augmentation = UNCHANGED) -> EpisodeSampler:
    return EpisodeSampler(
        images,
        num_ways=splits.num_ways or 5,
        num_shots=splits.num_shots,
        num_queries=splits.num_query_images,
        augmentation=augmentation,
    )


def _held_out(count: int, share: float, what: str, seed: int) -> tuple[list[int], list[int]]:
    """Divides ``count`` things at random into those that stay and those held out."""
    if not 0 < share < 1:
        raise ValueError(f"validation_tasks is {share}; a share of the training tasks must be between 0 and 1.")
    number = math.ceil(share * count)
    if number >= count:
        raise ValueError(f"validation_tasks={share} of {count} {what} leaves none for training: give more {what}.")
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()
    return sorted(order[number:]), sorted(order[:number])


def _hold_out_tasks(table: TaskTable, share: float, seed: int) -> tuple[TaskTable, TaskTable]:
    kept, held_out = _held_out(len(table.tasks), share, "tasks", seed)
    return (
        table._replace(tasks=tuple(table.tasks[index] for index in kept)),
        table._replace(tasks=tuple(table.tasks[index] for index in held_out)),
    )


def _hold_out_classes(
    images: ClassImages, validation: Any, splits: SplitSettings, seed: int
) -> tuple[ClassImages, ClassImages | None]:
    if isinstance(validation, float):
        kept, held_out = _held_out(images.num_classes, validation, "classes", seed)
        return images.select(kept), images.select(held_out)
    if validation is None:
        return images, None
    size = images.image_shape[1:]
    return images, _load(validation, dataclasses.replace(splits, image_size=size))


def _fixed_sizes(splits: TaskSplits, largest_query: int) -> TaskSplits:
    """Returns the same tasks with sizes that never vary, as a score over several tasks needs.

    The sizes are what three quarters of the tasks have: half of the lower quartile of the tasks' sizes as support, the
    rest as query. Smaller tasks are left out.
    """
    total = int(splits.capacities.double().quantile(0.25, interpolation="lower"))
    num_support = splits.num_support or max(total // 2, int(splits.smallest_supports.max()))
    num_query = min(largest_query, max(1, total - num_support))
    # Never empty: every task has one example more than the smallest support that it admits.
    kept = torch.nonzero(splits.capacities >= num_support + num_query).flatten().tolist()
    return splits.restricted(kept, num_support=num_support, num_query=num_query)
