"""The display of progress: when it is shown, and what it says."""

import io
import sys

import pytest
from rich.console import Console

from ibaml.train import progress
from ibaml.train.progress import ProgressBar, console_of


class Clock:
    """A clock that the test moves."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    return clock


def shown(is_terminal: bool, clock: Clock, times: list[float]) -> str:
    """Returns what is written while one part of ten is done at each of the times."""
    file = io.StringIO()
    with ProgressBar(Console(file=file, force_terminal=is_terminal, width=120), "evaluate", 10) as bar:
        for done, clock.now in enumerate(times, 1):
            bar.update(done)
    return file.getvalue()


def test_what_takes_less_than_two_seconds_shows_no_bar(clock):
    assert shown(True, clock, [0.5, 1.9]) == ""


def test_a_bar_on_a_terminal_shows_parts_and_the_time_left(clock):
    text = shown(True, clock, [1.0, 2.5, 3.0])
    assert "evaluate" in text and "3/10" in text and "left" in text


def test_elsewhere_there_is_a_line_now_and_then(clock):
    assert shown(False, clock, [10.0, 21.0, 30.0, 45.0]) == (
        "evaluate 2/10, 1.4 min left\nevaluate 4/10, 1.1 min left\n"
    )


@pytest.mark.parametrize("is_terminal", [True, False])
def test_by_default_only_a_terminal_is_shown_progress(monkeypatch, is_terminal):
    stream = io.StringIO()
    stream.isatty = lambda: is_terminal
    monkeypatch.setattr(sys, "stderr", stream)
    assert (console_of(None) is not None) == is_terminal
    assert console_of(True) is not None and console_of(False) is None


def test_a_closed_stderr_is_no_terminal(monkeypatch):
    stream = io.StringIO()
    stream.close()
    for missing in (stream, None):
        monkeypatch.setattr(sys, "stderr", missing)
        assert console_of(None) is None
