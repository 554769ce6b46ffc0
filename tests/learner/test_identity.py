"""A run folder belongs to its data: other values, labels, columns or splits are refused by name."""

import dataclasses
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pandas as pd
import pytest
import torch

from ibaml import Batch, Episode, MetaLearner, SplitSettings, TrainerSettings
from ibaml.data import FixedEpisodes, SinusoidTasks
from ibaml.learner.folder import MODEL
from ibaml.learner.identity import digest_of_tasks
from ibaml.learner.run_folder import ENVIRONMENT
from ibaml.networks import MLP
from ibaml.train.checkpoint import CHECKPOINT
from ibaml.train.lock import only_training_in

SETTINGS = TrainerSettings(num_steps=2, tasks_per_step=2, fast=False)


def pairs(seed: int = 0, positive: str = "yes"):
    rng = np.random.default_rng(seed)
    inputs = [rng.normal(size=(size, 3)) for size in (12, 9, 15)]
    return [(x, np.where(x[:, 0] > 0, positive, "no")) for x in inputs]


def table(seed: int = 0, name: str = "width") -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    frame = pd.DataFrame(rng.normal(size=(36, 3)), columns=["height", name, "y"])
    return frame.assign(task=np.arange(36) // 12)


def fit(folder, tasks, likelihood="categorical", **arguments) -> MetaLearner:
    arguments = {"settings": SETTINGS, **arguments}
    return MetaLearner(algorithm="maml", likelihood=likelihood).fit(tasks, run_folder=folder, **arguments)


def test_the_same_data_resume(tmp_path):
    first = fit(tmp_path, pairs())
    longer = dataclasses.replace(SETTINGS, num_steps=3, tasks_per_chunk=1)
    assert fit(tmp_path, pairs(), settings=longer).training_result.num_steps == 3
    assert first.training_result.num_steps == 2


@pytest.mark.parametrize(
    ("tasks", "arguments", "difference"),
    [
        (pairs(seed=1), {}, "data.training_tasks was '.*' and is now '.*'"),
        (pairs(positive="maybe"), {}, r"data.class_labels was \['no', 'yes'\] and is now \['maybe', 'no'\]"),
        ([(2 * x + 1, y) for x, y in pairs()], {}, "data.(scales|training_tasks) was "),
        ([(x[:, :2], y) for x, y in pairs()], {}, r"belongs to another network|data.input_shape was \[3\]"),
        (pairs(), {"splits": SplitSettings(num_support=3)}, "data.splits.num_support was None and is now 3"),
        (pairs(), {"validation_tasks": pairs(seed=2)}, "data.validation_tasks was None and is now '"),
    ],
)
def test_other_data_are_refused_and_the_run_stays_whole(tmp_path, tasks, arguments, difference):
    fit(tmp_path, pairs())
    before = {name: (tmp_path / name).read_bytes() for name in (MODEL, CHECKPOINT)}
    with pytest.raises(ValueError, match=difference):
        fit(tmp_path, tasks, **arguments)
    assert {name: (tmp_path / name).read_bytes() for name in (MODEL, CHECKPOINT)} == before


def test_other_columns_are_refused(tmp_path):
    columns = {"likelihood": "gaussian", "task": "task", "target": "y"}
    fit(tmp_path, table(), **columns)
    message = (
        r"was trained on other data: data.feature_names was \['height', 'width'\] and is now \['height', 'depth'\]"
    )
    with pytest.raises(ValueError, match=message):
        fit(tmp_path, table(name="depth"), **columns)
    message = r"data.target_columns was \['y'\] and is now \['width'\]"
    with pytest.raises(ValueError, match=message):
        fit(tmp_path, table(), **{**columns, "target": "width", "features": ("height", "y")})


def test_tensors_and_samplers(tmp_path):
    def episodes(shift: float) -> list[Episode]:
        source = torch.Generator().manual_seed(0)
        return [
            Episode(*(Batch(torch.randn(4, 1, generator=source) + shift, torch.zeros(4, 1)) for _ in range(2)))
            for _ in range(40)
        ]

    def train(tasks) -> None:
        network = MLP(1, input_shape=1, hidden_sizes=(3,), generator=torch.Generator().manual_seed(0))
        MetaLearner(network, "maml", "gaussian").fit(tasks, settings=SETTINGS, run_folder=tmp_path)

    train(episodes(0.0))
    train(FixedEpisodes(episodes(0.0)))
    # A single value of the last task.
    changed = episodes(0.0)
    changed[-1].query.x[-1] += 1e-6
    for other in (changed, SinusoidTasks(num_shots=4, num_queries=4)):
        with pytest.raises(ValueError, match="was trained on other data: data.training_tasks was"):
            train(other)


def test_a_sampler_without_content_is_known_by_its_tasks():
    class Counting:
        """Counts its calls, which is no difference."""

        input_shape, num_outputs = (1,), 1

        def __init__(self, num_shots: int) -> None:
            self.tasks, self.count = SinusoidTasks(num_shots=num_shots, num_queries=2), 0

        def sample(self, num_tasks, *, generator):
            self.count += 1
            return self.tasks.sample(num_tasks, generator=generator)

    class Random(Counting):
        """Does not heed the generator."""

        def sample(self, num_tasks, *, generator):
            return super().sample(num_tasks, generator=torch.Generator().manual_seed(self.count))

    one = Counting(3)
    assert digest_of_tasks(one) == digest_of_tasks(one) == digest_of_tasks(Counting(3)) != digest_of_tasks(Counting(4))
    assert digest_of_tasks(Random(3)) == "not repeatable"


def lines_in(columns: list[str]) -> dict[str, object]:
    return {"task": "task", "target": "y", "features": columns}


def test_a_model_in_closed_form_is_not_replaced_by_one_of_other_data(tmp_path):
    """It has no checkpoint, which would tell."""
    first = MetaLearner(likelihood="gaussian").fit(table(), run_folder=tmp_path, **lines_in(["height"]))
    assert not (tmp_path / CHECKPOINT).exists()
    before = (tmp_path / MODEL).read_bytes()
    message = (
        r"holds a model that was trained on other data: data.feature_names was \['height'\] and is now \['width'\]"
    )
    with pytest.raises(ValueError, match=message):
        MetaLearner(likelihood="gaussian").fit(table(), run_folder=tmp_path, **lines_in(["width"]))
    with pytest.raises(ValueError, match=r"other data: data.feature_names was \['height'\]"):
        fit(tmp_path, table(), "gaussian", **lines_in(["width"]))
    assert (tmp_path / MODEL).read_bytes() == before
    again = MetaLearner(likelihood="gaussian").fit(table(), run_folder=tmp_path, **lines_in(["height"]))
    x = np.linspace(-1, 1, 3)[:, None]
    for learner in (again, MetaLearner.load(tmp_path)):
        expected = first.adapt(x, x[:, 0]).predict(x).mean
        np.testing.assert_array_equal(learner.adapt(x, x[:, 0]).predict(x).mean, expected)
    (tmp_path / ENVIRONMENT).write_text("{")
    with pytest.raises(ValueError, match=rf"{ENVIRONMENT} is damaged \(.*\), and nothing else says on which data"):
        MetaLearner(likelihood="gaussian").fit(table(), run_folder=tmp_path, **lines_in(["height"]))


def test_a_training_by_steps_keeps_its_folder(tmp_path):
    """The same data by another way: its checkpoint and metrics would lie beside a model that is not of it."""
    fit(tmp_path, table(), "gaussian", **lines_in(["height"]))
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    with pytest.raises(
        ValueError, match="holds a training by steps, .*: this one was estimated in closed form. Choose"
    ):
        MetaLearner(likelihood="gaussian").fit(table(), run_folder=tmp_path, **lines_in(["height"]))
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()} == before


def test_a_model_in_closed_form_waits_for_a_training(tmp_path):
    """A training that has no checkpoint yet holds its folder."""
    holds, ends = threading.Event(), threading.Event()

    def training() -> None:
        with only_training_in(tmp_path):
            holds.set()
            ends.wait(60)

    with ThreadPoolExecutor(1) as other:
        other.submit(training)
        assert holds.wait(60)
        try:
            with pytest.raises(OSError, match="another training is running in"):
                MetaLearner(likelihood="gaussian").fit(table(), run_folder=tmp_path, **lines_in(["height"]))
        finally:
            ends.set()
    assert not (tmp_path / MODEL).exists()
