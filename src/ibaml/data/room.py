"""Room for many pixels: in memory, or from some size on in a file that the operating system reads as needed."""

import tempfile
from collections.abc import Sequence

import numpy as np

from ibaml.data.files.locate import cache_folders
from ibaml.data.images import Pixels

MOST_IN_MEMORY = 2**30
"""Bytes of pixels from which on they lie in a file."""


def room_for(shape: Sequence[int]) -> Pixels:
    """Returns an array of pixels, not filled.

    A large one is a file without a name in the folder of the cache, which goes when the array does: what is read of it
    stays in memory only as long as there is room. If no such file can be made the array is in memory all the same.

    Args:
        shape: Its shape.
    """
    if int(np.prod(shape, dtype=np.int64)) > MOST_IN_MEMORY:
        for folder in cache_folders():
            try:
                folder.mkdir(parents=True, exist_ok=True)
                with tempfile.TemporaryFile(dir=folder) as file:
                    return np.memmap(file, dtype=np.uint8, mode="w+", shape=tuple(shape))
            except OSError:
                continue
    return np.empty(shape, dtype=np.uint8)
