import io
import os
import zipfile
from pathlib import Path

import numpy as np
import pooch
import pytest
import torch
from PIL import Image

from ibaml.data import load_tiny_imagenet
from ibaml.data.sources import tiny_imagenet

CLASSES = {"train": ["n03", "n01", "n02"], "validation": ["n05", "n04"], "test": ["n06"]}
NUM_IMAGES = {"train": 3, "validation": 2, "test": 2}


def colour(name, index):
    return int(name[1:]), 10 * index, 200 + index


def write_archive(path, classes, image_format="WebP"):
    with zipfile.ZipFile(path, "w") as archive:
        for split, names in classes.items():
            for name in names:
                for index in range(NUM_IMAGES[split]):
                    stream = io.BytesIO()
                    pixels = np.full((64, 64, 3), colour(name, index), dtype=np.uint8)
                    Image.fromarray(pixels).save(stream, format=image_format, lossless=True)
                    archive.writestr(f"{split}/{name}/{name}_{index}.webp", stream.getvalue())


@pytest.fixture
def root(tmp_path, monkeypatch):
    monkeypatch.delenv("IBAML_DATA", raising=False)
    monkeypatch.setattr(pooch, "os_cache", lambda project: tmp_path / "cache")
    monkeypatch.setattr(tiny_imagenet, "NUM_CLASSES", {split: len(names) for split, names in CLASSES.items()})
    monkeypatch.setattr(tiny_imagenet, "IMAGES_PER_CLASS", NUM_IMAGES)
    root = tmp_path / "root"
    root.mkdir()
    write_archive(root / "tiny_imagenet_fewshot.zip", CLASSES)
    return root


@pytest.mark.parametrize("split", CLASSES)
@pytest.mark.parametrize("image_size", [64, 20])
def test_splits(root, split, image_size):
    for _ in range(2):  # decoded, then cached
        images = load_tiny_imagenet(split, root=root, image_size=image_size)
        assert images.class_names == tuple(sorted(CLASSES[split]))
        assert images.class_sizes.tolist() == [NUM_IMAGES[split]] * len(CLASSES[split])
        colours = [colour(name, index) for name in sorted(CLASSES[split]) for index in range(NUM_IMAGES[split])]
        assert images.image_shape == (3, image_size, image_size)
        assert torch.equal(images.images[:, :, 0, 0], torch.tensor(colours, dtype=torch.uint8))
        assert torch.equal(images.images.flatten(2).amin(2), images.images.flatten(2).amax(2))


def test_decodes_once_and_follows_the_contents(root, tmp_path, monkeypatch):
    cache = tmp_path / "chosen"
    first = load_tiny_imagenet("test", root=root, cache_dir=cache)
    with monkeypatch.context() as patch:
        patch.setattr(tiny_imagenet, "load_image_folder", lambda *a, **k: pytest.fail("decoded again"))
        os.utime(root / "tiny_imagenet_fewshot.zip", (0, 0))
        assert torch.equal(load_tiny_imagenet("test", root=root, cache_dir=cache).images, first.images)
        for other in (dict(split="train"), dict(split="test", image_size=32)):
            with pytest.raises(pytest.fail.Exception, match="decoded again"):
                load_tiny_imagenet(root=root, cache_dir=cache, **other)
    write_archive(root / "tiny_imagenet_fewshot.zip", {**CLASSES, "test": ["n09"]})
    assert load_tiny_imagenet("test", root=root, cache_dir=cache).class_names == ("n09",)
    assert len(list(cache.glob("tiny-imagenet-v1-test-*-64.npz"))) == 2


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        ({"test": ["n06", "n07"]}, "must hold 1 test classes of 2 images, got 2 classes of 2 images; .*load_image_f"),
        ({"train": ["n06"]}, "split 'test' is not in .*tiny_imagenet_fewshot.zip; splits present: train"),
    ],
)
def test_other_classes(root, classes, message):
    write_archive(root / "tiny_imagenet_fewshot.zip", classes)
    with pytest.raises(ValueError, match=message):
        load_tiny_imagenet("test", root=root)


def test_other_number_of_images(root, monkeypatch):
    monkeypatch.setattr(tiny_imagenet, "IMAGES_PER_CLASS", {"test": 100})
    with pytest.raises(ValueError, match="must hold 1 test classes of 100 images, got 1 classes of 2 images"):
        load_tiny_imagenet("test", root=root)


def test_truncated_archive(root):
    path = root / "tiny_imagenet_fewshot.zip"
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(ValueError, match="tiny_imagenet_fewshot.zip is not an intact zip archive.*broke off"):
        load_tiny_imagenet("test", root=root)


def test_missing_archive(tmp_path, root):
    with pytest.raises(FileNotFoundError, match="tiny_imagenet_fewshot.zip not found"):
        load_tiny_imagenet("test", root=tmp_path)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (dict(split="val"), ValueError, "split must be one of .*, got 'val'"),
        (dict(split="train", image_size=0), ValueError, "image_size must be at least 1"),
        (dict(split="train", image_size=64.0), TypeError, "image_size must be an int"),
    ],
)
def test_refuses(arguments, error, message):
    with pytest.raises(error, match=message):
        load_tiny_imagenet(**arguments)


@pytest.mark.slow
def test_real_archive(tmp_path):
    shared = Path(os.environ.get("IBAML_DATA") or Path(__file__).parents[2].parent / "shared" / "data")
    if not (shared / "tiny_imagenet_fewshot.zip").is_file():
        pytest.skip(f"no tiny_imagenet_fewshot.zip in {shared}; set IBAML_DATA to its folder")
    splits = {
        split: load_tiny_imagenet(split, root=shared, cache_dir=tmp_path) for split in ("train", "validation", "test")
    }
    assert [images.num_classes for images in splits.values()] == [64, 16, 20]
    assert [len(images.images) for images in splits.values()] == [12800, 1600, 2000]
    names = [set(images.class_names) for images in splits.values()]
    assert not names[0] & names[1] and not names[0] & names[2] and not names[1] & names[2]
