"""The loop: what it learns, that it resumes with the same bits, and that it stops with the state saved and a reason."""

import contextlib
import dataclasses
import itertools
import json
import math
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import nn

from ibaml import records, tree
from ibaml.algorithms import RECORDS, MetaParameters, make_algorithm
from ibaml.algorithms.model import Model, build_model
from ibaml.data import ClassImages, EpisodeSampler, FixedEpisodes, SinusoidTasks
from ibaml.likelihoods import Categorical, make_likelihood
from ibaml.networks import MLP
from ibaml.posterior import FittedModel
from ibaml.priors import DiagonalGaussian, DiagonalPrior
from ibaml.solvers.inner import GradientDescent
from ibaml.solvers.linear import CG
from ibaml.train import evaluate as evaluation
from ibaml.train import progress, trainer
from ibaml.train.checkpoint import CHECKPOINT, PREVIOUS, load_tensors, save_tensors
from ibaml.train.draw import DrawnTasks, draw_step
from ibaml.train.log import METRICS, read_metrics
from ibaml.train.result import Chosen
from ibaml.train.trainer import (
    Trainer,
    TrainerSettings,
    TrainingDivergedError,
    TrainingResult,
)
from ibaml.types import Batch, Episode, TaskSampler, Tensor

TIMINGS = ("seconds", "tasks_per_second")
ALGORITHMS = {
    "maml": make_algorithm("maml", inner=GradientDescent(num_steps=2, learning_rate=0.1)),
    "ibaml": make_algorithm(
        "ibaml",
        inner=GradientDescent(num_steps=2, learning_rate=0.1),
        num_samples=2,
        linear=CG(max_steps=2),
        temperature=0.1,
    ),
}
SMALL = TrainerSettings(
    num_steps=6,
    tasks_per_step=3,
    learning_rate=1e-2,
    validate_every=2,
    num_validation_tasks=3,
    checkpoint_every=1,
    log_every=1,
    fast=False,  # networks of a few weights are not worth tracing
)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def image_tasks(seed: int = 0) -> EpisodeSampler:
    """2-way 2-shot tasks over six classes of 2 x 2 images, each class about a brightness pattern of its own."""
    source = generator(seed)
    patterns = torch.randint(40, 216, (6, 1, 1, 2, 2), generator=source)
    images = patterns + torch.randint(-40, 40, (6, 6, 1, 2, 2), generator=source)
    data = ClassImages(
        images=images.reshape(36, 1, 2, 2).to(torch.uint8),
        class_start=torch.arange(7) * 6,
        class_names=tuple("abcdef"),
    )
    return EpisodeSampler(data, num_ways=2, num_shots=2, num_queries=3)


def image_model(seed: int = 0, num_outputs: int = 2) -> Model:
    network = MLP(num_outputs, input_shape=(1, 2, 2), hidden_sizes=(4, 4), activation="tanh", generator=generator(seed))
    return build_model(network, Categorical())


def sinusoid_model(seed: int = 0, width: int = 8) -> Model:
    network = MLP(1, input_shape=1, hidden_sizes=(width, width), activation="tanh", generator=generator(seed))
    return build_model(network, make_likelihood("gaussian", 1))


def make(
    folder: Path | None, name: str = "maml", settings: TrainerSettings = SMALL, kind: type[Trainer] = Trainer
) -> Trainer:
    return kind(image_model(), ALGORITHMS[name], settings, run_folder=folder)


def fit(folder: Path | None, name: str = "maml", settings: TrainerSettings = SMALL) -> TrainingResult:
    return make(folder, name, settings).fit(image_tasks(0), image_tasks(1))


class Interrupted(Trainer):
    """Gets a signal during the steps named by ``signals``."""

    signals: dict[int, list[int]] = {}

    def _train_step(self, tasks: TaskSampler) -> dict[str, float]:
        row = super()._train_step(tasks)
        for number in self.signals.get(self._step, []):
            signal.raise_signal(number)
        return row


class Spoilt:
    """Image tasks of which one call returns something else."""

    def __init__(self, call: int, spoil) -> None:
        self.tasks, self.call, self.spoil, self.count = image_tasks(0), call, spoil, 0
        self.input_shape, self.num_outputs = self.tasks.input_shape, self.tasks.num_outputs
        self.has_equal_sizes = True

    def sample(self, num_tasks: int, *, generator: torch.Generator) -> Episode:
        episode = self.tasks.sample(num_tasks, generator=generator)
        self.count += 1
        return self.spoil(episode) if self.count == self.call else episode


def rows_of(folder: Path) -> list[dict[str, float]]:
    rows = read_metrics(folder / METRICS)
    return [{name: value for name, value in row.items() if name not in TIMINGS} for row in rows]


def state_of(folder: Path) -> tuple[dict[str, Tensor], dict]:
    tensors, metadata = load_tensors(folder / CHECKPOINT)
    # The checksum of the rows, which hold times; ``rows_of`` compares the rest of them.
    del metadata["seconds"]
    metadata["running"].pop("written", {}).pop("sha256", None)
    return tensors, metadata


def assert_identical(first: Path, second: Path) -> None:
    """Every bit of both checkpoints and every logged number but times agree."""
    one, other = load_tensors(first / CHECKPOINT)[0], load_tensors(second / CHECKPOINT)[0]
    assert one.keys() == other.keys()
    for key in one:
        assert torch.equal(one[key], other[key]), key
    assert state_of(first)[1] == state_of(second)[1]
    assert rows_of(first) == rows_of(second)


def assert_same_meta(first: MetaParameters, second: MetaParameters) -> None:
    for one, other in zip(tree.leaves(first), tree.leaves(second), strict=True):
        assert torch.equal(one, other)


# Resuming


