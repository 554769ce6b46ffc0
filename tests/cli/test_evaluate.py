"""`ibaml evaluate` from end to end."""

import csv
import json
from pathlib import Path

import pytest
from tests.cli.small import SINUSOID

from ibaml.learner.folder import MODEL, read_metadata
from ibaml.recipes import runs
from ibaml.train.checkpoint import CHECKPOINT, PREVIOUS, load_tensors


def test_evaluate_reports_what_it_stores(ibaml, trained):
    code, output, errors = ibaml("evaluate", trained / "b", "--tasks", 5)
    assert code == 0
    step = read_metadata(trained / "b")["step"]
    assert "sinusoid_5shot_ibaml: test on 5 tasks with 5 known and " in output
    assert f" predicted examples; seed 0, state of step {step}, temperature 0.025" in output
    report = json.loads((trained / "b" / "evaluation" / "report.json").read_text())
    assert report["algorithm"]["temperature"] == 0.025 and report["step"] == step
    with (trained / "b" / "evaluation" / "per_task.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["task"] for row in rows] == ["0", "1", "2", "3", "4"]
    for name in ("mse", "nll", "coverage_90", "quantile_calibration_error"):
        mean = sum(float(row[name]) for row in rows) / 5
        assert report["metrics"][name]["mean"] == pytest.approx(mean, abs=1e-12)
        assert f"{mean:.4f}" in next(line for line in output.splitlines() if line.startswith(name))
    assert f"The page {trained / 'b' / 'evaluation' / 'report.html'} shows it" in errors
    tensors, metadata = load_tensors(trained / "b" / "evaluation" / "predictions.safetensors")
    assert tensors["mean"].shape == tensors["targets"].shape == (5, 6, 1)
    assert metadata["tasks"]["seed"] == 0


def test_evaluate_is_repeatable(ibaml, trained):
    reports = []
    for _ in range(2):
        ibaml("evaluate", trained / "a", "--tasks", 5)
        reports.append(json.loads((trained / "a" / "evaluation" / "report.json").read_text())["metrics"])
    assert reports[0] == reports[1]


def test_evaluate_with_other_settings(ibaml, run_of_its_own):
    code, *_ = ibaml(
        "evaluate", "run", "--tasks", 2, "--algorithm.inner.num-steps", "5", "--data.num-test-queries", "3"
    )
    assert code == 0
    assert load_tensors(Path("run/evaluation/predictions.safetensors"))[0]["mean"].shape == (2, 3, 1)
    # For the evaluation alone.
    assert runs.read_recipe(Path("run")).algorithm.inner.num_steps == 1


@pytest.mark.parametrize("tasks", [0, -1])
def test_evaluate_needs_tasks(ibaml, trained, tasks):
    code, _, errors = ibaml("evaluate", trained / "a", f"--tasks={tasks}")
    assert code == 2
    assert f"num_tasks must be at least 1, but is {tasks}." in errors


def test_numbers_belong_to_any_task(ibaml, trained):
    code, _, errors = ibaml("evaluate", trained / "a", "--out-of-task")
    assert code == 2 and "out_of_task is for classes, but the likelihood is" in errors


def test_evaluate_a_diverging_adaptation(ibaml, trained):
    code, _, errors = ibaml("evaluate", trained / "a", "--tasks", 2, "--algorithm.inner.learning-rate", "1e30")
    assert code == 2
    assert "error: test task 0 gives predictions that are not finite" in errors


def test_evaluate_before_training(ibaml, tmp_path, trained):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "recipe.json").write_text((trained / "a" / "recipe.json").read_text())
    code, _, errors = ibaml("evaluate", "run")
    assert code == 2
    assert "run has no model.safetensors: it holds no trained model" in errors


def test_truncated_checkpoints_are_refused(ibaml, tmp_path, run_of_its_own):
    for name, command in ((MODEL, ("evaluate", "run")), (CHECKPOINT, ("train", SINUSOID, "--run-folder", "run"))):
        path = tmp_path / "run" / name
        path.write_bytes(path.read_bytes()[:-20])
        (tmp_path / "run" / PREVIOUS).unlink(missing_ok=True)
        code, _, errors = ibaml(*command)
        assert code == 2
        assert f"error: run/{name} is no readable checkpoint (" in errors and "truncated" in errors


def test_a_changed_byte_is_refused(ibaml, tmp_path, run_of_its_own):
    content = bytearray((tmp_path / "run" / MODEL).read_bytes())
    content[-5] ^= 1
    (tmp_path / "run" / MODEL).write_bytes(content)
    code, _, errors = ibaml("evaluate", "run")
    assert code == 2
    assert "run/model.safetensors is damaged: its checksum does not match its contents." in errors


def test_a_damaged_recipe_is_refused(ibaml, tmp_path, run_of_its_own):
    (tmp_path / "run" / "recipe.json").write_text('{"name": "x"')
    code, _, errors = ibaml("evaluate", "run")
    assert code == 2
    assert "this is no recipe of this version of ibaml" in errors
