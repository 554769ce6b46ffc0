"""A prior that learns on from tasks as they come."""

import dataclasses
from typing import Any

import torch

from ibaml.algorithms import MetaParameters
from ibaml.algorithms.heads.empirical_bayes import Experience, Observer, observe
from ibaml.data.fixed_episodes import FixedEpisodes
from ibaml.data.ragged import RaggedTasks
from ibaml.posterior import FittedModel
from ibaml.types import Batch, TaskSampler


def experience_of(tasks: TaskSampler, num_draws: int) -> Experience:
    """Returns how many tasks, and examples of them, training learns from.

    Args:
        tasks: Where they come from. Those of data are counted once each, of a sampler without end as often as it is
            asked.
        num_draws: How many tasks are drawn.
    """
    if isinstance(tasks, RaggedTasks):
        return Experience(len(tasks), int(tasks.capacities.sum()))
    if isinstance(tasks, FixedEpisodes):
        return Experience(len(tasks.episodes), sum(len(batch.y) for episode in tasks.episodes for batch in episode))
    drawn = tasks.sample(1, generator=torch.Generator().manual_seed(0))
    return Experience(num_draws, num_draws * sum(batch.y.shape[1] for batch in drawn))


def observe_task(fitted: FittedModel, x: Any, y: Any, most_tasks: float | None) -> FittedModel:
    """Returns a model that has taken a task into its prior; arguments and errors are those of ``MetaLearner.observe``.

    Args:
        fitted: The model.
        x: Inputs of the task.
        y: Targets of the task.
        most_tasks: How many tasks the prior stands for at most.
    """
    algorithm, experience = fitted.algorithm, fitted.experience
    if not isinstance(algorithm, Observer):
        raise ValueError(
            f"algorithm {algorithm.name!r} has no closed form by which a single task moves its prior: fit again with "
            "all tasks. For numbers with Gaussian noise algorithm='linear_gaussian', the default on few inputs, and "
            "for counts and outliers 'generalized_linear' take tasks in one by one."
        )
    if most_tasks is not None and not most_tasks > 0:
        raise ValueError(f"most_tasks is {most_tasks}; expected a positive number of tasks, or None for no limit.")
    task = fitted.encode_support(x, y, None, names=("x", "y"))
    if not len(task.y):
        return fitted
    if experience is None:
        if most_tasks is None:
            raise ValueError(
                "the model does not say from how many tasks it was learned, as models of earlier versions do not: fit "
                "it again, or say how many tasks the prior stands for, most_tasks=..."
            )
        experience = Experience(most_tasks, most_tasks * len(task.y))
    if most_tasks is not None:
        experience = experience.at_most(most_tasks)
    model, shared, positions = fitted.on_features(task.x)
    found, experience = observe(
        algorithm, model, MetaParameters(fitted.meta.prior, shared), Batch(positions, task.y), experience
    )
    # What is shared beside the noise, the body of the network, stays.
    kept = {name: found.shared.get(name, value) for name, value in fitted.meta.shared.items()}
    return dataclasses.replace(fitted, meta=MetaParameters(found.prior, kept), experience=experience)
