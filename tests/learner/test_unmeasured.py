"""Tables with several targets of which some were not measured, from ``fit`` to ``ibaml predict``."""

import math
import warnings

import numpy as np
import pandas as pd
import pytest
import torch

from ibaml import MetaLearner
from ibaml.algorithms.heads import GaussianProcess
from ibaml.learner.evaluations import draw_evaluation
from ibaml.learner.files import predict_files
from ibaml.networks import MLP
from ibaml.types import Batch, Episode

TARGETS = ["height", "weight"]


def table(num_groups, *, share=0.3, seed=0):
    """Groups of eight rows, with lines of their own in two columns; of each row one target at least was measured."""
    rng = np.random.default_rng(seed)
    parts = []
    for group in range(num_groups):
        x = rng.normal(size=(8, 2))
        y = x @ rng.normal(1, 1, size=(2, 2)) + rng.normal(size=2) + 0.3 * rng.normal(size=(8, 2))
        missing = rng.random((8, 2)) < share
        missing[missing.all(1)] = False
        y = np.where(missing, np.nan, [100, 0] + [10, 1] * y)
        columns = dict(zip(["a", "b", *TARGETS], np.column_stack([x, y]).T, strict=True))
        parts.append(pd.DataFrame({"group": f"g{seed}_{group}", **columns}))
    return pd.concat(parts, ignore_index=True)


TRAIN, TEST = table(20), table(12, seed=1)
IS_KNOWN = TEST.groupby("group").cumcount() < 4
KNOWN, ASKED = TEST[IS_KNOWN], TEST[~IS_KNOWN]


@pytest.fixture(scope="module")
def learner():
    return MetaLearner(likelihood="gaussian").fit(TRAIN, task="group", target=TARGETS, num_steps=10)


def test_scales_are_of_what_was_measured(learner):
    np.testing.assert_allclose(learner.preprocessing.targets.mean, TRAIN[TARGETS].mean(), rtol=1e-12)
    np.testing.assert_allclose(learner.preprocessing.targets.scale, TRAIN[TARGETS].std(ddof=0), rtol=1e-12)


@pytest.mark.parametrize("index", [0, 1], ids=TARGETS)
def test_each_target_is_predicted_from_the_rows_where_it_was_measured(learner, index):
    """The other target says nothing of it, so rows without it change nothing."""
    group = TEST[TEST.group == "g1_3"]
    known, asked = group[:5], group[5:]
    own = known[known[TARGETS[index]].notna()]
    assert 0 < len(own) < len(known)
    found, expected = (learner.adapt(rows, rows[TARGETS]).predict(asked, joint=True) for rows in (known, own))
    for name in ("mean", "total_uncertainty"):
        np.testing.assert_allclose(getattr(found, name)[:, index], getattr(expected, name)[:, index], rtol=1e-5)
    np.testing.assert_allclose(found.covariance[index], expected.covariance[index], rtol=1e-5)


def test_further_rows_and_many_groups_are_those_of_adapt(learner):
    group = TEST[TEST.group == "g1_3"]
    first, rest = group[:3], group[3:5]
    updated = learner.adapt(first, first[TARGETS]).update(rest, rest[TARGETS]).predict(group[5:])
    known = group[:5]
    at_once = learner.adapt(known, known[TARGETS]).predict(group[5:])
    of_groups = learner.predict_new(known, group[5:])
    for other in (updated, of_groups):
        np.testing.assert_allclose(other.mean, at_once.mean, rtol=1e-5)
        np.testing.assert_allclose(other.total_uncertainty, at_once.total_uncertainty, rtol=1e-5)


def test_predictions_score_what_was_measured(learner):
    prediction = learner.predict_new(KNOWN, ASKED)
    y = ASKED[TARGETS].to_numpy()
    variance = prediction.total_uncertainty
    each = 0.5 * ((y - prediction.mean) ** 2 / variance + np.log(2 * math.pi * variance))
    assert np.isnan(each).any()
    np.testing.assert_allclose(prediction.nll(y), np.nansum(each, 1), rtol=1e-6)
    assert np.isnan(prediction.nll(np.full_like(y, np.nan))).all()


def test_an_evaluation_leaves_out_what_was_not_measured(learner):
    evaluation = learner.evaluate_in_full(TEST, num_support=4)
    for index, (prediction, y) in enumerate(zip(evaluation.predictions, evaluation.query_targets, strict=True)):
        described = prediction.tensors()
        error, variance = y - described["mean"], described["variance"]
        each = 0.5 * (error**2 / variance + torch.log(2 * math.pi * variance))
        of_rows = torch.stack([row[~row.isnan()].sum() for row in each])
        measured = ~y.isnan()
        inside = (error[measured].abs() <= 1.6448536 * variance[measured].sqrt()).double()
        expected = {"mse": (error[measured] ** 2).mean(), "nll": of_rows.mean(), "coverage_90": inside.mean()}
        for name, value in expected.items():
            torch.testing.assert_close(evaluation.per_task[name][index], value, rtol=1e-6, atol=0)
    assert any(y.isnan().any() for y in evaluation.query_targets)
    report = learner.evaluate(TEST, num_support=4)
    # Validation, calibration and curves are evaluations as well.
    calibrated = learner.with_fitted(learner.fitted_model).calibrate(TEST, num_support=4)
    assert calibrated.recalibration.nll_before.mean == pytest.approx(report["nll"].mean, rel=1e-6)
    curve = learner.learning_curve(TEST, [4])
    assert curve.to_frame()["nll"].iloc[0] == pytest.approx(report["nll"].mean, rel=1e-6)


