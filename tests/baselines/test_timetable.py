"""What a comparison says of the time that it takes, before and while it runs."""

import dataclasses
import time
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

from ibaml.algorithms import make_algorithm
from ibaml.baselines import FittedBaseline, Problem, compare_with_baselines, pose
from ibaml.baselines.timetable import Timetable
from ibaml.baselines.training import Setting, TrainedBaseline, expected_seconds
from ibaml.learner import MetaLearner
from ibaml.networks import MLP
from ibaml.train import TrainerSettings

SETTINGS = TrainerSettings(tasks_per_step=2, num_validation_tasks=3, fast=False)


def tasks(num_tasks: int) -> list[tuple[Any, Any]]:
    rng = np.random.default_rng(0)
    return [(x, x @ rng.normal(size=2)) for x in rng.normal(size=(num_tasks, 12, 2))]


@pytest.fixture(scope="module")
def learner() -> MetaLearner:
    network = MLP(1, input_shape=2, hidden_sizes=(3,))
    return MetaLearner(network, make_algorithm("linear_gaussian"), "gaussian", "head.*").fit(tasks(10), num_steps=1)


@dataclasses.dataclass(frozen=True)
class Waiting:
    """A baseline that trains, by waiting or by working."""

    pause: float = 0.0
    num_settings: int = 2
    name: ClassVar[str] = "waiting"

    def suits(self, problem: Problem) -> bool:
        return True

    def settings(self, problem: Problem) -> list[Setting]:
        if self.num_settings == 0:
            raise ValueError("the network suits no setting.")
        return [Setting("a", problem.learner, problem.settings)] * self.num_settings

    def fit(self, problem: Problem, *, seconds: float, folder: Path | None = None) -> FittedBaseline:
        time.sleep(self.pause)
        return FittedBaseline(problem.learner, "nothing", 1.0)


def timetable(learner: MetaLearner, seconds: float, *baselines: Any) -> tuple[Timetable, list[str]]:
    lines: list[str] = []
    problem = pose(learner, tasks(10), 0.3, settings=SETTINGS, say=lines.append)
    return Timetable(problem, seconds, baselines), lines


def test_the_time_is_said_before_and_while_baselines_train(learner: MetaLearner) -> None:
    lines: list[str] = []
    given = dict(seconds=0.1, settings=SETTINGS, baselines=["ridge", "gp", "maml"], say=lines.append)
    compare_with_baselines(learner, tasks(10), 0.3, tasks(3), **given)
    # Nobody waits for what takes a second.
    assert lines == ["ridge: fitting", "gp: fitting", "maml: fitting"]

    plan, lines = timetable(learner, 120.0, Waiting())
    plan.announce()
    with plan.fitting("ridge"):
        pass
    with plan.fitting("waiting"):
        pass
    with plan.fitting("neighbours"):
        pass
    assert lines[0] == (
        "Fitting takes about 3.0 min: waiting 3.0 min. Each trains for 120 s by the clock, after a trial of a quarter "
        "of that for each of its settings."
    )
    assert lines[1:3] == ["ridge: fitting; 3.0 min left in all", "waiting: fitting, about 3.0 min; 3.0 min left in all"]
    assert lines[-1] == "neighbours: fitting"


def test_a_busy_machine_is_told(learner: MetaLearner) -> None:
    plan, lines = timetable(learner, 4.0, Waiting())
    with plan.fitting("waiting"):
        time.sleep(0.05)
    assert "waiting had" in lines[-1] and "% of a core, as other work ran beside it" in lines[-1]
    with plan.fitting("waiting"):
        end = time.process_time() + 0.05
        while time.process_time() < end:
            pass
    # On a machine that is busy in earnest the second one waits as well.
    assert lines[-1].startswith("waiting: fitting") or "of a core" in lines[-1]


def test_what_cannot_be_trained_takes_no_time(learner: MetaLearner) -> None:
    plan, lines = timetable(learner, 120.0, Waiting(num_settings=0))
    plan.announce()
    assert not lines
    assert isinstance(Waiting(), TrainedBaseline) and expected_seconds([], 8.0) == 8.0


def test_trials_and_trainings_of_some_length_are_announced(
    learner: MetaLearner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ibaml.baselines.training._WORTH_A_LINE", 0.01)
    lines: list[str] = []
    given = dict(seconds=0.1, settings=SETTINGS, baselines=["gp"], say=lines.append)
    compare_with_baselines(learner, tasks(10), 0.3, tasks(3), **given)
    assert [line.split(",")[0].strip() for line in lines[1:3]] == ["trial 1 of 2", "trial 2 of 2"]
    assert lines[3].strip().startswith("training with learning rates")
