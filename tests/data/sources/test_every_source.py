"""Every source is a frozen record that survives JSON, refuses what its sampler would, and asks its loader rightly."""

import dataclasses
import functools
import re

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from ibaml.data import Augmentation, ClassImages, EpisodeSampler, SinusoidTasks
from ibaml.data.images import scale_pixels
from ibaml.data.sources import (
    SOURCES,
    FSMol,
    Glyphs,
    ImageFolder,
    ImageSource,
    MiniImagenet,
    Omniglot,
    Sinusoid,
    TinyImagenet,
)
from ibaml.data.sources.fsmol import FILE_NAME
from ibaml.testing import TaskSourceContract

SPLITS = ("train", "validation", "test")
EXAMPLES = {
    "glyphs": Glyphs(num_shots=5, num_queries=2),
    "omniglot": Omniglot(num_ways=3, protocol="official", image_size=20),
    "mini_imagenet": MiniImagenet(num_queries=4),
    "tiny_imagenet": TinyImagenet(image_size=32, augmentation=Augmentation(crop=0.5, colour=0.1)),
    "image_folder": ImageFolder(path="animals", image_size=8, num_ways=2, num_queries=2, num_test_queries=3),
    "sinusoid": Sinusoid(num_shots=3, num_queries=4, num_test_queries=9, noise_std=0.2),
    "fsmol": FSMol(support_sizes=(2,), num_queries=2, num_test_queries=1),
}


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@functools.cache
def fake_images(split: str, image_size: int, channels: int) -> ClassImages:
    """Six classes of twenty random images."""
    source = generator(SPLITS.index(split))
    return ClassImages(
        images=torch.randint(0, 256, (120, channels, image_size, image_size), generator=source, dtype=torch.uint8),
        class_start=torch.arange(7) * 20,
        class_names=tuple(f"class {index}" for index in range(6)),
    )


@pytest.fixture
def asked(monkeypatch):
    """Stands in for the image files and keeps what was asked for."""
    calls = []

    def load(source):
        def call(*positional, **arguments):
            calls.append((source, positional, arguments))
            split = positional[-1] if source == "image_folder" else positional[0]
            return fake_images(split, arguments["image_size"], 1 if source in ("glyphs", "omniglot") else 3)

        return call

    for name, source in SOURCES.items():
        if issubclass(source, ImageSource):
            monkeypatch.setattr(f"ibaml.data.sources.{name}.load_{name}", load(name))
    return calls


