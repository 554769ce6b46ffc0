"""Trainings that end early: signals, time limits, bad data and divergence leave a saved state and a reason."""

import dataclasses
import math
import re
import signal
import threading

import pytest
import torch
from tests.train.trainings import (
    ALGORITHMS,
    SMALL,
    Interrupted,
    Spoilt,
    assert_same_meta,
    fit,
    generator,
    image_tasks,
    make,
    sinusoid_model,
    state_of,
)
from torch import nn

from ibaml.algorithms.model import build_model
from ibaml.data import ClassImages, EpisodeSampler, FixedEpisodes, SinusoidTasks
from ibaml.likelihoods import Categorical
from ibaml.solvers.inner import GradientDescent
from ibaml.train.checkpoint import CHECKPOINT, load_tensors
from ibaml.train.trainer import (
    Trainer,
    TrainingDivergedError,
)
from ibaml.types import Batch, Episode, TaskSampler

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
