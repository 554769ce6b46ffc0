"""The training loop; all side effects of training live here.

A step draws tasks, averages their hypergradients and hands them to a ``torch.optim`` optimiser. Everything that
decides the future of a run (meta-parameters, optimiser, generator, step) is in its checkpoint, so a run that was
interrupted and resumed ends with the same bits as one that was not (on a CPU, with the same versions, thread count and
number of processes; with another number of processes sums are rounded in another order).
"""

import contextlib
import dataclasses
import json
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ibaml import records, tree
from ibaml.algorithms import Algorithm, MetaParameters
from ibaml.algorithms.kernels import advice_on_torch_func, is_beyond_torch_func
from ibaml.algorithms.model import Model
from ibaml.data.raw import RawInputs, raw_inputs_of
from ibaml.fast import DeviceLostError, is_device_lost, keep_freed_memory
from ibaml.posterior import FittedModel
from ibaml.train.checkpoint import (
    CHECKPOINT,
    TrainingState,
    digest,
    find_checkpoint,
    how_to_resume,
    meta_to_tensors,
    require_writable,
    restore_state,
    save_state,
    where_saved,
)
from ibaml.train.draw import check_drawn, draw_step
from ibaml.train.evaluate import evaluate, tempered
from ibaml.train.lock import only_training_in
from ibaml.train.log import TrainingBar, TrainingLog
from ibaml.train.optimizer import parameter_groups
from ibaml.train.processes import Processes, ProcessLostError, placed
from ibaml.train.progress import say
from ibaml.train.result import Chosen, StopReason, TrainingDivergedError, TrainingResult, raise_divergence
from ibaml.train.settings import ONLY_HOW, TrainerSettings
from ibaml.train.signals import caught_signals
from ibaml.train.step import NUM_CALLS_THAT_PAY, HypergradientStep, TaskHypergradients
from ibaml.train.temperature import fit_abstention, recalibrate
from ibaml.train.unsolved import LEAST_STEPS, warn_of_bias
from ibaml.types import Episode, HypergradientInfo, TaskSampler, Tensor

if TYPE_CHECKING:
    from rich.console import Console


