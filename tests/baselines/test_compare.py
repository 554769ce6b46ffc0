"""Every baseline on every form of tasks; what is paired, stored, refused and used again."""

import csv
import dataclasses
import io
import json
import math
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn

from ibaml import tree
from ibaml.algorithms import make_algorithm
from ibaml.baselines import BASELINES, Baseline, BaselineComparison, FittedBaseline, Problem, compare_with_baselines
from ibaml.baselines.compare import RECORD
from ibaml.baselines.training import PLAN
from ibaml.data.sources import Mixtures, Sinusoid
from ibaml.learner import MetaLearner
from ibaml.networks import MLP, Conv4
from ibaml.train import TrainerSettings, TrainingDivergedError
from ibaml.types import Batch, Episode

SETTINGS = TrainerSettings(tasks_per_step=2, num_validation_tasks=3, fast=False)
OF_CLASSES = {"logistic_regression", "neighbours", "prototypes", "maml"}
OF_NUMBERS = {"ridge", "neighbours", "pooled", "gp", "maml"}


def table(num_tasks: int, *, classes: bool, seed: int = 0) -> list[tuple[Any, Any]]:
    rng = np.random.default_rng(seed)
    tasks: list[tuple[Any, Any]] = []
    for _ in range(num_tasks):
        x = rng.normal(size=(int(rng.integers(12, 18)), 3))
        y = 10 + 3 * (x @ (np.array([1.0, -1.0, 0.5]) + 0.3 * rng.normal(size=3))) + 0.3 * rng.normal(size=len(x))
        tasks.append((x, np.where(y > 10, "high", "low") if classes else y))
    return tasks


def linear(likelihood: str = "gaussian", num_outputs: int = 1, num_features: int = 3) -> MetaLearner:
    head = make_algorithm("linear_gaussian" if likelihood == "gaussian" else "prototypes")
    network = MLP(num_outputs, input_shape=num_features, hidden_sizes=(4,))
    return MetaLearner(network, head, likelihood, "head.*")


def compared(learner: MetaLearner, train: Any, validation: Any, test: Any, **options: Any) -> BaselineComparison:
    given = {"seconds": 0.1, "settings": SETTINGS, "num_tasks": 4, **options}
    return compare_with_baselines(learner, train, validation, test, **given)


def fitted_on_numbers() -> tuple[MetaLearner, tuple[Any, Any, Any]]:
    tasks = table(14, classes=False)
    learner = linear().fit(tasks[:10], 0.3, num_steps=2)
    return learner, (tasks[:10], 0.3, tasks[10:])


def assert_complete(found: BaselineComparison, names: set[str]) -> None:
    """All methods have results, on the same targets to the last bit."""
    assert {method.name for method in found.methods} == {"learner", *names}
    for method in found.methods:
        assert not method.has_failed, method.note
        assert math.isfinite(method.report["nll"].mean) and len(method.per_task["nll"]) == found.num_tasks
        assert method.seconds is not None and method.seconds > 0


# Every form of tasks


def test_tables_of_numbers() -> None:
    learner, tasks = fitted_on_numbers()
    found = compared(learner, *tasks)
    assert_complete(found, OF_NUMBERS)
    assert found.header[1:4] == ["rmse", "nll", "coverage_90"]
    assert found["ridge"].report["rmse"].mean < found["pooled"].report["rmse"].mean
    posterior = found["ridge"].learner.adapt(*tasks[2][0])
    # In the units of the data, as the learner's own.
    assert abs(posterior.predict(tasks[2][0][0]).mean - tasks[2][0][1]).mean() < 1


def test_tables_of_classes_that_all_tasks_share() -> None:
    tasks = table(14, classes=True)
    learner = linear("categorical", 2).fit(tasks[:10], 0.3, num_steps=2)
    found = compared(learner, tasks[:10], 0.3, tasks[10:])
    assert_complete(found, OF_CLASSES | {"pooled"})
    assert found.header[1:4] == ["accuracy", "nll", "ece_pooled"]
    assert found["pooled"].report["accuracy"].mean > 0.8
    prediction = found["maml"].learner.adapt(*tasks[12]).predict(tasks[12][0])
    assert prediction.classes.tolist() == ["high", "low"]


