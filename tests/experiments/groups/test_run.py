import dataclasses

import numpy as np
import pytest
import torch

from ibaml.experiments.groups import run as groups
from ibaml.experiments.groups.baselines import Rows
from ibaml.experiments.groups.plot import groups_figure
from ibaml.experiments.groups.report import GROUPS, rows, summary, verdict
from ibaml.experiments.groups.run import GroupsSettings, Scores
from ibaml.experiments.groups.tables import DATASETS, folds, load, orthogonalise
from ibaml.experiments.report import Place, run_experiment
from ibaml.learner import defaults


@pytest.fixture(scope="module")
def result():
    """Growth curves with a bend: 40 groups, intercepts and slopes of their own."""
    generator = np.random.default_rng(0)
    intercept, slope = 100 + 8 * generator.normal(size=(40, 1)), 5 + generator.normal(size=(40, 1))
    time = generator.uniform(0, 4, size=(40, 10))
    y = intercept + slope * time + 2 * np.sin(2 * time) + generator.normal(size=time.shape)
    table = Rows(np.column_stack([time.ravel(), time.ravel() ** 2]), y.ravel(), np.repeat(np.arange(40), 10).tolist())
    patch = pytest.MonkeyPatch()
    patch.setattr(groups, "load", lambda dataset: table)
    calls = []
    found = groups.run(
        GroupsSettings(datasets=("oxboys",), methods=groups.METHODS[1:], num_folds=2, num_draws=2, num_steps=60),
        on_progress=lambda done, total: calls.append((done, total)),
    )
    patch.undo()
    assert calls == [(1, 2), (2, 2)]
    return found


def test_every_group_is_predicted_once_by_every_method(result):
    assert result.sizes == {"oxboys": (40, 400)}
    for scores in result.scores["oxboys"].values():
        assert {len(scores.rmse), len(scores.nll), len(scores.coverage)} == {40}


def test_sharing_between_groups_and_adapting_to_them_both_help(result):
    nll = {name: float(scores.nll.mean()) for name, scores in result.scores["oxboys"].items()}
    assert max(nll["ibaml_linear"], nll["mixed_effects"]) < min(nll["ridge"], nll["pooled"]) - 0.1
    assert abs(nll["ibaml_linear"] - nll["mixed_effects"]) < 0.15
    assert nll["alpaca"] < nll["pooled"] - 0.1
    # Only hidden units can follow the bend.
    assert nll["ibaml_mlp"] < nll["mixed_effects"] - 0.05
    rmse = result.scores["oxboys"]["ibaml_linear"].rmse.mean()
    # In the target's own unit: between the noise and the spread of the groups.
    assert 1 < rmse < 4


def test_report_tables_and_figure_hold_the_numbers(result):
    table = rows(result)
    assert [row["method"] for row in table] == list(groups.METHODS[1:])
    assert table[0]["nll"] == pytest.approx(float(result.scores["oxboys"]["ibaml_linear"].nll.mean()))
    assert next(row for row in table if row["method"] == "mixed_effects")["nll_minus_mixed_effects"] == 0
    text = summary(result)
    assert "## oxboys: height (cm) over age, by boy" in text and "40 groups, 400 rows" in text
    assert text.count("| mixed effects |") == 1 and "- iBaML, linear: coverage within 85-95% on" in text
    assert len(groups_figure(result).axes) == 2


def test_the_default_chooses_by_training_groups():
    settings = GroupsSettings(datasets=("oxboys",), methods=("ibaml", "mixed_effects"), num_folds=2, num_draws=1)
    result = groups.run(settings)
    scores = result.scores["oxboys"]["ibaml"]
    assert scores.nll.isfinite().all() and set(scores.choices) <= {defaults.CORRELATED, defaults.CURVES}
    assert len(scores.choices) == 2 and 0 < scores.milliseconds < 5
    assert f"The default chose, in so many folds: {scores.choices[0]} (" in summary(result)
    assert rows(result)[0]["milliseconds"] == round(scores.milliseconds, 2)


def test_the_command_leaves_tables_and_a_picture(tmp_path):
    settings = GroupsSettings(datasets=("oxboys",), methods=("mixed_effects", "pooled"), num_draws=1)
    assert "26 groups, 234 rows" in run_experiment(GROUPS, settings, Place(tmp_path))
    assert {"README.md", "groups.csv", "groups.png"} <= {path.name for path in tmp_path.iterdir()}


def test_the_verdict_asks_for_coverage_and_for_the_interval_of_the_difference():
    def scores(nll, coverage):
        return Scores(torch.ones(4), torch.tensor(nll), torch.full((4,), coverage), 1.0, 1.0)

    reference = scores([1.0, 1.0, 1.0, 1.0], 0.9)
    result = groups.GroupsResult(
        GroupsSettings(),
        {
            "milk": {"ibaml_mlp": scores([0.9, 1.2, 0.8, 1.2], 0.9), "mixed_effects": reference},
            "exams": {"ibaml_mlp": scores([1.2, 1.2, 1.2, 1.3], 0.9), "mixed_effects": reference},
            "chicks": {"ibaml_mlp": scores([0.5, 0.5, 0.5, 0.6], 0.97), "mixed_effects": reference},
        },
        {},
        {},
    )
    text = verdict(result, "ibaml_mlp")
    assert "coverage within 85-95% on 2 of 3 tables" in text and "on 2; both on 1: milk." in text


@pytest.mark.parametrize("name", DATASETS)
def test_every_table_has_groups_large_enough_and_independent_features(name):
    table = load(DATASETS[name])
    sizes = np.unique(np.asarray(table.groups), return_counts=True)[1]
    assert len(sizes) >= 12 and np.median(sizes) >= 8
    assert np.isfinite(table.x).all() and np.isfinite(table.y).all()
    assert DATASETS[name].num_slopes <= table.x.shape[1]
    for held_out in folds(table.groups, 5, seed=0):
        inside = np.array([group not in held_out for group in table.groups])
        x = orthogonalise(table.x, inside)
        assert np.allclose(x[inside].T @ x[inside] / inside.sum(), np.eye(x.shape[1]), atol=1e-8)
        assert (np.sum(x[inside] * table.x[inside], axis=0) > 0).all()


def test_arguments_out_of_range_are_refused():
    with pytest.raises(ValueError, match="datasets names iris; there are sleepstudy,"):
        GroupsSettings(datasets=("iris",))
    with pytest.raises(ValueError, match="methods is empty; there are ibaml, ibaml_linear,"):
        GroupsSettings(methods=())
    for field in ("num_support", "num_folds", "num_draws", "num_steps", "num_hidden"):
        with pytest.raises(ValueError, match=f"{field} must be at least [12], but is 0"):
            dataclasses.replace(GroupsSettings(), **{field: 0})
    with pytest.raises(ValueError, match="num_folds is 3, but there are only 2 groups"):
        folds("ab", 3, seed=0)
    column = np.arange(4.0)
    with pytest.raises(ValueError, match="feature 1 is constant or determined by those before it"):
        orthogonalise(np.column_stack([column, 2 * column + 1]), np.full(4, True))
