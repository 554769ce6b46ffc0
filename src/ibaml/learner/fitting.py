"""Training of a learner's model, with or without a run folder."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ibaml.algorithms import Algorithm
from ibaml.algorithms.model import Model
from ibaml.backbones import Extractor
from ibaml.data.prepare import Source, SplitSettings
from ibaml.learner.identity import data_identity
from ibaml.learner.run_folder import draw_training, write_environment, write_summary
from ibaml.posterior import FittedModel
from ibaml.train import Trainer, TrainerSettings, TrainingResult
from ibaml.train.processes import Processes
from ibaml.train.result import Chosen

if TYPE_CHECKING:
    from rich.console import Console


def fit_model(
    model: Model,
    algorithm: Algorithm,
    source: Source,
    settings: TrainerSettings,
    *,
    splits: SplitSettings,
    device: torch.device,
    run_folder: Path | None,
    write: Callable[[Path, FittedModel], object],
    max_minutes: float | None,
    console: "Console | None",
    processes: Processes,
    backbone: Extractor | None = None,
) -> tuple[FittedModel, TrainingResult]:
    """Trains a model on prepared tasks; arguments and errors are those of ``MetaLearner.fit``.

    Args:
        model: Network and likelihood.
        algorithm: What adapts.
        source: Samplers and preprocessing.
        settings: Settings of the outer loop.
        splits: How tasks are split, for the identity of the run.
        device: Where to compute.
        run_folder: Folder for the model, logs and checkpoints.
        write: Stores the fitted model in the run folder; called at every choice of a better state.
        max_minutes: Time limit of this call.
        console: Where progress is shown, if anywhere.
        processes: The processes that share each step's tasks.
        backbone: What makes features of inputs, if anything does.
    """

    def fitted(chosen: Chosen) -> FittedModel:
        return FittedModel(
            model=model,
            algorithm=algorithm,
            meta=chosen.meta,
            preprocessing=source.preprocessing,
            device=device,
            temperature=chosen.temperature,
            abstention=chosen.abstention,
            step=chosen.step,
            backbone=backbone,
        )

    def store(chosen: Chosen) -> None:
        assert run_folder is not None
        write(run_folder, fitted(chosen))
        write_environment(run_folder, num_processes=processes.size)

    trainer = processes.together(
        lambda: Trainer(
            model,
            algorithm,
            settings,
            run_folder=run_folder,
            device=device,
            console=console,
            processes=processes,
            data_identity=None if run_folder is None else data_identity(source, splits),
            on_chosen=None if run_folder is None else store,
        )
    )
    result = trainer.fit(source.train, source.validation, max_minutes=max_minutes)
    if run_folder is not None:
        processes.on_first(lambda: _finish(run_folder))
    return fitted(result.chosen), result


def _finish(run_folder: Path) -> None:
    draw_training(run_folder)
    write_summary(run_folder)


def console_of(progress: "bool | Console") -> "Console | None":
    """Returns where progress is shown: a console of one's own, stderr for True, None for False."""
    if not isinstance(progress, bool):
        return progress
    if not progress:
        return None
    from rich.console import Console  # only for those who want to see the progress

    return Console(stderr=True)
