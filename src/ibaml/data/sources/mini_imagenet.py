"""miniImageNet (Vinyals et al. 2016) in the split of Ravi and Larochelle 2017: 64 / 16 / 20 classes of 600 images."""

import csv
import dataclasses
import io
import os
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import ClassVar, NamedTuple, cast, get_args

import numpy as np
import numpy.typing as npt
import torch

from ibaml.checks import require_positive_int
from ibaml.data.files.cache import cached_images
from ibaml.data.files.locate import ENVIRONMENT_VARIABLE, search_folders
from ibaml.data.files.pickles import load_arrays
from ibaml.data.images import (
    ClassImages,
    Pixels,
    class_starts,
    decode_image,
    digest,
    member_stamps,
    open_archive,
    read_image_file,
    read_member,
    resize_image,
    to_pixels,
)
from ibaml.data.sources.base import ImageSource, Split

NUM_CLASSES: dict[Split, int] = {"train": 64, "validation": 16, "test": 20}
IMAGES_PER_CLASS = 600

FOLDER = "mini-imagenet"
ARCHIVE = "mini-imagenet.zip"
CSV_FILES: dict[Split, str] = {"train": "train.csv", "validation": "val.csv", "test": "test.csv"}
CACHE_FILES: dict[Split, str] = {
    "train": "mini-imagenet-cache-train.pkl",
    "validation": "mini-imagenet-cache-val.pkl",
    "test": "mini-imagenet-cache-test.pkl",
}
CATEGORY_FILES: dict[Split, str] = {
    "train": "miniImageNet_category_split_train_phase_train.pickle",
    "validation": "miniImageNet_category_split_val.pickle",
    "test": "miniImageNet_category_split_test.pickle",
}

_DECODING_VERSION = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class MiniImagenet(ImageSource):
    """miniImageNet, from whichever of its layouts is at hand."""

    image_size: int = 84
    name: ClassVar[str] = "mini_imagenet"

    def images(self, split: Split, *, data: Path | None = None) -> ClassImages:
        """Loads the images of a split."""
        return load_mini_imagenet(split, root=data, image_size=self.image_size)


def load_mini_imagenet(
    split: Split,
    *,
    root: str | os.PathLike[str] | None = None,
    image_size: int = 84,
    cache_dir: str | os.PathLike[str] | None = None,
) -> ClassImages:
    """Loads one split of miniImageNet from whichever of its layouts is at hand.

    The images are ImageNet's, whose terms do not let them be passed on: the files have to be obtained by the user. They
    are looked for in ``root``, ``$IBAML_DATA`` and the per-user cache; in each of these, and then in its folder
    ``mini-imagenet``, the first of these layouts is taken:

    1. ``mini-imagenet-cache-{train,val,test}.pkl``, as written by the code of Ren et al. 2018: a dict of ``image_data``
       (uint8, ``[N, 84, 84, 3]``) and ``class_dict`` (class name to list of indices).
    2. ``miniImageNet_category_split_{train_phase_train,val,test}.pickle``, as read by the code of Gidaris and Komodakis
       2018 and Lee et al. 2019 (MetaOptNet): a dict of ``data`` (as above), ``labels`` and ``catname2label``.
    3. ``{train,val,test}.csv``, the split as published by Ravi and Larochelle (columns ``filename,label``), with the
       images in the folder ``images`` beside it. Likewise, in none of these folders but directly in the places above,
       inside an archive ``mini-imagenet.zip``, with or without an outer folder.

    Pickles are read by ``load_arrays``, which runs no code, on each call; decoded image files are cached, keyed by the
    split and the names, sizes and times (in an archive: checksums) of the files.

    Args:
        split: ``"train"`` (64 classes), ``"validation"`` (16) or ``"test"`` (20).
        root: Folder to look in first.
        image_size: Height and width in pixels. Images of another size are resampled to it (Lanczos; the shape of a
            picture is not preserved). Pickles hold 84 x 84.
        cache_dir: Folder of the cache; None means ``$IBAML_DATA``, or else the per-user cache.

    Returns:
        Colour images of shape ``[num_images, 3, image_size, image_size]``; classes sorted by name (WordNet id), images
        of a class by file name, or in the order of a pickle.

    Raises:
        TypeError: If ``image_size`` is not an int.
        ValueError: If an argument is out of range; a pickle would run code, is damaged or holds something else; an
            archive, a CSV file or an image is damaged; or there are not the classes and images that the split has.
        FileNotFoundError: If no layout is found, or a CSV file lists images that are not there.
    """
    if split not in get_args(Split):
        raise ValueError(f"split must be one of {get_args(Split)}, got {split!r}.")
    require_positive_int("image_size", image_size)

    # Folder by folder, not layout by layout: what lies in root comes before whatever else the other places have.
    without_images: list[Path] = []
    for folder in search_folders(root):
        for place in (folder, folder / FOLDER):
            if (path := place / CACHE_FILES[split]).is_file():
                return _load_cache(path, split, image_size)
            if (path := place / CATEGORY_FILES[split]).is_file():
                return _load_category_split(path, split, image_size)
            if (path := place / CSV_FILES[split]).is_file() and _is_split_file(path):
                if (place / "images").is_dir():
                    return _load_image_files(_open_folder(path), split, image_size, cache_dir)
                without_images.append(path)
        if (path := folder / ARCHIVE).is_file():
            with _open_archive(path, split) as files:
                return _load_image_files(files, split, image_size, cache_dir)
    places = ", ".join(str(folder) for folder in search_folders(root))
    nearly = "".join(f" {path} is there, but no folder images beside it." for path in without_images)
    unset = "" if os.environ.get(ENVIRONMENT_VARIABLE) else f" (${ENVIRONMENT_VARIABLE} is not set)"
    raise FileNotFoundError(
        f"miniImageNet ({split}) not found; looked in {places}{unset}, and in a folder {FOLDER} of each, for "
        f"{CACHE_FILES[split]}, {CATEGORY_FILES[split]}, and {CSV_FILES[split]} (columns filename,label) beside a "
        f"folder images; and for {ARCHIVE} with the latter inside.{nearly} ImageNet's terms do not let its images be "
        "passed on, so that there is no download: obtain one of these under those terms and put it into one of the "
        "folders."
    )