@pytest.mark.parametrize(("name", "tasks_per_chunk"), [("maml", None), ("maml", 1), ("ibaml", 2), ("ibaml", 1)])
def test_resumed_run_has_the_bits_of_an_uninterrupted_one(tmp_path, name, tasks_per_chunk):
    settings = dataclasses.replace(SMALL, tasks_per_chunk=tasks_per_chunk)
    whole = fit(tmp_path / "whole", name, settings)
    assert whole.stop_reason == "completed" and whole.num_steps == 6

    Interrupted.signals = {3: [signal.SIGTERM], 5: [signal.SIGINT]}
    for stop, reason in ((3, "interrupted"), (5, "interrupted"), (6, "completed")):
        # A new object each time, as after a new start of the program.
        part = make(tmp_path / "parts", name, settings, kind=Interrupted).fit(image_tasks(0), image_tasks(1))
        assert (part.num_steps, part.stop_reason) == (stop, reason)
    assert_same_meta(part.last_meta, whole.last_meta)
    assert_same_meta(part.meta, whole.meta)
    assert part.best_step == whole.best_step
    assert_identical(tmp_path / "whole", tmp_path / "parts")


def test_tasks_with_generators_of_their_own(tmp_path):
    """Each task and its noise depend on the step and the task's number alone, and a resumed run has the same ones."""
    settings = dataclasses.replace(SMALL, draws="per_task")
    whole = make(tmp_path / "whole", "ibaml", settings).fit(image_tasks(0))
    make(tmp_path / "parts", "ibaml", settings).fit(image_tasks(0), max_minutes=1e-9)
    part = make(tmp_path / "parts", "ibaml", settings).fit(image_tasks(0))
    assert_same_meta(part.last_meta, whole.last_meta)
    assert_identical(tmp_path / "whole", tmp_path / "parts")

    algorithm, source = ALGORITHMS["ibaml"], generator()
    meta = algorithm.init(image_model().adapted, {}, generator=generator())

    def draw(share: range) -> DrawnTasks:
        return draw_step(image_tasks(0), algorithm, meta, settings, share, generator=source)

    state = source.get_state()
    episodes, first, noises = draw(range(3))
    assert first == 0 and len(noises) == len(episodes.support.y) == 3
    source.set_state(state)
    share, first, share_noises = draw(range(1, 3))
    assert first == 1 and len(share_noises) == 2
    assert_same_meta(tree.map(lambda leaf: leaf[1:], episodes), share)
    assert_same_meta(noises[1:], share_noises)
    # No two tasks, steps or draws of noise are alike.
    following, _, following_noises = draw(range(3))
    inputs = [*episodes.support.x, *following.support.x]
    weights = [noise.inner["features.0.weight"] for noise in (*noises, *following_noises)]
    for values in (inputs, weights):
        assert not any(torch.equal(a, b) for i, a in enumerate(values) for b in values[:i])


@pytest.mark.parametrize("schedule", ["constant", "cosine"])
def test_time_limits_do_not_change_the_result(tmp_path, schedule):
    settings = dataclasses.replace(SMALL, schedule=schedule, validate_every=3)
    whole = fit(tmp_path / "whole", "ibaml", settings)
    for stop in range(1, 7):
        part = make(tmp_path / "parts", "ibaml", settings).fit(image_tasks(0), image_tasks(1), max_minutes=1e-9)
        assert part.num_steps == stop
        assert part.stop_reason == ("completed" if stop == 6 else "time limit")
        if stop < 3:
            # No validation is due yet, but there is a chosen state that has been trained.
            assert part.best_step == 1 if stop == 1 else part.best_step in (1, 2)
    assert_same_meta(part.last_meta, whole.last_meta)
    assert_same_meta(part.meta, whole.meta)
    assert part.best_step == whole.best_step
    # The validations at the time limits before the first regular one are the only further rows.
    due = [row for row in rows_of(tmp_path / "parts") if "validation_nll" not in row or row["step"] % 3 == 0]
    assert due == rows_of(tmp_path / "whole")
    one, other = state_of(tmp_path / "whole"), state_of(tmp_path / "parts")
    assert one[1] == other[1]
    assert all(torch.equal(value, other[0][name]) for name, value in one[0].items())


@pytest.mark.parametrize("name", ALGORITHMS)
def test_resumed_without_validation(tmp_path, name):
    whole = make(tmp_path / "whole", name).fit(image_tasks(0))
    make(tmp_path / "parts", name).fit(image_tasks(0), max_minutes=1e-9)
    part = make(tmp_path / "parts", name).fit(image_tasks(0))
    assert part.best_step == part.num_steps == 6
    assert_same_meta(part.meta, whole.meta)
    assert_identical(tmp_path / "whole", tmp_path / "parts")


def test_rows_after_the_checkpoint_are_dropped(tmp_path):
    """A killed run has logged steps that its last checkpoint does not know; each step is logged once in the end."""
    settings = dataclasses.replace(SMALL, checkpoint_every=4, validate_every=4)
    fit(tmp_path / "whole", settings=settings)

    class Killed(Trainer):
        def _train_step(self, tasks):
            if self._step == 5:
                raise SystemExit
            return super()._train_step(tasks)

    with pytest.raises(SystemExit):
        make(tmp_path / "parts", settings=settings, kind=Killed).fit(image_tasks(0), image_tasks(1))
    assert rows_of(tmp_path / "parts")[-1]["step"] == 5 and state_of(tmp_path / "parts")[1]["step"] == 4
    make(tmp_path / "parts", settings=settings).fit(image_tasks(0), image_tasks(1))
    assert_identical(tmp_path / "whole", tmp_path / "parts")


SCRIPT = """
import sys
from pathlib import Path

import torch

from ibaml.algorithms import make_algorithm
from ibaml.data import SinusoidTasks
from ibaml.likelihoods import make_likelihood
from ibaml.algorithms.model import build_model
from ibaml.networks import MLP
from ibaml.solvers.inner import GradientDescent
from ibaml.solvers.linear import CG
from ibaml.train import Trainer, TrainerSettings

torch.set_num_threads({num_threads})
network = MLP(1, input_shape=1, hidden_sizes=(8, 8), activation="tanh", generator=torch.Generator().manual_seed(0))
result = Trainer(
    build_model(network, make_likelihood("gaussian", 1)),
    make_algorithm("ibaml", inner=GradientDescent(num_steps=2), num_samples=2, linear=CG(max_steps=2)),
    TrainerSettings(num_steps=1_000_000, tasks_per_step=2, validate_every=5, num_validation_tasks=2, log_every=1),
    run_folder=Path(sys.argv[1]),
).fit(SinusoidTasks(num_shots=3, num_queries=3), SinusoidTasks(num_shots=3, num_queries=3))
print(result.stop_reason, result.num_steps)
"""


