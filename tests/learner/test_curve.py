"""Learning curves against adaptation and prediction written out."""

import re

import numpy as np
import pandas as pd
import pytest
import torch
from tests.learner.test_groups import table

from ibaml import MetaLearner, SplitSettings
from ibaml.data import SinusoidTasks
from ibaml.learner import curve as module
from ibaml.learner.curve import learning_curve
from ibaml.networks import MLP


@pytest.fixture(scope="module")
def learner() -> MetaLearner:
    learner = MetaLearner(algorithm="linear_gaussian", likelihood="gaussian")
    return learner.fit(table(12), task="group", target="y", num_steps=3)


def test_scores_are_those_of_nested_supports_and_one_query_set(learner, monkeypatch):
    seen = []
    evaluate = module.evaluate

    def remember(fitted, episodes, **how):
        seen.append(episodes)
        return evaluate(fitted, episodes, **how)

    monkeypatch.setattr(module, "evaluate", remember)
    test = pd.concat([table(6, seed=4), table(1, seed=5)[:4].assign(group="small")])
    found = learner.learning_curve(test, [6, 0, 2, 2], seed=3)
    assert found.num_support == (0, 2, 6) and (found.num_tasks, found.num_left_out) == (6, 1)
    assert list(found.scores) == ["nll", "rmse", "coverage_90"]
    for number, episodes in zip(found.num_support, seen, strict=True):
        errors, nll = [], []
        for episode, most in zip(episodes, seen[-1], strict=True):
            assert len(episode.support.y) == number
            assert torch.equal(episode.support.x, most.support.x[:number])
            assert torch.equal(episode.query.x, most.query.x) and torch.equal(episode.query.y, most.query.y)
            fitted = learner.fitted_model
            posterior = fitted.solve(episode.support, None, seed=0)
            prediction, y = fitted.predict(posterior.value, episode.query.x, seed=0), fitted.in_units(episode.query.y)
            errors.append(float(((prediction.mean - y) ** 2).mean().sqrt()))
            nll.append(float(prediction.nll(y).mean()))
        index = found.num_support.index(number)
        assert found.scores["rmse"][index].mean == pytest.approx(np.mean(errors), rel=1e-5)
        assert found.scores["nll"][index].mean == pytest.approx(np.mean(nll), rel=1e-5)
    assert sum(len(one.query.y) + len(one.support.y) for one in seen[-1]) == len(test) - 4
    assert found.scores["nll"][0].mean > found.scores["nll"][-1].mean


def test_classes_are_scored_as_such_and_all_known_rows_of_one_class_will_do():
    learner = MetaLearner().fit(table(12, classes=True), task="group", target="y", num_steps=3)
    found = learner.learning_curve(table(8, classes=True, seed=4), [0, 1, 5])
    assert list(found.scores) == ["nll", "accuracy", "ece_pooled"]
    assert all(np.isfinite(value.mean) for values in found.scores.values() for value in values)
    alone = learner.learning_curve(table(8, classes=True, seed=4), [0])
    assert alone.num_support == (0,) and 0 < alone.scores["accuracy"][0].mean < 1


def test_table_and_frame(learner):
    found = learner.learning_curve(table(5, seed=4), [0, 5])
    frame = found.to_frame()
    assert frame.num_support.tolist() == [0, 5] and len(frame.columns) == 10
    for name, estimates in found.scores.items():
        assert frame[name].tolist() == [one.mean for one in estimates]
        assert frame[f"{name}_low"].tolist() == [one.low for one in estimates]
        assert frame[f"{name}_high"].tolist() == [one.high for one in estimates]
    assert found.rows == [[str(n), *(str(each[i]) for each in found.scores.values())] for i, n in enumerate((0, 5))]
    head, *lines, tail = str(found).splitlines()
    assert head.split() == found.header and tail == "5 tasks"
    assert [line.split(maxsplit=1)[0] for line in lines] == ["0", "5"]


@pytest.mark.parametrize(
    ("num_support", "kind", "message"),
    [
        ([], ValueError, "num_support is []; expected numbers of rows such as [0, 1, 2, 5, 10]."),
        ([-1, 2], ValueError, "num_support is [-1, 2]; expected numbers of rows"),
        ([0.5], TypeError, "num_support holds 0.5, a float; expected integers."),
        ([40], ValueError, "num_support asks for 40 known rows, but no task has 40 rows and one more"),
    ],
)
def test_numbers_that_are_refused(learner, num_support, kind, message):
    with pytest.raises(kind, match=re.escape(message)):
        learner.learning_curve(table(3, seed=4), num_support)


def test_tasks_that_are_refused(learner):
    with pytest.raises(TypeError, match="tasks is a SinusoidTasks, but num_support splits the rows of data"):
        learner.learning_curve(SinusoidTasks(num_shots=3, num_queries=3))
    network = MLP(1, input_shape=2, hidden_sizes=(3,))
    without = MetaLearner(network, "maml", "gaussian").fit(table(5), task="group", target="y", num_steps=1)
    with pytest.raises(ValueError, match="algorithm 'maml' has no prior"):
        without.learning_curve(table(3, seed=4))
    assert without.learning_curve(table(3, seed=4), [1, 3]).num_support == (1, 3)
    rng = np.random.default_rng(0)
    pairs = [(rng.normal(size=(8, 2)), list("abab" * 2)) for _ in range(4)]
    own = MetaLearner(classes="per_task").fit(pairs, num_steps=1).fitted_model
    with pytest.raises(ValueError, match="num_support asks for 1 known rows, but task '0' has 2 classes of its own"):
        learning_curve(own, pairs, SplitSettings(), [1, 4], seed=0)
    assert learning_curve(own, pairs, SplitSettings(), [2, 4], seed=0).num_tasks == 4


def test_a_task_of_equal_rows_is_left_out(learner):
    test = table(4, seed=4)
    same = pd.concat([test[:1]] * 12).assign(group="same")
    found = learner.learning_curve(pd.concat([test, same]), (number for number in (1, 2)))
    assert (found.num_tasks, found.num_left_out) == (4, 1)


def test_a_single_number_is_refused(learner):
    with pytest.raises(TypeError, match="num_support is 5; expected numbers of rows such as"):
        learner.learning_curve(table(4, seed=4), 5)
