"""Baselines that train: as long as the learner did, with settings chosen in short trials before.

A cosine schedule has to know its number of steps, and the time that it has says none. So each of the settings first
trains for a quarter of the time: a step to get started, half of the rest at a constant rate, which tells the speed, and
half with a falling one. (On glyphs a tenth of 30 seconds chose MAML on all weights, with an nll of 0.54 in the end; a
quarter chose the last layer, with 0.34.) The state with the least validation nll decides for its settings, and their
speed for the number of steps, with the time for start-up and validations left out. The training itself then starts
anew. Machines do not keep their speed: the seconds in a result are those that were spent, and training that takes a
fifth longer than it should is stopped.

Time is that of the clock, as the learner's was: it is what a user waits for, and on an accelerator the processor's says
little. Work beside it takes as much from a baseline as it takes from the learner only if it is there for both:
``ibaml.baselines.compare`` says where it was not.
"""

import dataclasses
import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

from ibaml.atomic import read_json, write_text
from ibaml.baselines.base import Baseline, FittedBaseline, Problem
from ibaml.baselines.choosing import tempered
from ibaml.learner import MetaLearner
from ibaml.posterior import FittedModel
from ibaml.train import Trainer, TrainerSettings, TrainingDivergedError, TrainingResult

PLAN = "plan.json"
"""What was chosen, beside the training that follows from it."""

_TRIAL = 0.25
"""Share of the time that a trial takes."""

_MOST_VALIDATIONS = 5
_SHARE_FOR_VALIDATION = 0.15
_SLACK = 1.2
_MANY = 10**9
_WORTH_A_LINE = 2.0
"""Seconds of a trial or a training from which on it is announced."""


class Setting(NamedTuple):
    """Settings to try.

    Attributes:
        described: The settings in words.
        learner: Not fitted.
        trainer: Outer loop, its number of steps left open.
    """

    described: str
    learner: MetaLearner
    trainer: TrainerSettings


@runtime_checkable
class TrainedBaseline(Baseline, Protocol):
    """A baseline that trains, so that the time it takes is known beforehand."""

    def settings(self, problem: Problem) -> Sequence[Setting]:
        """Returns the settings that short trials choose from.

        Args:
            problem: The tasks.

        Raises:
            ValueError: If the network suits none.
        """
        ...


class _Trial(NamedTuple):
    """How a short training went.

    Attributes:
        nll: On the validation tasks.
        steps_per_second: Speed once it had started.
        start_seconds: Time that starting took.
        validation_seconds: Time of one validation.
    """

    nll: float
    steps_per_second: float
    start_seconds: float
    validation_seconds: float


def expected_seconds(settings: Sequence[Setting], seconds: float) -> float:
    """Returns how long ``train`` takes, starting and validation aside.

    Args:
        settings: Settings to try.
        seconds: Time of training.
    """
    return seconds * (1 + _TRIAL * len(settings))


def train(problem: Problem, settings: Sequence[Setting], *, seconds: float, folder: Path | None) -> FittedBaseline:
    """Trains the best of some settings for a given time.

    Args:
        problem: The tasks.
        settings: Settings to try.
        seconds: Time of training; trials take a quarter of it each, besides.
        folder: Where training is stored; one that is there goes on with what was chosen.

    Raises:
        TrainingDivergedError: If all settings diverge, or the best one later.
        KeyboardInterrupt: If training was interrupted.
    """
    described = [one.described for one in settings]
    plan = None if folder is None else _read_plan(folder, described)
    if plan is None:
        plan = _plan(problem, settings, seconds)
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            write_text(folder / PLAN, json.dumps({**plan, "among": described}, indent=2) + "\n")
    chosen = settings[plan["index"]]
    if seconds >= _WORTH_A_LINE:
        problem.say(f"    training with {chosen.described}: {seconds:.0f} s")
    steps = {name: plan[name] for name in ("num_steps", "validate_every", "checkpoint_every")}
    learner = chosen.learner.fit(
        problem.train,
        problem.validation,
        settings=dataclasses.replace(chosen.trainer, output_temperature=True, **steps),
        run_folder=folder,
        max_minutes=_SLACK * seconds / 60,
    )
    result = learner.training_result
    assert result is not None
    _require_uninterrupted(result)
    return FittedBaseline(learner, f"{chosen.described}, {result.num_steps:,} steps", result.seconds)


