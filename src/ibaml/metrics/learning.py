"""How scores of held-out examples depend on how many examples of a task are known."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from ibaml.metrics.intervals import Estimate
from ibaml.optional import require


@dataclasses.dataclass(frozen=True, kw_only=True)
class LearningCurve:
    """Scores of the same held-out examples for each number of known ones; ``str`` is a table.

    Intervals are over tasks, whose differences are part of them. Rows of the table share the tasks, so that the
    difference of two rows is surer than their two intervals say.

    Attributes:
        num_support: Numbers of known examples, ascending.
        scores: By name, one for each number.
        num_tasks: Number of tasks.
        num_left_out: Tasks that had too few examples for the largest number.

    Examples:
        >>> one, other = Estimate(0.9, 0.05, 20), Estimate(0.5, 0.04, 20)
        >>> print(LearningCurve(num_support=(0, 5), scores={"nll": (one, other)}, num_tasks=20, num_left_out=2))
        known  nll
        0      0.900 +- 0.050
        5      0.500 +- 0.040
        20 tasks; 2 with too few rows were left out
    """

    num_support: tuple[int, ...]
    scores: Mapping[str, tuple[Estimate, ...]]
    num_tasks: int
    num_left_out: int

    @property
    def header(self) -> list[str]:
        """Heads of the columns."""
        return ["known", *self.scores]

    @property
    def rows(self) -> list[list[str]]:
        """Cells of the table, a row for each number of known examples."""
        return [
            [str(number), *(str(values[index]) for values in self.scores.values())]
            for index, number in enumerate(self.num_support)
        ]

    def __str__(self) -> str:
        """Returns the table, and how many tasks it is of."""
        table = [self.header, *self.rows]
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in table]
        left_out = f"; {self.num_left_out} with too few rows were left out" if self.num_left_out else ""
        return "\n".join([*lines, f"{self.num_tasks} tasks{left_out}"])

    def to_frame(self) -> Any:
        """Returns a pandas DataFrame: ``num_support``, and of each score the mean and the ends of its 95% interval.

        Raises:
            ImportError: If pandas is not installed.
        """
        columns: dict[str, list[float]] = {"num_support": list(self.num_support)}
        for name, values in self.scores.items():
            columns[name] = [value.mean for value in values]
            columns[f"{name}_low"] = [value.low for value in values]
            columns[f"{name}_high"] = [value.high for value in values]
        return require("pandas", "pandas", "tables").DataFrame(columns)