def _load_cache(path: Path, split: Split, image_size: int) -> ClassImages:
    """Loads a pickle of ``image_data`` and ``class_dict``."""
    content = _read_dict(path, ("image_data", "class_dict"))
    class_dict = content["class_dict"]
    if not isinstance(class_dict, dict):
        raise ValueError(f"class_dict of {path} must be a dict of indices by class, got {_kind(class_dict)}.")
    classes: dict[str, npt.NDArray[np.int64]] = {}
    for name, indices in cast("dict[object, object]", class_dict).items():
        if not isinstance(name, str):
            raise ValueError(f"class_dict of {path} must have names for keys, got {name!r}.")
        classes[name] = _integers(indices, f"class_dict[{name!r}] of {path}")
    return _gather(content["image_data"], "image_data", classes, path, split, image_size)


def _load_category_split(path: Path, split: Split, image_size: int) -> ClassImages:
    """Loads a pickle of ``data``, ``labels`` and ``catname2label``."""
    content = _read_dict(path, ("data", "labels", "catname2label"))
    labels = _integers(content["labels"], f"labels of {path}")
    names = content["catname2label"]
    if not isinstance(names, dict):
        raise ValueError(f"catname2label of {path} must be a dict of labels by class name, got {_kind(names)}.")
    name_of: dict[int | np.integer, str] = {}
    for name, label in cast("dict[object, object]", names).items():
        if not isinstance(name, str) or not isinstance(label, int | np.integer):
            raise ValueError(f"catname2label of {path} must be a dict of labels by class name, has {name!r}.")
        if label in name_of:
            raise ValueError(f"catname2label of {path} gives label {label} to both {name_of[label]!r} and {name!r}.")
        name_of[label] = name
    classes: dict[str, npt.NDArray[np.int64]] = {}
    for label in np.unique(labels).tolist():
        if label not in name_of:
            raise ValueError(f"catname2label of {path} has no class for the label {label}.")
        classes[name_of[label]] = np.flatnonzero(labels == label)
    return _gather(content["data"], "data", classes, path, split, image_size)


def _read_dict(path: Path, keys: tuple[str, ...]) -> dict[object, object]:
    """Reads a pickle that has to hold a dict with these keys."""
    content = load_arrays(path)
    if not isinstance(content, dict) or not set(keys) <= set(cast("dict[object, object]", content)):
        found = f"a dict of {', '.join(map(str, list(content)[:5]))}" if isinstance(content, dict) else _kind(content)
        raise ValueError(f"{path} must hold a dict of {', '.join(keys)}, got {found}; it is another pickle.")
    return cast("dict[object, object]", content)


