"""`ibaml compare` of trained runs from end to end."""

import csv
import json
import shutil
from pathlib import Path

import pytest

from ibaml.learner.evaluations import read_evaluation
from ibaml.metrics import paired_difference


def test_compare_pairs_tasks(ibaml, trained):
    code, output, errors = ibaml("compare", trained / "a", trained / "b")
    assert code == 0
    assert "5 paired test tasks; intervals are 95%" in output
    out = Path("runs/compare_a_vs_b")
    assert (out / "comparison.png").read_bytes().startswith(b"\x89PNG")
    assert str(out) in errors
    stored = [read_evaluation(trained / name) for name in "ab"]
    with (out / "comparison.csv").open() as file:
        rows = list(csv.reader(file))
    assert rows[0] == ["metric", "a", "b", "b - a"]
    for row in rows[1:]:
        difference = paired_difference(stored[1].per_task[row[0]], stored[0].per_task[row[0]])
        mean, half_width = row[3].split(" +- ")
        assert float(mean) == pytest.approx(difference.mean, abs=5e-5)
        assert float(half_width.split()[0]) == pytest.approx(difference.half_width, abs=5e-5)
        for cell, evaluation in zip(row[1:3], stored, strict=True):
            assert float(cell.split(" +- ")[0]) == pytest.approx(evaluation.per_task[row[0]].mean().item(), abs=5e-5)


def test_compare_says_which_is_better(ibaml, tmp_path, trained):
    for name, shift, stretch in (("low", 0.0, 1.0), ("high", 1.0, 1.0), ("noisy", 0.0, -1.0)):
        target = tmp_path / name / "evaluation"
        target.mkdir(parents=True)
        report = json.loads((trained / "a" / "evaluation" / "report.json").read_text())
        del report["metrics"]["mse"], report["metrics"]["quantile_calibration_error"]
        del report["sha256"]  # as of an earlier version
        report["metrics"]["accuracy"] = report["metrics"]["nll"]
        (target / "report.json").write_text(json.dumps(report))
        with (target / "per_task.csv").open("w", newline="") as file:
            values = [shift + stretch * value for value in (0.1, -0.2, 0.05, 0.15, -0.1)]
            header = ["task", "nll", "accuracy", "coverage_90"]
            csv.writer(file).writerows([header, *([i] + [v] * (len(header) - 1) for i, v in enumerate(values))])
    code, *_ = ibaml("compare", "low", "high", "noisy", "--out", "out")
    assert code == 0
    with Path("out/comparison.csv").open() as file:
        nll, accuracy, coverage = list(csv.reader(file))[1:]
    assert nll[4] == "+1.0000 +- 0.0000 worse" and accuracy[4] == "+1.0000 +- 0.0000 better"
    assert coverage[4] == "+1.0000 +- 0.0000"
    assert not nll[5].endswith(("worse", "better")) and not accuracy[5].endswith(("worse", "better"))


def test_compare_leaves_out_metrics_that_one_has_not(ibaml, trained):
    shutil.copytree(trained / "a", "other")
    report = Path("other/evaluation/report.json")
    values = json.loads(report.read_text())
    del values["sha256"]  # as of an earlier version
    report.write_text(json.dumps(values))
    with Path("other/evaluation/per_task.csv").open() as file:
        rows = [[*row[:1], *row[2:]] for row in csv.reader(file)]
    with Path("other/evaluation/per_task.csv").open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    code, output, _ = ibaml("compare", trained / "a", "other", "--out", "out")
    assert code == 0
    with Path("out/comparison.csv").open() as file:
        assert [row[0] for row in csv.reader(file)][1:] == rows[0][1:]


def test_compare_refuses_different_tasks(ibaml, tmp_path, trained):
    code, _, errors = ibaml("compare", trained / "a", trained / "c")
    assert code == 2
    assert "a and c were evaluated on different tasks (seed 0 and 1): evaluate both with the same --tasks" in errors
    shutil.copytree(trained / "a", "d")
    ibaml("evaluate", "d", "--tasks", 4, "--data.num-shots", "3")
    code, _, errors = ibaml("compare", trained / "a", "d")
    assert code == 2
    assert "different tasks (num_shots 5 and 3, num_tasks 5 and 4)" in errors
    assert not (tmp_path / "runs").exists()


def test_compare_keeps_folders_of_the_same_name_apart(ibaml, tmp_path, trained):
    for parent in ("first", "second"):
        target = tmp_path / parent / "run"
        target.mkdir(parents=True)
        (target / "evaluation").symlink_to(trained / ("a" if parent == "first" else "b") / "evaluation")
    code, output, _ = ibaml("compare", "first/run", "second/run")
    assert code == 0
    assert "second/run - first/run" in output
    assert Path("runs/compare_run_vs_run/comparison.csv").is_file()


def test_compare_needs_different_runs(ibaml, trained):
    code, _, errors = ibaml("compare", trained / "a", trained / "a")
    assert code == 2
    assert f"{trained / 'a'} is named twice: compare needs different run folders." in errors


def test_compare_refuses_a_damaged_evaluation(ibaml, tmp_path, run_of_its_own):
    path = tmp_path / "run" / "evaluation" / "per_task.csv"
    path.write_text("\n".join(path.read_text().splitlines()[:-1]) + "\n")
    code, _, errors = ibaml("compare", "run", "other")
    assert code == 2
    assert "run/evaluation is damaged (" in errors and "run `ibaml evaluate run` again." in errors
