"""Features on disk, each found by the contents of the input that it belongs to.

A folder holds the features of one backbone with its settings. Each of its files is a part of them: the SHA-256 of some
inputs, and their features. So a changed input is another input, an interrupted extraction goes on after the last part,
and two processes that write at once write files of their own.
"""

import hashlib
import os
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ibaml.atomic import atomic_write
from ibaml.data.files.locate import cache_folders
from ibaml.data.files.npz import load_npz

Features = npt.NDArray[np.float32]

_FOLDER = "features"
_DIGEST_BYTES = 32


class FeatureCache:
    """Features of one backbone by the digest of the input.

    Args:
        key: Digest of all that the features depend on beside the input.
        cache_dir: Folder of the cache; None means ``$IBAML_DATA``, or else the per-user cache.

    Attributes:
        folders: Where parts are read from, and the first that can be written to takes new ones.

    Examples:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     cache = FeatureCache("0" * 64, cache_dir=folder)
        ...     _ = cache.write([b"a" * 32], np.ones((1, 2), np.float32))
        ...     cache.read([b"a" * 32, b"b" * 32])
        {b'aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa': array([1., 1.], dtype=float32)}
    """

    def __init__(self, key: str, *, cache_dir: str | os.PathLike[str] | None = None) -> None:
        self.folders = [folder / _FOLDER / key[:32] for folder in cache_folders(cache_dir)]

    def read(self, digests: Sequence[bytes]) -> dict[bytes, Features]:
        """Returns the features that are there of some inputs, ``[num_features]`` each.

        A damaged file counts as absent, since what it held can be made again.

        Args:
            digests: SHA-256 of inputs.

        Cost:
            Reads the digests of all parts, and the features of those that hold a wanted one.
        """
        wanted, found = set(digests), dict[bytes, Features]()
        for path in self._parts():
            try:
                named = [row.tobytes() for row in load_npz(path, ["digests"])["digests"]]
                rows = [row for row, digest in enumerate(named) if digest in wanted and digest not in found]
                if not rows:
                    continue
                features = np.asarray(load_npz(path, ["features"])["features"], dtype=np.float32)
                found |= {named[row]: features[row] for row in rows}
            # TypeError: numbers of another kind; IndexError: fewer features than digests.
            except (OSError, ValueError, TypeError, IndexError):
                continue
        return found

    def write(self, digests: Sequence[bytes], features: Features) -> Path | None:
        """Writes a part, under a temporary name that is then changed: no other process sees half a file.

        When no folder is writable a RuntimeWarning says so: features are fine, they are only computed again next time.

        Args:
            digests: SHA-256 of the inputs.
            features: ``[num_inputs, num_features]``.

        Returns:
            The path of the file, or None if nothing could be written.
        """
        name = f"{hashlib.sha256(b''.join(digests)).hexdigest()[:32]}.npz"
        as_rows = np.frombuffer(b"".join(digests), dtype=np.uint8).reshape(-1, _DIGEST_BYTES)
        failures: list[str] = []
        for folder in self.folders:
            try:
                folder.mkdir(parents=True, exist_ok=True)
                with atomic_write(folder / name) as temporary, temporary.open("xb") as file:
                    np.savez(file, digests=as_rows, features=features.astype(np.float32))
            except OSError as error:
                failures.append(f"{folder} ({error.strerror or error})")
                continue
            return folder / name
        warnings.warn(
            f"cannot write features to {' or '.join(failures)}: they are computed anew each time. Set IBAML_DATA to a "
            "writable folder, or switch the cache off with Backbone(cache=False).",
            RuntimeWarning,
            stacklevel=3,
        )
        return None

    @property
    def num_bytes(self) -> int:
        """Size of all parts on disk."""
        return sum(path.stat().st_size for path in self._parts())

    def _parts(self) -> list[Path]:
        return [path for folder in self.folders if folder.is_dir() for path in sorted(folder.glob("[!.]*.npz"))]