def test_a_terminated_process_can_be_resumed_exactly(tmp_path):
    # With SIGINT: tests/cli/test_train.py.
    script = SCRIPT.format(num_threads=torch.get_num_threads())
    process = subprocess.Popen([sys.executable, "-c", script, str(tmp_path / "parts")], stdout=subprocess.PIPE)
    try:
        deadline = time.monotonic() + 300  # a loaded machine starts a process slowly
        while not (tmp_path / "parts" / METRICS).exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        process.terminate()
        output, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 0
    reason, stopped = output.decode().rsplit(" ", 1)
    assert reason == "interrupted"

    settings = TrainerSettings(
        num_steps=int(stopped) + 3, tasks_per_step=2, validate_every=5, num_validation_tasks=2, log_every=1
    )
    tasks = SinusoidTasks(num_shots=3, num_queries=3)
    for folder in ("parts", "whole"):
        # At a constant rate the number of steps is free.
        Trainer(
            sinusoid_model(),
            make_algorithm("ibaml", inner=GradientDescent(num_steps=2), num_samples=2, linear=CG(max_steps=2)),
            settings,
            run_folder=tmp_path / folder,
        ).fit(tasks, tasks)
    assert_identical(tmp_path / "whole", tmp_path / "parts")


def test_more_steps_continue_a_finished_run_at_a_constant_rate(tmp_path):
    longer = dataclasses.replace(SMALL, num_steps=10)
    fit(tmp_path / "whole", settings=longer)
    assert fit(tmp_path / "parts").num_steps == 6
    assert fit(tmp_path / "parts", settings=longer).num_steps == 10
    assert_identical(tmp_path / "whole", tmp_path / "parts")


def test_more_steps_are_refused_with_a_schedule_that_depends_on_them(tmp_path):
    cosine = dataclasses.replace(SMALL, schedule="cosine")
    fit(tmp_path, settings=cosine)
    with pytest.raises(ValueError, match=r"other settings: trainer.num_steps was 6 and is now 10\. Use the same"):
        fit(tmp_path, settings=dataclasses.replace(cosine, num_steps=10))


def test_a_finished_run_is_left_as_it_is(tmp_path):
    first = fit(tmp_path)
    before = state_of(tmp_path)
    again = fit(tmp_path)
    assert (again.num_steps, again.stop_reason) == (6, "completed")
    assert_same_meta(first.meta, again.meta)
    after = state_of(tmp_path)
    assert after[1] == before[1] and all(torch.equal(value, after[0][name]) for name, value in before[0].items())


def test_fewer_steps_than_were_taken_train_no_further(tmp_path):
    first = fit(tmp_path)
    again = fit(tmp_path, settings=dataclasses.replace(SMALL, num_steps=3))
    assert again.num_steps == 6
    assert_same_meta(first.last_meta, again.last_meta)


def refused_unchanged(folder: Path, message: str, attempt) -> None:
    before = (folder / CHECKPOINT).read_bytes()
    with pytest.raises(ValueError, match=message):
        attempt()
    assert (folder / CHECKPOINT).read_bytes() == before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(learning_rate=0.02), "trainer.learning_rate was 0.01 and is now 0.02"),
        (dict(seed=7), "trainer.seed was 0 and is now 7"),
        (dict(schedule="cosine"), "trainer.schedule was 'constant' and is now 'cosine'"),
        (dict(gradient_clip=None), "trainer.gradient_clip was 10.0 and is now None"),
    ],
)
def test_other_trainer_settings_are_refused(tmp_path, changes, message):
    fit(tmp_path)
    refused_unchanged(tmp_path, message, lambda: fit(tmp_path, settings=dataclasses.replace(SMALL, **changes)))


def test_another_algorithm_setting_is_refused(tmp_path):
    fit(tmp_path)
    other = dataclasses.replace(ALGORITHMS["maml"], inner=GradientDescent(num_steps=3, learning_rate=0.1))
    refused_unchanged(
        tmp_path,
        "algorithm.inner.num_steps was 2 and is now 3",
        lambda: Trainer(image_model(), other, SMALL, run_folder=tmp_path).fit(image_tasks()),
    )


def test_another_network_is_refused(tmp_path):
    fit(tmp_path)
    wide = build_model(MLP(2, input_shape=(1, 2, 2), hidden_sizes=(5, 4), activation="tanh"), Categorical())
    refused_unchanged(
        tmp_path,
        r"belongs to another network or algorithm: .*features\.0\.bias has shape \(4,\), the model \(5,\)",
        lambda: Trainer(wide, ALGORITHMS["maml"], SMALL, run_folder=tmp_path).fit(image_tasks()),
    )
    relu = build_model(MLP(2, input_shape=(1, 2, 2), hidden_sizes=(4, 4), activation="relu"), Categorical())
    refused_unchanged(
        tmp_path,
        "network was .*Tanh.* and is now .*ReLU",
        lambda: Trainer(relu, ALGORITHMS["maml"], SMALL, run_folder=tmp_path).fit(image_tasks()),
    )


def test_another_algorithm_is_refused(tmp_path):
    fit(tmp_path)
    refused_unchanged(
        tmp_path,
        "another network or algorithm: prior/features.0.bias is not in the model",
        lambda: fit(tmp_path, "ibaml"),
    )


def test_another_frozen_body_is_refused(tmp_path):
    """Frozen parameters are not in the checkpoint, so nothing else would notice."""

    def train(seed: int) -> None:
        model = build_model(image_model(seed).network, Categorical(), freeze="features.*")
        Trainer(model, ALGORITHMS["maml"], SMALL, run_folder=tmp_path).fit(image_tasks())

    train(0)
    refused_unchanged(tmp_path, "other settings: frozen_sha256 was", lambda: train(1))
    train(0)


