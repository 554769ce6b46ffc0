"""Files that were changed, cut off or made to mislead; reading them has to refuse them by name, or not to differ."""

import io
import os
import random
import struct
import tracemalloc
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from PIL import Image
from safetensors.torch import save_file

from ibaml.data import ClassImages, load_assays, load_class_folder, load_image_folder
from ibaml.data.files.cache import read_class_images, write_class_images
from ibaml.learner.files import read_table
from ibaml.train.checkpoint import load_tensors, save_tensors

MOST_BYTES = 2**29
"""Python's own memory that one file may take; what is read here has some kilobytes."""

_REFUSALS = (ValueError, OSError)
"""Errors that the command line tells in one sentence."""


class Kind(NamedTuple):
    """One kind of file.

    Attributes:
        name: Its name, with the suffix that it has on the disk.
        write: Writes an intact one.
        read: Reads one, and returns something that can be compared; None if it counts as absent.
        tells_changes: Whether any changed content is noticed, by a checksum or otherwise.
    """

    name: str
    write: Callable[[Path], object]
    read: Callable[[Path], Any]
    tells_changes: bool = True


class Failure(NamedTuple):
    """A file that was not read as it has to be."""

    kind: str
    what: str
    found: str


def image(value: int = 9, side: int = 6) -> bytes:
    """Returns a small PNG."""
    stream = io.BytesIO()
    pixels = np.full((side, side, 3), value, dtype=np.uint8)
    pixels[0, 0] = 255 - value
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


def archive_of(path: Path, packing: int, *, outer: str = "") -> None:
    """Writes an archive of two classes."""
    with zipfile.ZipFile(path, "w", packing) as archive:
        for index in range(4):
            archive.writestr(f"{outer}train/{'ab'[index % 2]}/{index}.png", image(20 * index))


def assays(path: Path) -> None:
    """Writes a file of molecules."""
    count = np.arange
    np.savez_compressed(
        path,
        task_name=np.array(["t", "u"]),
        task_split=np.array(["train", "valid"]),
        row_task=np.repeat([0, 1], 20),
        row_mol=count(40) % 10,
        label=np.tile([0, 1], 20),
        fp_ptr=count(11),
        fp_index=count(10).astype(np.uint16),
        fp_count=np.ones(10, np.uint8),
    )


def _table() -> pd.DataFrame:
    return pd.DataFrame({"site": ["a", "b"] * 6, "x": np.arange(12) / 8, "y": np.arange(12)})


def _images(path: Path) -> tuple[Any, ...]:
    found = load_image_folder(path, "train")
    return found.class_names, found.images.tolist()


def _cached(path: Path) -> tuple[Any, ...] | None:
    found = read_class_images([path.parent], path.name)
    return None if found is None else (found.class_names, found.images.tolist())


def _write_cached(path: Path) -> None:
    images = torch.arange(8 * 36, dtype=torch.uint8).reshape(8, 1, 6, 6)
    starts = torch.tensor([0, 4, 8])
    write_class_images([path.parent], path.name, ClassImages(images=images, class_start=starts, class_names=("a", "b")))


def _tensors(path: Path) -> tuple[Any, ...]:
    tensors, metadata = load_tensors(path)
    return {name: value.tolist() for name, value in tensors.items()}, metadata


def _assays(path: Path) -> tuple[Any, ...]:
    found = load_assays("train", path=path)
    return found.names, [rows.tolist() for rows in found.rows], found.counts.tolist(), found.positions.tolist()


KINDS = (
    Kind("stored.zip", lambda path: archive_of(path, zipfile.ZIP_STORED), _images),
    Kind("packed.zip", lambda path: archive_of(path, zipfile.ZIP_DEFLATED, outer="outer/"), _images),
    Kind("assays.npz", assays, _assays),
    Kind("cache.npz", _write_cached, _cached),
    Kind("state.safetensors", lambda path: save_tensors(path, {"a": torch.arange(6.0)}, {"step": 3}), _tensors),
    Kind("table.csv", lambda path: _table().to_csv(path, index=False), lambda path: read_table(path).to_dict(), False),
    Kind("table.parquet", lambda path: _table().to_parquet(path), lambda path: read_table(path).to_dict(), False),
)
"""What is changed byte by byte. Tables are other people's, without a checksum of their contents."""


def changed(whole: bytes, random_: random.Random) -> tuple[str, bytes]:
    """Returns what was done to a file, and the file: bytes changed, cut off, repeated, or a number in it made large."""
    place = random_.randrange(len(whole))
    match random_.randrange(6):
        case 0 | 1:
            flip = random_.randrange(1, 256)
            return f"byte {place} xor {flip}", whole[:place] + bytes([whole[place] ^ flip]) + whole[place + 1 :]
        case 2:
            return f"cut at {place}", whole[:place]
        case 3:
            stop = min(len(whole), place + random_.randrange(1, 40))
            return f"without {place} to {stop}", whole[:place] + whole[stop:]
        case 4:
            stop = min(len(whole), place + random_.randrange(1, 40))
            return f"{place} to {stop} twice", whole[:stop] + whole[place:]
        case _:
            large = struct.pack("<I", random_.choice([0, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF]))
            return f"{large.hex()} at {place}", whole[:place] + large + whole[place + 4 :]


