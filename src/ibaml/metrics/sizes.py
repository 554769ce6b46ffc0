"""How large a score's tasks were."""

import statistics
from collections.abc import Sequence
from typing import NamedTuple


class Sizes(NamedTuple):
    """Numbers of examples of several tasks in short; ``str`` is one phrase.

    Attributes:
        smallest: The least number.
        median: The middle one, or the mean of the two in the middle.
        largest: The largest number.

    Examples:
        >>> print(Sizes.of([3, 3]), "|", Sizes.of([5, 6, 25]))
        3 | 5 to 25 (median 6)
    """

    smallest: int
    median: float
    largest: int

    @classmethod
    def of(cls, numbers: Sequence[int]) -> "Sizes":
        """Summarises numbers, of which there is at least one."""
        return cls(min(numbers), statistics.median(numbers), max(numbers))

    def __str__(self) -> str:
        """Says one number where all are equal."""
        if self.smallest == self.largest:
            return str(self.smallest)
        return f"{self.smallest} to {self.largest} (median {self.median:g})"