def test_pictures_are_of_what_was_measured(tmp_path):
    """One input and several targets have no picture of a curve."""
    rng = np.random.default_rng(0)
    episodes = [
        Episode(
            *(Batch(torch.from_numpy(rng.normal(size=(5, 1))), torch.from_numpy(rng.normal(size=(5, 2)))) for _ in "sq")
        )
        for _ in range(3)
    ]
    for episode in episodes:
        episode.query.y[0, 1] = math.nan
    learner = MetaLearner(MLP(2, input_shape=1, hidden_sizes=()).double(), "linear_gaussian", "gaussian")
    evaluation = learner.fit(episodes, num_steps=1).evaluate_in_full(episodes)
    first = Episode(*(Batch(batch.x[None], batch.y[None]) for batch in episodes[0]))
    draw_evaluation(tmp_path, evaluation, first, title="growth")
    assert [path.name for path in tmp_path.iterdir()] == ["quantiles.png"]


def test_files(learner, tmp_path):
    KNOWN.to_csv(tmp_path / "known.csv", index=False)
    ASKED[["group", "a", "b"]].to_csv(tmp_path / "asked.csv", index=False)
    predict_files(learner.fitted_model, *(tmp_path / name for name in ("known.csv", "asked.csv", "out.csv")))
    found = pd.read_csv(tmp_path / "out.csv")
    expected = learner.predict_new(KNOWN, ASKED)
    np.testing.assert_allclose(found[[f"predicted_{name}" for name in TARGETS]], expected.mean, rtol=1e-6)


def test_a_task_with_gaps_moves_the_prior(learner):
    before = learner.fitted_model
    group = TEST[TEST.group == "g1_3"]
    moved = learner.with_fitted(before).observe(group, group[TARGETS]).fitted_model
    assert moved.experience.num_tasks == before.experience.num_tasks + 1
    assert all(bool(torch.isfinite(leaf).all()) for leaf in moved.meta.shared.values())


def test_processes_and_episodes_are_trained_with_gaps():
    y = torch.tensor([[1.0, math.nan], [math.nan, 2.0], [0.5, 1.0], [0.2, math.nan]])
    episodes = [Episode(Batch(torch.randn(4, 2), y + index), Batch(torch.randn(4, 2), y)) for index in range(4)]
    network = MLP(2, input_shape=2, hidden_sizes=())
    learner = MetaLearner(network, GaussianProcess(), "gaussian").fit(episodes, num_steps=2)
    assert math.isfinite(learner.evaluate(episodes)["nll"].mean)
    with pytest.raises(ValueError, match=r"support.y has 3 targets that were not measured .* algorithm 'maml' needs"):
        MetaLearner(network, "maml", "gaussian").fit(episodes, num_steps=2)


@pytest.mark.parametrize(
    ("settings", "algorithm"),
    [
        ({"likelihood": "student_t"}, "generalized_linear"),
        ({"likelihood": "poisson"}, "generalized_linear"),
        ({"likelihood": "gaussian", "algorithm": "ibaml"}, "ibaml"),
    ],
)
def test_what_needs_all_targets_says_so(settings, algorithm):
    with pytest.raises(
        ValueError,
        match=rf"y of task 'g0_\d+' has \d targets that were not measured \(NaN\), and algorithm '{algorithm}' needs "
        "all targets of an example: drop such examples, fit a learner for each target on its own, or for numbers with",
    ):
        MetaLearner(**settings).fit(TRAIN, task="group", target=TARGETS)


def test_what_was_measured_nowhere_is_refused(learner):
    with pytest.raises(ValueError, match="target 'weight' was measured in no row of the training tasks"):
        rows = TRAIN[TRAIN.height.notna()].assign(weight=np.nan)
        MetaLearner(likelihood="gaussian").fit(rows, task="group", target=TARGETS)
    empty = TRAIN.copy()
    empty.loc[5, TARGETS] = np.nan
    with pytest.raises(ValueError, match="y of task 'g0_0' has 1 rows of which no target was measured, .* row 5: drop"):
        MetaLearner(likelihood="gaussian").fit(empty, task="group", target=TARGETS)
    with pytest.raises(ValueError, match="y_support has 1 rows of which no target was measured, the first is row 1"):
        learner.adapt([[0.0, 0.0]] * 2, [[1.0, 2.0], [np.nan, np.nan]])
    with pytest.raises(
        ValueError, match="y_support has 1 missing .* infinite values, .* row 0, column 1: correct them"
    ):
        learner.adapt([[0.0, 0.0]] * 2, [[1.0, np.inf], [np.nan, 1.0]])
    with pytest.raises(ValueError, match="column 'height' of the table is missing in"):
        MetaLearner(likelihood="gaussian").fit(TRAIN.drop(columns="weight"), task="group", target="height")


def test_a_far_target_is_told_beside_gaps(learner):
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        learner.adapt([[0.0, 0.0]] * 2, [[np.nan, 1.0], [1e9, np.nan]])
    assert "the farthest by" in str(told[0].message) and "in row 1, column 0" in str(told[0].message)
