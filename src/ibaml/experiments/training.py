"""Recipes trained in an experiment's folder, in slices if asked to, and how far they have come."""

from pathlib import Path
from typing import NamedTuple

import torch

from ibaml.experiments.report import Place
from ibaml.learner.folder import MODEL
from ibaml.recipes import Recipe, runs
from ibaml.train.checkpoint import CHECKPOINT, load_tensors


class TrainedRun(NamedTuple):
    """How far the training of a recipe has come.

    Attributes:
        recipe: The run's recipe.
        folder: The run folder.
        num_steps: Meta-steps taken so far.
        best_step: Meta-step of the chosen state, the one with the lowest nll on validation tasks; None before any.
        seconds: Seconds of training, validation included, over all calls.
    """

    recipe: Recipe
    folder: Path
    num_steps: int
    best_step: int | None
    seconds: float

    @property
    def is_finished(self) -> bool:
        """Whether all meta-steps have been taken."""
        return self.num_steps >= self.recipe.trainer.num_steps

    @property
    def progress(self) -> str:
        """Meta-steps taken and planned, such as ``400 of 1,000``."""
        return f"{self.num_steps:,} of {self.recipe.trainer.num_steps:,}"


def run_folder(recipe: Recipe, folder: Path) -> Path:
    """Returns where an experiment keeps the run of a recipe."""
    return folder / "runs" / recipe.name


def read_run(recipe: Recipe, folder: Path) -> TrainedRun:
    """Returns how far a recipe has come in an experiment's folder.

    Args:
        recipe: The recipe.
        folder: The experiment's output folder.

    Raises:
        ValueError: If a file is damaged.
    """
    where = run_folder(recipe, folder)
    if not (where / CHECKPOINT).is_file():
        return TrainedRun(recipe, where, 0, None, 0.0)
    progress = load_tensors(where / CHECKPOINT)[1]
    best_step = int(progress["best_step"]) if (where / MODEL).is_file() else None
    return TrainedRun(recipe, where, int(progress["step"]), best_step, float(progress["seconds"]))


def train_or_resume(
    recipe: Recipe, place: Place, *, device: torch.device, max_minutes: float | None = None
) -> TrainedRun:
    """Trains a recipe in the experiment's folder, or resumes it; a finished run is left as it is.

    Args:
        recipe: The recipe.
        place: The experiment's folder, data and console.
        device: Where to compute.
        max_minutes: Stop after so many minutes, ready to go on in the next call.

    Raises:
        FileNotFoundError: If a data file is not found.
        ValueError: If a data file is damaged, or the folder holds a run with other settings.
        OSError: If the folder cannot be written.
        TrainingDivergedError: If a loss or gradient is not finite.
        KeyboardInterrupt: If training was interrupted; everything is saved.
    """
    result = runs.train_run(
        recipe,
        run_folder(recipe, place.folder),
        data=place.data,
        device=device,
        max_minutes=max_minutes,
        console=place.console,
    )
    if result.stop_reason == "interrupted":
        raise KeyboardInterrupt
    return read_run(recipe, place.folder)
