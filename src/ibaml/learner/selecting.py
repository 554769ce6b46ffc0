"""What a learner without a network of its own becomes: candidates, their comparison, and what is left to learn."""

import dataclasses
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, NamedTuple

import torch

from ibaml.algorithms import MetaParameters
from ibaml.algorithms.model import Model
from ibaml.data.prepare import Source, SplitSettings
from ibaml.data.ragged import TaskSplits
from ibaml.learner import defaults
from ibaml.learner.choice import Choice, choose, estimate_line, most_steps
from ibaml.learner.defaults import Suited
from ibaml.learner.hierarchical import Solved, fit_hierarchical
from ibaml.train import TrainerSettings
from ibaml.train.processes import Processes
from ibaml.train.progress import ProgressBar

if TYPE_CHECKING:
    from rich.console import Console

_SHARE_OF_COMPARISON = 0.5
"""Of the time that there is."""


class Selection(NamedTuple):
    """What was selected.

    Attributes:
        suited: Network and head.
        choice: Why; None if nothing was compared.
        solved: What was estimated in closed form, which leaves nothing to train.
        start: Meta-parameters that training goes on from. None: those that the algorithm makes of the network.
        trainer: Settings of the outer loop that suit it, if not the usual ones.
    """

    suited: Suited
    choice: Choice | None
    solved: Solved | None
    start: MetaParameters | None
    trainer: TrainerSettings | None


def select(
    candidates: Mapping[str, Suited],
    build: Callable[[Suited], Model],
    source: Source,
    *,
    is_open: bool,
    num_steps: int | None,
    splits: SplitSettings,
    seed: int,
    device: torch.device,
    max_minutes: float | None,
    processes: Processes,
    console: "Console | None",
) -> Selection:
    """Selects one of the candidates and learns what has a closed form.

    Args:
        candidates: What suits the tasks by name, simplest first.
        build: Makes a model of one.
        source: The tasks.
        is_open: Whether no settings of an outer loop are given: else the selected one is trained from the beginning.
        num_steps: Steps of each training or estimation. None: as many as suit.
        splits: How tasks are split.
        seed: Seed of the learner.
        device: Where to compute.
        max_minutes: Time limit of all, training aside, which is to have what is left.
        processes: The processes that share each step's tasks.
        console: Where to say what is compared and what was chosen.

    Raises:
        TrainingDivergedError: If a loss or gradient is not finite.
        KeyboardInterrupt: If a training was interrupted.
    """
    deadline = None if max_minutes is None else time.monotonic() + 60 * max_minutes
    if defaults.is_hierarchical(source.train, candidates):
        assert isinstance(source.train, TaskSplits)
        assert source.preprocessing is not None and source.preprocessing.targets is not None
        with ProgressBar(console, "estimate") as bar:
            solved = fit_hierarchical(
                source.train,
                candidates[defaults.CORRELATED],
                scale=source.preprocessing.targets.scale,
                most_steps=defaults.MOST_STEPS if num_steps is None else num_steps,
                seed=seed,
                deadline=deadline,
                bar=bar,
            )
        return Selection(solved.suited, solved.choice, solved if is_open else None, None, solved.suited.trainer)
    trial = dataclasses.replace(defaults.SHORT_TRAINER, seed=seed)
    if num_steps is not None:
        trial = dataclasses.replace(trial, num_steps=min(num_steps, trial.num_steps))
    found = choose(
        candidates,
        build,
        source,
        trial,
        splits=splits,
        device=device,
        max_minutes=None if max_minutes is None else _SHARE_OF_COMPARISON * max_minutes,
        processes=processes,
        console=console,
    )
    if found.suited.in_whole and is_open:
        assert isinstance(source.train, TaskSplits)
        estimated = estimate_line(
            build(found.suited),
            found.suited,
            source.train,
            most_steps=most_steps(trial),
            seed=seed,
            deadline=deadline,
            start=found.meta,
        )
        solved = Solved(found.suited, estimated.meta, found.choice, estimated.num_steps, estimated.is_late)
        return Selection(found.suited, found.choice, solved, None, None)
    start, trainer = (found.meta if is_open else None), found.suited.trainer
    if start is not None and trainer is None:
        trainer = defaults.further_trainer()
    return Selection(found.suited, found.choice, None, start, trainer)