class Trainer:
    """Meta-trains a model; with a run folder it also logs, checkpoints and resumes.

    Args:
        model: Network and likelihood.
        algorithm: What computes the hypergradients.
        settings: Settings of the loop.
        start: Meta-parameters to start from. None: those that the algorithm makes of the model.
        run_folder: Where checkpoints and logs go; a checkpoint in it is resumed. None: nothing is written.
        device: Where to compute; with several processes, the device of this one.
        console: Where progress is shown; None is silent.
        processes: The processes that share each step's tasks; the first one alone writes and shows progress.
        data_identity: JSON values that tell the data from others; a checkpoint of a run on others is refused.
        on_chosen: Called in the first process, after the checkpoint is written, with the chosen state, whenever it is
            new; needs ``run_folder``.

    Attributes:
        raw_inputs: What the inputs of the first training task were like, once ``fit`` has begun.

    Raises:
        ValueError: If there are more processes than tasks in a step, or weights are to decay and none is shared.
    """

    def __init__(
        self,
        model: Model,
        algorithm: Algorithm,
        settings: TrainerSettings,
        *,
        start: MetaParameters | None = None,
        run_folder: Path | None = None,
        device: torch.device | str = "cpu",
        console: "Console | None" = None,
        processes: Processes | None = None,
        data_identity: Mapping[str, Any] | None = None,
        on_chosen: Callable[[Chosen], None] | None = None,
    ) -> None:
        self.processes = processes or Processes()
        if self.processes.size > settings.tasks_per_step:
            raise ValueError(
                f"tasks_per_step is {settings.tasks_per_step}, fewer than the {self.processes.size} processes, which "
                "would leave some without work: use fewer processes or more tasks."
            )
        self.device = torch.device(device)
        self.model = model.to(self.device)
        self.algorithm = algorithm
        self.settings = settings
        self.run_folder = run_folder
        self.console = console if self.processes.is_first else None

        self._generator = torch.Generator().manual_seed(settings.seed)
        initial = algorithm.init(self.model.adapted, self.model.shared, generator=self._generator)
        # The optimiser holds copies: it changes them in place, while the model's initial values are the user's.
        self._meta = tree.map(lambda leaf: leaf.detach().clone(), initial if start is None else start)
        self._hypergradients = HypergradientStep(
            self.model,
            algorithm,
            # Writing programs takes seconds, which a short training never gets back.
            programs=None if settings.num_steps >= NUM_CALLS_THAT_PAY else False,
            precision=settings.precision,
            **{name: getattr(settings, name) for name in ONLY_HOW},
        )
        self._optimizer = torch.optim.AdamW(parameter_groups(self._meta, algorithm, model, settings))
        self.raw_inputs: RawInputs | None = None
        self._step, self._seconds = 0, 0.0
        self._chosen = Chosen(self._snapshot())
        self._data_identity = data_identity
        self._on_chosen = on_chosen
        self._written_step = self._num_outputs = 0
        self._is_validation_due, self._running = False, dict[str, Any]()
        self._stop_wishes: Callable[[], tuple[bool, bool]] = lambda: (False, False)
        self._agreed_stop = (False, False)
        # What a checkpoint does not hold but depends on; another frozen body would go unnoticed otherwise.
        unsaved = {**self.model.frozen, **dict(self.model.network.named_buffers())}
        self._frozen_digest = (
            digest(tree.detach({name: value.cpu() for name, value in unsaved.items()})) if unsaved else None
        )

    def fit(
        self,
        train_tasks: TaskSampler,
        validation_tasks: TaskSampler | None = None,
        *,
        max_minutes: float | None = None,
    ) -> TrainingResult:
        """Trains until ``num_steps``, the time limit, or a signal; resumes from the run folder's checkpoint.

        SIGINT, SIGTERM and SIGHUP end training after the running step, with everything saved; a second SIGINT stops at
        once.
        With several processes a signal to one, or the time limit of one, ends them all after the same step.

        Args:
            train_tasks: Tasks to learn from.
            validation_tasks: Tasks to choose the best checkpoint on.
            max_minutes: Stop after so much time in this call.

        Raises:
            ValueError: If a task does not fit the model, or the run folder's checkpoint another run, or processes start
                from different weights or settings.
            TypeError: If the network does what functional derivatives do not support.
            OSError: If the run folder cannot be written, or another training runs in it, before anything is computed.
            TrainingDivergedError: If a loss or gradient is not finite.
            ProcessLostError: If another process has died or hangs.
            DeviceLostError: If a kernel fails on a CUDA device.
        """
        if max_minutes is not None and not max_minutes > 0:
            raise ValueError(f"max_minutes must be positive, but is {max_minutes}.")
        try:
            with contextlib.ExitStack() as stack:
                self.processes.on_first(lambda: stack.enter_context(only_training_in(self.run_folder)))
                return self._fit(train_tasks, validation_tasks, max_minutes)
        except ProcessLostError as error:
            raise ProcessLostError(f"{error} {how_to_resume(self.run_folder)}") from error
        except RuntimeError as error:
            if is_beyond_torch_func(error):
                raise TypeError(advice_on_torch_func(self.model.network, error)) from error
            if not is_device_lost(error):
                raise
            # What is on the device is lost, so that nothing can be saved but what has been.
            raise DeviceLostError(
                f"step {self._step + 1}: {str(error).splitlines()[0]}. No further step is possible in this process. "
                f"{how_to_resume(self.run_folder)} If it happens again, try fast=False, which neither captures nor "
                "replays."
            ) from error

    def _fit(
        self, train_tasks: TaskSampler, validation_tasks: TaskSampler | None, max_minutes: float | None
    ) -> TrainingResult:
        found = self.processes.on_first(self._find_checkpoint)
        self.processes.together(lambda: self._prepare(found, train_tasks, validation_tasks))
        if self.processes.size > 1:
            self._require_equal_starts()

        if self.settings.fast:
            keep_freed_memory()
        start, start_seconds = time.monotonic(), self._seconds
        deadline = math.inf if max_minutes is None else start + 60 * max_minutes
        stop_reason: StopReason = "completed"
        with (
            TrainingLog(self.run_folder if self.processes.is_first else None, self._step, self._running) as log,
            TrainingBar(self.console, self.settings.num_steps, self._step) as bar,
        ):
            with caught_signals() as caught:
                self._stop_wishes = lambda: (bool(caught) or self.processes.is_abandoned, time.monotonic() > deadline)
                if self._is_validation_due and validation_tasks is not None:
                    bar.say(self._validate(validation_tasks, log))
                while self._step < self.settings.num_steps:
                    step_start = time.monotonic()
                    row = self._train_step(train_tasks)
                    self._seconds = start_seconds + time.monotonic() - start
                    row["tasks_per_second"] = self.settings.tasks_per_step / (time.monotonic() - step_start)
                    log.add(row)
                    bar.advance(row)
                    last = self._step == self.settings.num_steps
                    # Before the state is saved, so that a run killed in between has each row once.
                    if self._step % self.settings.log_every == 0:
                        log.write(self._step, self._seconds)
                    self._running = log.running
                    if validation_tasks is not None and (self._step % self.settings.validate_every == 0 or last):
                        # A validation may take longer than the steps before it.
                        self._is_validation_due = True
                        self._save()
                        bar.say(self._validate(validation_tasks, log))
                    elif self._step % self.settings.checkpoint_every == 0:
                        self._save()
                    interrupted, late = self._agreed_stop if self.processes.size > 1 else self._stop_wishes()
                    if interrupted or late:
                        if not last:
                            stop_reason = "interrupted" if interrupted else "time limit"
                        break
            log.write(self._step, self._seconds)
            self._running = log.running
            if validation_tasks is None:
                self._chosen = Chosen(self._snapshot(), self._step)
            elif self._chosen.nll == math.inf and stop_reason == "time limit":
                # A first slice that ends before the first validation would otherwise report the untrained prior. The
                # choice is provisional: a run without this stop would never have made it.
                bar.say(self._validate(validation_tasks, log))
                self._chosen = self._chosen._replace(nll=math.inf)
            self._save()
        ended_by = caught[0] if caught and stop_reason == "interrupted" else None
        return TrainingResult(self._chosen, self._snapshot(), self._step, stop_reason, self._seconds, ended_by)

    def _train_step(self, tasks: TaskSampler) -> dict[str, float]:
        generator_state = self._generator.get_state()
        settings = self.settings
        share = self.processes.share(settings.tasks_per_step)
        drawn = draw_step(tasks, self.algorithm, self._meta, settings, share, generator=self._generator)
        try:
            check_drawn(
                self.algorithm,
                self.model,
                drawn,
                self.model.most_outputs(self.algorithm, self._num_outputs, *(part.y for part in drawn.episodes)),
                self._step + 1,
            )
            is_refused = False
        except ValueError:
            # Other processes, which drew other tasks, learn of it by a sum that is not finite, and all say the same.
            is_refused = settings.draws == "per_task" and self.processes.size > 1
            if not is_refused:
                self._generator.set_state(generator_state)
                self._save()
                raise
        own = tree.map(lambda leaf: leaf[share.start - drawn.first :][: len(share)].to(self.device), drawn.episodes)
        own_noises = tree.map(lambda leaf: leaf.to(self.device), drawn.noises)
        computed = self._hypergradients(self._meta, tree.map(torch.zeros_like, own) if is_refused else own, own_noises)
        if is_refused:
            refused = computed.info._replace(outer_loss=torch.full_like(computed.info.outer_loss, math.nan))
            computed = computed._replace(total=tree.scale(math.nan, computed.total), info=refused)
        total, info, score, moved = self._over_processes(computed, share, generator_state)
        gradient = tree.scale(1 / settings.tasks_per_step, total)
        gradient_norm = tree.norm(gradient)
        if not bool(torch.isfinite(info.outer_loss).all() & torch.isfinite(gradient_norm)):
            self._generator.set_state(generator_state)
            # All processes are here, as all have the same sum.
            self._report_divergence(own, share, info, gradient_norm)
        if settings.gradient_clip is not None:
            gradient = tree.scale((settings.gradient_clip / gradient_norm).clamp_max(1.0), gradient)
        self._apply(gradient)
        for name, change in moved.items():
            self._meta.shared[name].add_(change / settings.tasks_per_step)
        self._step += 1
        return {
            "loss": float(info.outer_loss.mean()),
            self.model.likelihood.step_score_name: float(score.mean()),
            "inner_grad_norm": float(info.inner_grad_norm.mean()),
            "linear_residual": float(info.linear_residual.mean()),
            "linear_converged": float(info.linear_converged.double().mean()),
            "gradient_norm": float(gradient_norm),
        }

    def _over_processes(self, own: TaskHypergradients, share: range, generator_state: Tensor) -> TaskHypergradients:
        """Adds up gradients and changes of running averages; gives all processes all diagnostics and wishes to stop."""
        if self.processes.size == 1:
            return own
        per_task = tree.map(lambda leaf: placed(leaf, share, self.settings.tasks_per_step), (own.info, own.scores))
        wishes = torch.tensor(self._stop_wishes(), dtype=torch.float32, device=self.device)
        try:
            (total, moved), (info, scores), wishes = self.processes.sum(((own.total, own.moved), per_task, wishes))
        except ProcessLostError:
            self._generator.set_state(generator_state)
            self._save()
            raise
        interrupted, late = (wishes > 0).tolist()
        self._agreed_stop = (interrupted, late)
        return TaskHypergradients(total, info, scores, moved)

    def _fitted(self) -> FittedModel:
        return FittedModel(
            model=self.model,
            algorithm=self.algorithm,
            meta=self._meta,
            preprocessing=None,
            device=self.device,
            max_examples_per_pass=self.settings.max_examples_per_pass,
        )

    def _apply(self, gradient: MetaParameters) -> None:
        rate = 1.0
        if self.settings.schedule == "cosine":
            rate = 0.5 * (1 + math.cos(math.pi * self._step / self.settings.num_steps))
        for group in self._optimizer.param_groups:
            group["lr"] = group["initial_lr"] * rate
        for parameter, value in zip(tree.leaves(self._meta), tree.leaves(gradient), strict=True):
            parameter.grad = value
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)

    def _validate(self, tasks: TaskSampler, log: TrainingLog) -> str:
        # Far from every seed that a user would give to test tasks.
        seed = self.settings.seed + 10**6
        if self._chosen.nll == math.inf and self.settings.num_steps >= LEAST_STEPS and self.processes.is_first:
            warn_of_bias(self._fitted(), tasks, seed=seed)
        try:
            result = evaluate(
                self._fitted(),
                tasks,
                num_tasks=self.settings.num_validation_tasks,
                seed=seed,
                processes=self.processes,
            )
        except (ValueError, FloatingPointError) as error:
            self._save()
            kind = ValueError if isinstance(error, ValueError) else TrainingDivergedError
            raise kind(f"validation after step {self._step}: {error} {where_saved(self.run_folder)}") from error
        temperature = 1.0
        if self.settings.output_temperature:
            temperature = recalibrate(result.predictions, result.query_targets, sources=result.sources).temperature
            result = tempered(self.model.likelihood, result, temperature)
        scores = {f"validation_{name}": value.mean for name, value in result.report.items()}
        log.write(self._step, self._seconds, {**scores, "validation_temperature": temperature})
        self._running = log.running
        nll = result.report["nll"].mean
        improved = nll < self._chosen.nll
        if improved:
            abstention = fit_abstention(result.predictions, result.query_targets, sources=result.sources)
            self._chosen = Chosen(self._snapshot(), self._step, nll, temperature, abstention)
        self._is_validation_due = False
        self._save()
        shown = ", ".join(
            f"{name} {result.report[name]}" for name in ("accuracy", "mse", "nll", "ece") if name in result.report
        )
        return f"step {self._step}: validation {shown}{' (best so far)' if improved else ''}"

    def _check_first_task(self, tasks: TaskSampler, name: str) -> int:
        """Draws one task with a generator of its own and checks it, so that misfits show before long work."""
        episode = tasks.sample(1, generator=torch.Generator().manual_seed(self.settings.seed))
        first = tree.map(lambda leaf: leaf[0].to(self.device), episode)
        self.raw_inputs = self.raw_inputs or raw_inputs_of(first)
        num_outputs = self.model.check_task(first, task=name, algorithm=self.algorithm)
        self.model.check_features(self.algorithm, first.support.x)
        self.algorithm.check_task(self.model, self._meta, first)
        return num_outputs

    def _report_divergence(self, own: Episode, share: range, info: HypergradientInfo, gradient_norm: Tensor) -> None:
        """Saves the state before the step and raises, after ruling out bad data."""
        self._save()
        bad = torch.nonzero(~torch.isfinite(info.outer_loss)).flatten().tolist() or list(range(len(info.outer_loss)))

        def check_own() -> None:
            for index in (index for index in bad if index in share):
                task = tree.map(lambda leaf, i=index - share.start: leaf[i], own)
                name = f"training task {index} of step {self._step + 1}"
                self.model.check_task(task, task=name, algorithm=self.algorithm)

        self.processes.gather(check_own)
        # Every process is here, as all have the same sum, but one is enough to tell.
        self.processes.on_first(
            lambda: raise_divergence(
                self._step + 1, bad, info, gradient_norm, self.algorithm, self.settings, where_saved(self.run_folder)
            )
        )

    def _snapshot(self) -> MetaParameters:
        return tree.map(lambda leaf: leaf.detach().clone(), self._meta)

    def _description(self) -> dict[str, Any]:
        """What a checkpoint must agree with to be resumed."""
        return {
            "algorithm": records.to_json(self.algorithm),
            "trainer": dataclasses.asdict(self.settings),
            "network": repr(self.model.network),
            "likelihood": records.to_json(self.model.likelihood),
            "frozen_sha256": self._frozen_digest,
            "data": self._data_identity,
        }

    def _save(self) -> None:
        if self.run_folder is None or not self.processes.is_first:
            return
        state = TrainingState(
            self._meta,
            self._chosen,
            self._optimizer.state_dict()["state"],
            self._generator.get_state(),
            step=self._step,
            seconds=self._seconds,
            is_validation_due=self._is_validation_due,
            running=self._running,
        )
        save_state(self.run_folder, state, self._description())
        # Before the first choice the best state is the untrained one, which is no model.
        if self._on_chosen is not None and self._chosen.step not in (0, self._written_step):
            self._on_chosen(self._chosen)
            self._written_step = self._chosen.step

    def _prepare(
        self,
        found: tuple[dict[str, Tensor], dict[str, Any]] | None,
        train_tasks: TaskSampler,
        validation_tasks: TaskSampler | None,
    ) -> None:
        if self.run_folder is not None and found is not None:
            self._resume(self.run_folder, *found)
        self._num_outputs = self._check_first_task(train_tasks, "training task")
        if validation_tasks is not None:
            self._check_first_task(validation_tasks, "validation task")

    def _require_equal_starts(self) -> None:
        """Refuses processes whose networks were initialised differently: their sums would mean nothing."""

        def start() -> str:
            tensors = {name: value.cpu() for name, value in meta_to_tensors(self._snapshot()).items()}
            return digest(tensors, json.dumps(self._description(), sort_keys=True, default=str))

        starts = self.processes.gather(start)
        other = next((rank for rank, value in enumerate(starts) if value != starts[0]), None)
        if other is not None:
            raise ValueError(
                f"processes 0 and {other} start from different weights or settings: build the network from the same "
                "seed in every process (call torch.manual_seed before), and give all the same settings."
            )

    def _find_checkpoint(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        if self.run_folder is None:
            return None
        require_writable(self.run_folder)
        path = self.run_folder / CHECKPOINT
        return find_checkpoint(self.run_folder) if path.exists() else None

    def _resume(self, folder: Path, tensors: dict[str, Tensor], metadata: dict[str, Any]) -> None:
        state = restore_state(
            tensors, metadata, like=self._meta, description=self._description(), source=folder / CHECKPOINT
        )
        for parameter, value in zip(tree.leaves(self._meta), tree.leaves(state.meta), strict=True):
            parameter.copy_(value)
        groups = self._optimizer.state_dict()["param_groups"]
        self._optimizer.load_state_dict({"state": state.optimizer, "param_groups": groups})
        self._generator.set_state(state.generator)
        self._step, self._seconds, self._chosen = state.step, state.seconds, state.chosen
        self._is_validation_due, self._running = state.is_validation_due, dict(state.running)
        say(self.console, f"Resuming at step {self._step} of {self.settings.num_steps}.")
