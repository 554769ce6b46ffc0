"""Both settings of glibc's allocator in one process: the library's for the library, its own for everyone else."""

import ctypes

from ibaml.fast.allocator import is_glibc, keep_freed_memory, set_thresholds

# Where glibc's thresholds end up by themselves: they follow the largest block that was freed, up to 32 MiB.
_LARGEST_OWN_THRESHOLD = 32 * 2**20


def use(*, kept: bool) -> None:
    """Sets the allocator, and gives back to the system what is free.

    Args:
        kept: Whether freed memory is kept, as the library has it, or treated as glibc does by itself.
    """
    if not is_glibc() or not keep_freed_memory():
        return
    ctypes.CDLL(None).malloc_trim(0)
    if kept:
        set_thresholds()
    else:
        set_thresholds(mmap=_LARGEST_OWN_THRESHOLD, trim=2 * _LARGEST_OWN_THRESHOLD)
