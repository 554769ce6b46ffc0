"""What every source of tasks promises."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar, get_args, get_type_hints

import pytest
import torch

from ibaml import tree
from ibaml.data.sources import TaskSource
from ibaml.data.sources.base import Split, queries_in
from ibaml.testing.base import assert_close, assert_json_round_trip, fields_of, generator
from ibaml.types import Batch, Episode, TaskSampler, Tensor

SPLITS: tuple[Split, ...] = get_args(Split)


class TaskSourceContract:
    """Tasks of all splits: shapes, labels, randomness, and that no query example is in its support set.

    A source whose files are not found is skipped with its own message.

    Attributes:
        data: Folder with data files; None: where the source looks by itself.
    """

    data: Path | None = None
    num_tasks: ClassVar[int] = 3

    @staticmethod
    def make() -> TaskSource:
        """Returns the source to test."""
        raise NotImplementedError

    @pytest.fixture
    def source(self) -> TaskSource:
        """The source to test."""
        return self.make()

    def _samplers(self, source: TaskSource) -> Iterator[tuple[Split, TaskSampler]]:
        for split in SPLITS:
            try:
                sampler = source.sampler(split, data=self.data)
            except FileNotFoundError as error:
                pytest.skip(str(error))
            yield split, sampler

    def _tasks(self, sampler: TaskSampler, seed: int = 0, num_tasks: int = 3) -> list[Episode]:
        """Single tasks; a sampler of unequal tasks draws them one by one."""
        source = generator(seed)
        return [tree.map(lambda leaf: leaf[0], sampler.sample(1, generator=source)) for _ in range(num_tasks)]

    def test_tasks_have_the_shapes_that_the_sampler_states(self, source: TaskSource) -> None:
        """Inputs of ``input_shape``, labels below ``num_outputs`` or targets of so many columns."""
        for split, sampler in self._samplers(source):
            assert source.is_image == (len(sampler.input_shape) == 3), split
            for task in self._tasks(sampler):
                for name, batch in (("support", task.support), ("query", task.query)):
                    _check_batch(batch, sampler, f"{split} {name}")

    def test_query_sets_have_the_stated_size(self, source: TaskSource) -> None:
        """At most ``num_queries`` or ``num_test_queries`` examples, of each class for images."""
        for split, sampler in self._samplers(source):
            most = queries_in(source, split) * (sampler.num_outputs if source.is_image else 1)
            sizes = [len(task.query.y) for task in self._tasks(sampler)]
            assert max(sizes) <= most, split
            assert not source.is_image or set(sizes) == {most}, split

    def test_generator_alone_decides(self, source: TaskSource) -> None:
        """Equal seeds give equal tasks, others others, and the global generator is not touched."""
        for split, sampler in self._samplers(source):
            state = torch.get_rng_state()
            first, again, other = (sampler.sample(1, generator=generator(seed)) for seed in (1, 1, 2))
            assert torch.equal(torch.get_rng_state(), state), split
            assert_close(again, first, 0.0, split)
            assert not all(
                one.shape == two.shape and torch.equal(one, two)
                for one, two in zip(tree.leaves(first), tree.leaves(other), strict=True)
            ), split

    def test_no_query_example_is_in_its_support_set(self, source: TaskSource) -> None:
        """Told by the inputs, unless two examples of a set have the same: then equal inputs say nothing."""
        for split, sampler in self._samplers(source):
            for task in self._tasks(sampler):
                support, query = _rows(task.support.x), _rows(task.query.x)
                if len(set(support)) == len(support) and len(set(query)) == len(query):
                    assert not set(support) & set(query), split

    def test_splits_share_no_image(self, source: TaskSource) -> None:
        """Nor does a source without images draw the same task in two splits."""
        seen: dict[Any, Split] = {}
        for number, (split, sampler) in enumerate(self._samplers(source)):
            for task in self._tasks(sampler, seed=10 + number):
                sets = _rows(torch.cat([task.support.x, task.query.x]))
                for key in sets if source.is_image else [tuple(sets)]:
                    assert seen.setdefault(key, split) == split, f"the same in {seen[key]} and {split}"

    def test_equal_sizes_are_stated_truly(self, source: TaskSource) -> None:
        """Tasks of equal sizes can be drawn together; a sampler says so by ``has_equal_sizes``."""
        for split, sampler in self._samplers(source):
            if sampler.has_equal_sizes:
                tasks = self._tasks(sampler, num_tasks=6)
                assert len({(len(task.support.y), len(task.query.y)) for task in tasks}) == 1, split
                drawn = sampler.sample(self.num_tasks, generator=generator())
                assert all(leaf.shape[0] == self.num_tasks for leaf in tree.leaves(drawn)), split

    def test_arguments_out_of_range_are_refused(self, source: TaskSource) -> None:
        """No task, and no generator."""
        for _, sampler in self._samplers(source):
            with pytest.raises(ValueError, match="num_tasks must be at least 1"):
                sampler.sample(0, generator=generator())
            missing: Any = None
            with pytest.raises(TypeError, match="generator"):
                sampler.sample(1, generator=missing)

    def test_counts_below_one_are_refused(self, source: TaskSource) -> None:
        """By the name of the setting."""
        record: Any = source
        hints = get_type_hints(type(source))
        for name in fields_of(source):
            if hints[name] is int:
                with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
                    dataclasses.replace(record, **{name: 0})

    def test_files_of_a_user_get_the_shape_of_the_tasks(self, source: TaskSource) -> None:
        """``preprocessing`` makes inputs as the sampler does, or is None."""
        preprocessing = source.preprocessing()
        if preprocessing is None:
            return
        for _, sampler in self._samplers(source):
            assert preprocessing.input_shape == sampler.input_shape
            assert preprocessing.num_outputs == sampler.num_outputs

    def test_json_round_trip(self, source: TaskSource) -> None:
        """A source is a frozen record that recipes can hold."""
        assert_json_round_trip(source)
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(source, fields_of(source)[0], None)


def _check_batch(batch: Batch, sampler: TaskSampler, what: str) -> None:
    num_examples = len(batch.y)
    assert num_examples >= 1, what
    assert batch.x.shape == (num_examples, *sampler.input_shape), f"{what}: inputs of shape {tuple(batch.x.shape)}"
    assert batch.x.is_floating_point() and torch.isfinite(batch.x).all(), what
    if batch.y.is_floating_point():
        assert batch.y.shape == (num_examples, sampler.num_outputs), f"{what}: targets of shape {tuple(batch.y.shape)}"
        assert torch.isfinite(batch.y).all(), what
    else:
        assert batch.y.dtype == torch.int64 and batch.y.shape == (num_examples,), what
        assert 0 <= int(batch.y.min()) and int(batch.y.max()) < sampler.num_outputs, what


def _rows(x: Tensor) -> list[bytes]:
    """Each example's bytes."""
    return [row.numpy().tobytes() for row in x.flatten(1)]
