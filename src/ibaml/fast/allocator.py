"""The C library's memory allocator: freed memory is kept for the next step instead of being given back to the system.

A meta-step allocates and frees the same large tensors over and over. By default glibc returns large blocks to the
system as soon as they are free, and the system hands them out again page by page, each filled with zeros: in a
meta-step of a Conv4 on 84 x 84 images, with 350,000 page faults a task, a quarter to a half of the time went there.
"""

import ctypes
import functools
import os
import platform

# From glibc's malloc.h.
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3


def is_glibc() -> bool:
    """Whether the process has glibc's allocator."""
    return platform.libc_ver()[0] == "glibc"


def set_thresholds(*, mmap: int = 2**28, trim: int = 2**31 - 1) -> bool:
    """Sets glibc's thresholds, in bytes: of blocks with a mapping of their own, and of free memory to be given back.

    Returns:
        Whether glibc accepted both.
    """
    mallopt = ctypes.CDLL(None).mallopt
    return bool(mallopt(_M_MMAP_THRESHOLD, mmap)) and bool(mallopt(_M_TRIM_THRESHOLD, trim))


@functools.cache
def keep_freed_memory() -> bool:
    """Tells glibc to keep freed memory of the process for reuse; elsewhere, nothing happens.

    The process then keeps what it needed at its peak, but for blocks above 256 MiB, which go back at once: kept ones
    would leave gaps that the next cannot use, and at a hundred million weights memory ran out. It is left alone where
    the environment sets these thresholds (``MALLOC_TRIM_THRESHOLD_``, ``MALLOC_MMAP_THRESHOLD_``). CUDA memory is not
    concerned.

    Returns:
        Whether it was done.
    """
    if not is_glibc() or {"MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_"} & os.environ.keys():
        return False
    return set_thresholds()
