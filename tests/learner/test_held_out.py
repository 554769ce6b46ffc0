"""Held-out tasks are used as they are given, with as many known rows as there will be, and it is said what was used."""

import re

import numpy as np
import pytest
from PIL import Image

from ibaml import MetaLearner, SplitSettings
from ibaml.data import SinusoidTasks
from ibaml.learner.known_rows import split_rows
from ibaml.networks import MLP

RNG = np.random.default_rng(0)


def task(num_rows: int, noise: float = 0.5) -> tuple[np.ndarray, np.ndarray]:
    x = RNG.normal(size=(num_rows, 1))
    return x, 10 + 3 * RNG.normal() + x[:, 0] * RNG.normal(2, 3) + noise * RNG.normal(size=num_rows)


@pytest.fixture(scope="module")
def learner() -> MetaLearner:
    """Learned where measurements are noisy: elsewhere it is too unsure once it knows the weights of a task."""
    network = MLP(1, input_shape=1, hidden_sizes=(), norm="none")
    return MetaLearner(network, "linear_gaussian", "gaussian").fit(
        [task(20, noise=5.0) for _ in range(40)], num_steps=60
    )


TESTS = {f"lab {index}": task(8 + index) for index in range(5)}


def test_known_rows_are_as_many_as_asked_for(learner):
    small = {**TESTS, "small": task(3), "copies": tuple(np.repeat(part[:1], 9, 0) for part in task(2))}
    with pytest.warns(RuntimeWarning, match="2 of 7 tasks left out: 'small' has 3 different rows, too few for 3 known"):
        report = learner.evaluate(small, num_support=3, seed=4)
    assert report.num_support == (3, 3, 3) and report.num_query == (5, 7, 9) and report.num_tasks == 5
    assert report.left_out == {
        "small": "has 3 different rows, too few for 3 known ones and others to predict",
        "copies": "has 1 different rows, too few for 3 known ones and others to predict",
    }
    first = "5 tasks with 3 known and 5 to 9 (median 7) predicted examples, 2 left out"
    assert str(report).splitlines()[0] == report.headline == first
    assert repr(report).splitlines()[2].split(maxsplit=1) == ["nll", str(report["nll"])]
    curve = learner.learning_curve(small, [3], seed=4)
    assert curve.scores["nll"][0] == report["nll"] and curve.num_left_out == 2
    assert learner.evaluate(TESTS, num_support=0)["mse"].mean > 2 * report["mse"].mean
    half = learner.evaluate(TESTS)
    assert half.num_support == half.num_query._replace(smallest=4, median=5, largest=6) and not half.left_out


@pytest.mark.parametrize(
    ("tasks", "number", "kind", "message"),
    [
        (TESTS, 40, ValueError, "num_support asks for 40 known rows, but no task has 40 rows and one more to predict"),
        (TESTS, -1, ValueError, "num_support is [-1]; expected numbers of rows such as"),
        (TESTS, 2.5, TypeError, "num_support holds 2.5, a float; expected integers."),
        (
            SinusoidTasks(num_shots=3, num_queries=3),
            3,
            TypeError,
            "tasks is a SinusoidTasks, but num_support splits the",
        ),
    ],
)
def test_numbers_and_tasks_that_do_not_go_together(learner, tasks, number, kind, message):
    for call in (learner.evaluate, learner.calibrate):
        with pytest.raises(kind, match=re.escape(message)):
            call(tasks, num_support=number)


def classes_of_their_own(num_classes: int) -> tuple[np.ndarray, np.ndarray]:
    y = np.repeat(np.arange(num_classes), 5)
    return 4 * np.eye(4)[y] + RNG.normal(size=(len(y), 4)), y


