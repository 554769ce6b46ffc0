"""A training that is taken up again: the same bits as one without a break, or a reason why not."""

import contextlib
import dataclasses
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from rich.console import Console
from tests.train.trainings import (
    ALGORITHMS,
    SMALL,
    Interrupted,
    assert_identical,
    assert_same_meta,
    fit,
    generator,
    image_model,
    image_tasks,
    make,
    rows_of,
    sinusoid_model,
    state_of,
)

from ibaml import records, tree
from ibaml.algorithms import RECORDS, make_algorithm
from ibaml.algorithms.model import build_model
from ibaml.data import SinusoidTasks
from ibaml.likelihoods import Categorical
from ibaml.networks import MLP
from ibaml.solvers.inner import GradientDescent
from ibaml.solvers.linear import CG
from ibaml.train import trainer
from ibaml.train.checkpoint import CHECKPOINT, PREVIOUS, load_tensors, save_tensors
from ibaml.train.draw import DrawnTasks, draw_step
from ibaml.train.log import METRICS
from ibaml.train.trainer import (
    Trainer,
    TrainerSettings,
)


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
from ibaml import records
from ibaml.algorithms import RECORDS
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


def test_other_data_are_refused(tmp_path):
    def run(**data: object) -> None:
        Trainer(image_model(), ALGORITHMS["maml"], SMALL, run_folder=tmp_path, data_identity=data).fit(image_tasks())

    run(labels=["a", "b"], training_tasks="123")
    run(labels=["a", "b"], training_tasks="123")
    message = "was trained on other data: data.labels was \\['a', 'b'\\] and is now \\['a', 'c'\\]. Use the same data"
    refused_unchanged(tmp_path, message, lambda: run(labels=["a", "c"], training_tasks="456"))


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
