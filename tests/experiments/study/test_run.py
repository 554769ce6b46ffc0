import csv
import dataclasses
import json
import shutil

import pytest
import torch

from ibaml.data.sources import SOURCES, Mixtures, RandomSlopes
from ibaml.experiments.report import Place, run_experiment
from ibaml.experiments.study import options as table
from ibaml.experiments.study import run as study
from ibaml.experiments.study.options import DATA_SETS, DEFAULT, DataSet, cells, options
from ibaml.experiments.study.plot import study_figure
from ibaml.experiments.study.report import STUDY, differences, noise, rows, summary
from ibaml.experiments.study.run import StudySettings
from ibaml.metrics import Estimate, paired_difference
from ibaml.recipes import Recipe
from ibaml.train import TrainingDivergedError


@pytest.fixture(autouse=True, scope="module")
def tiny():
    """Two small data sets of classes and of numbers, in place of the study's."""
    patch = pytest.MonkeyPatch()
    small = {
        "classes": DataSet(_small(Mixtures(num_ways=3, num_queries=6, num_test_queries=6, num_features=4), 3), 2),
        "numbers": DataSet(_small(RandomSlopes(num_queries=6, num_test_queries=6, num_features=2), 1), 2),
    }
    patch.setattr(table, "DATA_SETS", small)
    patch.setattr(study, "DATA_SETS", small)
    yield
    patch.undo()


def _small(source, num_outputs):
    likelihood, scope = ("categorical", "per_task") if num_outputs > 1 else ("gaussian", "shared")
    whole = table._table(source, likelihood, scope)
    return lambda: whole().replace({"trainer.tasks_per_step": 2, "trainer.num_validation_tasks": 10})


def settings(**changes) -> StudySettings:
    return StudySettings(**{"data_sets": ("classes",), "factors": ("head",), "num_tasks": 4, **changes})


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny):
    """A study of the heads, with a record of the splits that were loaded."""
    where = tmp_path_factory.mktemp("study")
    splits = []
    patch = pytest.MonkeyPatch()
    for source in (Mixtures, RandomSlopes):
        own = source.sampler

        def recorded(self, split, *, own=own, **arguments):
            splits.append(split)
            return own(self, split, **arguments)

        patch.setattr(source, "sampler", recorded)
    run_experiment(STUDY, settings(data_sets=("classes", "numbers")), Place(where))
    patch.undo()
    assert "validation" in splits and "test" not in splits
    return where


@pytest.mark.parametrize("name", ["glyphs_5shot", "mixtures", "sinusoid", "random_slopes", "fsmol", "omniglot_1shot"])
def test_every_option_changes_the_default_in_its_own_way(name):
    default = DATA_SETS[name].recipe()
    found = options(default)
    assert found[0].factor == DEFAULT and len({one[:2] for one in found}) == len(found)
    changed = [default.replace(one.changes) for one in found]
    assert all(one != other for i, one in enumerate(changed) for other in changed[:i])
    assert all(Recipe.from_json(one.to_json()) == one for one in changed)
    factors = {one.factor for one in found}
    assert {"head", "prior", "outer loss", "normalisation", "support mean", "initial variance", "seed"} <= factors
    assert all(one.learner() is not None for one in changed)


def test_cells_have_the_steps_of_the_scale_and_names_of_their_own():
    found = cells("classes", scale=3.0, seed=5)
    assert {cell.recipe.trainer.num_steps for cell in found} == {6}
    assert len({cell.recipe.name for cell in found}) == len(found)
    assert all(" " not in cell.recipe.name for cell in found)
    seeds = {cell.recipe.trainer.seed for cell in found if cell.option.factor == "seed"}
    assert found[0].recipe.trainer.seed == 5 and seeds == {6, 7}


def test_the_command_leaves_a_report_a_table_and_a_picture(folder):
    text = (folder / "README.md").read_text()
    assert "8 of 8 cells" in text and "no test task was drawn" in text
    assert "## classes (4 of 4 cells)" in text and "## numbers (4 of 4 cells)" in text
    with (folder / "study.csv").open(newline="") as file:
        written = list(csv.DictReader(file))
    assert [row["option"] for row in written[:4]] == ["default", "gaussian classes", "prototypes", "ridge"]
    assert 0 <= float(written[0]["out_of_task_auroc"]) <= 1 and written[4]["out_of_task_auroc"] == ""
    assert float(written[0]["nll_difference"]) == 0 and float(written[4]["rmse"]) > 0 and written[4]["accuracy"] == ""
    assert (folder / "study.png").is_file() and (folder / "settings.json").is_file()


def test_cells_are_judged_on_tasks_that_chose_nothing(folder):
    for path in sorted((folder / "runs").iterdir()):
        tasks = json.loads((path / "evaluation" / "report.json").read_text())["tasks"]
        assert (tasks["split"], tasks["num_tasks"]) == ("validation", 4)
        chosen = json.loads((path / "recipe.json").read_text())["trainer"]["seed"] + 10**6
        assert tasks["seed"] == 2 * 10**6 != chosen


def test_differences_are_paired_over_the_same_tasks(folder):
    result = study.run(settings(), Place(folder))
    default, other = result.judged["classes"][:2]
    found = differences(result.judged["classes"])
    assert found["head", "gaussian classes"] == paired_difference(other.per_task["nll"], default.per_task["nll"])
    assert found[DEFAULT, DEFAULT].mean == 0
    assert differences(result.judged["classes"][1:]) == {}