def test_no_task_is_made_easier():
    """All of its classes are in the known rows, and in the answers, whatever the number of rows."""
    tasks = [classes_of_their_own(number) for number in (2, 3, 4)]

    def fit(algorithm: str) -> MetaLearner:
        body = MLP(2, input_shape=4, hidden_sizes=(4,), norm="none")
        return MetaLearner(body, algorithm, classes="per_task").fit(tasks, num_steps=1)

    head, by_steps = fit("head"), fit("maml")
    found = head.evaluate_in_full(tasks, num_support=6)
    assert [one.probs.shape[-1] for one in found.predictions] == [2, 3, 4] and found.num_support == (6, 6, 6)
    episodes, _ = split_rows(head.fitted_model, tasks, SplitSettings(), [4, 8], seed=0)
    assert [len(one.support.y[:4].unique()) for one in episodes] == [2, 3, 4]
    with pytest.raises(ValueError, match="num_support asks for 3 known rows, but task '2' has 4 classes of its own"):
        head.evaluate(tasks, num_support=3)
    for call in (lambda: by_steps.evaluate(tasks, num_support=6), lambda: by_steps.learning_curve(tasks, [6])):
        with pytest.raises(ValueError, match="task '1' has 3 classes, but the model tells 2 apart"):
            call()
    with pytest.raises(ValueError, match="algorithm 'maml' has no prior"):
        by_steps.evaluate(tasks, num_support=0)


def test_known_images_of_a_folder(tmp_path):
    for name in "abcd":
        (tmp_path / name).mkdir()
        for index in range(6):
            Image.fromarray(RNG.integers(0, 255, (6, 6), dtype=np.uint8)).save(tmp_path / name / f"{index}.png")
    splits = SplitSettings(num_ways=3, num_shots=2, num_query_images=2, channels=1, image_size=6)
    body = MLP(3, input_shape=(1, 6, 6), hidden_sizes=(4,), norm="none")
    learner = MetaLearner(body, classes="per_task").fit(tmp_path, splits=splits, num_steps=1)
    assert learner.evaluate(tmp_path, num_tasks=2).headline == "2 tasks with 6 known and 6 predicted examples"
    assert learner.evaluate(tmp_path, num_tasks=2, num_support=9).num_support.largest == 9
    with pytest.raises(ValueError, match="num_support is 4, but each task of the folder has 3 classes and as many"):
        learner.evaluate(tmp_path, num_support=4)


NEW = [task(13) for _ in range(30)]


def coverage(learner: MetaLearner, num_known: int = 3) -> float:
    """Share of targets in their 90% intervals, with so many known rows."""
    found = []
    for x, y in NEW:
        low, high = learner.adapt(x[:num_known], y[:num_known]).predict(x[6:]).interval(0.9)
        found.append(np.mean((low <= y[6:]) & (y[6:] <= high)))
    return float(np.mean(found))


def test_calibration_does_no_harm(learner):
    """Eight tasks with six known rows call for narrow intervals, which three known rows do not warrant."""
    assert coverage(learner) > 0.9
    few = [task(12) for _ in range(8)]
    with pytest.warns(
        RuntimeWarning, match="temperature stays 1: 8 tasks, with 6 known examples; needed are 10 to know"
    ):
        learner.calibrate(few)
    assert learner.calibration_temperature == 1 and learner.recalibration.fitted < 0.8
    many = few + [task(12) for _ in range(32)]
    learner.calibrate(many)
    assert learner.calibration_temperature == learner.recalibration.fitted < 0.6
    harmed = coverage(learner)
    learner.calibrate(many, num_support=3)
    assert coverage(learner) > 0.86 > harmed + 0.02
    assert learner.recalibration.num_support == (3, 3, 3)
    learner.calibrate(many, num_support=(3, 6))
    assert (learner.recalibration.num_tasks, learner.recalibration.num_support.largest) == (40, 6)
    assert coverage(learner) > harmed


def test_what_was_found_belongs_to_the_model(learner, tmp_path):
    learner.calibrate([task(12) for _ in range(10)])
    assert learner.recalibration.temperature == learner.calibration_temperature
    assert MetaLearner.load(learner.save(tmp_path)).recalibration is None
    assert learner.adapting_with(learner.algorithm).recalibration is None
    assert MetaLearner().recalibration is None
