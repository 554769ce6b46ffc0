import io
import os
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ibaml.data import load_class_folder, load_image_folder
from ibaml.data.sources.image_folder import load_images


def picture(value: int, suffix: str = "png", size: tuple[int, int] = (6, 4), mode: str = "RGB") -> bytes:
    stream = io.BytesIO()
    colour = value if mode == "L" else (value, 0, 255 - value)
    options = {"lossless": True} if suffix == "webp" else {}
    Image.new(mode, size, colour).save(stream, format={"jpg": "JPEG"}.get(suffix, suffix.upper()), **options)
    return stream.getvalue()


FILES = {
    "train/dog/2.png": picture(20),
    "train/dog/1.webp": picture(10, "webp"),
    "train/cat/1.jpg": picture(30, "jpg"),
    "train/cat/.hidden.png": b"",
    "train/cat/notes.txt": b"not an image",
    "train/LICENSE": b"",
    "val/cow/1.PNG": picture(40),
    "README.md": b"",
}


def write(path: Path, kind: str, files: dict[str, bytes], folders: tuple[str, ...] = ()) -> Path:
    if kind == "folder":
        for folder in folders:
            (path / folder).mkdir(parents=True)
        for name, content in files.items():
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            (path / name).write_bytes(content)
        return path
    with zipfile.ZipFile(path.with_suffix(".zip"), "w") as archive:
        for folder in folders:
            archive.writestr(folder + "/", b"")
        for name, content in files.items():
            archive.writestr(name, content)
    return path.with_suffix(".zip")


@pytest.fixture(params=["folder", "zip"])
def make(request, tmp_path):
    return lambda files, folders=(): write(tmp_path / "data", request.param, files, folders)


def test_classes_and_images_sorted_by_name(make):
    images = load_image_folder(make(FILES), "train")
    assert images.class_names == ("cat", "dog")
    assert images.class_sizes.tolist() == [1, 2]
    assert images.image_shape == (3, 4, 6)
    assert images.images[1:, :, 0, 0].tolist() == [[10, 0, 245], [20, 0, 235]]
    assert (images.images[0, :, 0, 0] - torch.tensor([30, 0, 225])).abs().max() <= 3  # JPEG loses a little


def test_spellings_of_validation(make):
    path = make(FILES)
    for spelling in ("validation", "val", "valid"):
        assert load_image_folder(path, spelling).class_names == ("cow",)


def test_resizing_and_grey(make):
    path = make({"train/a/1.png": picture(200, mode="L"), "train/a/2.png": picture(100, size=(9, 9), mode="L")})
    images = load_image_folder(path, "train", image_size=8, channels=1)
    assert images.image_shape == (1, 8, 8)
    assert images.images[:, 0, 3, 3].tolist() == [200, 100]
    assert load_image_folder(path, "train", image_size=(2, 5)).image_shape == (3, 2, 5)
    with pytest.raises(
        ValueError, match=r"differ in size: train/a/2.png has .* \(9, 9\), the first image \(4, 6\); pass"
    ):
        load_image_folder(path, "train")


def test_outer_folder_in_an_archive(tmp_path):
    path = write(
        tmp_path / "data", "zip", {f"outer/{name}": content for name, content in FILES.items() if "/" in name[6:]}
    )
    assert load_image_folder(path, "train").class_names == ("cat", "dog")


def test_absent_split_lists_those_present(make):
    with pytest.raises(ValueError, match="split 'test' is not in .*; splits present: train, val"):
        load_image_folder(make(FILES), "test")


def test_class_without_images(make):
    with pytest.raises(ValueError, match="class 'bird' of split 'train' in .* has no image"):
        load_image_folder(make(FILES, ("train/bird",)), "train")


def test_class_with_other_files_only(make):
    with pytest.raises(ValueError, match="class 'bird' of split 'train' in .* has no image"):
        load_image_folder(make(FILES | {"train/bird/notes.txt": b""}), "train")


