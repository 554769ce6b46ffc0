"""The tasks and the noise of a meta-step."""

from typing import NamedTuple

import torch

from ibaml.algorithms import Algorithm, MetaParameters, TaskNoise
from ibaml.algorithms.checks import check_labels, check_targets
from ibaml.algorithms.model import Model
from ibaml.seeds import noise_generator, task_seed
from ibaml.train.evaluate import draw_tasks
from ibaml.train.settings import TrainerSettings
from ibaml.types import Episode, TaskSampler


class DrawnTasks(NamedTuple):
    """What a process has drawn for a step.

    Attributes:
        episodes: Tasks, with a leading axis.
        first: Number of the first of them among the step's tasks.
        noises: Noise of each task of this process's share.
    """

    episodes: Episode
    first: int
    noises: list[TaskNoise]


def draw_step(
    tasks: TaskSampler,
    algorithm: Algorithm,
    meta: MetaParameters,
    settings: TrainerSettings,
    share: range,
    *,
    generator: torch.Generator,
) -> DrawnTasks:
    """Draws the tasks of a step and the noise of a process's share of them.

    Args:
        tasks: Source of the tasks.
        algorithm: What needs the noise.
        meta: Meta-parameters, for its shapes.
        settings: How many tasks, and whether each has a generator of its own.
        share: Numbers of the tasks that the process computes.
        generator: The run's generator; it ends in the same state in every process.
    """
    if settings.draws == "per_task":
        seed = int(torch.randint(2**40, (), generator=generator))
        episodes = draw_tasks(tasks, share.start, share.stop, seed=seed)
        own = (noise_generator("inner", task_seed(seed, index)) for index in share)
        return DrawnTasks(episodes, share.start, [algorithm.draw_noise(meta, generator=one) for one in own])
    episodes = tasks.sample(settings.tasks_per_step, generator=generator)
    # All of it in every process, so that the generator stays the same in all.
    drawn = (algorithm.draw_noise(meta, generator=generator) for _ in range(settings.tasks_per_step))
    return DrawnTasks(episodes, 0, [noise for index, noise in enumerate(drawn) if index in share])


def check_drawn(algorithm: Algorithm, model: Model, drawn: DrawnTasks, num_outputs: int, step: int) -> None:
    """Refuses inputs and targets that would give a finite loss and a wrong gradient.

    Targets out of range are no class, and labels with an axis too many are compared with those of other examples. An
    infinite input is no input that training can learn from, even where the loss is finite (after a ``tanh``).

    Raises:
        ValueError: Naming the task.

    Cost:
        A few comparisons for the support sets of all tasks, and as many for their query sets.
    """
    likelihood = model.likelihood
    for part, batch in (("support", drawn.episodes.support), ("query", drawn.episodes.query)):
        check_labels(likelihood, f"training tasks of step {step} {part}.y", batch.y, num_axes=2)
        if not bool(torch.isfinite(batch.x).all()):
            for index, inputs in enumerate(batch.x, start=drawn.first):
                model.check_inputs(f"training task {index} of step {step} {part}.x", inputs)
        try:
            targets = batch.y.flatten(0, 1)
            check_targets(algorithm, likelihood, f"training tasks of step {step} {part}.y", targets, num_outputs)
        except ValueError:
            # Only a refusal looks for the task.
            for index, targets in enumerate(batch.y, start=drawn.first):
                argument = f"training task {index} of step {step} {part}.y"
                check_targets(algorithm, likelihood, argument, targets, num_outputs)
            raise