def test_a_saved_model_is_no_training_checkpoint(tmp_path):
    fit(tmp_path)
    tensors, metadata = load_tensors(tmp_path / CHECKPOINT)
    del tensors["generator"]
    save_tensors(tmp_path / CHECKPOINT, tensors, metadata)
    with pytest.raises(ValueError, match="is no training checkpoint: it holds a model without optimiser state"):
        fit(tmp_path)


def test_a_damaged_checkpoint_is_refused(tmp_path):
    fit(tmp_path)
    content = (tmp_path / CHECKPOINT).read_bytes()
    (tmp_path / CHECKPOINT).write_bytes(content[:-9])
    (tmp_path / PREVIOUS).unlink()
    with pytest.raises(ValueError, match="is no readable checkpoint .*truncated"):
        fit(tmp_path)
    assert (tmp_path / CHECKPOINT).read_bytes() == content[:-9]


def test_a_damaged_checkpoint_leaves_the_one_before(tmp_path):
    """Nothing is lost but the steps since, and the run ends with the same bits."""
    whole = fit(tmp_path / "whole")
    for _ in range(2):
        make(tmp_path / "parts").fit(image_tasks(0), image_tasks(1), max_minutes=1e-9)
    (tmp_path / "parts" / CHECKPOINT).write_bytes(b"damaged")
    with pytest.warns(RuntimeWarning, match="is no readable checkpoint .* goes on from the checkpoint before, of step"):
        part = fit(tmp_path / "parts")
    assert_same_meta(part.last_meta, whole.last_meta)
    assert_same_meta(part.meta, whole.meta)


class Killed(Exception):
    """Stands for a process that ends at once."""


@pytest.mark.parametrize("when", range(1, 13))
def test_a_run_that_ends_at_any_write_resumes_with_the_same_bits_and_rows(tmp_path, monkeypatch, when):
    settings = dataclasses.replace(SMALL, log_every=3, checkpoint_every=2, validate_every=4)
    whole = fit(tmp_path / "whole", settings=settings)
    real, count = os.replace, itertools.count(1)

    def replace(old: Path, new: Path) -> None:
        real(old, new)
        if next(count) == when:
            raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", replace)
        with contextlib.suppress(Killed):
            fit(tmp_path / "parts", settings=settings)
    part = fit(tmp_path / "parts", settings=settings)
    assert_same_meta(part.last_meta, whole.last_meta)
    assert_same_meta(part.meta, whole.meta)
    assert rows_of(tmp_path / "parts") == rows_of(tmp_path / "whole")


def test_the_state_before_a_validation_is_saved(tmp_path, monkeypatch):
    """And the validation is made up for."""
    whole = fit(tmp_path / "whole")
    with monkeypatch.context() as patched:
        patched.setattr(trainer, "evaluate", lambda *_, **__: (_ for _ in ()).throw(Killed))
        with pytest.raises(Killed):
            fit(tmp_path / "parts")
    assert state_of(tmp_path / "parts")[1]["step"] == SMALL.validate_every
    part = fit(tmp_path / "parts")
    assert_same_meta(part.meta, whole.meta)
    assert rows_of(tmp_path / "parts") == rows_of(tmp_path / "whole")


def test_resuming_is_announced(tmp_path):
    make(tmp_path).fit(image_tasks(), max_minutes=1e-9)
    with (tmp_path / "output").open("w") as file:
        console = Console(file=file, width=200)
        Trainer(image_model(), ALGORITHMS["maml"], SMALL, run_folder=tmp_path, console=console).fit(
            image_tasks(0), image_tasks(1)
        )
    output = (tmp_path / "output").read_text()
    assert "Resuming at step 1 of 6." in output
    assert re.search(r"step 4: validation accuracy \d\.\d+ \+- .*, nll .*", output)
    assert "(best so far)" in output


# Run folders


