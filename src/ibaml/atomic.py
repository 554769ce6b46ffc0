"""Files written in one move: a reader sees the old file or the new one, never a part. JSON read with a limit."""

import errno
import json
import os
import secrets
import shutil
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_MOST_BYTES = 2**26
_FULL = (errno.ENOSPC, errno.EDQUOT)


@contextmanager
def atomic_write(path: Path) -> Generator[Path]:
    """Gives the path of a temporary file to write, which becomes ``path`` when the block ends without an error.

    It lies in the same folder, as a rename is atomic within one file system only, and is made by the caller, so that
    its permissions are the usual ones (``tempfile`` makes files that only their owner can read).

    Args:
        path: The file to write; its folder exists.

    Raises:
        OSError: If the file cannot be written, on a full disk with what to do; one already at ``path`` is unchanged.

    Examples:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder) / "numbers.txt"
        ...     with atomic_write(path) as temporary:
        ...         _ = temporary.write_text("1 2 3")
        ...     path.read_text()
        '1 2 3'
    """
    temporary = path.with_name(f".{os.getpid()}.{secrets.token_hex(4)}.{path.name}")
    try:
        yield temporary
        _flush(temporary)
        os.replace(temporary, path)
        _flush(path.parent)
    except OSError as error:
        if error.errno not in _FULL:
            raise
        told = OSError(
            f"{path} cannot be written: the disk is full ({error.strerror}). What was there before is whole; make room "
            "and start the same again."
        )
        told.errno = error.errno
        raise told from error
    finally:
        temporary.unlink(missing_ok=True)


def keep_copy(path: Path, copy: Path) -> None:
    """Gives a file a second name, which keeps its contents when another file takes the first.

    Args:
        path: The file.
        copy: The second name, in the same folder; replaced if it exists.

    Raises:
        OSError: If the folder cannot be written.
    """
    temporary = copy.with_name(f".{os.getpid()}.{secrets.token_hex(4)}.{copy.name}")
    try:
        try:
            os.link(path, temporary)
        except OSError:
            # A file system without links.
            shutil.copyfile(path, temporary)
        os.replace(temporary, copy)
    finally:
        temporary.unlink(missing_ok=True)


def _flush(path: Path) -> None:
    """Waits until a file, or the list of names of a folder, is on the disk: after a power cut a rename alone may be."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        # Not every system opens folders.
        return
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF, errno.EACCES):
            raise
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """Writes a text file in one move, with the same bytes on every system."""
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")


def read_json(path: Path) -> Any:
    """Reads a JSON file of at most 64 MiB.

    Args:
        path: The file.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is too large, nested too deeply, or no JSON. The message does not name the file.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}.")
    if (size := path.stat().st_size) > _MOST_BYTES:
        raise ValueError(f"it has {size:,} bytes, and at most {_MOST_BYTES:,} are read")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
