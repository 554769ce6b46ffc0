"""Labelled images of one's own: a folder or zip archive laid out as ``split/class/image``."""

import dataclasses
import os
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import ClassVar, NamedTuple

import numpy as np
import torch

from ibaml.checks import expand_home, require_positive_int
from ibaml.data.images import (
    ClassImages,
    Pixels,
    check_names,
    decode_image,
    open_archive,
    read_image_file,
    read_member,
    resize_image,
    to_pixels,
)
from ibaml.data.room import room_for
from ibaml.data.sources.base import ImageSource, Split

IMAGE_SUFFIXES = frozenset(
    {
        *(".avif", ".bmp", ".gif", ".j2k", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg", ".pbm", ".pgm", ".png", ".pnm"),
        *(".ppm", ".tga", ".tif", ".tiff", ".webp"),
    }
)
"""Files with other suffixes are taken to be notes and passed over, but for those that are known to be pictures too."""

FOREIGN_SUFFIXES = frozenset(
    {".arw", ".cr2", ".cr3", ".czi", ".dcm", ".dng", ".heic", ".heif", ".jxl", ".nef", ".orf", ".raf", ".raw", ".svg"}
)
"""Pictures that Pillow does not read: passed over, they would be missing without a word."""


class ImageFiles(NamedTuple):
    """Images without labels.

    Attributes:
        names: File names.
        pixels: uint8, ``[num_images, channels, height, width]``.
    """

    names: tuple[str, ...]
    pixels: Pixels


_VALIDATION_NAMES = ("validation", "val", "valid")


class _Entry(NamedTuple):
    """A file or folder below the root."""

    parts: tuple[str, ...]
    is_folder: bool

    @property
    def split(self) -> str:
        """The folder right below the root, or the file's own name if it lies there."""
        return self.parts[0]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImageFolder(ImageSource):
    """Images of one's own, ``split/class/image`` under a folder or in a zip archive.

    Attributes:
        path: Folder or archive, relative to the data folder.
    """

    path: str
    image_size: int = 84
    name: ClassVar[str] = "image_folder"

    def images(self, split: Split, *, data: Path | None = None) -> ClassImages:
        """Loads the images of a split."""
        path = (Path() if data is None else data) / Path(self.path).expanduser()
        return load_image_folder(path, split, image_size=self.image_size)


def load_image_folder(
    path: str | os.PathLike[str],
    split: str,
    *,
    image_size: int | tuple[int, int] | None = None,
    channels: int = 3,
) -> ClassImages:
    """Loads the images of one split, ``split/class/image.*`` under a folder or in a zip archive (read in place).

    Any format that Pillow reads by one of IMAGE_SUFFIXES; hidden files are passed over. In an archive one common outer
    folder is allowed. Images are decoded one by one and held as uint8: in memory, or beyond a gigabyte in a file of the
    cache's folder that goes when they do.

    Args:
        path: Folder, or zip archive.
        split: Name of the split's folder. ``"validation"``, ``"val"`` and ``"valid"`` stand for each other.
        image_size: Side in pixels, or ``(height, width)``, to which every image is resized (Lanczos, antialiased; the
            shape of the image is not preserved). None keeps them, which needs all of one size.
        channels: 3 for colour, 1 for grey; images are converted.

    Returns:
        Images of shape ``[num_images, channels, height, width]``; classes sorted by name, and images by name within.

    Raises:
        FileNotFoundError: If ``path`` does not exist.
        TypeError: If ``image_size`` is none of the above.
        ValueError: If the archive is damaged, the split is absent or empty, a class has no image, an image cannot be
            read, images differ in size while ``image_size`` is None, or an argument is out of range.

    Examples:
        >>> from tempfile import TemporaryDirectory
        >>> from PIL import Image
        >>> with TemporaryDirectory() as folder:
        ...     for name in ("cat", "dog"):
        ...         (Path(folder) / "train" / name).mkdir(parents=True)
        ...         Image.new("RGB", (8, 8)).save(Path(folder) / "train" / name / "0.png")
        ...     load_image_folder(folder, "train").class_names
        ('cat', 'dog')
    """
    path, size = _check_arguments(path, image_size, channels, "split/class/image")
    with _open_root(path) as (entries, read):
        # A split is a folder below the root; a file below the root (a licence, say) is none.
        splits = sorted({entry.split for entry in entries if len(entry.parts) > 1 or entry.is_folder})
        name = _match_split(split, splits, path)
        below = [_Entry(entry.parts[1:], entry.is_folder) for entry in entries if entry.split == name]
        return _read_classes(below, lambda parts: read((name, *parts)), path, size, channels, split=name)


def load_class_folder(
    path: str | os.PathLike[str], *, image_size: int | tuple[int, int] | None = None, channels: int = 3
) -> ClassImages:
    """Loads a folder of class folders, ``class/image.*``; everything else is as in ``load_image_folder``.

    Args:
        path: The folder.
        image_size: Side in pixels, or ``(height, width)``, to which every image is resized. None keeps them.
        channels: 3 for colour, 1 for grey.

    Raises:
        FileNotFoundError: If ``path`` does not exist.
        TypeError: If ``image_size`` is none of the above.
        ValueError: If ``path`` is no folder, holds no classes, a class has no image, an image cannot be read, images
            differ in size while ``image_size`` is None, or an argument is out of range.
    """
    path, size = _check_arguments(path, image_size, channels, "class/image")
    if not path.is_dir():
        raise ValueError(f"{path} is no folder; give one with class/image files.")
    return _read_classes(
        _list_folder(path, depth=2), lambda parts: read_image_file(path.joinpath(*parts)), path, size, channels
    )


def load_images(path: str | os.PathLike[str], *, image_size: int | tuple[int, int], channels: int = 3) -> ImageFiles:
    """Loads the images that lie right in a folder, or one image file.

    Args:
        path: Folder or file.
        image_size: Side in pixels, or ``(height, width)``, to which every image is resized.
        channels: 3 for colour, 1 for grey.

    Raises:
        FileNotFoundError: If ``path`` does not exist.
        ValueError: If there is no image, or one cannot be read.
    """
    path, size = _check_arguments(path, image_size, channels, "image")
    files = [path] if path.is_file() else sorted(path.iterdir())
    files = [file for file in files if not _is_hidden((file.name,)) and _is_image(file.name, path)]
    if not files:
        raise ValueError(f"{path} holds no image (suffixes {', '.join(sorted(IMAGE_SUFFIXES))}).")
    pictures = [_decode(read_image_file(file), f"{file.name} of {path}", size, channels) for file in files]
    return ImageFiles(tuple(file.name for file in files), np.stack(pictures))


def _check_arguments(
    path: str | os.PathLike[str], image_size: object, channels: int, layout: str
) -> tuple[Path, tuple[int, int] | None]:
    path = expand_home("path", path)
    if channels not in (1, 3):
        raise ValueError(f"channels must be 1 (grey) or 3 (colour), got {channels!r}.")
    size = _parse_image_size(image_size)
    if not path.exists():
        raise FileNotFoundError(f"path {path} does not exist; give a folder or zip archive with {layout} files.")
    return path, size


def _read_classes(
    entries: list[_Entry],
    read: Callable[[tuple[str, ...]], bytes],
    path: Path,
    size: tuple[int, int] | None,
    channels: int,
    *,
    split: str | None = None,
) -> ClassImages:
    """Reads ``class/image`` entries; ``split`` names the folder above them in messages."""
    above = "" if split is None else f"{split}/"
    classes: dict[str, list[tuple[str, ...]]] = {}
    for parts, is_folder in entries:
        if not parts or (len(parts) == 1 and not is_folder):
            continue
        files = classes.setdefault(parts[0], [])
        if len(parts) == 2 and not is_folder and _is_image(above + "/".join(parts), path):
            files.append(parts)
    if not classes:
        source = f"{path}" if split is None else f"split {split!r} of {path}"
        raise ValueError(f"{source} has no class folder; expected {above}class/image files.")
    num_images = sum(map(len, classes.values()))
    pictures: Pixels | None = None
    starts = [0]
    for class_name in sorted(classes):
        if not classes[class_name]:
            raise ValueError(
                f"class {class_name!r} {'' if split is None else f'of split {split!r} '}in {path} has no image "
                f"(suffixes {', '.join(sorted(IMAGE_SUFFIXES))}); add some or remove the folder."
            )
        for place, parts in enumerate(sorted(classes[class_name]), starts[-1]):
            name = above + "/".join(parts)
            picture = _decode(read(parts), f"{name} of {path}", size, channels)
            if pictures is None:
                pictures = room_for((num_images, *picture.shape))
            if picture.shape != pictures.shape[1:]:
                raise ValueError(
                    f"images of {path} differ in size: {name} has (height, width) "
                    f"{picture.shape[1:]}, the first image {pictures.shape[2:]}; pass image_size to resize them."
                )
            pictures[place] = picture
        starts.append(starts[-1] + len(classes[class_name]))
    images = torch.from_numpy(pictures)
    return ClassImages(images=images, class_start=torch.tensor(starts), class_names=tuple(sorted(classes)))


def _parse_image_size(image_size: object) -> tuple[int, int] | None:
    """Returns (height, width), or None to keep the images as they are."""
    if image_size is None:
        return None
    if isinstance(image_size, tuple):
        sides: tuple[object, ...] = image_size
        if len(sides) != 2:
            raise ValueError(f"image_size must be an int or (height, width), got {image_size!r}.")
        return require_positive_int("image_size", sides[0]), require_positive_int("image_size", sides[1])
    side = require_positive_int("image_size", image_size)
    return side, side


def _match_split(split: str, splits: list[str], path: Path) -> str:
    """Returns the folder name of a split, any spelling of "validation" standing for the others."""
    spellings = (split, *_VALIDATION_NAMES) if split in _VALIDATION_NAMES else (split,)
    for spelling in spellings:
        if spelling in splits:
            return spelling
    present = ", ".join(splits) if splits else "none"
    raise ValueError(f"split {split!r} is not in {path}; splits present: {present}.")


@contextmanager
def _open_root(path: Path) -> Generator[tuple[list[_Entry], Callable[[tuple[str, ...]], bytes]]]:
    """Opens a folder or archive: what lies up to three levels deep, and a function that reads a file by its parts."""
    if path.is_dir():
        yield _list_folder(path), lambda parts: read_image_file(path.joinpath(*parts))
        return
    with open_archive(path) as archive:
        check_names(archive)
        # By their parts: some programs write ./ or // into names, under which a file has to be read.
        names = {PurePosixPath(info.filename).parts: info.filename for info in archive.infolist()}
        entries = [_Entry(parts, name.endswith("/")) for parts, name in names.items() if not _is_hidden(parts)]
        outer: tuple[str, ...] = ()
        files = [entry.parts for entry in entries if not entry.is_folder]
        # outer/split/class/image: as produced by zipping the folder itself instead of what is in it.
        if files and len({parts[0] for parts in files}) == 1 and all(len(parts) >= 4 for parts in files):
            outer = files[0][:1]
            entries = [_Entry(parts[1:], is_folder) for parts, is_folder in entries if len(parts) > 1]

        def read(parts: tuple[str, ...]) -> bytes:
            return read_member(archive, names[outer + parts])

        yield entries, read


def _list_folder(root: Path, depth: int = 3) -> list[_Entry]:
    """Lists what lies up to so many levels below a folder."""
    entries: list[_Entry] = []
    pending: list[tuple[Path, tuple[str, ...]]] = [(root, ())]
    while pending:
        folder, parents = pending.pop()
        for child in folder.iterdir():
            parts = (*parents, child.name)
            if _is_hidden(parts):
                continue
            is_folder = child.is_dir()
            entries.append(_Entry(parts, is_folder))
            if is_folder and len(parts) < depth:
                pending.append((child, parts))
    return entries


def _is_image(name: str, path: Path) -> bool:
    """Tells images from notes, by their names.

    Raises:
        ValueError: If it is a picture that cannot be read.
    """
    suffix = PurePosixPath(name).suffix.lower()
    if suffix in FOREIGN_SUFFIXES:
        raise ValueError(
            f"{name} of {path} is a picture that Pillow does not read ({suffix}): save it as JPEG or PNG, or take it "
            "out of the folder."
        )
    return suffix in IMAGE_SUFFIXES


def _is_hidden(parts: tuple[str, ...]) -> bool:
    """Tells files that operating systems leave behind from those that people put there."""
    return not parts or any(part.startswith(".") or part == "__MACOSX" for part in parts)


def _decode(content: bytes, name: str, size: tuple[int, int] | None, channels: int) -> Pixels:
    image = decode_image(content, name, channels=channels)
    return to_pixels(image if size is None else resize_image(image, size))