def test_episodes_of_unequal_sizes() -> None:
    generator = torch.Generator().manual_seed(0)

    def batch(size: int) -> Batch:
        x = torch.randn(size, 3, generator=generator)
        return Batch(x, x[:, :1] + 0.1 * torch.randn(size, 1, generator=generator))

    episodes = [Episode(batch(4 + i % 3), batch(5 + i % 2)) for i in range(12)]
    learner = linear().fit(episodes[:6], settings=dataclasses.replace(SETTINGS, tasks_per_step=1, num_steps=2))
    # Without settings, which would have to say that such tasks come one at a time.
    found = compared(learner, episodes[:6], episodes[6:9], episodes[9:], settings=None, baselines=["ridge", "gp"])
    assert_complete(found, {"ridge", "gp"})
    for method in found.methods:
        for one, episode in zip(method.learner.evaluate_in_full(episodes[9:]).query_targets, episodes[9:], strict=True):
            assert torch.equal(one, episode.query.y.double()) or torch.equal(one, episode.query.y)


def test_images_whose_classes_are_of_their_task() -> None:
    generator = torch.Generator().manual_seed(0)

    def batch(size: int) -> Batch:
        y = torch.arange(size) % 2
        return Batch(torch.randn(size, 1, 8, 8, generator=generator) + y.reshape(-1, 1, 1, 1), y)

    episodes = [Episode(batch(4), batch(6)) for _ in range(9)]
    network = Conv4(2, channels=4, image_size=8, downsample="stride")
    learner = MetaLearner(network, make_algorithm("prototypes"), classes="per_task")
    learner = learner.fit(episodes[:3], settings=dataclasses.replace(SETTINGS, num_steps=2))
    assert_complete(compared(learner, episodes[:3], episodes[3:6], episodes[6:]), OF_CLASSES)


def test_samplers_and_a_network_of_ones_own() -> None:
    source = Mixtures(num_ways=3, num_features=3, num_informative=2, num_queries=4)
    network = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 3))
    before = [value.clone() for value in network.state_dict().values()]
    learner = MetaLearner(network, make_algorithm("prototypes"), adapt="3.*", classes="per_task")
    learner = learner.fit(source.sampler("train"), settings=dataclasses.replace(SETTINGS, num_steps=2))
    found = compared(learner, *(source.sampler(split) for split in ("train", "validation", "test")))
    assert_complete(found, OF_CLASSES)
    # Running statistics forbid to adapt what comes before them.
    assert "last layer" in found["maml"].note
    assert all(map(torch.equal, network.state_dict().values(), before))


# Fair play


@dataclasses.dataclass
class Guarded:
    """A baseline that tells a sampler of test tasks when it is fitted."""

    baseline: Baseline
    guard: dict[str, bool]

    @property
    def name(self) -> str:
        return self.baseline.name

    def suits(self, problem: Problem) -> bool:
        return self.baseline.suits(problem)

    def fit(self, problem: Problem, *, seconds: float, folder: Path | None = None) -> FittedBaseline:
        self.guard["fitting"] = True
        try:
            return self.baseline.fit(problem, seconds=seconds, folder=folder)
        finally:
            self.guard["fitting"] = False


class TestTasks:
    """Sinusoids that are not to be seen while a baseline is fitted."""

    __test__ = False

    def __init__(self, guard: dict[str, bool]) -> None:
        self.guard, self.tasks = guard, Sinusoid(num_shots=4, num_queries=5).sampler("test")
        self.input_shape, self.num_outputs, self.has_equal_sizes = (1,), 1, True

    def sample(self, num_tasks: int, *, generator: torch.Generator) -> Episode:
        assert not self.guard["fitting"], "test tasks were drawn while a baseline was fitted"
        return self.tasks.sample(num_tasks, generator=generator)


def test_tuning_never_touches_test_tasks() -> None:
    source, guard = Sinusoid(num_shots=4, num_queries=5), {"fitting": False}
    splits = [source.sampler(split) for split in ("train", "validation")]
    learner = linear(num_features=1).fit(splits[0], settings=dataclasses.replace(SETTINGS, num_steps=2))
    baselines = [Guarded(BASELINES[name], guard) for name in sorted(OF_NUMBERS)]
    assert_complete(compared(learner, *splits, TestTasks(guard), baselines=baselines), OF_NUMBERS)
    # The guard works: as validation tasks they are seen, which ends the baseline.
    with pytest.raises(AssertionError, match="test tasks were drawn"):
        compared(learner, splits[0], TestTasks(guard), TestTasks(guard), baselines=baselines[:1])