def test_finished_cells_are_read_and_missing_ones_trained(folder, monkeypatch):
    trained = []
    monkeypatch.setattr(study, "_train_and_judge", lambda cell, data: trained.append(cell.recipe.name))
    study.run(settings(data_sets=("classes", "numbers")), Place(folder))
    assert trained == []
    with pytest.raises(FileNotFoundError, match=r"cost\.json"):
        study.run(settings(factors=("support mean",)), Place(folder))
    assert trained == ["classes-support_mean-subtracted"]


def test_a_posterior_that_training_does_not_see_needs_no_training(folder, tmp_path, monkeypatch):
    *_, cell = (cell for cell in cells("classes", scale=1.0, seed=0) if cell.option.factor == "posterior temperature")
    anew = cell.recipe.learner()
    anew.fit(*(cell.recipe.data.sampler(split) for split in ("train", "validation")), settings=cell.recipe.trainer)
    shutil.copytree(folder / "runs" / "classes-default-default", tmp_path / "runs" / "classes-default-default")
    monkeypatch.setattr(study.MetaLearner, "fit", None)
    result = study.run(settings(factors=("posterior temperature",)), Place(tmp_path))
    assert len(result.judged["classes"]) == 5
    expected = anew.evaluate_in_full(cell.recipe.data.sampler("validation"), num_tasks=4, seed=2 * 10**6)
    assert result.judged["classes"][-1].temperature == anew.calibration_temperature
    assert torch.equal(result.judged["classes"][-1].per_task["nll"], expected.per_task["nll"])


def test_a_stopped_study_is_reported_from_the_cells_that_are_there(folder):
    result = study.run(settings(factors=("head", "outer loss"), max_minutes=0), Place(folder))
    assert len(result.judged["classes"]) == 4 and result.num_cells == {"classes": 5}
    text = summary(result)
    assert "4 of 5 cells" in text and "| head: ridge |" in text and "outer loss" not in text
    assert len(rows(result)) == 4


def test_nothing_yet_is_a_report_too(tmp_path):
    text = run_experiment(STUDY, settings(max_minutes=0), Place(tmp_path))
    assert "0 of 4 cells" in text and "Not yet" in text and not (tmp_path / "study.png").exists()


def test_other_steps_in_the_same_folder_are_refused(folder):
    with pytest.raises(ValueError, match="trained with other settings: trainer.num_steps"):
        study.run(settings(scale=2.0), Place(folder))


def test_other_tasks_are_judged_again_without_training(folder, monkeypatch):
    monkeypatch.setattr(study, "open_run", None)
    result = study.run(settings(num_tasks=5, factors=("head",)), Place(folder))
    assert {len(cell.per_task["nll"]) for cell in result.judged["classes"]} == {5}
    again = study.run(settings(), Place(folder))
    assert {len(cell.per_task["nll"]) for cell in again.judged["classes"]} == {4}


def test_a_diverging_cell_is_a_finding(tmp_path, monkeypatch):
    def diverge(self, *args, **kwargs):
        raise TrainingDivergedError("step 1: not finite")

    monkeypatch.setattr(study.MetaLearner, "fit", diverge)
    result = study.run(settings(), Place(tmp_path))
    assert result.judged["classes"] == [] and len(result.failed["classes"]) == 4
    assert "head, ridge: failed. step 1: not finite" in summary(result)
    again = study.run(settings(max_minutes=0), Place(tmp_path))
    assert len(again.failed["classes"]) == 4


def test_the_picture_has_a_panel_for_each_data_set():
    found = {
        (DEFAULT, DEFAULT): Estimate(0.0, 0.0, 9),
        ("head", "ridge"): Estimate(0.3, 0.1, 9),
        ("seed", "1"): Estimate(-0.02, 0.03, 9),
    }
    axes = study_figure({"one": found, "two": found, "three": found}).axes
    assert [panel.get_title() for panel in axes] == ["one", "two", "three", ""]
    assert [label.get_text() for label in axes[0].get_yticklabels()] == ["seed: 1", "default", "head: ridge"]
    assert noise(found) == 0.02


def test_arguments_out_of_range_are_refused():
    with pytest.raises(ValueError, match="data_sets names iris; there are classes, numbers"):
        settings(data_sets=("iris",))
    with pytest.raises(ValueError, match="data_sets is empty"):
        settings(data_sets=())
    with pytest.raises(ValueError, match="factors names colour; there are default, head, prior"):
        settings(factors=("colour",))
    with pytest.raises(ValueError, match=r"scale must be positive, but is 0"):
        settings(scale=0)
    with pytest.raises(ValueError, match="num_tasks must be at least 2, for an interval, but is 1"):
        settings(num_tasks=1)
    with pytest.raises(ValueError, match="max_minutes must be at least 0, but is -1"):
        settings(max_minutes=-1)


def test_random_slopes_have_the_correlation_that_was_asked_for():
    source = RandomSlopes(num_shots=40, correlation=0.5, noise_std=0.01)
    support = source.sampler("train").sample(2000, generator=torch.Generator().manual_seed(0)).support
    inputs = torch.cat([torch.ones_like(support.x[..., :1]), support.x], -1)
    weights = torch.linalg.lstsq(inputs, support.y).solution.squeeze(-1)
    expected = 0.5 * torch.eye(4) + 0.5
    torch.testing.assert_close(torch.cov(weights.T), expected, rtol=0, atol=0.12)
    assert SOURCES["random_slopes"] is RandomSlopes
    for changes, message in (({"correlation": 1.0}, "correlation must be"), ({"noise_std": 0.0}, "noise_std must be")):
        with pytest.raises(ValueError, match=message):
            dataclasses.replace(source, **changes)
