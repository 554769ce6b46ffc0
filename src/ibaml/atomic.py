"""Files written in one move: a reader sees the old file or the new one, never a part."""

import errno
import os
import secrets
import shutil
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def atomic_write(path: Path) -> Generator[Path]:
    """Gives the path of a temporary file to write, which becomes ``path`` when the block ends without an error.

    It lies in the same folder, as a rename is atomic within one file system only, and is made by the caller, so that
    its permissions are the usual ones (``tempfile`` makes files that only their owner can read).

    Args:
        path: The file to write; its folder exists.

    Raises:
        OSError: If the file cannot be written; one already at ``path`` is then unchanged.

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
