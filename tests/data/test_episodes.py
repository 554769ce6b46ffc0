import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ibaml.data import ClassImages, EpisodeSampler, with_rotations
from ibaml.types import TaskSampler


def numbered_classes(sizes: list[int]) -> ClassImages:
    """Every image is one pixel whose three channels spell (class, image within the class, 0)."""
    pixels = [(label, place, 0) for label, size in enumerate(sizes) for place in range(size)]
    return ClassImages(
        images=torch.tensor(pixels, dtype=torch.uint8).reshape(-1, 3, 1, 1),
        class_start=torch.tensor([0, *sizes]).cumsum(0),
        class_names=tuple(f"class{label}" for label in range(len(sizes))),
    )


def decode(x: torch.Tensor) -> torch.Tensor:
    """Returns (class, image) of every example, shape [tasks, examples, 2]."""
    return (x * 255).round().long()[:, :, :2, 0, 0]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(4, 9), min_size=2, max_size=8),
    num_shots=st.integers(1, 2),
    num_queries=st.integers(1, 2),
    num_tasks=st.integers(1, 5),
    seed=st.integers(0, 2**31),
    data=st.data(),
)
def test_tasks_are_well_formed(sizes, num_shots, num_queries, num_tasks, seed, data):
    num_ways = data.draw(st.integers(1, len(sizes)))
    sampler = EpisodeSampler(numbered_classes(sizes), num_ways=num_ways, num_shots=num_shots, num_queries=num_queries)
    episode = sampler.sample(num_tasks, generator=generator(seed))

    assert episode.support.x.shape == (num_tasks, num_ways * num_shots, 3, 1, 1)
    assert episode.query.x.shape == (num_tasks, num_ways * num_queries, 3, 1, 1)
    assert episode.support.x.dtype == torch.float32 and episode.support.y.dtype == torch.int64
    for task in range(num_tasks):
        support, query = decode(episode.support.x)[task].tolist(), decode(episode.query.x)[task].tolist()
        drawn = [tuple(pair) for pair in support + query]
        assert len(set(drawn)) == len(drawn), "support and query must not share an image"
        labels = torch.cat([episode.support.y[task], episode.query.y[task]]).tolist()
        label_of_class = dict(zip([pair[0] for pair in drawn], labels, strict=True))
        assert [label_of_class[pair[0]] for pair in drawn] == labels, "a class must keep one label"
        assert sorted(label_of_class.values()) == list(range(num_ways)), "labels must belong to distinct classes"
        assert all(place < sizes[label] for label, place in drawn), "no image of the next class"
        assert episode.support.y[task].bincount().tolist() == [num_shots] * num_ways
        assert episode.query.y[task].bincount().tolist() == [num_queries] * num_ways


def test_is_a_task_sampler_reproducible_by_seed_alone():
    sampler: TaskSampler = EpisodeSampler(numbered_classes([5] * 6), num_ways=3, num_shots=2, num_queries=2)
    assert sampler.input_shape == (3, 1, 1)
    assert sampler.num_outputs == 3
    state = torch.random.get_rng_state()
    first, again = sampler.sample(4, generator=generator(3)), sampler.sample(4, generator=generator(3))
    assert torch.equal(first.support.x, again.support.x) and torch.equal(first.query.x, again.query.x)
    assert not torch.equal(first.query.x, sampler.sample(4, generator=generator(4)).query.x)
    assert torch.equal(state, torch.random.get_rng_state()), "the global generator must stay untouched"


def test_classes_labels_and_images_are_uniform():
    sizes, num_tasks, num_ways = [4, 5, 9, 4, 6], 20_000, 2
    sampler = EpisodeSampler(numbered_classes(sizes), num_ways=num_ways, num_shots=1, num_queries=2)
    episode = sampler.sample(num_tasks, generator=generator())
    drawn, labels = decode(episode.support.x), episode.support.y

    def check(count: int, trials: int, probability: float) -> None:
        assert abs(count - trials * probability) < 5 * math.sqrt(trials * probability * (1 - probability))

    for label, size in enumerate(sizes):
        hits = drawn[..., 0] == label
        check(int(hits.sum()), num_tasks, num_ways / len(sizes))
        check(int((hits & (labels == 0)).sum()), num_tasks, 1 / len(sizes))
        for place in range(size):
            check(int((drawn[..., 1][hits] == place).sum()), int(hits.sum()), 1 / size)


def test_pixels_span_zero_to_one():
    images = torch.tensor([0, 255] * 2, dtype=torch.uint8).reshape(4, 1, 1, 1)
    data = ClassImages(images=images, class_start=torch.tensor([0, 2, 4]), class_names=("a", "b"))
    episode = EpisodeSampler(data, num_ways=2, num_shots=1, num_queries=1).sample(1, generator=generator())
    both = torch.cat([episode.support.x, episode.query.x]).flatten()
    assert sorted(both.tolist()) == [0.0, 0.0, 1.0, 1.0]