def _plan(problem: Problem, settings: Sequence[Setting], seconds: float) -> dict[str, Any]:
    trials: dict[int, _Trial] = {}
    failures: list[str] = []
    for index, one in enumerate(settings):
        if _TRIAL * seconds >= _WORTH_A_LINE:
            problem.say(f"    trial {index + 1} of {len(settings)}, {one.described}: {_TRIAL * seconds:.0f} s")
        try:
            trial = _try(problem, one, _TRIAL * seconds)
        except (TrainingDivergedError, FloatingPointError, ValueError) as error:
            failures.append(f"{one.described}: {error}")
            continue
        if math.isfinite(trial.nll):
            trials[index] = trial
    if not trials:
        raise TrainingDivergedError("; ".join(failures) or "no settings give finite predictions.")
    index = min(trials, key=lambda one: trials[one].nll)
    trial = trials[index]
    affordable = int(_SHARE_FOR_VALIDATION * seconds / max(trial.validation_seconds, 1e-9))
    num_validations = min(max(affordable, 1), _MOST_VALIDATIONS)
    # The last validation comes after the time that is counted.
    left = seconds - trial.start_seconds - (num_validations - 1) * trial.validation_seconds
    num_steps = max(1, round(trial.steps_per_second * max(left, 0.2 * seconds)))
    every = math.ceil(num_steps / num_validations)
    return {"index": index, "num_steps": num_steps, "validate_every": every, "checkpoint_every": every}


def _try(problem: Problem, setting: Setting, seconds: float) -> _Trial:
    learner, half = setting.learner, seconds / 2 / 60
    settings = dataclasses.replace(
        setting.trainer, num_steps=_MANY, schedule="constant", validate_every=_MANY, checkpoint_every=_MANY
    )
    trainer = Trainer(learner.model, learner.algorithm, settings, device=learner.device)

    def trained(max_minutes: float) -> TrainingResult:
        result = trainer.fit(problem.train, max_minutes=max_minutes)
        _require_uninterrupted(result)
        return result

    # One step, which waits for programs to be written; then what tells the speed.
    first, second = trained(1e-9), trained(half)
    speed = (second.num_steps - first.num_steps) / max(second.seconds - first.seconds, 1e-9)
    # Half a cosine from here on has the rate fall from a half to nothing: noise of large steps is no verdict.
    num_steps = second.num_steps + max(1, min(round(speed * seconds / 2), second.num_steps))
    trainer.settings = dataclasses.replace(settings, num_steps=num_steps, schedule="cosine")
    last = trained(2 * half)
    fitted = FittedModel(
        model=learner.model,
        algorithm=learner.algorithm,
        meta=last.last_meta,
        preprocessing=None,
        device=learner.device,
    )
    start = time.monotonic()
    evaluation = problem.validate(learner.with_fitted(fitted))
    validation_seconds = time.monotonic() - start
    _, nll = tempered(learner.with_fitted(fitted), evaluation)
    return _Trial(nll, speed, max(first.seconds - first.num_steps / speed, 0.0), validation_seconds)


def _require_uninterrupted(result: TrainingResult) -> None:
    # A signal ends training in good order; whoever trains several in a row has to stop as well.
    if result.stop_reason == "interrupted":
        raise KeyboardInterrupt


def _read_plan(folder: Path, described: Sequence[str]) -> dict[str, Any] | None:
    if not (folder / PLAN).is_file():
        return None
    try:
        plan = read_json(folder / PLAN)
        return plan if plan.pop("among", None) == list(described) else None
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{folder / PLAN} is damaged ({error}): remove {folder} to fit it again.") from error