def test_split_without_classes(make):
    with pytest.raises(ValueError, match="split 'empty' of .* has no class folder"):
        load_image_folder(make(FILES, ("empty",)), "empty")


def test_unreadable_image(make):
    with pytest.raises(ValueError, match="cannot read the image train/dog/3.png of .*replace or remove it"):
        load_image_folder(make(FILES | {"train/dog/3.png": picture(1)[:40]}), "train")


def test_truncated_archive(tmp_path):
    path = write(tmp_path / "data", "zip", FILES)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="data.zip is not an intact zip archive .*Get it again"):
        load_image_folder(path, "train")


def test_archive_with_a_flipped_bit(tmp_path):
    path = write(tmp_path / "data", "zip", FILES)
    content = bytearray(path.read_bytes())
    content[content.index(b"IDAT") + 6] ^= 0xFF
    path.write_bytes(content)
    with pytest.raises(ValueError, match="cannot read train/dog/2.png of .*data.zip .*Get the archive again"):
        load_image_folder(path, "train")


def test_missing_path(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere does not exist; give a folder or zip archive"):
        load_image_folder(tmp_path / "nowhere", "train")


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (dict(channels=2), ValueError, r"channels must be 1 \(grey\) or 3 \(colour\), got 2"),
        (dict(image_size=0), ValueError, "image_size must be at least 1, got 0"),
        (dict(image_size=(1, 2, 3)), ValueError, r"image_size must be an int or \(height, width\)"),
        (dict(image_size="28"), TypeError, "image_size must be an int"),
        (dict(image_size=(28, 1.5)), TypeError, "image_size must be an int"),
    ],
)
def test_refuses(arguments, error, message, tmp_path):
    with pytest.raises(error, match=message):
        load_image_folder(tmp_path, "train", **arguments)


def test_real_archive():
    shared = Path(os.environ.get("IBAML_DATA") or Path(__file__).parents[2].parent / "shared" / "data")
    path = shared / "tiny_imagenet_fewshot.zip"
    if not path.is_file():
        pytest.skip(f"{path} is absent; set IBAML_DATA to its folder")
    images = load_image_folder(path, "validation")
    assert (images.num_classes, images.image_shape) == (16, (3, 64, 64))
    assert images.class_sizes.unique().tolist() == [100]
    assert 60 < np.asarray(images.images.float().mean()) < 180


# Folders without splits


def test_a_class_folder_is_what_a_split_holds(tmp_path):
    for number, name in enumerate(("cat", "dog")):
        (tmp_path / "train" / name).mkdir(parents=True)
        Image.new("RGB", (4, 4), (number, 2, 3)).save(tmp_path / "train" / name / "0.png")
    alone, split = load_class_folder(tmp_path / "train"), load_image_folder(tmp_path, "train")
    assert torch.equal(alone.images, split.images) and alone.class_names == split.class_names
    files = load_images(tmp_path / "train" / "dog", image_size=2)
    assert (
        files.names == ("0.png",)
        and files.pixels.shape == (1, 3, 2, 2)
        and files.pixels[0, :, 0, 0].tolist() == [1, 2, 3]
    )
    assert load_images(tmp_path / "train" / "dog" / "0.png", image_size=4, channels=1).pixels.shape == (1, 1, 4, 4)


def test_class_folders_it_refuses(tmp_path):
    with pytest.raises(FileNotFoundError, match="absent does not exist; give a folder or zip archive with class/image"):
        load_class_folder(tmp_path / "absent")
    (tmp_path / "note.txt").write_text("")
    with pytest.raises(ValueError, match="note.txt is no folder; give one with class/image files"):
        load_class_folder(tmp_path / "note.txt")
    with pytest.raises(ValueError, match="has no class folder; expected class/image files"):
        load_class_folder(tmp_path)
    with pytest.raises(ValueError, match="holds no image .suffixes .bmp"):
        load_images(tmp_path, image_size=4)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="class 'empty' in .* has no image"):
        load_class_folder(tmp_path)
