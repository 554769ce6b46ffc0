"""Images grouped by class; image files and archives of them decoded; one scale for all."""

import hashlib
import io
import lzma
import struct
import zipfile
import zlib
from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from ibaml.types import Tensor

# Imported where images are decoded: importing the library needs none.
if TYPE_CHECKING:
    from PIL import Image

Pixels: TypeAlias = npt.NDArray[np.uint8]

_END_OF_ARCHIVE = 22
_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
"""What is decoded, whatever a file is called. Pillow would hand others, such as EPS, to programs that run them."""
_MOST_PIXELS = 64_000_000
_MOST_BYTES = 2**28
"""What is read of one image, so that a small file cannot fill the memory."""

WHITE = 255
"""The largest value of a pixel, which networks see as one."""


def scale_pixels(pixels: Tensor) -> Tensor:
    """Returns pixels of 0..255 as float32 in [0, 1], the inputs of networks."""
    return pixels.to(torch.float32).div_(WHITE)


@dataclass(frozen=True, kw_only=True, eq=False)
class ClassImages:
    """Images sorted by class; classes may have different numbers of images.

    The images of class ``c`` are ``images[class_start[c]:class_start[c + 1]]``.

    Attributes:
        images: uint8 in 0..255, shape ``[num_images, channels, height, width]``, on any device.
        class_start: int64, shape ``[num_classes + 1]``: first image of each class, then ``num_images``.
        class_names: One distinct name per class.

    Raises:
        TypeError: If ``images`` is not uint8 or ``class_start`` not int64.
        ValueError: If shapes disagree, ``class_start`` does not run from 0 to ``num_images``, names repeat or
            a class has no image.

    Examples:
        >>> data = ClassImages(
        ...     images=torch.zeros(5, 1, 4, 4, dtype=torch.uint8),
        ...     class_start=torch.tensor([0, 2, 5]),
        ...     class_names=("a", "b"),
        ... )
        >>> data.num_classes, data.image_shape, data.class_sizes.tolist()
        (2, (1, 4, 4), [2, 3])
    """

    images: Tensor
    class_start: Tensor
    class_names: tuple[str, ...]

    def __post_init__(self) -> None:
        """Checks that the three fields describe the same classes."""
        if self.images.dtype != torch.uint8:
            raise TypeError(f"images must be uint8 in 0..255, got {self.images.dtype}; convert before building.")
        if self.class_start.dtype != torch.int64:
            raise TypeError(f"class_start must be int64, got {self.class_start.dtype}; use class_start.long().")
        if self.images.ndim != 4:
            raise ValueError(
                "images must have shape [num_images, channels, height, width], "
                f"got {tuple(self.images.shape)}; grey images need a channel axis of length 1."
            )
        if self.class_start.ndim != 1 or self.class_start.numel() != len(self.class_names) + 1:
            raise ValueError(
                f"class_start must have one entry per class and one more, [{len(self.class_names) + 1}] for "
                f"{len(self.class_names)} class_names, got shape {tuple(self.class_start.shape)}."
            )
        if not self.class_names:
            raise ValueError("class_names is empty: at least one class is needed.")
        if len(set(self.class_names)) != len(self.class_names):
            repeated = next(name for name in self.class_names if self.class_names.count(name) > 1)
            raise ValueError(f"class_names must be distinct, {repeated!r} occurs twice; rename or merge the classes.")
        starts = self.class_start.tolist()
        if starts[0] != 0 or starts[-1] != len(self.images):
            raise ValueError(
                f"class_start must run from 0 to the number of images {len(self.images)}, "
                f"got {starts[0]} to {starts[-1]}."
            )
        for name, start, end in zip(self.class_names, starts[:-1], starts[1:], strict=True):
            if end <= start:
                raise ValueError(f"class {name!r} has no image (class_start {start} to {end}); leave it out.")

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.class_names)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of every image."""
        _, channels, height, width = self.images.shape
        return channels, height, width

    @property
    def class_sizes(self) -> Tensor:
        """Number of images of each class, int64, shape ``[num_classes]``."""
        return self.class_start.diff()

    def select(self, class_indices: Sequence[int] | Tensor) -> "ClassImages":
        """Returns the chosen classes, in the order given.

        Args:
            class_indices: Distinct integers in ``0..num_classes - 1``.

        Returns:
            The images of those classes, copied.

        Raises:
            ValueError: If no class is chosen, one is chosen twice or an index is out of range.

        Examples:
            >>> data = ClassImages(
            ...     images=torch.arange(3, dtype=torch.uint8).reshape(3, 1, 1, 1),
            ...     class_start=torch.tensor([0, 1, 3]),
            ...     class_names=("a", "b"),
            ... )
            >>> data.select([1]).images.flatten()
            tensor([1, 2], dtype=torch.uint8)
        """
        chosen = [int(index) for index in class_indices]
        if not chosen:
            raise ValueError("class_indices is empty: choose at least one class.")
        if len(set(chosen)) != len(chosen):
            raise ValueError("class_indices must be distinct: a class chosen twice cannot be told from itself.")
        for index in chosen:
            if not 0 <= index < self.num_classes:
                raise ValueError(f"class_indices must lie in 0..{self.num_classes - 1}, got {index}.")
        starts = self.class_start.tolist()
        pieces = [self.images[starts[index] : starts[index + 1]] for index in chosen]
        sizes = [len(piece) for piece in pieces]
        return ClassImages(
            images=torch.cat(pieces),
            class_start=class_starts(sizes),
            class_names=tuple(self.class_names[index] for index in chosen),
        )

    def to(self, device: torch.device | str) -> "ClassImages":
        """Returns the same classes with the images on ``device``; sampling from them then needs no transfer.

        Args:
            device: For example ``"cuda"``. ``class_start`` stays where it is: only the sampler reads it, on the CPU.

        Returns:
            A new ClassImages, sharing storage where nothing had to move.
        """
        return ClassImages(images=self.images.to(device), class_start=self.class_start, class_names=self.class_names)


def with_rotations(images: ClassImages) -> ClassImages:
    """Adds each class turned by 90, 180 and 270 degrees (counter-clockwise) as three further classes.

    The augmentation that Santoro et al. 2016 and Vinyals et al. 2016 use for Omniglot. A character that is symmetric
    under a rotation coincides with its own copy; like them, this keeps both.

    Args:
        images: Square images.

    Returns:
        Four times as many classes: the originals in their order and under their names, then all of them turned by
        90 degrees (name suffix ``@90``), by 180 (``@180``) and by 270 (``@270``).

    Raises:
        ValueError: If the images are not square.
    """
    _, height, width = images.image_shape
    if height != width:
        raise ValueError(
            f"images must be square to be turned by 90 degrees, got {height} x {width}; resize them when loading."
        )
    turned = [torch.rot90(images.images, quarter, dims=(2, 3)) for quarter in range(4)]
    names = list(images.class_names)
    for degrees in (90, 180, 270):
        names.extend(f"{name}@{degrees}" for name in images.class_names)
    return ClassImages(
        images=torch.cat(turned),
        class_start=class_starts(images.class_sizes.repeat(4).tolist()),
        class_names=tuple(names),
    )


def class_starts(sizes: Sequence[int]) -> Tensor:
    """Returns the ``class_start`` of classes of these sizes.

    Examples:
        >>> class_starts([2, 3])
        tensor([0, 2, 5])
    """
    return torch.tensor([0, *np.cumsum(sizes).tolist()])


def decode_image(content: bytes, name: str, *, channels: int) -> "Image.Image":
    """Decodes an image file, to RGB for three channels and to grey for one, as viewers show it.

    What is transparent becomes white, and an image that a camera marked as turned is turned.

    Raises:
        ValueError: If it cannot be read, holds several pictures or more than 64 million pixels, or its pixels have more
            than 8 bits: what they count up to is not in the file, and Pillow would cut them off at 255.
    """
    from PIL import Image, ImageOps

    try:
        with Image.open(io.BytesIO(content), formats=_FORMATS) as opened:
            problem = _find_problem(opened)
            if problem is None:
                turned = ImageOps.exif_transpose(opened)
                if turned.has_transparency_data:
                    turned = turned.convert("RGBA")
                    turned = Image.alpha_composite(Image.new("RGBA", turned.size, "white"), turned)
                return turned.convert("RGB" if channels == 3 else "L")
    # SyntaxError: a broken PNG. Warning: Pillow's of a large image, where warnings are errors. The others are what
    # Pillow and struct make of files whose parts contradict each other.
    except (
        *(OSError, EOFError, SyntaxError, ValueError, MemoryError, Warning, zlib.error, Image.DecompressionBombError),
        *(ArithmeticError, LookupError, TypeError, AttributeError, RuntimeError, struct.error),
    ) as error:
        raise ValueError(
            f"cannot read the image {name} ({error}); replace or remove it, or get the archive again."
        ) from error
    raise ValueError(f"the image {name} {problem}.")


def _find_problem(image: "Image.Image") -> str | None:
    """Says what keeps an image that was opened, but not decoded, from being taken."""
    width, height = image.size
    if width * height > _MOST_PIXELS:
        return f"has {width} x {height} pixels, and at most {_MOST_PIXELS:,} are decoded: make it smaller"
    if image.mode in ("I", "F") or image.mode.startswith("I;"):
        return (
            f"has pixels of more than 8 bits (mode {image.mode}), and how bright the largest is meant to be is not in "
            "the file: save it with 8 bits, such as Image.fromarray((255.0 / largest * numpy.asarray(image)).round()"
            ".astype('uint8')), with one largest value for all images"
        )
    # Cameras put a small copy of a photograph beside it (MPO): viewers show the first.
    if getattr(image, "n_frames", 1) > 1 and image.format != "MPO":
        return f"holds {getattr(image, 'n_frames', 1)} pictures: save the one that is meant as a file of its own"
    return None


def resize_image(image: "Image.Image", size: tuple[int, int]) -> "Image.Image":
    """Resamples an image to (height, width), antialiased (Lanczos), unless it has that size; its shape may change."""
    from PIL import Image

    height, width = size
    return image if image.size == (width, height) else image.resize((width, height), Image.Resampling.LANCZOS)


def to_pixels(image: "Image.Image") -> Pixels:
    """Returns an image as uint8 of shape ``[channels, height, width]``."""
    pixels = np.asarray(image)
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)


def read_image_file(path: Path) -> bytes:
    """Returns the contents of a file in a folder; a link counts as what it leads to.

    Raises:
        ValueError: If it is no file (a pipe or a device would never end), or too large.
        OSError: If it cannot be read.
    """
    if not path.is_file():
        raise ValueError(f"{path} is no file, or a link that leads nowhere: remove it.")
    size = path.stat().st_size
    if size > _MOST_BYTES:
        raise ValueError(f"the image {path} has {size:,} bytes, and at most {_MOST_BYTES:,} are read: make it smaller.")
    return path.read_bytes()


@contextmanager
def open_archive(path: Path) -> Generator[zipfile.ZipFile]:
    """Opens a zip archive.

    Raises:
        ValueError: If it is none, or not whole.
        OSError: If it cannot be read.
    """
    if not path.is_file():
        raise ValueError(f"{path} is no file, where a zip archive was expected.")
    try:
        archive = zipfile.ZipFile(path)
    except (zipfile.BadZipFile, NotImplementedError, ValueError, LookupError, struct.error) as error:
        raise ValueError(
            f"{path} is not an intact zip archive ({error}): probably a copy or download that broke off. Get it again."
        ) from error
    with archive:
        yield archive


def check_names(archive: zipfile.ZipFile) -> None:
    """Refuses an archive whose list of contents names a file otherwise than the file itself does.

    Contents have checksums and names have none, but each name stands in the archive twice.

    Raises:
        ValueError: If two differ, the archive says that it has another number of files, or one is encrypted or packed
            in a way that Python cannot read.
    """
    assert archive.filename is not None
    with Path(archive.filename).open("rb") as file:
        file.seek(-_END_OF_ARCHIVE - len(archive.comment), io.SEEK_END)
        end = file.read(_END_OF_ARCHIVE)
    number, found = int.from_bytes(end[10:12], "little"), len(archive.infolist())
    # Archives with more files than two bytes count say so elsewhere.
    if end.startswith(b"PK\5\6") and number != min(found, 0xFFFF):
        raise ValueError(f"{archive.filename} is damaged: it says that it has {number} files, but lists {found}.")
    for info in archive.infolist():
        try:
            archive.open(info).close()
        except (zipfile.BadZipFile, EOFError, OSError, RuntimeError, ValueError, struct.error) as error:
            raise ValueError(
                f"{archive.filename} is damaged at {info.filename} ({error}). Get the archive again."
            ) from error


def read_member(archive: zipfile.ZipFile, name: str) -> bytes:
    """Reads a file of an archive.

    Raises:
        ValueError: If the archive is damaged there, or packed in a way that Python cannot read.
    """
    try:
        size = archive.getinfo(name).file_size
        if size > _MOST_BYTES:
            raise ValueError(f"it has {size:,} bytes, and at most {_MOST_BYTES:,} are read")
        return archive.read(name)
    # RuntimeError: encrypted; its subclass NotImplementedError: compressed by a method that Python lacks. KeyError: the
    # archive's list of contents has it under another name.
    except (
        zipfile.BadZipFile,
        zlib.error,
        lzma.LZMAError,
        EOFError,
        OSError,
        RuntimeError,
        LookupError,
        ValueError,
    ) as error:
        raise ValueError(f"cannot read {name} of {archive.filename} ({error}). Get the archive again.") from error


def member_stamps(members: Iterable[zipfile.ZipInfo]) -> dict[str, str]:
    """Returns for each member of an archive, sorted by name, a text that changes with its contents.

    The directory of a zip file holds the CRC-32 of each member: a key to the contents without reading them.
    """
    ordered = sorted(members, key=lambda info: info.filename)
    return {info.filename: f"{info.file_size}:{info.CRC}" for info in ordered}


def digest(stamps: Mapping[str, str], head: bytes = b"") -> str:
    """Returns sixteen hexadecimal digits that differ for files of other names or stamps, for names of cache files."""
    lines = "".join(f"{name}:{stamp}\n" for name, stamp in stamps.items())
    return hashlib.sha256(head + lines.encode()).hexdigest()[:16]
