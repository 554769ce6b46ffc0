"""Splits of unequal tasks: sizes, seeds, classes on the support side, and no row on both sides."""

import math
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ibaml.data import TaskSplits
from ibaml.types import Batch


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def regression(*sizes: int) -> list[Batch]:
    """Tasks whose rows are all different, and whose first input tells the task."""
    return [
        Batch(torch.stack([torch.full((n,), float(t)), torch.arange(float(n))], 1), torch.arange(float(n)).unsqueeze(1))
        for t, n in enumerate(sizes)
    ]


def classification(*sizes: int, num_classes: int = 3) -> list[Batch]:
    return [Batch(task.x, torch.arange(len(task.x)) % num_classes) for task in regression(*sizes)]


@given(st.integers(0, 2**31), st.integers(1, 6))
def test_draws_share_sizes_and_never_share_rows(seed, num_tasks):
    sampler = TaskSplits(regression(2, 5, 30), num_outputs=1, num_query=8)
    episode = sampler.sample(num_tasks, generator=generator(seed))
    assert episode.support.x.shape[0] == episode.query.x.shape[0] == num_tasks
    assert 1 <= episode.query.x.shape[1] <= 8 and episode.support.x.shape[1] <= 24
    for support, query in zip(episode.support.x, episode.query.x, strict=True):
        rows = torch.cat([support, query])
        assert len(rows.unique(dim=0)) == len(rows)
        assert len(rows[:, 0].unique()) == 1, "a task keeps to itself"
    assert torch.equal(episode.support.x[..., 1:], episode.support.y), "targets stay with their inputs"


def test_the_generator_decides():
    sampler = TaskSplits(regression(9, 12), num_outputs=1)
    first, again, other = (sampler.sample(3, generator=generator(seed)) for seed in (1, 1, 2))
    assert torch.equal(first.support.x, again.support.x) and torch.equal(first.query.x, again.query.x)
    assert first.support.x.shape != other.support.x.shape or not torch.equal(first.support.x, other.support.x)


def test_every_task_and_many_sizes_are_drawn():
    sampler = TaskSplits(regression(3, 10, 40), num_outputs=1)
    source = generator()
    draws = [sampler.sample(1, generator=source) for _ in range(300)]
    tasks = torch.tensor([int(draw.support.x[0, 0, 0]) for draw in draws]).bincount()
    # 100 each, five standard deviations of a binomial are 41.
    assert ((tasks - 100).abs() < 41).all()
    sizes = torch.tensor([draw.support.x.shape[1] for draw in draws])
    assert sizes.min() == 1 and sizes.max() == 32


def test_supports_are_as_often_below_as_above_the_geometric_mean_of_their_bounds():
    sampler = TaskSplits(regression(1000), num_outputs=1, num_query=1)
    source = generator()
    sizes = torch.tensor([sampler.sample(1, generator=source).support.x.shape[1] for _ in range(300)])
    # From 1 to 800; five standard deviations of a binomial of 300 are 43.
    assert abs(int((sizes <= 28).sum()) - 150) < 43


def test_a_task_with_more_classes_than_the_support_has_rows_is_not_drawn():
    few, many = classification(40, num_classes=2)[0], classification(1, 40, num_classes=4)[1]
    sampler = TaskSplits([few, many], num_outputs=4, stratify=True)
    for seed in range(40):
        support = sampler.sample(6, generator=generator(seed)).support
        for x, y in zip(support.x, support.y, strict=True):
            assert len(y.unique()) == (2 if x[0, 0] == 0 else 4)


def copies(num_groups: int, num_copies: int) -> Batch:
    """Groups of equal rows, of two classes in turn."""
    x = torch.arange(float(num_groups)).repeat_interleave(num_copies).unsqueeze(1)
    return Batch(x, x[:, 0].long() % 2)


def test_copies_leave_room_for_every_class_in_a_stratified_support():
    sampler = TaskSplits([copies(4, 3)], num_outputs=2, num_support=2, stratify=True)
    for seed in range(20):
        assert sampler.sample(1, generator=generator(seed)).support.y[0].sort().values.tolist() == [0, 1]


def test_a_split_has_as_many_rows_as_it_promises_where_copies_are_cut():
    sampler = TaskSplits([copies(6, 3)], num_outputs=2, stratify=True)
    capacity = int(sampler.capacities[0])
    for seed in range(20):
        for num_support in range(2, capacity):
            episode = sampler.episode(0, num_support, capacity - num_support, generator=generator(seed))
            assert len(episode.support.y) == num_support and len(episode.query.y) == capacity - num_support


@given(st.integers(0, 2**31))
def test_a_stratified_support_has_every_class_of_its_task(seed):
    sampler = TaskSplits(classification(4, 20), num_outputs=3, stratify=True)
    episode = sampler.sample(2, generator=generator(seed))
    for labels in episode.support.y:
        assert labels.unique().tolist() == [0, 1, 2]


def test_a_rare_class_is_in_every_stratified_support():
    task = Batch(torch.arange(50.0).unsqueeze(1), (torch.arange(50) == 17).long())
    sampler = TaskSplits([task], num_outputs=2, num_support=2, stratify=True)
    assert all(sampler.sample(1, generator=generator(seed)).support.y.sum() == 1 for seed in range(20))


