"""Settings of a training, and what it shows while it goes on."""

import dataclasses
import math
import re

import pytest
from rich.console import Console
from tests.train.trainings import ALGORITHMS, SMALL, image_model, image_tasks, sinusoid_model

from ibaml.data import SinusoidTasks
from ibaml.train import progress, trainer
from ibaml.train.trainer import (
    Trainer,
    TrainerSettings,
)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        *[
            (field, 0, f"{field} must be at least 1, but is 0")
            for field in (
                "num_steps",
                "tasks_per_step",
                "validate_every",
                "num_validation_tasks",
                "checkpoint_every",
                "log_every",
                "tasks_per_chunk",
            )
        ],
        ("num_steps", -3, "num_steps must be at least 1, but is -3"),
        *[
            (field, value, f"{field} must be positive and finite, but is {value}")
            for field in ("learning_rate", "log_var_learning_rate", "gradient_clip")
            for value in (0.0, -1.0, math.inf, math.nan)
        ],
        ("schedule", "linear", "schedule must be 'constant' or 'cosine', but is 'linear'"),
        ("draws", "all", "draws must be 'per_task' or None, but is 'all'"),
    ],
)
def test_settings_are_validated(field, value, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        TrainerSettings(**{field: value})


def test_settings_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        SMALL.num_steps = 3


# The progress display


class Terminal:
    """A terminal that remembers what was written."""

    def __init__(self) -> None:
        self.text = ""

    def write(self, text: str) -> int:
        self.text += text
        return len(text)

    def flush(self) -> None:
        pass

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("score", ["acc", "mse"])
def test_a_terminal_shows_a_bar(score, monkeypatch):
    monkeypatch.setattr(progress, "_SECONDS_BEFORE", -1.0)
    terminal = Terminal()
    console = Console(file=terminal, force_terminal=True, width=200)
    if score == "acc":
        Trainer(image_model(), ALGORITHMS["maml"], SMALL, console=console).fit(image_tasks())
    else:
        tasks = SinusoidTasks(num_shots=3, num_queries=3)
        Trainer(sinusoid_model(), ALGORITHMS["ibaml"], SMALL, console=console).fit(tasks)
    assert "6/6" in terminal.text
    assert re.search(rf"loss .* {score} .* inner grad .* residual .* tasks/s", terminal.text)


def test_without_a_terminal_a_line_appears_now_and_then(tmp_path, monkeypatch):
    clock = iter(range(0, 10**6, 7))
    monkeypatch.setattr(trainer.time, "monotonic", lambda: float(next(clock)))
    with (tmp_path / "output").open("w") as file:
        console = Console(file=file, width=200)
        Trainer(image_model(), ALGORITHMS["maml"], SMALL, console=console).fit(image_tasks())
    lines = (tmp_path / "output").read_text().splitlines()
    assert lines and all(re.match(r"step \d/6 loss .* tasks/s, \d+\.\d min left$", line) for line in lines)