def test_unwritable_run_folder_is_refused_before_any_work(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    unwritable = make(tmp_path / "file" / "run")
    monkeypatch.setattr(Trainer, "_train_step", lambda *_: pytest.fail("trained"))
    with pytest.raises(OSError, match=r"run_folder .*file/run cannot be written \(.*\): choose another with"):
        unwritable.fit(image_tasks())


def test_nothing_is_written_without_a_run_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = fit(None, "ibaml")
    assert result.num_steps == 6
    assert list(tmp_path.iterdir()) == []


def test_a_run_folder_changes_nothing(tmp_path):
    assert_same_meta(fit(None, "ibaml").last_meta, fit(tmp_path, "ibaml").last_meta)


def test_log_rows_are_averages_over_log_every_steps(tmp_path):
    fit(tmp_path / "single")
    fit(tmp_path / "triple", settings=dataclasses.replace(SMALL, log_every=3))
    single = [row for row in rows_of(tmp_path / "single") if "loss" in row]
    triple = [row for row in rows_of(tmp_path / "triple") if "loss" in row]
    assert [row["step"] for row in single] == [1, 2, 3, 4, 5, 6]
    assert [row["step"] for row in triple] == [3, 6]
    for row, part in zip(triple, (single[:3], single[3:]), strict=True):
        for name in ("loss", "accuracy", "inner_grad_norm", "linear_residual", "linear_converged", "gradient_norm"):
            assert row[name] == pytest.approx(sum(step[name] for step in part) / 3, rel=1e-12)
    validated = [row for row in rows_of(tmp_path / "single") if "validation_nll" in row]
    assert [row["step"] for row in validated] == [2, 4, 6]
    assert {"validation_accuracy", "validation_ece", "validation_brier"} <= validated[0].keys()


@pytest.mark.parametrize("stop", [None, 1, 3])
def test_a_new_choice_is_handed_on_once(tmp_path, stop):
    """After each checkpoint that holds a new chosen state, and first of all after a resumption."""
    chosen = []

    def run(max_minutes: float | None = None) -> TrainingResult:
        def keep(new: Chosen) -> None:
            assert state_of(tmp_path)[1]["best_step"] == new.step
            chosen.append((new.step, tree.map(torch.clone, new.meta)))

        return Trainer(image_model(), ALGORITHMS["maml"], SMALL, run_folder=tmp_path, on_chosen=keep).fit(
            image_tasks(0), image_tasks(1), max_minutes=max_minutes
        )

    for _ in range(stop or 0):
        run(max_minutes=1e-9)
    first_of_last_run = len(chosen)
    result = run()
    steps = [step for step, _ in chosen[first_of_last_run:]]
    assert steps == sorted(set(steps)) and steps[-1] == result.best_step
    assert_same_meta(chosen[-1][1], result.meta)


def test_no_choice_is_handed_on_before_there_is_one(tmp_path):
    class Early(Interrupted):
        signals = {1: [signal.SIGINT]}

    Early(
        image_model(), ALGORITHMS["maml"], SMALL, run_folder=tmp_path, on_chosen=lambda *_: pytest.fail("chosen")
    ).fit(image_tasks(0), image_tasks(1))


def test_other_data_are_refused(tmp_path):
    def run(**data: object) -> None:
        Trainer(image_model(), ALGORITHMS["maml"], SMALL, run_folder=tmp_path, data_identity=data).fit(image_tasks())

    run(labels=["a", "b"], training_tasks="123")
    run(labels=["a", "b"], training_tasks="123")
    message = "was trained on other data: data.labels was \\['a', 'b'\\] and is now \\['a', 'c'\\]. Use the same data"
    refused_unchanged(tmp_path, message, lambda: run(labels=["a", "c"], training_tasks="456"))


# What a step does


def float64_tasks() -> FixedEpisodes:
    source = generator(5)

    def batch(size: int) -> Batch:
        x = torch.randn(size, 3, generator=source, dtype=torch.float64)
        return Batch(x, (x[:, 0] > 0).long() + (x[:, 1] > 0).long())

    return FixedEpisodes([Episode(batch(5), batch(4)) for _ in range(7)])


def float64_model() -> Model:
    network = MLP(3, input_shape=3, hidden_sizes=(4,), activation="tanh", generator=generator()).double()
    return build_model(network, Categorical(), adapt="head.*")


class Recorded(Trainer):
    """Keeps the gradients that it applies."""

    applied: list[MetaParameters]

    def _apply(self, gradient: MetaParameters) -> None:
        self.applied = [*getattr(self, "applied", []), gradient]
        super()._apply(gradient)


@pytest.mark.parametrize("name", ["maml", "fomaml", "imaml", "abml", "vampire", "ibaml"])
def test_chunks_give_the_same_gradients(name):
    algorithm = make_algorithm(name, inner=GradientDescent(num_steps=2, learning_rate=0.1))
    gradients = []
    for chunk in (None, 1, 2, 8):
        settings = dataclasses.replace(SMALL, num_steps=1, tasks_per_step=5, tasks_per_chunk=chunk, gradient_clip=None)
        run = Recorded(float64_model(), algorithm, settings)
        run.fit(float64_tasks())
        gradients.append(run.applied)
    for others in gradients[1:]:
        for gradient, other in zip(gradients[0], others, strict=True):
            for one, two in zip(tree.leaves(gradient), tree.leaves(other), strict=True):
                torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-11)


def test_a_step_applies_the_mean_hypergradient_of_its_tasks():
    """Against the algorithm called task by task, and Adam's first step, which is the learning rate in the sign."""
    algorithm, settings = ALGORITHMS["maml"], dataclasses.replace(SMALL, num_steps=1, gradient_clip=None)
    run = Recorded(image_model(), algorithm, settings)
    result = run.fit(image_tasks())

    model, source = image_model(), generator(settings.seed)
    meta = algorithm.init(model.adapted, model.shared, generator=source)
    episodes = image_tasks().sample(3, generator=source)
    noises = [algorithm.draw_noise(meta, generator=source) for _ in range(3)]
    tasks = [tree.map(lambda leaf, i=index: leaf[i], episodes) for index in range(3)]
    single = [algorithm.hypergradient(model, meta, task, noise)[0] for task, noise in zip(tasks, noises, strict=True)]
    for name, before in model.adapted.items():
        mean = torch.stack([gradient.prior[name] for gradient in single]).mean(0)
        torch.testing.assert_close(run.applied[0].prior[name], mean, rtol=1e-5, atol=1e-7)
        step = settings.learning_rate * mean / (mean.abs() + 1e-8)
        torch.testing.assert_close(result.last_meta.prior[name], before - step, rtol=1e-4, atol=1e-5)


def test_log_variances_have_a_learning_rate_of_their_own():
    settings = dataclasses.replace(SMALL, num_steps=1, learning_rate=1e-2, log_var_learning_rate=0.5)
    run = make(None, "ibaml", settings)
    before = run._snapshot()
    after = run.fit(image_tasks()).last_meta
    assert isinstance(before.prior, DiagonalGaussian) and isinstance(after.prior, DiagonalGaussian)
    moved = [
        torch.cat([(after_group[name] - value).abs().flatten() for name, value in before_group.items()]).max()
        for before_group, after_group in (
            (before.prior.mean, after.prior.mean),
            (before.prior.log_var, after.prior.log_var),
        )
    ]
    assert float(moved[0]) == pytest.approx(1e-2, rel=1e-2)
    assert float(moved[1]) == pytest.approx(0.5, rel=1e-2)


def test_gradient_clipping_shortens_and_never_lengthens():
    free, clipped, loose = (
        Recorded(image_model(), ALGORITHMS["maml"], dataclasses.replace(SMALL, num_steps=1, gradient_clip=clip))
        for clip in (None, 1e-3, 1e3)
    )
    for run in (free, clipped, loose):
        run.fit(image_tasks())
    norm = float(tree.norm(free.applied[0]))
    assert norm > 1e-2
    assert float(tree.norm(clipped.applied[0])) == pytest.approx(1e-3, rel=1e-5)
    for one, other in zip(tree.leaves(clipped.applied[0]), tree.leaves(free.applied[0]), strict=True):
        torch.testing.assert_close(one, other * (1e-3 / norm), rtol=1e-4, atol=1e-9)
    assert_same_meta(loose.applied[0], free.applied[0])