@pytest.mark.parametrize("num_support", [1, 2, 10])
def test_a_rare_class_is_as_rare_in_a_support_as_in_its_task(num_support):
    task = Batch(torch.arange(50.0).unsqueeze(1), (torch.arange(50) < 5).long())
    sampler = TaskSplits([task], num_outputs=2, num_support=num_support)
    source = generator()
    found = torch.cat([sampler.sample(8, generator=source).support.y for _ in range(100)])
    # Of 800 supports without replacement; their mean share is a tenth, within five standard deviations.
    deviation = math.sqrt(0.1 * 0.9 / num_support / 800)
    assert abs(float(found.double().mean()) - 0.1) < 5 * deviation


def test_a_support_may_be_smaller_than_the_number_of_classes():
    sampler = TaskSplits(classification(9), num_outputs=3, num_support=1)
    assert sampler.sample(2, generator=generator()).support.y.shape == (2, 1)
    assert TaskSplits(classification(2), num_outputs=3).smallest_supports.tolist() == [1]


@given(st.integers(0, 2**31), st.booleans())
def test_identical_rows_stay_on_one_side(seed, classes):
    x = torch.tensor([[0.0], [0.0], [-0.0], [1.0], [2.0], [2.0], [3.0], [4.0], [5.0]])
    y = (x[:, 0] > 1).long() if classes else 2 * x
    sampler = TaskSplits([Batch(x, y)], num_outputs=2 if classes else 1)
    episode = sampler.sample(3, generator=generator(seed))
    for support, query in zip(episode.support.x, episode.query.x, strict=True):
        assert not torch.isin(support, query).any()


def test_equal_inputs_with_other_targets_are_measurements_of_their_own():
    batch = Batch(torch.zeros(6, 1), torch.arange(6.0).unsqueeze(1))
    assert TaskSplits([batch], num_outputs=1).capacities.tolist() == [6]
    copies = Batch(torch.zeros(6, 1), torch.zeros(6, 1))
    with pytest.raises(
        ValueError, match=r"task '0' has 6 examples, 5 of them copies of others .*group_duplicates=False"
    ):
        TaskSplits([copies], num_outputs=1)
    assert TaskSplits([copies], num_outputs=1, group_duplicates=False).capacities.tolist() == [6]


def test_classes_of_each_task_are_numbered_afresh():
    task = Batch(torch.arange(40.0).unsqueeze(1), torch.arange(40) % 4)
    sampler = TaskSplits([task], num_outputs=2, num_ways=2)
    seen = set()
    for seed in range(40):
        episode = sampler.sample(1, generator=generator(seed))
        for batch in episode:
            own = batch.x[0, :, 0].long() % 4
            pairs = {(int(label), int(of_class)) for label, of_class in zip(batch.y[0], own, strict=True)}
            assert len(dict(pairs)) == len(pairs) <= 2, "each number stands for one class"
            seen |= pairs
        assert episode.support.y.unique().tolist() == [0, 1]
    assert seen == {(label, of_class) for label in (0, 1) for of_class in range(4)}


def test_one_split_of_a_task_uses_all_of_it():
    sampler = TaskSplits(regression(4, 11), num_outputs=1)
    episode = sampler.episode(1, generator=generator())
    assert len(episode.support.y) == 5 and len(episode.query.y) == 6
    sized = sampler.episode(1, 3, 2, generator=generator())
    assert len(sized.support.y) == 3 and len(sized.query.y) == 2


def test_one_task_is_split_with_sizes_as_draws_have_them():
    sampler = TaskSplits(regression(4, 11), num_outputs=1, num_query=5)
    sizes = set()
    for seed in range(200):
        support, query = sampler.split(1, generator=generator(seed))
        assert len(support.y) + len(query.y) <= 11 and len(query.y) == min(5, 11 - len(support.y))
        rows = torch.cat([support.y, query.y]).flatten().tolist()
        assert len(set(rows)) == len(rows) and set(support.x[:, 0].tolist()) == {1.0}
        sizes.add(len(support.y))
    # From one to four fifths.
    assert sizes == set(range(1, 9))
    fixed = TaskSplits(regression(4, 11), num_outputs=1, num_support=3)
    assert len(fixed.split(0, generator=generator()).support.y) == 3


def test_what_it_says_of_itself():
    sampler = TaskSplits(classification(6, 9), num_outputs=3, stratify=True)
    assert sampler.input_shape == (2,) and sampler.num_outputs == 3 and not sampler.has_equal_sizes
    assert sampler.smallest_supports.tolist() == [3, 3]
    fixed = sampler.restricted([1], num_support=4, num_query=5)
    sizes = {tuple(fixed.sample(1, generator=generator(seed)).query.x.shape) for seed in range(5)}
    assert sizes == {(1, 5, 2)} and fixed.has_equal_sizes and len(fixed) == 1
    assert not sampler.restricted([0, 1], num_support=4, num_query=5).has_equal_sizes


@pytest.mark.parametrize(
    ("tasks", "arguments", "message"),
    [
        ([], {}, "tasks is empty"),
        (regression(5, 1), {}, "task '1' has 1 examples; a split needs at least 1 for the support and 1 for the query"),
        (
            classification(3),
            {"stratify": True},
            "task '0' has 3 examples; a split needs at least 3 for the support and 1 for the query",
        ),
        (regression(5), {"num_support": 5}, "task '0' has 5 examples; a split needs at least 5"),
        (classification(9), {"num_support": 2, "stratify": True}, "num_support is 2, but task '0' has 3 classes"),
        (classification(9), {"num_ways": 4}, "task '0' has 3 classes, but num_ways is 4"),
        (regression(5), {"num_support": 0}, "num_support must be at least 1"),
        (regression(5), {"num_query": 0}, "num_query must be at least 1"),
    ],
)
def test_what_it_refuses(tasks, arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        TaskSplits(tasks, num_outputs=3, **arguments)
