"""Training of a learner's model, with or without a run folder."""

import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ibaml import tree
from ibaml.algorithms import Algorithm, MetaParameters
from ibaml.algorithms.checks import check_targets
from ibaml.algorithms.heads.empirical_bayes import Observer
from ibaml.algorithms.model import Model
from ibaml.backbones import Extractor
from ibaml.data.prepare import Source
from ibaml.data.ragged import TaskSplits
from ibaml.learner.defaults import TABLE_TRAINER
from ibaml.learner.held_out import calibrated
from ibaml.learner.hierarchical import Solved
from ibaml.learner.online import experience_of
from ibaml.learner.run_folder import draw_training, write_environment, write_summary
from ibaml.likelihoods import Likelihood
from ibaml.posterior import FittedModel
from ibaml.train import Trainer, TrainerSettings, TrainingResult
from ibaml.train.checkpoint import CHECKPOINT
from ibaml.train.evaluate import evaluate
from ibaml.train.lock import only_training_in
from ibaml.train.processes import Processes
from ibaml.train.result import Chosen
from ibaml.train.signals import pass_on
from ibaml.types import TaskSampler

if TYPE_CHECKING:
    from rich.console import Console

LEAST_MINUTES = 1e-3
"""Of a training after a comparison that took all the time: one step."""


def require_targets(algorithm: Algorithm, likelihood: Likelihood, tasks: TaskSampler) -> None:
    """Refuses data with targets that the algorithm cannot learn from, before anything else is done with them.

    Args:
        algorithm: What is to learn.
        likelihood: Of the targets.
        tasks: The training tasks. Those of a sampler are checked as they are drawn.

    Raises:
        ValueError: Naming the task.
    """
    if not isinstance(tasks, TaskSplits) or likelihood.target_kind == "classes":
        return
    num_outputs = likelihood.num_outputs(tasks.num_outputs)
    for name, task in zip(tasks.names, tasks.tasks, strict=True):
        check_targets(algorithm, likelihood, f"y of task {name!r}", task.y, num_outputs)


def fit_model(
    model: Model,
    algorithm: Algorithm,
    source: Source,
    settings: TrainerSettings,
    *,
    data: Mapping[str, Any],
    device: torch.device,
    run_folder: Path | None,
    write: Callable[[Path, FittedModel], object],
    max_minutes: float | None,
    console: "Console | None",
    processes: Processes,
    backbone: Extractor | None = None,
    start: MetaParameters | None = None,
) -> tuple[FittedModel, TrainingResult]:
    """Trains a model on prepared tasks; arguments and errors are those of ``MetaLearner.fit``.

    Args:
        model: Network and likelihood.
        algorithm: What adapts.
        source: Samplers and preprocessing.
        settings: Settings of the outer loop.
        data: What tells the data of a run folder from others; empty without one.
        device: Where to compute.
        run_folder: Folder for the model, logs and checkpoints.
        write: Stores the fitted model in the run folder; called at every choice of a better state.
        max_minutes: Time limit of this call.
        console: Where progress is shown, if anywhere.
        processes: The processes that share each step's tasks.
        backbone: What makes features of inputs, if anything does.
        start: Meta-parameters to start from. None: those that the algorithm makes of the model.
    """
    num_draws = settings.num_steps * settings.tasks_per_step
    experience = experience_of(source.train, num_draws) if isinstance(algorithm, Observer) else None

    def fitted(chosen: Chosen) -> FittedModel:
        return FittedModel(
            model=model,
            algorithm=algorithm,
            meta=chosen.meta,
            preprocessing=source.preprocessing,
            device=device,
            temperature=chosen.temperature,
            abstention=chosen.abstention,
            experience=experience,
            step=chosen.step,
            raw_inputs=trainer.raw_inputs if source.preprocessing is None else None,
            backbone=backbone,
        )

    def store(chosen: Chosen) -> None:
        assert run_folder is not None
        write(run_folder, fitted(chosen))
        write_environment(run_folder, num_processes=processes.size, data=data)

    trainer = processes.together(
        lambda: Trainer(
            model,
            algorithm,
            settings,
            start=start,
            run_folder=run_folder,
            device=device,
            console=console,
            processes=processes,
            data_identity=None if run_folder is None else dict(data),
            on_chosen=None if run_folder is None else store,
        )
    )
    result = trainer.fit(source.train, source.validation, max_minutes=max_minutes)
    if run_folder is not None:
        processes.on_first(lambda: _finish(run_folder))
    return fitted(result.chosen), result