def test_a_zero_gradient_survives_clipping():
    constant = Batch(torch.zeros(2, 3, dtype=torch.float64), torch.zeros(2, dtype=torch.int64))
    # One class and one output: the nll is zero whatever the weights.
    network = MLP(1, input_shape=3, hidden_sizes=()).double()
    model = build_model(network, Categorical())
    result = Trainer(model, ALGORITHMS["maml"], dataclasses.replace(SMALL, num_steps=2)).fit(
        FixedEpisodes([Episode(constant, constant)])
    )
    assert bool(tree.all_finite(result.last_meta))


@pytest.mark.parametrize("schedule", ["constant", "cosine"])
def test_schedule(schedule):
    rates = []

    class Watched(Trainer):
        def _apply(self, gradient):
            super()._apply(gradient)
            rates.append([group["lr"] for group in self._optimizer.param_groups])

    settings = dataclasses.replace(SMALL, num_steps=4, schedule=schedule, log_var_learning_rate=0.1)
    Watched(image_model(), ALGORITHMS["ibaml"], settings).fit(image_tasks())
    half = math.sqrt(0.5) / 2
    factors = [1, 1, 1, 1] if schedule == "constant" else [1, 0.5 + half, 0.5, 0.5 - half]
    for factor, (mean_rate, log_var_rate) in zip(factors, rates, strict=True):
        assert mean_rate == pytest.approx(1e-2 * factor, rel=1e-12)
        assert log_var_rate == pytest.approx(0.1 * factor, rel=1e-12)


def test_the_model_of_the_user_is_not_changed():
    model = image_model()
    before = {name: value.clone() for name, value in model.network.state_dict().items()}
    Trainer(model, ALGORITHMS["ibaml"], SMALL).fit(image_tasks())
    for name, value in model.network.state_dict().items():
        assert torch.equal(value, before[name])
        assert torch.equal(model.adapted[name], before[name])


def test_the_seed_decides():
    runs = [fit(None, "ibaml", dataclasses.replace(SMALL, seed=seed)).last_meta for seed in (0, 0, 1)]
    assert_same_meta(runs[0], runs[1])
    assert not torch.equal(tree.ravel(runs[0])[0], tree.ravel(runs[2])[0])


def test_the_global_seed_does_not():
    # Building a module draws from it before the module's own initialisation does.
    runs = [make(None, "ibaml"), make(None, "ibaml")]
    state = torch.get_rng_state()
    results = []
    for run in runs:
        results.append(run.fit(image_tasks(0), image_tasks(1)).last_meta)
        assert torch.equal(torch.get_rng_state(), state)
        torch.rand(3)
        state = torch.get_rng_state()
    assert_same_meta(*results)


# Choosing the best


def fitted_model(model, algorithm, meta):
    return FittedModel(model=model, algorithm=algorithm, meta=meta, preprocessing=None, device=torch.device("cpu"))


def test_the_logged_loss_is_that_of_a_task_however_many_there_are(tmp_path):
    class Same(SinusoidTasks):
        """Tasks that are all the first one."""

        def sample(self, num_tasks, *, generator):
            one = super().sample(1, generator=generator)
            return tree.map(lambda leaf: leaf.expand(num_tasks, *leaf.shape[1:]), one)

    losses = []
    for count in (1, 3):
        settings = dataclasses.replace(SMALL, num_steps=1, tasks_per_step=count)
        folder = tmp_path / str(count)
        Trainer(sinusoid_model(), ALGORITHMS["maml"], settings, run_folder=folder).fit(Same(num_shots=3, num_queries=3))
        losses.append(rows_of(folder)[0]["loss"])
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)


def test_validation_chooses_the_best_state(tmp_path, monkeypatch):
    # Of equal states the earlier one.
    nlls = iter([3.0, 1.0, 1.0])
    seen = []
    real = trainer.evaluate

    def scripted(fitted, tasks, **arguments):
        result = real(fitted, tasks, **arguments)
        seen.append((tree.map(torch.clone, fitted.meta), arguments["seed"], arguments["num_tasks"]))
        nll = result.report["nll"]._replace(mean=next(nlls))
        return dataclasses.replace(result, report={**result.report, "nll": nll})

    monkeypatch.setattr(trainer, "evaluate", scripted)
    monkeypatch.setattr(trainer, "tempered", lambda likelihood, result, temperature: result)
    result = fit(tmp_path)
    assert result.best_step == 4
    assert_same_meta(result.meta, seen[1][0])
    assert_same_meta(result.last_meta, seen[2][0])
    assert not torch.equal(tree.ravel(result.meta)[0], tree.ravel(result.last_meta)[0])
    assert {seed for _, seed, _ in seen} == {10**6} and {count for *_, count in seen} == {3}


def test_validations_are_where_they_are_due_and_at_the_end(tmp_path):
    fit(tmp_path, settings=dataclasses.replace(SMALL, num_steps=5))
    assert [row["step"] for row in rows_of(tmp_path) if "validation_nll" in row] == [2, 4, 5]


def test_logged_validation_equals_an_evaluation_of_that_state(tmp_path):
    result = fit(tmp_path, "ibaml", settings=dataclasses.replace(SMALL, num_validation_tasks=12))
    logged = {row["step"]: row for row in rows_of(tmp_path) if "validation_nll" in row}
    fitted = fitted_model(image_model(), ALGORITHMS["ibaml"], result.meta)
    fitted = dataclasses.replace(fitted, temperature=result.chosen.temperature)
    assert logged[result.best_step]["validation_temperature"] == fitted.temperature != 1
    again = evaluation.evaluate(fitted, image_tasks(1), num_tasks=12, seed=SMALL.seed + 10**6)
    assert logged[result.best_step]["validation_nll"] == pytest.approx(again.report["nll"].mean, abs=1e-6)
    assert min(row["validation_nll"] for row in logged.values()) == logged[result.best_step]["validation_nll"]


# Learning


