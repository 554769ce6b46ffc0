import re

import pytest
import torch

from ibaml import tree
from ibaml.data import FixedEpisodes
from ibaml.types import Batch, Episode


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def episode(value: float, size: int = 3, features: int = 2) -> Episode:
    support = Batch(torch.full((size, features), value), torch.zeros(size, dtype=torch.int64))
    return Episode(support, Batch(torch.full((4, features), -value), torch.ones(4, dtype=torch.int64)))


def test_draws_whole_episodes_with_a_task_axis():
    tasks = FixedEpisodes([episode(1.0), episode(2.0), episode(3.0)])
    drawn = tasks.sample(50, generator=generator())
    assert drawn.support.x.shape == (50, 3, 2) and drawn.query.x.shape == (50, 4, 2)
    assert drawn.support.y.shape == (50, 3) and drawn.query.y.shape == (50, 4)
    values = drawn.support.x[:, 0, 0]
    assert set(values.tolist()) == {1.0, 2.0, 3.0}
    # Support and query are of the same episode.
    assert torch.equal(drawn.query.x[:, 0, 0], -values)
    assert torch.equal(drawn.support.x, values.reshape(-1, 1, 1).expand(50, 3, 2))


def test_draws_are_uniform():
    tasks = FixedEpisodes([episode(float(value)) for value in range(4)])
    values = tasks.sample(4000, generator=generator()).support.x[:, 0, 0]
    counts = torch.bincount(values.long(), minlength=4).double()
    # Five standard errors of a binomial count.
    assert bool((counts - 1000).abs().max() < 5 * (4000 * 0.25 * 0.75) ** 0.5)


def test_the_generator_alone_decides():
    tasks = FixedEpisodes([episode(float(value)) for value in range(9)])
    source = generator(1)
    first, second = tasks.sample(5, generator=source), tasks.sample(5, generator=source)
    again = tasks.sample(5, generator=generator(1))
    assert all(torch.equal(one, two) for one, two in zip(tree.leaves(first), tree.leaves(again), strict=True))
    assert not torch.equal(first.support.x, second.support.x)


def test_classes_and_outputs():
    assert FixedEpisodes([episode(1.0)]).num_outputs == 2
    assert FixedEpisodes([episode(1.0)]).input_shape == (2,)
    images = Batch(torch.zeros(3, 1, 8, 8), torch.zeros(3, 5))
    tasks = FixedEpisodes([Episode(images, images)])
    assert (tasks.num_outputs, tasks.input_shape) == (5, (1, 8, 8))


def test_unequal_sizes_can_be_drawn_one_at_a_time():
    tasks = FixedEpisodes([episode(1.0, size=3), episode(2.0, size=5)])
    assert not tasks.has_equal_sizes and FixedEpisodes([episode(1.0), episode(2.0)]).has_equal_sizes
    source = generator()
    assert {tasks.sample(1, generator=source).support.x.shape[1] for _ in range(20)} == {3, 5}
    message = (
        "num_tasks is 2, but the episodes have unequal sizes and cannot be stacked: draw one at a time, which in "
        "training means tasks_per_step=1."
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        tasks.sample(2, generator=source)


def test_refuses():
    with pytest.raises(ValueError, match="episodes is empty; expected at least one Episode"):
        FixedEpisodes([])
    with pytest.raises(ValueError, match=re.escape("different shapes [(2,), (3,)]; expected a single shape")):
        FixedEpisodes([episode(1.0), episode(1.0, features=3)])
    tasks = FixedEpisodes([episode(1.0)])
    with pytest.raises(ValueError, match="num_tasks must be at least 1, got 0"):
        tasks.sample(0, generator=generator())
    with pytest.raises(TypeError, match="num_tasks must be an int"):
        tasks.sample(1.0, generator=generator())
    with pytest.raises(TypeError, match="generator must be a torch.Generator"):
        tasks.sample(1, generator=0)
