"""The commands from end to end, in this process; one with a real signal in its own."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from ibaml.cli import main
from ibaml.learner import MetaLearner
from ibaml.learner.evaluations import read_evaluation
from ibaml.learner.folder import MODEL, read_metadata
from ibaml.metrics import paired_difference
from ibaml.recipes import RECIPES, runs
from ibaml.train import Trainer
from ibaml.train.checkpoint import CHECKPOINT, PREVIOUS, load_tensors
from ibaml.train.devices import resolve_device
from ibaml.train.log import METRICS, read_metrics

SINUSOID = "sinusoid_5shot_maml"
SMALL = (
    "--trainer.tasks-per-step",
    "2",
    "--trainer.validate-every",
    "2",
    "--trainer.num-validation-tasks",
    "3",
    "--trainer.log-every",
    "1",
    "--data.num-test-queries",
    "6",
    "--network.arguments.hidden-sizes",
    "6",
    "6",
)
GLYPHS = (
    "--trainer.num-validation-tasks",
    "2",
    "--trainer.tasks-per-step",
    "1",
    "--data.num-shots",
    "1",
    "--data.num-queries",
    "1",
    "--data.num-test-queries",
    "2",
    "--network.arguments.channels",
    "4",
)


@pytest.fixture(autouse=True)
def wide_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "250")


@pytest.fixture
def ibaml(capsys, tmp_path, monkeypatch):
    """Runs a command in an empty folder and returns its exit code, standard output and standard error."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            main([str(argument) for argument in arguments])
        output = capsys.readouterr()
        return caught.value.code, output.out, output.err

    return run


