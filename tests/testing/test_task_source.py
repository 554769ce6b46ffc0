"""The contract of task sources accepts a foreign one and finds what is wrong with a broken one."""

import dataclasses
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from ibaml.checks import require_cpu_generator, require_positive_int
from ibaml.data.preprocessing import Preprocessing
from ibaml.data.sources import Split
from ibaml.testing import TaskSourceContract, failures
from ibaml.types import Batch, Episode


@dataclasses.dataclass(frozen=True)
class Lines:
    """Tasks of a sampler of one's own: noisy lines."""

    num_shots: int
    num_queries: int
    input_shape: ClassVar[tuple[int, ...]] = (2,)
    num_outputs: ClassVar[int] = 1
    has_equal_sizes: ClassVar[bool] = True

    def sample(self, num_tasks: int, *, generator: torch.Generator) -> Episode:
        require_positive_int("num_tasks", num_tasks)
        require_cpu_generator(generator)
        x = torch.randn(num_tasks, self.num_shots + self.num_queries, 2, generator=generator)
        y = x @ torch.randn(num_tasks, 2, 1, generator=generator)
        return Episode(
            Batch(x[:, : self.num_shots], y[:, : self.num_shots]), Batch(x[:, self.num_shots :], y[:, self.num_shots :])
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class LineSource:
    """A source of one's own."""

    num_shots: int = 4
    num_queries: int = 6
    num_test_queries: int = 8
    name: ClassVar[str] = "lines"
    is_image: ClassVar[bool] = False

    def __post_init__(self) -> None:
        for name in ("num_shots", "num_queries", "num_test_queries"):
            require_positive_int(name, getattr(self, name))

    def sampler(self, split: Split, *, data: Path | None = None, device: Any = "cpu") -> Any:
        return Lines(self.num_shots, self.num_queries if split == "train" else self.num_test_queries)

    def preprocessing(self) -> Preprocessing | None:
        return None


def test_source_of_ones_own() -> None:
    class Mine(TaskSourceContract):
        make = LineSource

    assert failures(Mine) == {}


class Changed:
    """A sampler whose tasks are changed before they are handed out."""

    def __init__(self, change: Any, **stated: Any) -> None:
        self.lines, self.change = Lines(4, 6), change
        self.input_shape, self.num_outputs, self.has_equal_sizes = (2,), 1, True
        vars(self).update(stated)

    def sample(self, num_tasks: int, *, generator: torch.Generator) -> Episode:
        return self.change(self.lines.sample(num_tasks, generator=generator))


def leaks(task: Episode) -> Episode:
    return task._replace(
        query=Batch(task.query.x.clone().index_copy(1, torch.tensor([0]), task.support.x[:, :1]), task.query.y)
    )


def jitters(task: Episode) -> Episode:
    return task._replace(support=task.support._replace(x=task.support.x + torch.rand(())))


def unequal(task: Episode) -> Episode:
    size = 2 + int(task.support.x[0, 0, 0] > 0)
    return task._replace(support=Batch(task.support.x[:, :size], task.support.y[:, :size]))


@pytest.mark.parametrize(
    ("sampler", "test"),
    [
        (Changed(leaks), "test_no_query_example_is_in_its_support_set"),
        (Changed(jitters), "test_generator_alone_decides"),
        (Changed(unequal), "test_equal_sizes_are_stated_truly"),
        (Changed(lambda task: task, input_shape=(3,)), "test_tasks_have_the_shapes_that_the_sampler_states"),
        (Changed(lambda task: task, num_outputs=2), "test_tasks_have_the_shapes_that_the_sampler_states"),
        (Lines(4, 60), "test_query_sets_have_the_stated_size"),
    ],
)
def test_broken_sampler_is_found(sampler: Any, test: str) -> None:
    class Source(LineSource):
        def sampler(self, split: Split, *, data: Path | None = None, device: Any = "cpu") -> Any:
            return sampler

    class Broken(TaskSourceContract):
        make = Source

    assert failures(Broken, only=test)


def test_source_that_checks_nothing_is_found() -> None:
    class Careless(LineSource):
        def __post_init__(self) -> None:
            pass

    class Broken(TaskSourceContract):
        make = Careless

    assert failures(Broken).keys() == {"test_counts_below_one_are_refused"}