def test_what_is_fitted_does_not_depend_on_the_test_tasks() -> None:
    learner, (train, share, test) = fitted_on_numbers()
    others = [(x, -100 * y) for x, y in test]
    names = ["ridge", "neighbours", "pooled"]
    one, other = (compared(learner, train, share, tasks, baselines=names) for tasks in (test, others))
    for name in names:
        metas = [each[name].learner.meta_parameters for each in (one, other)]
        assert one[name].note == other[name].note
        assert all(map(torch.equal, *map(tree.leaves, metas)))
        assert one[name].report["nll"].mean != other[name].report["nll"].mean


def test_all_methods_have_the_same_tasks_to_the_last_bit() -> None:
    learner, (train, share, test) = fitted_on_numbers()
    found = compared(learner, train, share, test, baselines=["ridge", "gp"], seed=3)
    own = learner.evaluate_in_full(test, seed=3).query_targets
    for method in found.methods:
        targets = method.learner.evaluate_in_full(test, seed=3).query_targets
        assert all(map(torch.equal, targets, own))
        assert method.learner.preprocessing is learner.preprocessing


def test_test_tasks_that_change_are_refused() -> None:
    class Changing(TestTasks):
        def sample(self, num_tasks: int, *, generator: torch.Generator) -> Episode:
            return self.tasks.sample(num_tasks, generator=self.own)

        own = torch.Generator().manual_seed(0)

    train = Sinusoid(num_shots=4, num_queries=5).sampler("train")
    learner = linear(num_features=1).fit(train, settings=dataclasses.replace(SETTINGS, num_steps=2))
    with pytest.raises(ValueError, match="ridge was evaluated on other test tasks than the learner"):
        compared(learner, train, train, Changing({"fitting": False}), baselines=["ridge"])


# The table


def test_differences_are_paired() -> None:
    learner, tasks = fitted_on_numbers()
    found = compared(learner, *tasks, baselines=["ridge"])
    first, ridge = found.methods
    for metric, cell in zip(("nll", "rmse"), found.rows[1][4:6], strict=True):
        values = (ridge.per_task[metric] - first.per_task[metric]).numpy()
        half_width = stats.t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / math.sqrt(len(values))
        assert cell.split(" better")[0].split(" worse")[0] == f"{values.mean():+.4f} +- {half_width:.4f}"
    torch.testing.assert_close(ridge.per_task["rmse"], ridge.per_task["mse"].sqrt())


@dataclasses.dataclass(frozen=True)
class Failing:
    error: type[Exception]
    name: ClassVar[str] = "failing"

    def suits(self, problem: Problem) -> bool:
        return True

    def fit(self, problem: Problem, *, seconds: float, folder: Path | None = None) -> FittedBaseline:
        raise self.error("step 3: the loss | is not finite.")


def test_a_failure_is_a_row(tmp_path: Path) -> None:
    learner, tasks = fitted_on_numbers()
    found = compared(learner, *tasks, baselines=["ridge", Failing(TrainingDivergedError)], folder=tmp_path)
    assert found["failing"].has_failed and not found["ridge"].has_failed
    rows = list(csv.reader(io.StringIO((tmp_path / "comparison.csv").read_text())))
    assert rows[0] == found.header and {len(row) for row in rows} == {len(found.header)}
    assert rows[3][:2] == ["failing", "failed"]
    assert rows[3][-1] == "TrainingDivergedError: step 3: the loss | is not finite."
    markdown = (tmp_path / "comparison.md").read_text().splitlines()
    assert {line.count("|") for line in markdown} == {len(found.header) + 1}
    stored = json.loads((tmp_path / "comparison.json").read_text())
    assert [method["failed"] for method in stored["methods"]] == [False, False, True]
    assert stored["methods"][1]["per_task"]["nll"] == found["ridge"].per_task["nll"].tolist()
    # A defect is no result.
    with pytest.raises(KeyError):
        compared(learner, *tasks, baselines=[Failing(KeyError)])


def test_predictions_that_fail_are_a_row() -> None:
    learner, (train, share, test) = fitted_on_numbers()

    @dataclasses.dataclass(frozen=True)
    class Broken:
        name: ClassVar[str] = "broken"

        def suits(self, problem: Problem) -> bool:
            return True

        def fit(self, problem: Problem, *, seconds: float, folder: Path | None = None) -> FittedBaseline:
            found = BASELINES["ridge"].fit(problem, seconds=seconds)
            fitted = found.learner.fitted_model
            meta = tree.map(lambda leaf: leaf * math.nan, fitted.meta)
            return found._replace(learner=found.learner.with_fitted(dataclasses.replace(fitted, meta=meta)))

    row = compared(learner, train, share, test, baselines=[Broken()]).rows[1]
    assert row[1] == "failed" and row[-1].startswith("FloatingPointError: test task 0")