def train(ibaml, folder: object, *arguments: object, recipe: str = SINUSOID, steps: int = 4) -> tuple[int, str, str]:
    return ibaml("train", recipe, "--run-folder", folder, "--steps", steps, *arguments, *SMALL)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Three small evaluated runs: two of the same tasks, one of a Gaussian algorithm among them, and one of others."""
    folder = tmp_path_factory.mktemp("runs")
    for name, recipe, seed in (("a", SINUSOID, 0), ("b", "sinusoid_5shot_ibaml", 0), ("c", SINUSOID, 1)):
        for command in (
            ["train", recipe, "--run-folder", str(folder / name), "--steps", "4", "--device", "cpu", *SMALL],
            ["evaluate", str(folder / name), "--tasks", "5", "--seed", str(seed)],
        ):
            with pytest.raises(SystemExit) as caught:
                main(command)
            assert caught.value.code == 0
    return folder


@pytest.fixture
def run_of_its_own(trained, tmp_path):
    """A copy of the first of these runs, in the folder ``run`` of the command, to change and to damage."""
    return shutil.copytree(trained / "a", tmp_path / "run")


# Listing


def test_recipes_are_listed(ibaml):
    code, output, _ = ibaml("recipes")
    assert code == 0
    lines = output.splitlines()
    assert [line for line in lines if not line.startswith(" ")] == list(RECIPES)
    assert "60,000 steps of 8 tasks" in output


@pytest.mark.parametrize("columns", [80, 60])
def test_names_stay_whole_in_a_narrow_terminal(ibaml, monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    words = ibaml("recipes")[1].split()
    assert all(name in words for name in RECIPES)


@pytest.mark.parametrize("command", [(), ("train",), ("evaluate",), ("compare",), ("recipes",)])
def test_help(ibaml, command):
    code, output, _ = ibaml(*command, "--help")
    assert code == 0
    assert f"usage: ibaml {' '.join(command)}".rstrip() in output
    if command == ("train",):
        assert all(option in output for option in ("--run-folder", "--data", "--max-minutes", "--steps"))


@pytest.mark.parametrize("command", [("trian",), (), ("train",), ("train", SINUSOID, "--steps", "ten")])
def test_misspelt_commands_exit_with_two(ibaml, command):
    code, _, errors = ibaml(*command)
    assert code == 2
    assert errors


# Refusals before any work


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("train", "sinusoid_5shot_mam"),
            f"there is no recipe 'sinusoid_5shot_mam'; did you mean {SINUSOID!r}? `ibaml recipes` lists all.",
        ),
        (("train", SINUSOID, "--steps", "0"), "num_steps must be at least 1, but is 0."),
        (("train", SINUSOID, "--max-minutes", "0"), "max_minutes must be positive, but is 0"),
        (("train", SINUSOID, "--device", "quantum"), "device must be auto, cpu, cuda or cuda:N, but is 'quantum'."),
        (("train", SINUSOID, "--threads", "0"), "--threads must be at least 1, but is 0."),
        (("train", SINUSOID, "--network.arguments.input-shape", "2"), "cannot process training task support.x of"),
        (
            ("evaluate", "nowhere"),
            "nowhere has no model.safetensors: it holds no trained model, or a run that has not reached its first",
        ),
        (("compare", "one"), "compare needs at least two run folders, but got 1."),
        (("compare", "one", "two"), "one has not been evaluated: run `ibaml evaluate one` first."),
    ],
)
def test_refusals(ibaml, arguments, message):
    code, _, errors = ibaml(*arguments)
    assert code == 2
    assert message in errors
    assert "error: " in errors and "Traceback" not in errors


@pytest.mark.parametrize("device", ["cuda", "cuda:1"])
def test_cuda_without_cuda(ibaml, device, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    code, _, errors = ibaml("train", SINUSOID, "--device", device)
    assert code == 2
    assert f"device is {device!r}, but this torch finds no CUDA device(s): use cpu." in errors


def test_cuda_devices_that_are_not_there(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert resolve_device("auto") == torch.device("cuda")
    assert resolve_device("cuda:0") == torch.device("cuda:0")
    with pytest.raises(ValueError, match="device is 'cuda:1', but this torch finds 1 CUDA device"):
        resolve_device("cuda:1")


def test_missing_data_says_where_it_was_looked_for(ibaml, tmp_path):
    code, _, errors = ibaml("train", "omniglot_5way_1shot_maml", "--data", tmp_path / "data")
    assert code == 2
    assert f"looked in {tmp_path / 'data'}" in errors
    assert not (tmp_path / "runs").exists()


def test_unwritable_run_folder(ibaml, tmp_path):
    (tmp_path / "file").write_text("")
    code, _, errors = train(ibaml, tmp_path / "file" / "run")
    assert code == 2
    assert "file/run cannot be written (" in errors and "choose another with --run-folder" in errors


# Training


def test_train_leaves_a_complete_run(trained):
    folder = trained / "b"
    names = {path.name for path in folder.iterdir()}
    assert names == {
        "recipe.json",
        "previous.checkpoint.safetensors",
        "environment.json",
        "README.md",
        METRICS,
        "tensorboard",
        "training.png",
        CHECKPOINT,
        MODEL,
        "model.json",
        "evaluation",
    }
    assert {path.name for path in (folder / "evaluation").iterdir()} == {
        "report.html",
        "report.json",
        "per_task.csv",
        "predictions.safetensors",
        "quantiles.png",
        "example_task.png",
    }
    assert load_tensors(folder / CHECKPOINT)[1]["step"] == 4
    recipe = runs.read_recipe(folder)
    assert recipe.trainer.num_steps == 4 and recipe.network.arguments["hidden_sizes"] == (6, 6)
    environment = json.loads((folder / "environment.json").read_text())
    assert environment["packages"]["torch"] == torch.__version__.split("+")[0] or "+" in torch.__version__
    assert (folder / "training.png").read_bytes().startswith(b"\x89PNG")


def test_train_says_what_it_does(ibaml):
    code, _, errors = train(ibaml, "run")
    assert code == 0
    assert f"Training {SINUSOID} on cpu: 4 meta-steps of 2 tasks. Everything goes to run." in errors
    assert "step 2: validation mse" in errors
    assert "Training completed at step 4; the best state is of step" in errors
    assert "Evaluate it with: ibaml evaluate run" in errors


def test_the_default_run_folder_is_named_after_the_recipe(ibaml, tmp_path):
    code, *_ = ibaml("train", SINUSOID, "--steps", 1, *SMALL)
    assert code == 0
    assert (tmp_path / "runs" / SINUSOID / MODEL).is_file()


def test_folders_with_brackets_are_shown_as_they_are(ibaml):
    code, _, errors = train(ibaml, "run[/x][red]")
    assert code == 0
    assert "ibaml evaluate run[/x][red]" in errors.replace("\n", "")


def test_seed_and_threads(ibaml, monkeypatch):
    asked = []
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    assert train(ibaml, "run", "--seed", 7, "--threads", 1)[0] == 0
    assert asked == [1]
    assert runs.read_recipe(Path("run")).trainer.seed == 7


@pytest.mark.parametrize(
    ("flags", "nearest"),
    [
        (("--trainer.num-stps", "3"), "--trainer.num-steps INT"),
        (("--algorithm.iner.num-steps", "3"), "--algorithm.inner.num-steps INT"),
        (("--network.arguments.hiden-sizes", "3"), "--network.arguments.hidden-sizes"),
        (("--stepz", "3"), "--steps {None}|INT"),
        (("--trainer.learning-rate", "fast"), "Error parsing --trainer.learning-rate"),
    ],
)
def test_misspelt_settings_get_the_nearest_name(ibaml, tmp_path, flags, nearest):
    code, _, errors = ibaml("train", SINUSOID, *flags)
    assert code == 2 and nearest in errors
    assert not (tmp_path / "runs").exists()


def test_settings_of_every_part_are_flags(ibaml):
    flags = ("--trainer.learning-rate", "0.5", "--algorithm.inner.num-steps", 2, "--network.arguments.activation=tanh")
    assert train(ibaml, "run", *flags, "--adapt", "head.*", "--trainer.no-fast")[0] == 0
    recipe = runs.read_recipe(Path("run"))
    assert (recipe.trainer.learning_rate, recipe.algorithm.inner.num_steps, recipe.trainer.fast) == (0.5, 2, False)
    assert recipe.network.arguments["activation"] == "tanh" and recipe.adapt == ("head.*",)
    assert recipe.trainer.tasks_per_step == 2
    assert MetaLearner.load("run").settings.network.arguments["activation"] == "tanh"


def test_the_help_of_a_recipe_lists_its_settings(ibaml):
    code, output, _ = ibaml("train", "sinusoid_5shot_ibaml", "--help")
    assert code == 0
    for flag in (
        "--run-folder",
        "--algorithm.linear.max-steps",
        "--network.arguments.hidden-sizes",
        "--data.num-shots",
    ):
        assert flag in output


def test_flags_may_come_before_the_name(ibaml):
    assert ibaml("train", "--steps", 1, "--run-folder", "run", SINUSOID)[0] == 0
    assert runs.read_recipe(Path("run")).trainer.num_steps == 1


def test_time_limit_then_resumption(ibaml, tmp_path):
    code, _, errors = train(ibaml, "run", "--max-minutes", 1e-9)
    assert code == 0
    assert "Training time limit at step 1" in errors
    assert f"Resume with the same command: ibaml train {SINUSOID} --run-folder run" in errors
    # The settings are those of the run, without naming them again.
    code, _, errors = ibaml("train", SINUSOID, "--run-folder", "run")
    assert code == 0
    assert "Resuming at step 1 of 4." in errors and "Training completed at step 4" in errors

    train(ibaml, "whole")
    whole, parts = (load_tensors(tmp_path / name / CHECKPOINT)[0] for name in ("whole", "run"))
    assert all(torch.equal(value, parts[name]) for name, value in whole.items())


def test_more_steps_extend_a_run(ibaml, run_of_its_own):
    code, _, errors = ibaml("train", SINUSOID, "--run-folder", "run", "--steps", 6)
    assert code == 0
    assert "Resuming at step 4 of 6." in errors and "Training completed at step 6" in errors


@pytest.mark.parametrize(
    ("setting", "difference"),
    [
        ("--algorithm.inner.num-steps=7", "algorithm.inner.num_steps was 1 and is now 7"),
        ("--data.num-shots=3", "data.num_shots was 5 and is now 3"),
        ("--trainer.learning-rate=0.5", "trainer.learning_rate was 0.001 and is now 0.5"),
    ],
)
def test_other_settings_are_refused_and_the_run_stays_whole(ibaml, tmp_path, run_of_its_own, setting, difference):
    before = (tmp_path / "run" / "recipe.json").read_text()
    code, _, errors = ibaml("train", SINUSOID, "--run-folder", "run", setting)
    assert code == 2
    assert f"run was trained with other settings: {difference}. Use the same settings to resume" in errors
    assert (tmp_path / "run" / "recipe.json").read_text() == before
    assert ibaml("train", SINUSOID, "--run-folder", "run")[0] == 0


def test_a_folder_with_another_recipe_is_refused(ibaml, tmp_path, run_of_its_own):
    before = (tmp_path / "run" / CHECKPOINT).read_bytes()
    code, _, errors = train(ibaml, "run", recipe="sinusoid_5shot_ibaml")
    assert code == 2
    assert f"run holds a run of {SINUSOID!r}, not of 'sinusoid_5shot_ibaml': choose another --run-folder." in errors
    assert (tmp_path / "run" / CHECKPOINT).read_bytes() == before


def test_divergence_is_an_error_with_advice(ibaml):
    code, _, errors = train(ibaml, "run", "--algorithm.inner.learning-rate", "1e30")
    assert code == 2
    assert "error: step 1: the hypergradient is not finite" in errors
    assert "learning_rate=1e+30" in errors and "The state before is saved in run/checkpoint.safetensors." in errors


def test_interrupt_outside_training(ibaml, monkeypatch):
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Trainer, "fit", interrupt)
    code, _, errors = train(ibaml, "run")
    assert code == 130
    assert "Interrupted." in errors


def test_a_defect_keeps_its_traceback(monkeypatch, tmp_path):
    def fail(*_: object, **__: object) -> None:
        raise AssertionError("defect")

    monkeypatch.setattr(Trainer, "fit", fail)
    with pytest.raises(AssertionError, match="defect"):
        main(["train", SINUSOID, "--run-folder", str(tmp_path), "--device", "cpu", *SMALL])


def test_sigint_exits_with_130_and_the_run_resumes(ibaml, tmp_path):
    settings = [*SMALL, "--trainer.validate-every", "5"]
    command = ["train", SINUSOID, "--run-folder", "parts", "--device", "cpu", "--steps"]
    process = subprocess.Popen(
        [sys.executable, "-c", "from ibaml.cli import main; main()", *command, "1000000", *settings],
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())},
    )
    try:
        deadline = time.monotonic() + 300  # a loaded machine starts a process slowly
        while not (tmp_path / "parts" / METRICS).exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130
    assert b"Training interrupted at step" in errors and b"Resume with the same command" in errors

    steps = load_tensors(tmp_path / "parts" / CHECKPOINT)[1]["step"] + 3
    assert ibaml("train", SINUSOID, "--run-folder", "parts", "--device", "cpu", "--steps", steps)[0] == 0
    assert ibaml("train", SINUSOID, "--run-folder", "whole", "--device", "cpu", "--steps", steps, *settings)[0] == 0
    for name in (CHECKPOINT, MODEL):
        parts, whole = (load_tensors(tmp_path / folder / name)[0] for folder in ("parts", "whole"))
        assert parts.keys() == whole.keys() and all(torch.equal(value, parts[key]) for key, value in whole.items())
    timings = ("seconds", "tasks_per_second")
    rows = [
        [{k: v for k, v in row.items() if k not in timings} for row in read_metrics(tmp_path / folder / METRICS)]
        for folder in ("parts", "whole")
    ]
    assert rows[0] == rows[1]


# Evaluating


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


# Comparing


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


# Images


def test_glyphs_from_end_to_end(ibaml, glyph_cache, monkeypatch):
    monkeypatch.setenv("IBAML_DATA", str(glyph_cache))
    for name in ("ibaml", "maml"):
        code, _, errors = ibaml(
            "train",
            f"glyphs_5way_5shot_{name}",
            "--run-folder",
            name,
            "--steps",
            2,
            "--device",
            "cpu",
            *GLYPHS,
        )
        assert code == 0, errors
        code, output, errors = ibaml("evaluate", name, "--tasks", 3)
        assert code == 0, errors
        assert "accuracy" in output and "ece_pooled" in output
        pictures = {path.name for path in Path(name, "evaluation").glob("*.png")}
        assert pictures == {"reliability.png", "selective.png", "example_task.png"}
    code, output, _ = ibaml("compare", "ibaml", "maml")
    assert code == 0
    assert "maml - ibaml" in output
    report = json.loads(Path("ibaml/evaluation/report.json").read_text())
    assert report["tasks"]["data"]["type"] == "Glyphs" and report["tasks"]["num_tasks"] == 3
