import io
import os
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ibaml.data import images as of_images
from ibaml.data import load_class_folder, load_image_folder, room
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
    with pytest.raises(ValueError, match="holds no image .suffixes .avif, .bmp"):
        load_images(tmp_path, image_size=4)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="class 'empty' in .* has no image"):
        load_class_folder(tmp_path)


def saved(image: Image.Image, suffix: str = "PNG", **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, suffix, **options)
    return stream.getvalue()


RAMP = np.linspace(0, 4095, 24).reshape(4, 6)
DEEP = {
    "16-bit.png": saved(Image.fromarray(RAMP.astype(np.uint16))),
    "16-bit.tif": saved(Image.fromarray(RAMP.astype(np.uint16)), "TIFF"),
    "32-bit.tif": saved(Image.fromarray(RAMP.astype(np.int32)), "TIFF"),
    "float.tif": saved(Image.fromarray(RAMP.astype(np.float32)), "TIFF"),
}


@pytest.mark.parametrize("name", DEEP)
def test_pixels_of_more_than_eight_bits_are_refused(make, name):
    """Pillow would cut them off at 255."""
    with pytest.raises(ValueError, match=r"the image train/a/\S+ of \S+ has pixels of more than 8 bits \(mode \S+\)"):
        load_image_folder(make({f"train/a/{name}": DEEP[name]}), "train", channels=1)


@pytest.mark.parametrize("suffix", ["GIF", "TIFF", "WEBP"])
def test_several_pictures_in_a_file_are_refused(make, suffix):
    frames = [Image.new("L", (4, 4), value) for value in (0, 255, 90)]
    several = saved(frames[0], suffix, save_all=True, append_images=frames[1:])
    with pytest.raises(ValueError, match="holds 3 pictures: save the one that is meant as a file of its own"):
        load_image_folder(make({f"train/a/0.{suffix.lower()}": several}), "train")


def test_what_is_transparent_is_white(make):
    """Ink on nothing, where nothing is black: without its transparency the picture is all black."""
    ink = np.zeros((4, 4), np.uint8)
    ink[1, 2] = 255
    rgba = Image.fromarray(np.dstack([np.zeros((4, 4, 3), np.uint8), ink]))
    files = {f"train/a/{mode}.png": saved(rgba.convert(mode)) for mode in ("RGBA", "LA")}
    palette = Image.new("P", (4, 4), 0)
    palette.putpalette([0, 0, 0, 9, 9, 9])
    palette.putpixel((2, 1), 1)
    files["train/a/P.png"] = saved(palette, transparency=0)
    for channels in (1, 3):
        found = load_image_folder(make(files), "train", channels=channels).images
        for image in found:
            assert image[0, 1, 2] <= 9 and (image == 255).sum() == channels * 15


def test_turned_photographs_are_turned(make):
    """A camera that was held upright writes the picture lying, and a note of it."""
    pixels = np.arange(0, 240, 10, dtype=np.uint8).reshape(4, 6)
    exif = Image.Exif()
    exif[0x0112] = 6
    found = load_image_folder(make({"train/a/0.png": saved(Image.fromarray(pixels), exif=exif)}), "train", channels=1)
    np.testing.assert_array_equal(found.images[0, 0], np.rot90(pixels, -1))


def test_images_of_absurd_size_are_refused_unread(make, monkeypatch):
    monkeypatch.setattr(of_images, "_MOST_PIXELS", 20)
    with pytest.raises(ValueError, match="has 6 x 4 pixels, and at most 20 are decoded: make it smaller"):
        load_image_folder(make({"train/a/0.png": picture(9)}), "train")


def test_members_of_absurd_size_are_refused_unread(tmp_path, monkeypatch):
    monkeypatch.setattr(of_images, "_MOST_BYTES", 20)
    with pytest.raises(ValueError, match=r"cannot read train/a/0.png of .* has \d+ bytes, and at most 20 are read"):
        load_image_folder(write(tmp_path / "data", "zip", {"train/a/0.png": picture(9)}), "train")


def test_names_that_some_programs_write(tmp_path):
    files = {"./train/a/0.png": picture(1), "train//a/1.png": picture(2), "train/b/./2.png": picture(3)}
    found = load_image_folder(write(tmp_path / "data", "zip", files), "train")
    assert found.images[:, 0, 0, 0].tolist() == [1, 2, 3] and found.class_sizes.tolist() == [2, 1]


def test_a_changed_byte_changes_no_image_without_a_word(tmp_path):
    """Seeded sample of one-byte changes, of stored and of packed members."""
    rng = np.random.default_rng(0)
    for packing in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        path = tmp_path / f"{packing}.zip"
        with zipfile.ZipFile(path, "w", packing) as archive:
            for index in range(4):
                archive.writestr(f"train/{'ab'[index % 2]}/{index}.png", picture(20 * index))
        whole = path.read_bytes()
        expected = load_image_folder(path, "train")
        for place in rng.choice(len(whole), 150, replace=False):
            path.write_bytes(whole[:place] + bytes([whole[place] ^ int(rng.integers(1, 256))]) + whole[place + 1 :])
            try:
                found = load_image_folder(path, "train")
            except ValueError:
                continue
            assert found.images.equal(expected.images) and found.class_names == expected.class_names, place


def test_a_photograph_with_a_small_copy_beside_it_is_the_photograph(make):
    first, copy = (Image.new("RGB", (6, 4), colour) for colour in ("red", "blue"))
    content = saved(first, "MPO", save_all=True, append_images=[copy])
    found = load_image_folder(make({"train/a/0.jpg": content}), "train").images
    assert found[0, 0].min() > 200 and found[0, 2].max() < 50


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "YCbCr"])
def test_modes_come_out_as_one_sees_them(make, mode):
    """A light grey picture, in every way that it can be stored."""
    suffix, name = ("TIFF", "0.tif") if mode in ("CMYK", "YCbCr") else ("PNG", "0.png")
    picture = Image.new("L", (6, 4), 255).convert("RGB").convert(mode)
    images = load_image_folder(make({f"train/a/{name}": saved(picture, suffix)}), "train").images
    assert images.min() >= 253


@pytest.mark.parametrize("name", ["0.heic", "scan.DCM", "0.nef"])
def test_pictures_that_pillow_does_not_read_are_named(make, tmp_path, name):
    path = make({"train/a/0.png": picture(1), f"train/a/{name}": b"?"})
    with pytest.raises(ValueError, match=f"train/a/{name} of .* is a picture that Pillow does not read .*: save it as"):
        load_image_folder(path, "train")


@pytest.mark.parametrize("has_room", [True, False])
def test_many_pixels_lie_in_a_file_without_a_name(make, monkeypatch, tmp_path, has_room):
    monkeypatch.setattr(room, "MOST_IN_MEMORY", 100)
    folder = tmp_path / "cache"
    folder.write_text("no folder") if not has_room else None
    monkeypatch.setattr(room, "cache_folders", lambda: [folder])
    names = [f"train/{name}/{number}.png" for name in "ab" for number in range(3)]
    path = make({name: picture(value) for value, name in enumerate(names)})
    images = load_image_folder(path, "train").images
    assert [int(value) for value in images[:, 0, 0, 0]] == list(range(6))
    if has_room:
        assert isinstance(room.room_for((200,)), np.memmap) and not list(folder.iterdir())
    assert not isinstance(room.room_for((100,)), np.memmap)
