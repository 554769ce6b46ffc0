"""Which of several heads a table gets: the simplest one that held-out tasks do not speak against.

Each candidate is trained on some of the training tasks and predicts the others, with supports of the sizes that
training draws. The lowest mean nll wins, unless a simpler candidate is within one standard error of it, paired over
tasks (the rule of Breiman et al. 1984). With few tasks that error is large, so features that a dozen groups seem to
show are not believed. The winner then goes on from there with all tasks. The prior of lines in the inputs is not
trained but estimated from whole tasks (``ibaml.train.whole_tasks``).
"""

import logging
import math
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, NamedTuple

import torch

from ibaml import tree
from ibaml.algorithms import MetaParameters
from ibaml.algorithms.model import Model
from ibaml.data.prepare import Source, SplitSettings
from ibaml.data.ragged import TaskSplits
from ibaml.learner.defaults import LEAST_TASKS, MOST_STEPS, SHORT_TRAINER, Suited
from ibaml.posterior import FittedModel
from ibaml.seeds import task_generator
from ibaml.train import Trainer, TrainerSettings
from ibaml.train.evaluate import evaluate
from ibaml.train.processes import Processes
from ibaml.train.progress import say
from ibaml.train.signals import pass_on
from ibaml.train.whole_tasks import Estimated, HasMarginal, estimate_prior, in_whole
from ibaml.types import Episode, Tensor

if TYPE_CHECKING:
    from rich.console import Console

_logger = logging.getLogger(__name__)

_SHARE_HELD_OUT, _MOST_HELD_OUT = 4, 40
_NUM_DRAWS = 3


class Choice(NamedTuple):
    """What was chosen and why.

    Attributes:
        name: The candidate.
        nll: Mean nll of each candidate's predictions on the held-out tasks, simplest candidate first.
        num_tasks: Number of held-out tasks.
    """

    name: str
    nll: Mapping[str, float]
    num_tasks: int

    def __str__(self) -> str:
        scores = ", ".join(f"{name} {nll:.3f}" for name, nll in self.nll.items())
        return f"{self.name}, by the nll of {self.num_tasks} held-out tasks (the simplest within one error): {scores}"


class Selected(NamedTuple):
    """The candidate that was chosen.

    Attributes:
        suited: Network and head.
        choice: Why; None if nothing was compared.
        meta: What its comparison learned, from which it goes on; None likewise.
    """

    suited: Suited
    choice: Choice | None
    meta: MetaParameters | None