def write_assays(folder):
    """Four assays of 256 rows over as many molecules; of the three training assays the first is held out."""
    rows = np.arange(4 * 256)
    np.savez(
        folder / FILE_NAME,
        task_name=np.array(["A1", "A2", "A3", "A4"]),
        task_split=np.array(["train", "valid", "train", "train"]),
        row_task=(rows // 256).astype(np.int16),
        row_mol=(rows % 256).astype(np.int32),
        label=(rows % 2).astype(np.uint8),
        fp_ptr=np.arange(257),
        fp_index=np.arange(256, dtype=np.uint16),
        fp_count=np.ones(256, dtype=np.uint8),
    )


class TestWithOwnFiles(TaskSourceContract):
    """The contract on files that are made for the test."""

    @pytest.fixture(params=EXAMPLES)
    def source(self, request, asked, tmp_path):
        self.data = tmp_path
        write_assays(tmp_path)
        assert type(EXAMPLES[request.param]) is SOURCES[request.param]
        return EXAMPLES[request.param]


@pytest.mark.parametrize("name", ["mini_imagenet", "tiny_imagenet", "glyphs"])
def test_arguments_of_image_loaders(name, asked, tmp_path):
    source = EXAMPLES[name]
    for split in SPLITS:
        source.sampler(split, data=tmp_path)
        root = {} if name == "glyphs" else {"root": tmp_path}
        assert asked[-1] == (name, (split,), {**root, "image_size": source.image_size})


def test_arguments_of_omniglot(asked, tmp_path):
    source = EXAMPLES["omniglot"]
    for split in SPLITS:
        source.sampler(split, data=tmp_path)
    assert [arguments["rotations"] for *_, arguments in asked] == [True, True, True]
    for split, (_, positional, arguments) in zip(SPLITS, asked, strict=True):
        assert positional == (split,)
        assert (arguments["root"], arguments["protocol"], arguments["image_size"]) == (tmp_path, "official", 20)
    dataclasses.replace(source, rotations=False).sampler("train")
    assert asked[-1][2]["rotations"] is False and asked[-1][2]["root"] is None
    upright = dataclasses.replace(source, rotated_tests=False)
    for split in SPLITS:
        upright.sampler(split)
    assert [arguments["rotations"] for *_, arguments in asked[-3:]] == [True, False, False]


def test_an_image_folder(tmp_path):
    for split in SPLITS:
        for name in ("cat", "dog", "owl"):
            folder = tmp_path / "data" / "animals" / split / name
            folder.mkdir(parents=True)
            for index in range(4):
                Image.new("RGB", (6, 5), (60 * index, 40, 200)).save(folder / f"{index}.png")
    source = EXAMPLES["image_folder"]
    tasks = source.sampler("test", data=tmp_path / "data")
    assert isinstance(tasks, EpisodeSampler) and tasks.images.class_names == ("cat", "dog", "owl")
    assert tasks.sample(1, generator=generator()).query.x.shape == (1, 6, 3, 8, 8)
    # Without a data folder the path is taken as it is.
    whole = dataclasses.replace(source, path=str(tmp_path / "data" / "animals"))
    assert whole.sampler("test").num_outputs == 2
    with pytest.raises(FileNotFoundError, match="absent"):
        dataclasses.replace(source, path="absent").sampler("train", data=tmp_path)
    with pytest.raises(ValueError, match="num_ways=5 needs at least 5 classes, got 3"):
        dataclasses.replace(whole, num_ways=5).sampler("train")


def test_sinusoid_settings():
    tasks = EXAMPLES["sinusoid"].sampler("train")
    assert isinstance(tasks, SinusoidTasks)
    assert (tasks.num_shots, tasks.num_queries, tasks.noise_std) == (3, 4, 0.2)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Omniglot(protocol="own"), "protocol must be one of ('vinyals', 'official'), got 'own'."),
        (lambda: Sinusoid(num_shots=1, noise_std=-1.0), "noise_std must be a finite number of at least 0, got -1.0."),
        (lambda: FSMol(support_sizes=()), "support_sizes is empty; expected at least one support size."),
        (lambda: FSMol(support_sizes=(1,)), "support_sizes must be at least 2, one row of each class, got (1,)."),
    ],
)
def test_refused_settings(make, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        make()


@pytest.mark.parametrize("name", EXAMPLES)
def test_files_of_a_user_become_inputs(name, asked, tmp_path):
    source = EXAMPLES[name]
    preprocessing = source.preprocessing()
    if name == "fsmol":
        assert preprocessing is None
    elif name == "sinusoid":
        table = pd.DataFrame({"y": [1.0], "x": [2.5]})
        assert preprocessing.encode_inputs("x", table).tolist() == [[2.5]]
        assert preprocessing.encode_targets("y", table["y"]).tolist() == [[1.0]]
    else:
        shape = preprocessing.input_shape
        assert preprocessing.image_size == shape[1:] == (source.image_size, source.image_size)
        assert preprocessing.num_outputs == source.num_ways
        if name != "image_folder":
            assert shape == source.sampler("train").input_shape
        pixels = torch.arange(256, dtype=torch.uint8).reshape(-1, 1, 1, 1).expand(256, *shape)
        encoded = preprocessing.encode_inputs("x", pixels)
        expected = scale_pixels(255 - pixels if name == "omniglot" else pixels)
        torch.testing.assert_close(encoded, expected, rtol=0, atol=0)


def test_images_of_training_tasks_alone_are_changed(asked) -> None:
    plain, changing = TinyImagenet(image_size=8), TinyImagenet(image_size=8, augmentation=Augmentation(crop=0.5))
    for split in SPLITS:
        drawn, changed = (source.sampler(split).sample(1, generator=generator()) for source in (plain, changing))
        assert torch.equal(drawn.support.x, changed.support.x) == (split != "train")
        assert torch.equal(drawn.support.y, changed.support.y)