def judge(kind: str, what: str, path: Path, read: Callable[[Path], Any], expected: Any) -> Failure | None:
    """Reads a damaged file.

    Args:
        kind: Kind of the file.
        what: What was done to it.
        path: The file.
        read: Reads it.
        expected: What an intact one gives; None: anything that can be read is right.
    """
    try:
        found = read(path)
    except _REFUSALS as error:
        if path.name not in str(error):
            return Failure(kind, what, f"does not name the file: {type(error).__name__}: {error}")
        return None
    except Exception as error:
        return Failure(kind, what, f"{type(error).__name__}: {error}")
    if expected is not None and found is not None and found != expected:
        return Failure(kind, what, "was read as something else, without a word")
    return None


def fuzz(kind: Kind, folder: Path, seed: int) -> Iterator[Failure | None]:
    """Changes files of one kind without end, and yields what reading each of them did wrong, if anything."""
    path = folder / kind.name
    kind.write(path)
    whole, expected = path.read_bytes(), kind.read(path)
    assert expected is not None
    random_ = random.Random(seed)
    while True:
        what, content = changed(whole, random_)
        path.write_bytes(content)
        yield judge(kind.name, what, path, kind.read, expected if kind.tells_changes else None)


class Bomb(NamedTuple):
    """A small file that asks for much, or is of an odd kind."""

    name: str
    write: Callable[[Path], object]
    read: Callable[[Path], Any]


def _zip_with(name: str, content: bytes, *, flags: int = 0, method: int | None = None) -> Callable[[Path], None]:
    """Writes an archive with one more file, which is marked as encrypted or packed otherwise."""

    def write(path: Path) -> None:
        archive_of(path, zipfile.ZIP_DEFLATED)
        with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr(name, content)
        whole = bytearray(path.read_bytes())
        for mark, flag_at, method_at in ((b"PK\3\4", 6, 8), (b"PK\1\2", 8, 10)):
            place = whole.rfind(mark)
            whole[place + flag_at] |= flags
            if method is not None:
                whole[place + method_at : place + method_at + 2] = struct.pack("<H", method)
        path.write_bytes(bytes(whole))

    return write


def png_of(width: int, height: int, rows: bytes = b"") -> bytes:
    """Returns a PNG that claims a size."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = chunk(b"IDAT", zlib.compress(rows)) if rows else b""
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + body + chunk(b"IEND", b"")


def _npz_claiming(shape: tuple[int, ...]) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        assays(path)
        header = io.BytesIO()
        np.lib.format.write_array_header_1_0(header, {"descr": "<i8", "fortran_order": False, "shape": shape})
        with zipfile.ZipFile(path) as archive:
            members = {info.filename: archive.read(info) for info in archive.infolist()}
        with zipfile.ZipFile(path, "w") as archive:
            for name, content in (members | {"row_task.npy": header.getvalue()}).items():
                archive.writestr(name, content)

    return write


def _class_folder(fill: Callable[[Path], object]) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        for index in range(2):
            (path / "a").mkdir(parents=True, exist_ok=True)
            (path / "a" / f"{index}.png").write_bytes(image())
        fill(path / "a" / "odd.png")

    return write


def _classes(path: Path) -> Any:
    return load_class_folder(path).images


def _deep_tensors(path: Path) -> None:
    text = "[" * 100_000 + "]" * 100_000
    save_file({"a": torch.zeros(1)}, path, metadata={"format": "ibaml-1", "sha256": "0", "json": text})


def _long_parquet(path: Path) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    table = pa.table({f"c{index}": pa.nulls(2**20) for index in range(300)})
    parquet.write_table(table, path)


BOMBS = (
    Bomb("claims.zip", _zip_with("train/a/9.png", png_of(60_000, 60_000)), _images),
    Bomb("large.zip", _zip_with("train/a/9.png", png_of(13_000, 13_000, bytes(100_000))), _images),
    Bomb("encrypted.zip", _zip_with("train/a/9.png", image(), flags=1), _images),
    Bomb("method.zip", _zip_with("train/a/9.png", image(), method=97), _images),
    Bomb("postscript.zip", _zip_with("train/a/9.png", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"), _images),
    Bomb("link.zip", _zip_with("train/a/9.png", b"../../../etc/passwd"), _images),
    Bomb("terabyte.npz", _npz_claiming((2**37,)), _assays),
    Bomb("negative.npz", _npz_claiming((-1, -8)), _assays),
    Bomb("deep.safetensors", _deep_tensors, _tensors),
    Bomb("long.parquet", _long_parquet, read_table),
    Bomb("folder.zip", lambda path: path.mkdir(), lambda path: load_class_folder(path)),
    Bomb("pipe", _class_folder(os.mkfifo), _classes),
    Bomb("device", _class_folder(lambda path: path.symlink_to("/dev/zero")), _classes),
    Bomb("dangling", _class_folder(lambda path: path.symlink_to(path.parent / "none.png")), _classes),
    Bomb("loop", _class_folder(lambda path: path.symlink_to(path)), _classes),
    Bomb("directory", _class_folder(lambda path: path.mkdir()), lambda path: len(_classes(path)) == 2),
)
"""Each is refused by name; the last is passed over, as folders among images are."""


def drop(bomb: Bomb, folder: Path) -> Failure | None:
    """Writes a bomb, reads it, and says what was wrong with that, memory included."""
    path = folder / bomb.name
    bomb.write(path)
    tracemalloc.start()
    try:
        failure = judge(bomb.name, "", path, bomb.read, True)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    if failure is None and peak > MOST_BYTES:
        return Failure(bomb.name, "", f"took {peak:,} bytes of memory")
    return failure
