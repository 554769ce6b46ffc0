"""`ibaml train` from end to end, in this process; one with a real signal in its own."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from tests.cli.small import SINUSOID, SMALL, train

from ibaml.cli import main
from ibaml.learner import MetaLearner
from ibaml.learner.folder import MODEL
from ibaml.recipes import runs
from ibaml.train import Trainer
from ibaml.train.checkpoint import CHECKPOINT, load_tensors
from ibaml.train.log import METRICS, read_metrics


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
        (("--stepz", "3"), "--steps NUMBER"),
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