def _gather(
    images: object,
    field: str,
    classes: dict[str, npt.NDArray[np.int64]],
    path: Path,
    split: Split,
    image_size: int,
) -> ClassImages:
    """Sorts pickled images by class."""
    from PIL import Image

    if (
        not isinstance(images, np.ndarray)
        or images.dtype != np.uint8
        or images.ndim != 4
        or images.shape[3] != 3
        or 0 in images.shape
    ):
        raise ValueError(f"{field} of {path} must be uint8 images of shape [N, height, width, 3], got {_kind(images)}.")
    owner: dict[int, str] = {}
    for name, indices in classes.items():
        for index in indices.tolist():
            if not 0 <= index < len(images):
                raise ValueError(
                    f"class {name!r} of {path} has the image {index}, but {field} has {len(images)} images."
                )
            if index in owner:
                raise ValueError(
                    f"image {index} of {path} occurs in the classes {owner[index]!r} and {name!r}; "
                    "each image must belong to one class, once."
                )
            owner[index] = name
    _check_sizes({name: len(indices) for name, indices in classes.items()}, path, split)
    order = np.concatenate([classes[name] for name in sorted(classes)]).tolist()
    # One image at a time: the train split has 0.8 GB, of which fancy indexing would make one more copy.
    target = np.empty((len(order), 3, image_size, image_size), dtype=np.uint8)
    for place, index in enumerate(order):
        target[place] = to_pixels(resize_image(Image.fromarray(images[index]), (image_size, image_size)))
    return _class_images(target, {name: len(classes[name]) for name in sorted(classes)})


class _ImageFiles(NamedTuple):
    """Image files and the CSV file that lists them, in a folder or an archive.

    Attributes:
        csv_name: The CSV file, for messages.
        csv_content: What is in it.
        images_name: The folder of the images, for messages.
        stamp: Returns a text that changes with the contents of an image, or None if there is no such image.
        read: Returns the contents of an image.
    """

    csv_name: str
    csv_content: bytes
    images_name: str
    stamp: Callable[[str], str | None]
    read: Callable[[str], bytes]


def _is_split_file(path: Path) -> bool:
    """Tells a split file of miniImageNet from the many others that are called train.csv."""
    if path.parent.name == FOLDER:
        return True
    with path.open("rb") as file:
        columns = file.readline(1000).removeprefix(b"\xef\xbb\xbf").strip().split(b",")
    return b"filename" in columns and b"label" in columns


def _open_folder(csv_path: Path) -> _ImageFiles:
    """Opens the layout in which the images lie in a folder beside the CSV file."""
    images = csv_path.parent / "images"

    def stamp(name: str) -> str | None:
        try:
            status = (images / name).stat()
        except (FileNotFoundError, NotADirectoryError):
            return None
        return f"{status.st_size}:{status.st_mtime_ns}"

    return _ImageFiles(
        csv_name=str(csv_path),
        csv_content=csv_path.read_bytes(),
        images_name=str(images),
        stamp=stamp,
        read=lambda name: read_image_file(images / name),
    )


@contextmanager
def _open_archive(path: Path, split: Split) -> Generator[_ImageFiles]:
    """Opens the same layout inside a zip archive."""
    with open_archive(path) as archive:
        stamps = member_stamps(archive.infolist())
        csv_names = [
            name for name in stamps if PurePosixPath(name).name == CSV_FILES[split] and not name.startswith("__MACOSX/")
        ]
        if not csv_names:
            raise ValueError(
                f"{path} has no {CSV_FILES[split]}; expected {', '.join(CSV_FILES.values())} and a folder images in "
                "it. If it holds pickles, unpack it."
            )
        csv_name = min(csv_names, key=lambda name: (name.count("/"), name))
        prefix = csv_name.removesuffix(CSV_FILES[split]) + "images/"

        yield _ImageFiles(
            csv_name=f"{csv_name} of {path}",
            csv_content=read_member(archive, csv_name),
            images_name=f"{prefix} of {path}",
            stamp=lambda name: stamps.get(prefix + name),
            read=lambda name: read_member(archive, prefix + name),
        )


