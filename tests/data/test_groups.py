import pytest
import torch

from ibaml.data import GroupedTasks


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def table():
    groups = ["a", "b", "a", "c", "b", "a", "b", "b", "c", "a"]
    x = torch.arange(10.0)[:, None]
    return x, 2 * x[:, 0], groups


def test_a_task_is_a_group():
    x, y, groups = table()
    tasks = GroupedTasks(x, y, groups, num_support=2)
    # Group c has two rows: none would be left for the query set.
    assert tasks.names == ("a", "b") and len(tasks) == 2
    assert tasks.input_shape == (1,) and tasks.num_outputs == 1
    members = {"a": {0.0, 2.0, 5.0, 9.0}, "b": {1.0, 4.0, 6.0, 7.0}}
    for index, name in enumerate(tasks.names):
        support, query = tasks.episode(index, generator=generator(index))
        assert set(support.x[:, 0].tolist()) | set(query.x[:, 0].tolist()) == members[name]
        assert len(support.x) == len(query.x) == 2
        assert torch.equal(support.y, 2 * support.x)


def test_query_sets_are_cut_to_the_smallest_and_to_the_limit():
    x, y, groups = table()
    episode = GroupedTasks(x, y, [*groups[:9], "b"], num_support=2).sample(40, generator=generator())
    assert episode.support.x.shape == (40, 2, 1) and episode.query.y.shape == (40, 1, 1)
    limited = GroupedTasks(x, torch.stack([y, y], 1), groups, num_support=1, num_queries=2)
    assert limited.num_outputs == 2 and limited.names == ("a", "b", "c")
    tasks = GroupedTasks(x, y, groups, num_support=2)
    assert tasks.has_equal_sizes, "both groups have four rows"
    assert not GroupedTasks(x, y, groups, num_support=1).has_equal_sizes
    assert GroupedTasks(x, y, groups, num_support=1, num_queries=1).has_equal_sizes
    assert limited.episode(0, generator=generator()).query.y.shape == (3, 2)
    assert limited.sample(1, generator=generator()).query.y.shape[1] <= 2


def test_tables_that_do_not_fit_are_refused():
    x, y, groups = table()
    with pytest.raises(TypeError, match="x must be a floating-point tensor, got list"):
        GroupedTasks([[1.0]], y, groups, num_support=1)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="y must be a floating-point tensor, got Tensor"):
        GroupedTasks(x, y.long(), groups, num_support=1)
    with pytest.raises(ValueError, match="y has NaN or infinite values"):
        GroupedTasks(x, y / 0, groups, num_support=1)
    with pytest.raises(ValueError, match=r"x has shape \(10,\); expected \[num_rows, num_features\]"):
        GroupedTasks(y, y, groups, num_support=1)
    with pytest.raises(ValueError, match="x, y and groups have 10, 10 and 9 rows"):
        GroupedTasks(x, y, groups[1:], num_support=1)
    with pytest.raises(ValueError, match="num_support is 4, but the largest of 3 groups has 4 rows"):
        GroupedTasks(x, y, groups, num_support=4)