def store_solved(
    model: Model,
    algorithm: Algorithm,
    solved: Solved,
    source: Source,
    *,
    begun: float,
    console: "Console | None",
    seed: int,
    data: Mapping[str, Any],
    device: torch.device,
    run_folder: Path | None,
    write: Callable[[Path, FittedModel], object],
    processes: Processes,
    backbone: Extractor | None,
) -> tuple[FittedModel, TrainingResult]:
    """Does for a model that was estimated in closed form what training does at its end.

    Args:
        model: What ``solved.suited`` describes.
        algorithm: Likewise.
        solved: What was estimated.
        source: Its tasks; those of validation tell the output temperature.
        begun: When its estimation began, by ``time.monotonic``.
        console: Where progress is shown, if anywhere.
        seed: Seed of the learner.
        data: What tells the data of a run folder from others; empty without one.
        device: Where to compute.
        run_folder: Folder for the model, if it is to be stored.
        write: Stores it there.
        processes: The processes that share the validation tasks.
        backbone: What makes features of inputs, if anything does.

    Raises:
        ValueError: If a validation task does not fit, or the folder holds a training by steps.
        OSError: If the folder cannot be written, or a training runs in it.
    """
    like = tree.leaves(model.adapted)[0]
    fitted = FittedModel(
        model=model,
        algorithm=algorithm,
        meta=tree.map(lambda leaf: leaf.to(device=like.device, dtype=like.dtype), solved.meta),
        preprocessing=source.preprocessing,
        device=device,
        step=solved.num_steps,
        experience=experience_of(source.train, num_draws=0),  # Each task of data counts once.
        backbone=backbone,
    )
    nll = math.inf
    if source.validation is not None:
        # As many tasks, and the same ones, as a trainer of tables takes.
        held_out = evaluate(
            fitted,
            source.validation,
            num_tasks=TABLE_TRAINER.num_validation_tasks,
            seed=seed + 10**6,
            console=console,
            processes=processes,
        )
        fitted, nll = calibrated(fitted, [held_out]), held_out.report["nll"].mean
    chosen = Chosen(fitted.meta, solved.num_steps, nll, fitted.temperature, fitted.abstention)
    if run_folder is not None:
        processes.on_first(lambda: _store(run_folder, fitted, write, processes, data))
    seconds = time.monotonic() - begun
    ended = "time limit" if solved.is_late else "completed"
    return fitted, TrainingResult(chosen, fitted.meta, solved.num_steps, ended, seconds)


def pass_on_signal(result: TrainingResult, settings: TrainerSettings, run_folder: str | Path | None) -> None:
    """Passes a signal that ended training on to the program; see ``ibaml.train.signals``.

    Args:
        result: Of the training.
        settings: Settings of the outer loop.
        run_folder: Where all is saved, if anywhere.

    Raises:
        KeyboardInterrupt: Of SIGINT without a run folder.
    """
    kept = "there is no run folder, so that it would start anew"
    if run_folder is not None:
        kept = f"all is saved in {run_folder}, and the same call goes on from there"
    told = f"at step {result.num_steps} of {settings.num_steps}; {kept}."
    pass_on(result.ended_by, told, is_saved=run_folder is not None)


def _store(
    folder: Path,
    fitted: FittedModel,
    write: Callable[[Path, FittedModel], object],
    processes: Processes,
    data: Mapping[str, Any],
) -> None:
    with only_training_in(folder):
        if (folder / CHECKPOINT).exists():
            raise ValueError(
                f"{folder} holds a training by steps, whose checkpoint and metrics would lie beside a model of another "
                "kind: this one was estimated in closed form. Choose another run folder."
            )
        write(folder, fitted)
        write_environment(folder, num_processes=processes.size, data=data)
        write_summary(folder)


def _finish(run_folder: Path) -> None:
    draw_training(run_folder)
    write_summary(run_folder)
