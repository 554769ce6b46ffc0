import io
import os
import zipfile
from pathlib import Path

import numpy as np
import pooch
import pytest
import torch
from PIL import Image

from ibaml.data import load_omniglot
from ibaml.data.sources import omniglot

BACKGROUND = {"Greek": 2, "Hebrew": 1, "Latin": 1}
EVALUATION = {"Tengwar": 2}
SPLIT = """alphabet,character,split
Greek,character01,train
Latin,character01,train
Hebrew,character01,val
Tengwar,character01,test
Tengwar,character02,train
"""


def drawing(column: int) -> bytes:
    """A black bar of 15 columns on white paper, as 1-bit PNG of 105 x 105."""
    pixels = np.ones((105, 105), dtype=bool)
    pixels[:, 15 * column : 15 * (column + 1)] = False
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, format="PNG")
    return stream.getvalue()


def write_archive(path: Path, alphabets: dict[str, int], num_drawings: int = 3) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"{path.stem}/", b"")
        number = 0
        for alphabet, num_characters in alphabets.items():
            for character in range(1, num_characters + 1):
                number += 1
                for repeat in range(1, num_drawings + 1):
                    name = f"{path.stem}/{alphabet}/character{character:02}/{number:04}_{repeat:02}.png"
                    archive.writestr(name, drawing(number))


@pytest.fixture
def root(tmp_path, monkeypatch):
    monkeypatch.delenv("IBAML_DATA", raising=False)
    monkeypatch.setattr(pooch, "os_cache", lambda project: tmp_path / "cache")
    root = tmp_path / "root"
    root.mkdir()
    write_archive(root / "images_background.zip", BACKGROUND)
    write_archive(root / "images_evaluation.zip", EVALUATION)
    (root / "omniglot_vinyals_split.csv").write_text(SPLIT)
    return root


@pytest.mark.parametrize(
    ("protocol", "split", "names"),
    [
        ("vinyals", "train", ("Greek/character01", "Latin/character01", "Tengwar/character02")),
        ("vinyals", "validation", ("Hebrew/character01",)),
        ("vinyals", "test", ("Tengwar/character01",)),
        ("official", "train", ("Greek/character01", "Greek/character02", "Latin/character01")),
        ("official", "validation", ("Hebrew/character01",)),
        ("official", "test", ("Tengwar/character01", "Tengwar/character02")),
    ],
)
def test_splits(root, protocol, split, names):
    images = load_omniglot(split, root=root, protocol=protocol, rotations=False)
    assert images.class_names == names
    assert images.class_sizes.tolist() == [3] * len(names)
    turned = load_omniglot(split, root=root, protocol=protocol)
    assert turned.num_classes == 4 * len(names)


def test_ink_is_bright_and_shrunk_by_area(root):
    images = load_omniglot("test", root=root, rotations=False, image_size=7).images
    # 105 / 7 = 15: each pixel of the result is the mean of a square that the bar of 15 columns fills or misses.
    expected = torch.zeros(7, 7, dtype=torch.uint8)
    expected[:, 1] = 255
    assert torch.equal(images[0, 0], expected)
    grey = load_omniglot("test", root=root, rotations=False, image_size=21).images[0, 0]
    assert grey[:, 3:6].eq(255).all() and grey.sum() == 255 * 3 * 21


def test_cache_follows_the_contents(root, tmp_path, monkeypatch):
    first = load_omniglot("test", root=root, protocol="official")
    monkeypatch.setattr(omniglot, "_decode", lambda *arguments: pytest.fail("decoded again"))
    os.utime(root / "images_evaluation.zip", (0, 0))
    assert torch.equal(load_omniglot("test", root=root, protocol="official").images, first.images)
    monkeypatch.undo()
    monkeypatch.setattr(pooch, "os_cache", lambda project: tmp_path / "cache")
    write_archive(root / "images_evaluation.zip", {"Tengwar": 3})
    assert load_omniglot("test", root=root, protocol="official", rotations=False).num_classes == 3
    cache = tmp_path / "other"
    load_omniglot("test", root=root, protocol="official", cache_dir=cache)
    assert len(list(cache.glob("omniglot-*.npz"))) == 1


