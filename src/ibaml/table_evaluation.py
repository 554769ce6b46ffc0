"""Scores over tasks of unequal sizes, in the units of the data."""

from collections.abc import Sequence
from typing import Any

from ibaml import tree
from ibaml.data.prepare import SplitSettings, image_sampler, is_folder, is_raw, table_splits
from ibaml.data.tables import read_tasks
from ibaml.evaluation import Evaluation, draw_tasks, summarise, task_generator
from ibaml.likelihoods import Prediction
from ibaml.posterior import FittedModel
from ibaml.types import Episode, Tensor


def read_episodes(
    fitted: FittedModel, tasks: Any, splits: SplitSettings, *, num_tasks: int, seed: int
) -> list[Episode]:
    """Returns held-out tasks in any form as encoded episodes.

    Args:
        fitted: The fitted model.
        tasks: Data (each task is split once, with half of it as support unless ``splits`` says otherwise, and all the
            rest as query), Episodes, a sampler or an image folder.
        splits: How tasks are split.
        num_tasks: Number of tasks to draw from a sampler or a folder.
        seed: Seed of splits and draws.

    Raises:
        TypeError: If the tasks are of no accepted form.
        ValueError: If a task does not fit or cannot be split.
    """
    preprocessing = fitted.preprocessing
    if is_folder(tasks) and preprocessing is not None:
        tasks = image_sampler(preprocessing, tasks, splits)
    if is_raw(tasks):
        if isinstance(tasks, Sequence):
            return list(tasks)
        drawn = [draw_tasks(tasks, index, index + 1, seed=seed) for index in range(num_tasks)]
        return [tree.map(lambda leaf: leaf[0], episode) for episode in drawn]
    if preprocessing is None:
        raise TypeError(
            f"the model was fitted on tensors, but tasks is a {type(tasks).__name__}: give a sampler or a sequence of "
            "Episodes."
        )
    names = {"task": preprocessing.task_column, "target": preprocessing.target_columns}
    is_long = hasattr(tasks, "columns")
    columns: dict[str, Any] = {**names, "features": preprocessing.feature_names} if is_long else {}
    if is_long and preprocessing.is_vector and preprocessing.target_columns is not None:
        columns["target"] = preprocessing.target_columns[0]
    dtype = tree.leaves(fitted.model.adapted)[0].dtype
    sampler = table_splits(preprocessing, read_tasks(tasks, **columns), splits, dtype=dtype)
    return [sampler.episode(index, generator=task_generator(seed, index)) for index in range(len(sampler))]


def adapt_to_episodes(
    fitted: FittedModel, episodes: Sequence[Episode], *, seed: int
) -> tuple[list[Prediction], list[Tensor]]:
    """Adapts to each episode and returns predictions and targets of its query set, regression in the data's units."""
    predictions: list[Prediction] = []
    targets: list[Tensor] = []
    scale = None if fitted.preprocessing is None else fitted.preprocessing.targets
    for episode in episodes:
        episode = tree.map(lambda leaf: leaf.to(fitted.device), episode)
        fitted.model.check_task(episode)
        posterior = fitted.solve(episode.support, None, seed=seed)
        predictions.append(fitted.predict(posterior.value, episode.query.x, seed=seed))
        y = episode.query.y
        if scale is not None:
            y = y.double() * scale.scale.to(y.device) + scale.mean.to(y.device)
        targets.append(y)
    return predictions, targets


def evaluate_tables(fitted: FittedModel, episodes: Sequence[Episode], *, seed: int) -> Evaluation:
    """Returns scores over tasks, each task of the same weight, with 95% intervals."""
    return summarise(fitted.model.likelihood, *adapt_to_episodes(fitted, episodes, seed=seed))