def _load_image_files(
    files: _ImageFiles, split: Split, image_size: int, cache_dir: str | os.PathLike[str] | None
) -> ClassImages:
    """Decodes the images that a CSV file lists, or takes them from the cache."""
    classes = _read_split_file(files)
    _check_sizes({name: len(images) for name, images in classes.items()}, files.csv_name, split)
    names = [name for label in sorted(classes) for name in sorted(classes[label])]
    stamps = {name: files.stamp(name) for name in names}
    if missing := [name for name, stamp in stamps.items() if stamp is None]:
        raise FileNotFoundError(
            f"{files.csv_name} lists {len(missing)} images that are not in {files.images_name}, first {missing[0]}; "
            "get the missing images, or the whole again if a copy broke off."
        )

    def decode() -> ClassImages:
        target = np.empty((len(names), 3, image_size, image_size), dtype=np.uint8)
        for place, name in enumerate(names):
            image = decode_image(files.read(name), f"{name} of {files.images_name}", channels=3)
            target[place] = to_pixels(resize_image(image, (image_size, image_size)))
        return _class_images(target, {label: len(classes[label]) for label in sorted(classes)})

    key = digest({name: stamp for name, stamp in stamps.items() if stamp is not None}, files.csv_content)
    return cached_images(f"mini-imagenet-v{_DECODING_VERSION}-{split}-{key}-{image_size}.npz", decode, cache_dir)


def _read_split_file(files: _ImageFiles) -> dict[str, list[str]]:
    """Reads which images a CSV file lists, by class."""
    try:
        text = files.csv_content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{files.csv_name} is not a text file ({error}).") from error
    reader = csv.DictReader(io.StringIO(text, newline=""))
    classes: dict[str, list[str]] = {}
    seen: set[str] = set()
    try:
        if reader.fieldnames is None or not {"filename", "label"} <= set(reader.fieldnames):
            raise ValueError(f"{files.csv_name} must have the columns filename,label, got {reader.fieldnames}.")
        for row in reader:
            name, label = row["filename"], row["label"]
            place = f"{files.csv_name}, line {reader.line_num}"
            if not name or not label:
                raise ValueError(f"{place}: needs a file name and a label, got {name!r} and {label!r}.")
            if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
                raise ValueError(f"{place}: {name!r} lies outside of the folder images; name files relative to it.")
            if name in seen:
                raise ValueError(f"{place}: {name!r} is listed a second time.")
            seen.add(name)
            classes.setdefault(label, []).append(name)
    except csv.Error as error:
        raise ValueError(f"{files.csv_name} is not a CSV file ({error}).") from error
    return classes


def _check_sizes(sizes: dict[str, int], source: object, split: Split) -> None:
    """Checks that there are the classes and images that the split is defined to have."""
    found = sorted(set(sizes.values()))
    if len(sizes) != NUM_CLASSES[split] or found != [IMAGES_PER_CLASS]:
        raise ValueError(
            f"the {split} split of miniImageNet has {NUM_CLASSES[split]} classes of {IMAGES_PER_CLASS} images, but "
            f"{source} has {len(sizes)} classes of {' or '.join(map(str, found)) or 'no'} images. It is incomplete or "
            "of another split (copies exist in which val and test are interchanged: rename those); for other "
            "selections of images there is load_image_folder."
        )


def _class_images(images: Pixels, sizes: dict[str, int]) -> ClassImages:
    """Wraps images that are sorted by class; ``sizes`` is in the same order."""
    return ClassImages(
        images=torch.from_numpy(images),
        class_start=class_starts(list(sizes.values())),
        class_names=tuple(sizes),
    )


def _integers(value: object, what: str) -> npt.NDArray[np.int64]:
    """Returns a list, tuple or array of integers as an array."""
    if isinstance(value, np.ndarray):
        if value.ndim == 1 and value.dtype.kind in "iu":
            return value.astype(np.int64)
    elif isinstance(value, list | tuple):
        # Looked at one by one: NumPy would unfold lists of lists, of which a crafted file can hold exponentially many.
        items = cast("list[object]", value)
        if all(isinstance(item, int | np.integer) and -(2**63) <= item < 2**63 for item in items):
            return np.array(items, dtype=np.int64)
    raise ValueError(f"{what} must be a list of integers, got {_kind(value)}.")


def _kind(value: object) -> str:
    """Describes a value for a message."""
    if isinstance(value, np.ndarray):
        return f"an array of shape {value.shape} and dtype {value.dtype}"
    return f"a {type(value).__name__}"