@pytest.mark.parametrize("name", ["maml", "imaml", "abml", "ibaml"])
def test_training_lowers_the_loss_after_adaptation(name):
    """Blobs in the plane whose classes sit at the same places in every task, under shuffled labels."""
    source = generator(3)
    centres = torch.tensor([[2.0, 0.0], [-1.0, 1.7], [-1.0, -1.7]])

    def task() -> Episode:
        order = torch.randperm(3, generator=source)

        def batch(per_class: int) -> Batch:
            y = torch.arange(3).repeat_interleave(per_class)
            return Batch(centres[order][y] + 0.3 * torch.randn(len(y), 2, generator=source), y)

        return Episode(batch(4), batch(4))

    settings: dict = {"inner": GradientDescent(num_steps=2, learning_rate=0.2)}
    if name in ("abml", "vampire", "ibaml"):
        settings |= {"num_samples": 2, "temperature": 0.01, "prior": DiagonalPrior(initial_log_var=(-7.0, -7.0))}
    if name == "imaml":
        settings |= {"proximal_strength": 0.1}
    algorithm = make_algorithm(name, **settings)
    network = MLP(3, input_shape=2, hidden_sizes=(16,), activation="tanh", generator=generator())
    model = build_model(network, Categorical())
    train_tasks, test_tasks = FixedEpisodes([task() for _ in range(40)]), FixedEpisodes([task() for _ in range(20)])
    run = Trainer(model, algorithm, TrainerSettings(num_steps=30, learning_rate=0.1, tasks_per_step=4))
    before = run._snapshot()
    after = run.fit(train_tasks).meta
    nll = [
        evaluation.evaluate(fitted_model(model, algorithm, meta), test_tasks, num_tasks=20, seed=1).report["nll"].mean
        for meta in (before, after)
    ]
    assert nll[1] < 0.7 * nll[0]


# Signals, threads and time


def test_a_second_sigint_stops_at_once(tmp_path):
    class Impatient(Interrupted):
        signals = {3: [signal.SIGINT, signal.SIGINT]}

    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt):
        make(tmp_path, kind=Impatient).fit(image_tasks(0), image_tasks(1))
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers
    # What was saved before is whole.
    assert state_of(tmp_path)[1]["step"] == 2
    fit(tmp_path)


def test_two_sigterms_are_one(tmp_path):
    class Impatient(Interrupted):
        signals = {3: [signal.SIGTERM, signal.SIGTERM]}

    result = make(tmp_path, kind=Impatient).fit(image_tasks(0), image_tasks(1))
    assert (result.num_steps, result.stop_reason) == (3, "interrupted")


def test_a_signal_during_the_last_step_does_not_unfinish_the_run(tmp_path):
    class Late(Interrupted):
        signals = {6: [signal.SIGINT]}

    result = make(tmp_path, kind=Late).fit(image_tasks(0), image_tasks(1))
    assert (result.num_steps, result.stop_reason) == (6, "completed")


def test_interrupted_before_the_first_validation_keeps_the_initial_state_as_best(tmp_path):
    class Early(Interrupted):
        signals = {1: [signal.SIGINT]}

    result = make(tmp_path, kind=Early).fit(image_tasks(0), image_tasks(1))
    assert (result.num_steps, result.best_step) == (1, 0)
    assert_same_meta(result.meta, make(None)._snapshot())


def test_trains_in_another_thread():
    results = []
    thread = threading.Thread(target=lambda: results.append(fit(None)))
    thread.start()
    thread.join()
    assert results[0].num_steps == 6


@pytest.mark.parametrize("max_minutes", [0, -1.0, math.nan])
def test_a_time_limit_is_positive(max_minutes):
    with pytest.raises(ValueError, match=f"max_minutes must be positive, but is {max_minutes}"):
        make(None).fit(image_tasks(), max_minutes=max_minutes)


# Bad data and divergence


def spoil_input(episode: Episode) -> Episode:
    x = episode.query.x.clone()
    x[1, 4, 0, 1, 0] = math.nan
    return episode._replace(query=episode.query._replace(x=x))


def spoil_label(episode: Episode) -> Episode:
    y = episode.support.y.clone()
    y[2, 3] = 5
    return episode._replace(support=episode.support._replace(y=y))


@pytest.mark.parametrize(("name", "tasks_per_chunk"), [("maml", 1), ("ibaml", None)])
@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            spoil_input,
            r"training task 1 of step 4 query\.x has 1 NaN or infinite values, the first at index \(4, 0, 1, 0\)",
        ),
        (
            spoil_label,
            r"training task 2 of step 4 support\.y has labels from 0 to 5, but the network has 2 outputs: expected "
            r"labels in 0 \.\. 1",
        ),
    ],
)
def test_bad_data_in_training_names_the_task_and_loses_nothing(tmp_path, name, tasks_per_chunk, spoil, message):
    settings = dataclasses.replace(SMALL, checkpoint_every=100, validate_every=100, tasks_per_chunk=tasks_per_chunk)
    whole = make(tmp_path / "whole", name, settings).fit(image_tasks())
    # The first call is the check before training, so the fifth is step 4.
    with pytest.raises(ValueError, match=message):
        make(tmp_path / "parts", name, settings).fit(Spoilt(5, spoil))
    assert state_of(tmp_path / "parts")[1]["step"] == 3
    mended = make(tmp_path / "parts", name, settings).fit(image_tasks())
    assert mended.num_steps == 6
    assert_same_meta(mended.last_meta, whole.last_meta)


@pytest.mark.parametrize("folder", [True, False])
def test_divergence_names_step_causes_and_the_saved_state(tmp_path, folder):
    settings = dataclasses.replace(SMALL, num_steps=50, learning_rate=1e30, gradient_clip=None, checkpoint_every=100)
    model = sinusoid_model()
    run = Trainer(model, ALGORITHMS["maml"], settings, run_folder=tmp_path if folder else None)
    with pytest.raises(TrainingDivergedError) as caught:
        run.fit(SinusoidTasks(num_shots=3, num_queries=3))
    message = str(caught.value)
    step = int(re.match(r"step (\d+): the hypergradient is not finite \(norm ", message).group(1))
    assert "learning_rate=0.1" in message and "or learning_rate (1e+30) too large" in message
    assert re.search(r"tasks \[[\d, ]+\] of the step; their inner gradient norms \[", message)
    if folder:
        assert message.endswith(f"The state before is saved in {tmp_path / CHECKPOINT}.")
        tensors, metadata = load_tensors(tmp_path / CHECKPOINT)
        assert metadata["step"] == step - 1
        assert all(bool(torch.isfinite(value).all()) for name, value in tensors.items() if name.startswith("prior"))
    else:
        assert message.endswith("The state before is lost, because there is no run folder to save it in.")


