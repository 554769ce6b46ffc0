"""Signals end training after the running step, and then reach the program."""

import os
import signal
import sys

import numpy as np
import pytest

from ibaml import MetaLearner
from ibaml.networks import MLP
from ibaml.train.checkpoint import CHECKPOINT, load_tensors
from ibaml.train.processes import Processes
from ibaml.train.progress import say
from ibaml.train.signals import caught_signals, pass_on, results_are_read

TASKS = [(x, x.sum(1)) for x in np.random.default_rng(0).normal(size=(4, 8, 3))]


@pytest.fixture
def received(monkeypatch):
    """Signals as the program gets them; SIGINT as in a program that does nothing about it."""
    found: list[int] = []
    numbers = (signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.signal(number, lambda number, _: found.append(number)) for number in numbers}
    # Who starts the tests may have it ignored.
    before[signal.SIGINT] = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield found
    for number, handler in before.items():
        signal.signal(number, handler)


def fit(number: int, monkeypatch: pytest.MonkeyPatch, **arguments: object) -> MetaLearner:
    from ibaml.train import trainer

    real = trainer.draw_step

    def draw_step(*given: object, **named: object) -> object:
        signal.raise_signal(number)
        return real(*given, **named)

    network = MLP(1, input_shape=3, hidden_sizes=(4,), norm="none")
    with monkeypatch.context() as patched:
        patched.setattr(trainer, "draw_step", draw_step)
        return MetaLearner(network, "maml", likelihood="gaussian").fit(TASKS, num_steps=3, **arguments)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_request_to_end_reaches_the_program_after_all_is_saved(number, received, monkeypatch, tmp_path, capsys):
    for arguments, told in (
        ({}, "there is no run folder"),
        ({"run_folder": tmp_path}, f"all is saved in {tmp_path}, and"),
    ):
        received.clear()
        result = fit(number, monkeypatch, **arguments).training_result
        assert (result.num_steps, result.stop_reason, result.ended_by) == (1, "interrupted", number)
        assert received == [number]
        assert f"Training was ended by {number.name} at step 1 of 3; {told}" in capsys.readouterr().err
    assert (tmp_path / "checkpoint.safetensors").exists()


def test_an_interrupted_training_without_a_folder_raises(received, monkeypatch, tmp_path, capsys):
    with pytest.raises(KeyboardInterrupt):
        fit(signal.SIGINT, monkeypatch)
    assert fit(signal.SIGINT, monkeypatch, run_folder=tmp_path).training_result.stop_reason == "interrupted"
    assert capsys.readouterr().err.count("Training was ended by SIGINT at step 1 of 3") == 2


def test_who_reads_results_gets_no_signal(received):
    with results_are_read():
        pass_on(signal.SIGTERM, "told.", is_saved=True)
    assert received == []
    pass_on(None, "told.", is_saved=False)
    pass_on(signal.SIGTERM, "told.", is_saved=True)
    assert received == [signal.SIGTERM]


def test_a_hang_up_that_is_ignored_stays_so(received):
    """As under nohup."""
    with caught_signals() as caught:
        signal.raise_signal(signal.SIGHUP)
    assert caught == [signal.SIGHUP] and received == []
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with caught_signals() as caught:
        signal.raise_signal(signal.SIGHUP)
    assert caught == []


class Broken:
    """A stream whose reader is gone, as a closed pipe, terminal or full disk."""

    encoding = "utf-8"

    def __init__(self, error: Exception, *, is_terminal: bool) -> None:
        self.error = error
        self.isatty = lambda: is_terminal

    def write(self, text: str) -> int:
        raise self.error

    def flush(self) -> None:
        raise self.error

    def fileno(self) -> int:
        raise OSError


@pytest.mark.parametrize("is_terminal", [False, True])
@pytest.mark.parametrize(
    "error", [OSError(5, "Input/output error"), OSError(28, "No space"), ValueError("closed file")]
)
def test_progress_that_nobody_sees_ends_no_training(error, is_terminal):
    from rich.console import Console

    console = Console(file=Broken(error, is_terminal=is_terminal), force_terminal=is_terminal)
    network = MLP(1, input_shape=3, hidden_sizes=(4,), norm="none")
    learner = MetaLearner(network, "maml", likelihood="gaussian").fit(TASKS, TASKS, num_steps=2, progress=console)
    assert learner.training_result.stop_reason == "completed"
    assert not say(console, "A line of the command line.") and say(None, "Nobody is told.")


def test_a_pipe_that_nobody_reads_ends_no_training(monkeypatch):
    """Of which rich makes a SystemExit, after it has sent standard output nowhere."""
    from rich.console import Console

    with open(os.devnull, "w") as nowhere:
        monkeypatch.setattr(sys, "stdout", nowhere)
        console = Console(file=Broken(BrokenPipeError(32, "Broken pipe"), is_terminal=False))
        network = MLP(1, input_shape=3, hidden_sizes=(4,), norm="none")
        learner = MetaLearner(network, "maml", likelihood="gaussian").fit(TASKS, TASKS, num_steps=2, progress=console)
        assert not say(Console(file=console.file), "A line of the command line.")
    assert learner.training_result.stop_reason == "completed"


class Abandoned(Processes):
    """One process whose launcher has died."""

    def __init__(self) -> None:
        super().__init__(launcher=os.getppid() + 1)


def test_processes_whose_launcher_has_died_save_and_end(tmp_path):
    assert not Processes(launcher=os.getppid()).is_abandoned and not Processes().is_abandoned
    network = MLP(1, input_shape=3, hidden_sizes=(4,), norm="none")
    learner = MetaLearner(network, "maml", likelihood="gaussian")
    result = learner.fit(TASKS, num_steps=5, run_folder=tmp_path, processes=Abandoned()).training_result
    assert (result.num_steps, result.stop_reason, result.ended_by) == (1, "interrupted", None)
    assert load_tensors(tmp_path / CHECKPOINT)[1]["step"] == 1
