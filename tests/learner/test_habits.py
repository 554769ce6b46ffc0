"""Progress of a learner's methods where it is asked for, and paths that begin with ~."""

import io
import sys

import numpy as np
import pytest

from ibaml import MetaLearner, plots
from ibaml.cli import main
from ibaml.train import progress


@pytest.fixture(scope="module")
def tasks():
    rng = np.random.default_rng(0)
    inputs = [rng.normal(size=(12, 1)) for _ in range(8)]
    return [(x, rng.normal(2, 0.5) * x[:, 0] + rng.normal(0, 0.1, 12)) for x in inputs]


@pytest.fixture(scope="module")
def learner(tasks):
    return MetaLearner(likelihood="gaussian").fit(tasks)


@pytest.fixture
def home(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    return tmp_path


class Terminal(io.StringIO):
    """A stream that says that somebody looks at it."""

    def isatty(self) -> bool:
        return True


def written(monkeypatch, stream: io.StringIO, learner: MetaLearner, tasks, verbose: bool | None) -> str:
    """Returns what appears on stderr while everything takes long."""
    monkeypatch.setattr(progress, "_SECONDS_BEFORE", -1.0)
    monkeypatch.setattr(progress, "_SECONDS_BETWEEN_LINES", -1.0)
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setenv("TERM", "xterm")
    learner = learner.with_fitted(learner.fitted_model)
    learner.verbose = verbose
    learner.evaluate(tasks)
    learner.calibrate(2 * tasks)
    learner.learning_curve(tasks, [1, 2])
    learner.fit(tasks)
    return stream.getvalue()


def test_a_terminal_is_shown_every_method_that_takes_long(monkeypatch, learner, tasks):
    text = written(monkeypatch, Terminal(), learner, tasks, None)
    assert "evaluate" in text and "8/8" in text
    assert "estimate" in text and "Chosen: " in text


def test_a_pipe_stays_silent_unless_asked(monkeypatch, learner, tasks):
    assert written(monkeypatch, io.StringIO(), learner, tasks, None) == ""
    assert written(monkeypatch, Terminal(), learner, tasks, False) == ""
    text = written(monkeypatch, io.StringIO(), learner, tasks, True)
    assert "evaluate 8/8, 0.0 min left" in text and "estimate 3/5 left-out groups" in text


def test_paths_of_the_home_folder_are_found(home, learner, tasks):
    assert learner.save("~/model") == home / "model"
    assert MetaLearner.load("~/model").choice == learner.choice
    MetaLearner(likelihood="gaussian").fit(tasks, run_folder="~/run")
    assert (home / "run" / "model.json").is_file()
    assert plots.save(plots.learning_curve(learner.learning_curve(tasks, [1, 2])), "~/curve.png").is_file()


def test_the_command_expands_them_in_its_options_too(home, capsys):
    with pytest.raises(SystemExit) as caught:
        main(["predict", "~/model", "--support=~/known.csv", "--query", "~/asked.csv", "--out=~/out.csv"])
    assert caught.value.code == 2
    assert f"{home}/model" in capsys.readouterr().err
