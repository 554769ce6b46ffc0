"""How much memory a Newton matrix takes, before it is made: a system may end a process that asks for too much."""

import os

from ibaml.types import Tensor

_GIGABYTE = 1e9


def require_room(like: Tensor, num_numbers: int, *, num_classes: int, num_examples: int) -> None:
    """Refuses a softmax problem whose Newton matrices are larger than the memory of this machine.

    Memory of other devices is their own matter, whose refusals are errors and end nothing.

    Args:
        like: A tensor of the problem.
        num_numbers: How many numbers the matrices have that are held at the same time.
        num_classes: Classes of the task.
        num_examples: Size of its support set.

    Raises:
        MemoryError: If they do not fit, with what to do.
    """
    needed, there = num_numbers * like.element_size(), _memory()
    if like.device.type == "cpu" and there is not None and needed > there:
        raise MemoryError(
            f"softmax over {num_classes:,} classes and {num_examples:,} examples takes about "
            f"{needed / _GIGABYTE:,.0f} GB, and this machine has {there / _GIGABYTE:,.0f}: "
            "algorithm='gaussian_classes' takes little, as do fewer classes, examples or features"
        )


def _memory() -> int | None:
    """Returns the bytes of memory of this machine, if the system tells."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return None
