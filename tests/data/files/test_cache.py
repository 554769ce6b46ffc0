import warnings

import numpy as np
import pytest
import torch

from ibaml.data import ClassImages
from ibaml.data.files.cache import read_class_images, write_class_images


@pytest.fixture
def images() -> ClassImages:
    return ClassImages(
        images=torch.randint(0, 256, (9, 1, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8),
        class_start=torch.tensor([0, 4, 9]),
        class_names=("é", "longer name"),
    )


def same(a: ClassImages, b: ClassImages) -> bool:
    return (
        torch.equal(a.images, b.images) and torch.equal(a.class_start, b.class_start) and a.class_names == b.class_names
    )


def test_round_trip_leaves_no_other_file(images, tmp_path):
    folder = tmp_path / "new" / "folder"
    assert read_class_images([folder], "a.npz") is None
    assert write_class_images([folder], "a.npz", images) == folder / "a.npz"
    assert [path.name for path in folder.iterdir()] == ["a.npz"]
    assert same(read_class_images([tmp_path, folder], "a.npz"), images)


def test_damage_counts_as_absent(images, tmp_path):
    path = write_class_images([tmp_path], "a.npz", images)
    intact = path.read_bytes()
    flipped = bytearray(intact)
    flipped[200] ^= 0xFF
    for damaged in (intact[: len(intact) // 2], b"", b"not a zip", bytes(flipped)):
        path.write_bytes(damaged)
        assert read_class_images([tmp_path], "a.npz") is None
    np.savez(path, other=np.zeros(2))
    assert read_class_images([tmp_path], "a.npz") is None
    np.savez(path, images=np.zeros(2), class_start=np.zeros(2), class_names=np.array(["a"]))
    assert read_class_images([tmp_path], "a.npz") is None
    np.save(tmp_path / "b.npy", np.zeros(2))
    (tmp_path / "b.npy").rename(path)
    assert read_class_images([tmp_path], "a.npz") is None


def test_pickles_are_not_read(tmp_path):
    np.savez(tmp_path / "a.npz", images=np.array([object()], dtype=object))
    assert read_class_images([tmp_path], "a.npz") is None


def test_next_folder_serves_when_the_first_cannot_be_written(images, tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        path = write_class_images([tmp_path / "file" / "folder", tmp_path], "a.npz", images)
    assert path == tmp_path / "a.npz"


def test_warns_when_nothing_can_be_written(images, tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.warns(RuntimeWarning, match="cannot write the cache file a.npz.*made anew each time"):
        assert write_class_images([tmp_path / "file"], "a.npz", images) is None


def test_a_changed_byte_counts_as_absent(images, tmp_path):
    """Bytes here and there, changed in their lowest and in their highest bit."""
    path = write_class_images([tmp_path], "a.npz", images)
    whole = path.read_bytes()
    for place in range(0, len(whole), 13):
        for flip in (1, 0x80):
            path.write_bytes(whole[:place] + bytes([whole[place] ^ flip]) + whole[place + 1 :])
            found = read_class_images([tmp_path], "a.npz")
            assert found is None or found.images.equal(images.images), place