def test_missing_files(root):
    (root / "omniglot_vinyals_split.csv").unlink()
    with pytest.raises(FileNotFoundError, match="omniglot_vinyals_split.csv not found.*protocol='official'"):
        load_omniglot("train", root=root)
    (root / "images_background.zip").unlink()
    with pytest.raises(FileNotFoundError, match="images_background.zip not found.*brendenlake/omniglot"):
        load_omniglot("train", root=root, protocol="official")


def test_truncated_archive(root):
    path = root / "images_evaluation.zip"
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(ValueError, match="images_evaluation.zip is not an intact zip archive.*Get it again"):
        load_omniglot("test", root=root, protocol="official")


def test_flipped_bit(root):
    path = root / "images_evaluation.zip"
    content = bytearray(path.read_bytes())
    content[content.index(b"IDAT") + 10] ^= 0xFF
    path.write_bytes(content)
    with pytest.raises(ValueError, match="cannot read .* of .*images_evaluation.zip .*CRC.*Get the archive again"):
        load_omniglot("test", root=root, protocol="official")


def test_undecodable_image(root):
    with zipfile.ZipFile(root / "images_evaluation.zip", "w") as archive:
        archive.writestr("images_evaluation/Tengwar/character01/0001_01.png", b"no image")
    with pytest.raises(ValueError, match="cannot read the image images_evaluation/Tengwar/character01/0001_01.png"):
        load_omniglot("test", root=root, protocol="official")


def test_other_archive(root):
    with zipfile.ZipFile(root / "images_evaluation.zip", "w") as archive:
        archive.writestr("holiday/photo.png", drawing(0))
    with pytest.raises(ValueError, match="has no file named like"):
        load_omniglot("test", root=root, protocol="official")


def test_archive_without_validation_alphabets(root):
    write_archive(root / "images_background.zip", {"Greek": 1})
    with pytest.raises(ValueError, match="has no alphabet for the validation split"):
        load_omniglot("validation", root=root, protocol="official")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (SPLIT + "Klingon,character01,test\n", "lists 1 test characters that the archives lack, first 'Klingon/char"),
        ("a,b\n", r"must have the columns alphabet,character,split, got \['a', 'b'\]"),
        ("", "must have the columns alphabet,character,split, got None"),
        (SPLIT + "Greek,character02,tain\n", "line 7: split must be train, val or test, got 'tain'"),
        ("alphabet,character,split\nGreek,character01,test\n", "no character for the splits train, validation"),
    ],
)
def test_bad_split_file(root, text, message):
    (root / "omniglot_vinyals_split.csv").write_text(text)
    with pytest.raises(ValueError, match=message):
        load_omniglot("test", root=root)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (dict(split="val"), ValueError, "split must be one of .*, got 'val'"),
        (dict(split="train", protocol="lake"), ValueError, "protocol must be one of .*, got 'lake'"),
        (dict(split="train", image_size=0), ValueError, "image_size must be at least 1"),
        (dict(split="train", image_size="28"), TypeError, "image_size must be an int"),
    ],
)
def test_refuses(arguments, error, message):
    with pytest.raises(error, match=message):
        load_omniglot(**arguments)


@pytest.mark.slow
def test_real_archives(tmp_path):
    shared = Path(os.environ.get("IBAML_DATA") or Path(__file__).parents[2].parent / "shared" / "data")
    if not (shared / "images_background.zip").is_file():
        pytest.skip(f"no Omniglot archives in {shared}; set IBAML_DATA to their folder")
    sizes = {
        (protocol, split): load_omniglot(
            split, root=shared, protocol=protocol, rotations=False, cache_dir=tmp_path
        ).num_classes
        for protocol in ("vinyals", "official")
        for split in ("train", "validation", "test")
    }
    assert list(sizes.values()) == [1028, 172, 423, 792, 172, 659]