def choose(
    candidates: Mapping[str, Suited],
    build: Callable[[Suited], Model],
    source: Source,
    settings: TrainerSettings,
    *,
    splits: SplitSettings,
    device: torch.device,
    max_minutes: float | None,
    processes: Processes,
    console: "Console | None" = None,
) -> Selected:
    """Learns all candidates from a part of the tasks and compares them on the rest.

    Args:
        candidates: What suits the tasks by name, simplest first.
        build: Makes a model of one.
        source: The training tasks.
        settings: Settings of the outer loop; an estimation in closed form takes ``MOST_STEPS`` steps at the most, or
            these if they are fewer than the usual ones.
        splits: How tasks are split.
        device: Where to compute.
        max_minutes: Time limit of all candidates together.
        processes: The processes that share each step's tasks.
        console: Where to say what is compared and what was chosen, and to show progress.

    Returns:
        The chosen one; of a single candidate, and if there are too few tasks to hold some out, the first.

    Raises:
        TrainingDivergedError: If a loss or gradient is not finite.
        KeyboardInterrupt: If a training was interrupted.
    """
    tasks = source.train
    if len(candidates) == 1 or not isinstance(tasks, TaskSplits) or len(tasks) < LEAST_TASKS:
        return Selected(next(iter(candidates.values())), None, None)
    order = torch.randperm(len(tasks), generator=torch.Generator().manual_seed(settings.seed)).tolist()
    num_held_out = min(_MOST_HELD_OUT, len(tasks) // _SHARE_HELD_OUT)
    rest = _some(tasks, sorted(order[num_held_out:]), splits)
    episodes = [
        _episode(_some(tasks, [index], splits), task_generator(settings.seed, _NUM_DRAWS * place + draw))
        for place, index in enumerate(order[:num_held_out])
        for draw in range(_NUM_DRAWS)
    ]
    minutes = None if max_minutes is None else max_minutes / len(candidates)
    learned: dict[str, MetaParameters] = {}

    def losses(name: str) -> Tensor:
        candidate = candidates[name]
        model, algorithm = build(candidate), candidate.algorithm
        if candidate.in_whole:
            learned[name] = estimate_line(
                model,
                candidate,
                rest,
                most_steps=most_steps(settings),
                seed=settings.seed,
                deadline=None if minutes is None else time.monotonic() + 60 * minutes,
            ).meta
        else:
            trainer = Trainer(model, algorithm, settings, device=device, console=console, processes=processes)
            result = trainer.fit(rest, max_minutes=minutes)
            if result.stop_reason == "interrupted":
                pass_on(result.ended_by, "while models were compared.", is_saved=True)
                raise KeyboardInterrupt
            learned[name] = result.chosen.meta
        fitted = FittedModel(
            model=model, algorithm=algorithm, meta=learned[name], preprocessing=source.preprocessing, device=device
        )
        found = evaluate(fitted, episodes, seed=settings.seed, processes=processes)
        return found.per_task["nll"].reshape(num_held_out, _NUM_DRAWS).mean(1)

    def tell(text: str) -> None:
        if processes.is_first:
            say(console, text)

    tell(f"Comparing {len(candidates)} models on {num_held_out} of the tasks: {', '.join(candidates)}.")
    found = {name: losses(name) for name in candidates}
    choice = Choice(simplest_good(found), {name: float(value.mean()) for name, value in found.items()}, num_held_out)
    _logger.info("%s", choice)
    tell(f"Chosen: {choice}.")
    return Selected(candidates[choice.name], choice, learned[choice.name])


def most_steps(settings: TrainerSettings) -> int:
    """Returns the steps of an estimation in closed form in place of some training: fewer if that is cut short."""
    return settings.num_steps if settings.num_steps < SHORT_TRAINER.num_steps else MOST_STEPS


def estimate_line(
    model: Model,
    suited: Suited,
    tasks: TaskSplits,
    *,
    most_steps: int,
    seed: int,
    deadline: float | None = None,
    start: MetaParameters | None = None,
) -> Estimated:
    """Estimates the prior of a line in the inputs from whole tasks.

    Args:
        model: What ``suited`` describes.
        suited: A candidate with ``in_whole``.
        tasks: The tasks.
        most_steps: Steps at the most.
        seed: Seed of the rows that are taken of large tasks.
        deadline: When to stop, by ``time.monotonic``. None: no limit.
        start: Where to start. None: where training would.
    """
    assert isinstance(suited.algorithm, HasMarginal)
    middle = suited.algorithm.init(model.adapted, model.shared, generator=torch.Generator())
    return estimate_prior(
        model,
        suited.algorithm,
        in_whole(tasks.tasks, generator=torch.Generator().manual_seed(seed)),
        start=middle if start is None else start,
        middle=middle,
        most_steps=most_steps,
        deadline=deadline,
    )


def simplest_good(losses: Mapping[str, Tensor]) -> str:
    """Returns the first name whose mean loss is within one standard error of the lowest, paired over tasks.

    Args:
        losses: Loss of each task by name, simplest first; each ``[num_tasks]``.

    Examples:
        >>> losses = {"line": torch.tensor([1.0, 2.0, 3.0]), "curve": torch.tensor([0.9, 2.1, 2.9])}
        >>> simplest_good(losses), simplest_good({**losses, "spline": torch.tensor([0.1, 1.0, 2.1])})
        ('line', 'spline')
    """
    best = min(losses.values(), key=lambda each: float(each.mean()))

    def is_good(each: Tensor) -> bool:
        difference = each - best
        error = float(difference.std()) / math.sqrt(len(difference))
        return float(difference.mean()) <= error

    return next(name for name, each in losses.items() if each is best or is_good(each))


def _some(tasks: TaskSplits, indices: list[int], splits: SplitSettings) -> TaskSplits:
    return tasks.restricted(indices, num_support=splits.num_support, num_query=splits.num_query)


def _episode(task: TaskSplits, generator: torch.Generator) -> Episode:
    return tree.map(lambda leaf: leaf[0], task.sample(1, generator=generator))
