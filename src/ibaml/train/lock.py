"""One training in a folder at a time."""

import contextlib
import os
import re
import threading
from collections.abc import Generator
from pathlib import Path

# Temporary files of ``ibaml.atomic``: the process, eight digits, the name.
_TEMPORARY = re.compile(r"\.\d+\.[0-9a-f]{8}\..+")
_held: set[tuple[Path, int]] = set()


@contextlib.contextmanager
def only_training_in(folder: Path | None) -> Generator[None]:
    """Holds a run folder for the time of a block, and removes what a killed process left half-written in it.

    The lock is on the folder itself: no file is left, and the system gives it back when the process ends, however it
    ends. The same thread may hold a folder again. Where a system has no such locks, nothing is held.

    Args:
        folder: The folder; made if missing. None: there is nothing to hold.

    Raises:
        OSError: If another training holds it, its name is no text, or it cannot be made.
    """
    if folder is None or (key := (folder.resolve(), threading.get_ident())) in _held:
        yield
        return
    try:
        os.fspath(folder).encode()
    except UnicodeEncodeError as error:
        raise OSError(
            f"run_folder {os.fspath(folder)!r} has a name that is no text in UTF-8, which its README needs: choose "
            "another with --run-folder."
        ) from error
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(
            f"run_folder {folder} cannot be written ({error.strerror or error}): choose another with --run-folder, or "
            "change its permissions."
        ) from error
    with _locked(folder):
        _held.add(key)
        try:
            for path in folder.iterdir():
                if _TEMPORARY.fullmatch(path.name) and path.is_file():
                    with contextlib.suppress(OSError):
                        path.unlink(missing_ok=True)
            yield
        finally:
            _held.discard(key)


@contextlib.contextmanager
def _locked(folder: Path) -> Generator[None]:
    try:
        import fcntl

        descriptor = os.open(folder, os.O_RDONLY)
    except (ImportError, OSError):
        yield
        return
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise OSError(
                f"another training is running in {folder}: wait until it has ended, or choose another folder. Two "
                "would overwrite each other's checkpoints."
            ) from error
        except OSError:
            # A file system without locks, such as some over a network.
            pass
        yield
    finally:
        os.close(descriptor)