def test_images_may_live_on_another_device():
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    data = numbered_classes([5] * 6)
    settings_ = dict(num_ways=3, num_shots=2, num_queries=2)
    here = EpisodeSampler(data, **settings_).sample(4, generator=generator(1))
    there = EpisodeSampler(data.to("cuda"), **settings_).sample(4, generator=generator(1))
    assert there.support.x.device.type == there.support.y.device.type == "cuda"
    assert torch.equal(there.query.x.cpu(), here.query.x)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(num_ways=4), ValueError, "num_ways=4 needs at least 4 classes, got 3"),
        (dict(num_queries=4), ValueError, r"class 'class1' has 4 images, but .* 1 \+ 4 = 5 are needed"),
        (dict(num_ways=0), ValueError, "num_ways must be at least 1, got 0"),
        (dict(num_shots=-1), ValueError, "num_shots must be at least 1, got -1"),
        (dict(num_queries=0), ValueError, "num_queries must be at least 1, got 0"),
        (dict(num_shots=1.0), TypeError, "num_shots must be an int, got 1.0"),
        (dict(num_shots=True), TypeError, "num_shots must be an int, got True"),
        (dict(images="folder"), TypeError, "images must be ClassImages, got str"),
    ],
)
def test_sampler_refuses(change, error, message):
    arguments = dict(images=numbered_classes([6, 4, 6]), num_ways=2, num_shots=1, num_queries=2) | change
    with pytest.raises(error, match=message):
        EpisodeSampler(arguments.pop("images"), **arguments)


def test_sample_refuses():
    sampler = EpisodeSampler(numbered_classes([4, 4]), num_ways=2, num_shots=1, num_queries=1)
    with pytest.raises(ValueError, match="num_tasks must be at least 1, got 0"):
        sampler.sample(0, generator=generator())
    with pytest.raises(TypeError, match="generator must be a torch.Generator, got int"):
        sampler.sample(1, generator=0)
    if torch.cuda.is_available():
        with pytest.raises(ValueError, match="generator must live on the cpu, got cuda"):
            sampler.sample(1, generator=torch.Generator("cuda"))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(images=torch.zeros(3, 1, 2, 2)), TypeError, "images must be uint8 in 0..255, got torch.float32"),
        (dict(class_start=torch.tensor([0, 1, 3], dtype=torch.int32)), TypeError, "class_start must be int64"),
        (dict(images=torch.zeros(3, 2, 2, dtype=torch.uint8)), ValueError, r"got \(3, 2, 2\); grey images need"),
        (dict(class_start=torch.tensor([0, 3])), ValueError, r"class_start must have one entry per class and one more"),
        (dict(class_start=torch.tensor([0]), class_names=()), ValueError, "class_names is empty"),
        (dict(class_names=("a", "a")), ValueError, "class_names must be distinct, 'a' occurs twice"),
        (dict(class_start=torch.tensor([0, 1, 4])), ValueError, "number of images 3, got 0 to 4"),
        (dict(class_start=torch.tensor([0, 3, 3])), ValueError, "class 'b' has no image"),
        (dict(class_start=torch.tensor([0, 0, 3])), ValueError, "class 'a' has no image"),
    ],
)
def test_class_images_refuse(change, error, message):
    fields = dict(
        images=torch.zeros(3, 1, 2, 2, dtype=torch.uint8), class_start=torch.tensor([0, 1, 3]), class_names=("a", "b")
    )
    with pytest.raises(error, match=message):
        ClassImages(**(fields | change))


def test_select_keeps_the_order_given():
    chosen = numbered_classes([2, 3, 4]).select(torch.tensor([2, 0]))
    assert chosen.class_names == ("class2", "class0")
    assert chosen.class_start.tolist() == [0, 4, 6]
    assert chosen.images[:, 0, 0, 0].tolist() == [2, 2, 2, 2, 0, 0]


@pytest.mark.parametrize(
    ("indices", "message"),
    [
        ([], "class_indices is empty"),
        ([0, 0], "class_indices must be distinct"),
        ([3], r"class_indices must lie in 0..2, got 3"),
        ([-1], r"class_indices must lie in 0..2, got -1"),
    ],
)
def test_select_refuses(indices, message):
    with pytest.raises(ValueError, match=message):
        numbered_classes([2, 3, 4]).select(indices)


def test_rotations_are_counter_clockwise_extra_classes():
    images = torch.arange(3 * 4, dtype=torch.uint8).reshape(3, 1, 2, 2)
    data = ClassImages(images=images, class_start=torch.tensor([0, 1, 3]), class_names=("a", "b"))
    turned = with_rotations(data)
    assert turned.class_names == ("a", "b", "a@90", "b@90", "a@180", "b@180", "a@270", "b@270")
    assert turned.class_start.tolist() == [0, 1, 3, 4, 6, 7, 9, 10, 12]
    assert torch.equal(turned.images[:3], images)
    assert turned.images[3, 0].tolist() == [[1, 3], [0, 2]]
    assert turned.images[6, 0].tolist() == [[3, 2], [1, 0]]
    assert turned.images[9, 0].tolist() == [[2, 0], [3, 1]]


def test_rotations_need_square_images():
    data = ClassImages(
        images=torch.zeros(1, 1, 2, 3, dtype=torch.uint8), class_start=torch.tensor([0, 1]), class_names=("a",)
    )
    with pytest.raises(ValueError, match="images must be square to be turned by 90 degrees, got 2 x 3"):
        with_rotations(data)


def test_the_classes_of_tasks_are_those_that_are_drawn():
    sampler = EpisodeSampler(numbered_classes([4, 6, 5, 4, 7]), num_ways=3, num_shots=2, num_queries=2)
    for num_tasks in (1, 4):
        found = sampler.sample_classes(num_tasks, generator=generator(5))
        drawn = decode(sampler.sample(num_tasks, generator=generator(5)).query.x)[..., 0]
        assert torch.equal(found.repeat_interleave(2, 1), drawn)
    with pytest.raises(ValueError, match="num_tasks must be"):
        sampler.sample_classes(0, generator=generator())
