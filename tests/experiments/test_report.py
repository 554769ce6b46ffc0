import csv
import json

import pytest

from ibaml import cli
from ibaml.experiments.fig1.report import FIG1
from ibaml.experiments.fig1.run import Fig1Settings
from ibaml.experiments.registry import EXPERIMENTS, experiment_name
from ibaml.experiments.report import Place, run_experiment

SMALL = {"condition_numbers": (20.0,), "inner_steps": (1, 2), "linear_steps": (1, 2), "num_tasks": 2, "num_seeds": 2}
SMALL_ON_COMMAND_LINE = (
    "--condition-numbers 20 --inner-steps 1 2 --linear-steps 1 2 --num-tasks 2 --num-seeds 2".split()
)


def run(*arguments):
    with pytest.raises(SystemExit) as stopped:
        cli.main(list(arguments))
    return stopped.value.code


def test_the_folder_explains_itself(tmp_path):
    summary = run_experiment(FIG1, Fig1Settings(**SMALL), Place(tmp_path / "new" / "fig1"))
    folder = tmp_path / "new" / "fig1"
    names = {path.name for path in folder.iterdir()}
    assert names == {
        "README.md",
        "settings.json",
        "environment.json",
        "errors.csv",
        "bounds.csv",
        "fig1.png",
        "bounds.png",
    }
    assert (folder / "README.md").read_text() == summary
    assert json.loads((folder / "settings.json").read_text())["num_tasks"] == 2
    environment = json.loads((folder / "environment.json").read_text())
    assert environment["seconds"] > 0
    assert "torch" in environment["packages"]
    with (folder / "errors.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["num_inner_steps"] for row in rows} == {"1", "2"}
    assert (folder / "fig1.png").read_bytes().startswith(b"\x89PNG")


def test_the_command_line_runs_the_experiment_and_prints_its_summary(tmp_path, capsys):
    assert run("reproduce", "fig1", "--out", str(tmp_path / "out"), *SMALL_ON_COMMAND_LINE) == 0
    assert capsys.readouterr().out.startswith("# Fig. 1")
    assert json.loads((tmp_path / "out" / "settings.json").read_text())["linear_steps"] == [1, 2]


def test_the_default_folder_is_named_after_the_experiment(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run("reproduce", "fig1", *SMALL_ON_COMMAND_LINE) == 0
    assert (tmp_path / "reproductions" / "fig1" / "README.md").is_file()


@pytest.mark.parametrize(("name", "experiment"), EXPERIMENTS.items())
def test_experiments_are_named_as_on_the_command_line(name, experiment):
    assert experiment_name(experiment.settings()) == name


def test_settings_of_no_experiment_are_refused():
    with pytest.raises(TypeError, match="settings must be those of one of fig1, fig2, .*, study, got int."):
        experiment_name(3)


def test_a_setting_without_a_meaning_is_refused_with_a_sentence(tmp_path, capsys):
    assert run("reproduce", "fig1", "--out", str(tmp_path), "--num-seeds", "1") == 2
    assert "num_seeds must be at least 2" in " ".join(capsys.readouterr().err.split())


def test_a_folder_that_cannot_be_written_shows_before_any_work(tmp_path):
    (tmp_path / "file").touch()
    calls = []
    with pytest.raises(OSError, match=r"file/fig1 cannot be written"):
        place = Place(tmp_path / "file" / "fig1", on_progress=lambda *done: calls.append(done))
        run_experiment(FIG1, Fig1Settings(**SMALL), place)
    assert not calls


@pytest.mark.parametrize("experiment", ["fig2", "table1", "fig3", "sinusoid"])
def test_cuda_without_cuda_is_refused_with_a_sentence(tmp_path, capsys, monkeypatch, experiment):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert run("reproduce", experiment, "--out", str(tmp_path), "--device", "cuda") == 2
    assert "CUDA" in capsys.readouterr().err


@pytest.mark.parametrize("experiment", ["table1", "fig3"])
def test_missing_data_is_named(tmp_path, capsys, monkeypatch, experiment):
    monkeypatch.setenv("IBAML_DATA", str(tmp_path / "empty"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    arguments = ("--out", str(tmp_path / "out"), "--data", str(tmp_path), "--device", "cpu", "--steps", "1")
    assert run("reproduce", experiment, *arguments) == 2
    assert "tiny_imagenet_fewshot.zip" in capsys.readouterr().err