def test_wrong_arguments_are_refused() -> None:
    learner, tasks = fitted_on_numbers()
    for options, message in (
        ({"baselines": ["rigde"]}, "there is no baseline 'rigde'; there are logistic_regression, ridge,"),
        ({"baselines": ["prototypes"]}, "baseline 'prototypes' does not suit these tasks; those that do are ridge,"),
        ({"baselines": ["ridge", "ridge"]}, "baseline 'ridge' is named twice"),
        ({"seconds": 0}, "seconds must be positive, but is 0"),
    ):
        with pytest.raises(ValueError, match=message):
            compared(learner, *tasks, **options)
    with pytest.raises(ValueError, match="validation_tasks is None, but baselines are tuned on such tasks"):
        compared(learner, tasks[0], None, tasks[2])
    source = Sinusoid(num_shots=4, num_queries=5)
    raw = linear(num_features=1).fit(source.sampler("train"), num_steps=1)
    with pytest.raises(TypeError, match="the learner was fitted on tensors, but train_tasks is a list"):
        compared(raw, *tasks)


def test_a_loaded_learner_needs_the_time(tmp_path: Path) -> None:
    learner, tasks = fitted_on_numbers()
    assert compared(learner, *tasks, seconds=None, baselines=["ridge"]).methods[0].seconds > 0
    loaded = MetaLearner.load(learner.save(tmp_path))
    with pytest.raises(ValueError, match="having been loaded: give seconds"):
        compared(loaded, *tasks, seconds=None)
    assert compared(loaded, *tasks, baselines=["ridge"]).methods[0].seconds is None


# The folder


def test_what_was_fitted_is_used_again(tmp_path: Path) -> None:
    learner, tasks = fitted_on_numbers()
    names, lines = ["ridge", "gp"], list[str]()
    first = compared(learner, *tasks, baselines=names, folder=tmp_path, say=lines.append)
    again = compared(learner, *tasks, baselines=names, folder=tmp_path, say=lines.append)
    assert lines[:2] == ["ridge: fitting", "gp: fitting"]
    assert lines[2:] == [f"{name}: as fitted in {tmp_path / name}" for name in names]
    assert again.rows == first.rows
    assert all(torch.equal(again[name].per_task["nll"], first[name].per_task["nll"]) for name in names)
    # Another time is another fit, and so are other data.
    compared(learner, *tasks, baselines=names, folder=tmp_path, seconds=0.2, say=lines.append)
    compared(learner, tasks[0][1:], *tasks[1:], baselines=names, folder=tmp_path, seconds=0.2, say=lines.append)
    assert lines[4:] == 2 * ["ridge: fitting", "gp: fitting"]


def test_interrupted_training_goes_on_with_what_was_chosen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ibaml.baselines.training._SLACK", 1e6)  # the plan's steps, however slow the machine
    learner, tasks = fitted_on_numbers()
    first = compared(learner, *tasks, baselines=["gp"], folder=tmp_path)
    record = json.loads((tmp_path / "gp" / RECORD).read_text())
    (tmp_path / "gp" / RECORD).write_text(json.dumps({**record, "result": None}))

    def no_trials(*_: object) -> None:
        raise AssertionError("chosen anew")

    monkeypatch.setattr("ibaml.baselines.training._plan", no_trials)
    again = compared(learner, *tasks, baselines=["gp"], folder=tmp_path)
    assert again["gp"].note == first["gp"].note
    assert torch.equal(again["gp"].per_task["nll"], first["gp"].per_task["nll"])
    assert json.loads((tmp_path / "gp" / PLAN).read_text())["among"]


def test_an_interruption_ends_it_all(monkeypatch: pytest.MonkeyPatch) -> None:
    learner, tasks = fitted_on_numbers()
    original = MetaLearner.fit

    def interrupted(self: MetaLearner, *arguments: Any, **options: Any) -> MetaLearner:
        found = original(self, *arguments, **options)
        found.training_result = found.training_result._replace(stop_reason="interrupted")
        return found

    monkeypatch.setattr(MetaLearner, "fit", interrupted)
    with pytest.raises(KeyboardInterrupt):
        compared(learner, *tasks, baselines=["gp"])
