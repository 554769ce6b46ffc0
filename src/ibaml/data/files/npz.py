"""Arrays of ``.npz`` files, checked before they are read."""

import lzma
import math
import os
import struct
import zipfile
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

_READERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}


def load_npz(
    path: str | os.PathLike[str], names: Sequence[str], *, most_bytes: int | None = None
) -> dict[str, npt.NDArray[Any]]:
    """Reads arrays of a ``.npz`` file, without pickle; the rest of the file is not looked at.

    No more memory is taken than the arrays have bytes in the file's own list of contents: a header that claims a
    larger array is refused before that is made, and so is what unpacks to more than ``most_bytes``.

    Args:
        path: The file.
        names: Names of the arrays.
        most_bytes: Largest size of all of them together, unpacked. None: no limit.

    Returns:
        The arrays by name.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is no such file, an array is missing, damaged, too large, or holds objects. The message does
            not name the file.

    Examples:
        >>> import io
        >>> stream = io.BytesIO()
        >>> np.savez(stream, a=np.arange(3))
        >>> load_npz(stream, ["a"])
        {'a': array([0, 1, 2])}
    """
    try:
        with zipfile.ZipFile(path) as archive:
            found = {info.filename: info for info in archive.infolist()}
            missing = [name for name in names if f"{name}.npy" not in found]
            if missing:
                raise ValueError(f"it lacks {', '.join(missing)}")
            members = {name: found[f"{name}.npy"] for name in names}
            size = sum(member.file_size for member in members.values())
            if most_bytes is not None and size > most_bytes:
                raise ValueError(f"its arrays have {size:,} bytes, and at most {most_bytes:,} are read")
            return {name: _read(archive, member) for name, member in members.items()}
    except FileNotFoundError:
        raise
    # RuntimeError: an encrypted member; its subclass NotImplementedError: one packed by a method that Python lacks.
    except (
        *(ValueError, OSError, EOFError, RuntimeError, LookupError, TypeError, MemoryError, ArithmeticError),
        *(SyntaxError, struct.error, zipfile.BadZipFile, zlib.error, lzma.LZMAError),
    ) as error:
        raise ValueError(str(error) or type(error).__name__) from error


def _read(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> npt.NDArray[Any]:
    with archive.open(member) as stream:
        _check_header(stream, member)
    with archive.open(member) as stream:
        array = np.lib.format.read_array(stream, allow_pickle=False)
        # To the end, where the checksum is looked at.
        if stream.read(1):
            raise ValueError(f"{member.filename} has bytes behind its array")
    return array


def _check_header(stream: Any, member: zipfile.ZipInfo) -> None:
    """Refuses an array that has not the size of its file."""
    version = np.lib.format.read_magic(stream)
    if version not in _READERS:
        raise ValueError(f"{member.filename} has format {version}, which plain arrays do not need")
    shape, _, dtype = _READERS[version](stream)
    claimed = math.prod(shape) * dtype.itemsize
    if not dtype.hasobject and claimed != member.file_size - stream.tell():
        raise ValueError(
            f"{member.filename} claims shape {shape} of {dtype}, {claimed:,} bytes, and holds "
            f"{member.file_size - stream.tell():,}"
        )
