"""``ibaml compare RUN --baselines`` from end to end."""

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ibaml.cli import main
from ibaml.learner import MetaLearner
from ibaml.train.checkpoint import CHECKPOINT, load_tensors

SMALL = "--trainer.tasks-per-step 2 --trainer.validate-every 2 --trainer.num-validation-tasks 3 --trainer.no-fast"
TRAIN = f"train sinusoid_5shot_maml --run-folder run --steps 2 --device cpu --data.num-test-queries 6 {SMALL}"
COMPARE = "compare run --tasks 4 --device cpu --seconds 0.1 --baselines"


@pytest.fixture
def ibaml(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[str], tuple[Any, str, str]]:
    """Runs a command in an empty folder and returns its exit code, standard output and standard error."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "250")

    def run(command: str) -> tuple[Any, str, str]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            main(command.split())
        return caught.value.code, *capsys.readouterr()

    return run


def test_baselines_beside_a_run(ibaml: Callable[[str], tuple[Any, str, str]]) -> None:
    assert ibaml(TRAIN)[0] == 0
    code, output, errors = ibaml(f"{COMPARE} ridge maml")
    assert code == 0, errors
    assert "4 paired test tasks; intervals are 95%" in output
    lines = [line for line in output.splitlines() if line.strip()]
    names = ["method", "sinusoid_5shot_maml", "ridge", "maml"]
    # Scores, differences and notes, in parts that eighty columns can hold.
    assert [line.split()[0] for line in lines[1:9]] == [*names, "minus", *names[1:]]
    assert lines[9].split() == ["method", "note"] and max(map(len, lines[:9])) <= 80 and "…" not in output
    assert "Tables, picture and fitted baselines are in run/baselines." in errors
    assert Path("run/baselines/comparison.png").stat().st_size > 10_000
    with Path("run/baselines/comparison.csv").open() as file:
        rows = list(csv.reader(file))
    assert [row[0] for row in rows] == names
    stored = json.loads(Path("run/baselines/comparison.json").read_text())
    assert stored["methods"][0]["seconds"] == load_tensors(Path("run") / CHECKPOINT)[1]["seconds"]
    assert MetaLearner.load("run/baselines/maml").algorithm.name == "maml"

    # All of them; those that are there are used again, and what is left of the run is as it was.
    code, output, errors = ibaml(COMPARE)
    assert code == 0, errors
    assert "ridge: as fitted in run/baselines/ridge" in errors and "pooled: fitting" in errors
    again = [line.split() for line in output.splitlines() if line.strip()]
    assert {words[0] for words in again} == {"4", "minus", *names, "neighbours", "pooled", "gp"}
    assert all(line.split() in again for line in lines[1:])
    assert not Path("run/evaluation").exists()


def test_what_does_not_fit_is_refused(ibaml: Callable[[str], tuple[Any, str, str]]) -> None:
    assert ibaml(TRAIN)[0] == 0
    for command, message in (
        ("compare run other --baselines", "--baselines are compared with one run, but there are 2 run folders"),
        ("compare run other --seconds 3", "--seconds is for --baselines; runs are compared as `ibaml evaluate` left"),
        (f"{COMPARE} rigde", "there is no baseline 'rigde'; there are logistic_regression,"),
        (f"{COMPARE} prototypes", "baseline 'prototypes' does not suit these tasks; those that do are ridge,"),
        ("compare other --baselines", "other has no model.safetensors"),
    ):
        code, _, errors = ibaml(command)
        assert code == 2 and message in errors, errors
    (Path("run") / CHECKPOINT).unlink()
    code, _, errors = ibaml("compare run --device cpu --baselines")
    assert code == 2 and "run has no checkpoint.safetensors, which would say how long it was trained" in errors
    Path("run/recipe.json").unlink()
    code, _, errors = ibaml(COMPARE)
    assert code == 2 and "run was not trained by a recipe, which would name its tasks" in errors