def test_divergence_in_the_first_step_can_be_resumed(tmp_path):
    algorithm = dataclasses.replace(ALGORITHMS["maml"], inner=GradientDescent(num_steps=5, learning_rate=1e30))
    for _ in range(2):
        with pytest.raises(TrainingDivergedError, match="step 1: the hypergradient is not finite"):
            Trainer(sinusoid_model(), algorithm, SMALL, run_folder=tmp_path).fit(
                SinusoidTasks(num_shots=3, num_queries=3)
            )
        assert state_of(tmp_path)[1]["step"] == 0


def test_divergence_in_validation_is_reported_with_the_state_saved(tmp_path):
    """Training tasks can be tame where validation tasks are not."""
    settings = dataclasses.replace(SMALL, checkpoint_every=100)
    wild = SinusoidTasks(num_shots=3, num_queries=3, amplitude=(1e30, 1e30))
    run = Trainer(sinusoid_model(), ALGORITHMS["maml"], settings, run_folder=tmp_path)
    message = (
        r"validation after step 2: test task 0: adapting to the 3 support examples gives numbers that are not finite\. "
        r"Likely causes: .* inner steps that are too large \(unrolled gradient, .*\)\. The state before is saved"
    )
    with pytest.raises(TrainingDivergedError, match=message):
        run.fit(SinusoidTasks(num_shots=3, num_queries=3), wild)
    assert state_of(tmp_path)[1]["step"] == 2


@pytest.mark.parametrize("where", ["training", "validation"])
def test_the_first_task_of_each_kind_is_checked_before_training(monkeypatch, where):
    monkeypatch.setattr(Trainer, "_train_step", lambda *_: pytest.fail("trained"))

    def attempt(message: str, bad: TaskSampler) -> None:
        pair = (bad, image_tasks()) if where == "training" else (image_tasks(), bad)
        with pytest.raises(ValueError, match=message):
            make(None).fit(*pair)

    large = ClassImages(
        images=torch.zeros(8, 1, 3, 3, dtype=torch.uint8), class_start=torch.tensor([0, 4, 8]), class_names=("a", "b")
    )
    attempt(
        rf"the network \(MLP\) cannot process {where} task support\.x of shape \(4, 1, 3, 3\) and dtype "
        r"torch\.float32: x must have shape \[examples, 1, 2, 2\], got \[4, 1, 3, 3\]",
        EpisodeSampler(large, num_ways=2, num_shots=2, num_queries=2),
    )
    three = EpisodeSampler(image_tasks().images, num_ways=3, num_shots=1, num_queries=1)
    attempt(rf"{where} task support\.y has labels from 0 to 2, but the network has 2 outputs", three)
    real = Batch(torch.zeros(2, 1, 2, 2), torch.zeros(2, 1))
    attempt(
        rf"{where} task support\.y has dtype torch\.float32, but expected class", FixedEpisodes([Episode(real, real)])
    )


def test_a_module_without_checks_of_its_own_gets_the_same_message():
    model = build_model(nn.Sequential(nn.Flatten(), nn.Linear(5, 2)), Categorical())
    with pytest.raises(
        ValueError, match=r"the network \(Sequential\) cannot process training task support\.x of shape"
    ):
        Trainer(model, ALGORITHMS["maml"], SMALL).fit(image_tasks())


def test_bad_data_in_validation_is_reported_with_the_state_saved(tmp_path):
    def spoil(episode: Episode) -> Episode:
        return episode._replace(query=episode.query._replace(y=episode.query.y + 2))

    settings = dataclasses.replace(SMALL, checkpoint_every=100)
    message = (
        r"validation after step 2: test task 1 query\.y has labels from 2 to 3, .* The state before is saved in .*"
    )
    with pytest.raises(ValueError, match=message):
        # The first call is the check before training.
        make(tmp_path, settings=settings).fit(image_tasks(0), Spoilt(3, spoil))
    assert state_of(tmp_path)[1]["step"] == 2


def test_episodes_of_unequal_sizes_train_one_at_a_time():
    source = generator()

    def batch(size: int) -> Batch:
        return Batch(torch.randn(size, 1, 2, 2, generator=source), torch.arange(size) % 2)

    tasks = FixedEpisodes([Episode(batch(size), batch(4)) for size in (2, 3, 5)])
    with pytest.raises(ValueError, match="cannot be stacked: draw one at a time, which in training means tasks_per_st"):
        fit_with = make(None)
        fit_with.fit(tasks)
    single = make(None, settings=dataclasses.replace(SMALL, tasks_per_step=1))
    assert single.fit(tasks, tasks).num_steps == 6


# Settings


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


def test_metadata_of_a_checkpoint_is_json(tmp_path):
    fit(tmp_path, "ibaml")
    _, metadata = load_tensors(tmp_path / CHECKPOINT)
    assert json.loads(json.dumps(metadata)) == metadata
    assert records.from_json(metadata["description"]["algorithm"], RECORDS) == ALGORITHMS["ibaml"]


def test_a_checkpoint_of_unknown_best_is_refused(tmp_path):
    fit(tmp_path)
    tensors, metadata = load_tensors(tmp_path / CHECKPOINT)
    kept = {name: value for name, value in tensors.items() if not name.startswith("best/")}
    save_tensors(tmp_path / CHECKPOINT, kept, metadata)
    with pytest.raises(ValueError, match=r"belongs to another network or algorithm: prior/.* is missing"):
        fit(tmp_path)
