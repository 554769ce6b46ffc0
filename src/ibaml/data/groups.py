"""Regression tasks from one table with a column of groups: patients, schools, animals, machines.

A task is a group: some of its rows are the support set, the others the query set.
"""

from collections.abc import Sequence

import torch

from ibaml.checks import require_positive_int
from ibaml.data.ragged import RaggedTasks
from ibaml.types import Batch, Episode, Tensor


class GroupedTasks(RaggedTasks):
    """A TaskSampler over the groups of a table, with supports of one size.

    Args:
        x: Inputs, ``[num_rows, num_features]``; standardised ones suit the optimisers.
        y: Targets, ``[num_rows]`` or ``[num_rows, num_outputs]``.
        groups: For each row the name of its group.
        num_support: Rows of a support set.
        num_queries: Largest query set. None: all other rows.

    Raises:
        TypeError: If ``x`` or ``y`` is no floating-point tensor.
        ValueError: If the lengths differ, a value is not finite, or no group has more than ``num_support`` rows.

    Attributes:
        names: The groups, in order of first appearance, but for those in ``left_out``.
        left_out: Groups with too few rows for a query, and why.

    Examples:
        >>> x, y = torch.arange(8.0)[:, None], torch.arange(8.0)
        >>> tasks = GroupedTasks(x, y, ["a"] * 4 + ["b"] * 4, num_support=3)
        >>> episode = tasks.sample(2, generator=torch.Generator().manual_seed(0))
        >>> episode.support.x.shape, episode.query.y.shape
        (torch.Size([2, 3, 1]), torch.Size([2, 1, 1]))
    """

    def __init__(
        self,
        x: Tensor,
        y: Tensor,
        groups: Sequence[object],
        *,
        num_support: int,
        num_queries: int | None = None,
    ) -> None:
        """Checks and sorts the table; see the class."""
        for name, value in (("x", x), ("y", y)):
            if not isinstance(value, Tensor) or not value.is_floating_point():  # pyright: ignore[reportUnnecessaryIsInstance]
                raise TypeError(f"{name} must be a floating-point tensor, got {type(value).__name__}.")
            if not bool(torch.isfinite(value).all()):
                raise ValueError(f"{name} has NaN or infinite values: drop or impute those rows.")
        if x.ndim != 2:
            raise ValueError(f"x has shape {tuple(x.shape)}; expected [num_rows, num_features].")
        if y.ndim not in (1, 2) or not len(x) == len(y) == len(groups):
            raise ValueError(
                f"x, y and groups have {len(x)}, {len(y)} and {len(groups)} rows and y {y.ndim} axes; expected as many "
                "rows of each, and y of shape [num_rows] or [num_rows, num_outputs]."
            )
        self.num_support = require_positive_int("num_support", num_support)
        if num_queries is not None:
            require_positive_int("num_queries", num_queries)
        y = y[:, None] if y.ndim == 1 else y
        members: dict[object, list[int]] = {}
        for row, group in enumerate(groups):
            members.setdefault(group, []).append(row)
        large = {group: rows for group, rows in members.items() if len(rows) > num_support}
        if not large:
            raise ValueError(
                f"num_support is {num_support}, but the largest of {len(members)} groups has "
                f"{max(map(len, members.values()), default=0)} rows: at least one has to be left for the query set."
            )
        self.names = tuple(large)
        self.left_out = {
            str(group): f"has {len(rows)} rows, and {num_support} known ones and one to predict are needed"
            for group, rows in members.items()
            if group not in large
        }
        self.tasks = tuple(Batch(x[rows], y[rows]) for rows in large.values())
        super().__init__(torch.tensor([len(rows) for rows in large.values()]), num_query=num_queries)

    @property
    def has_equal_sizes(self) -> bool:
        """Whether all draws have query sets of the same size."""
        smallest, largest = int(self.capacities.min()), int(self.capacities.max())
        return smallest == largest or (self.num_query is not None and smallest >= self.num_support + self.num_query)

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one input: the number of features."""
        return tuple(self.tasks[0].x.shape[1:])

    @property
    def num_outputs(self) -> int:
        """Number of target dimensions."""
        return self.tasks[0].y.shape[-1]

    def _draw(self, num_tasks: int, generator: torch.Generator) -> tuple[list[int], int]:
        return torch.randint(len(self), (num_tasks,), generator=generator).tolist(), self.num_support

    def episode(
        self, index: int, num_support: int | None = None, num_query: int | None = None, *, generator: torch.Generator
    ) -> Episode:
        """Draws a support and a query set of one group, without a task axis; see ``RaggedTasks``."""
        x, y = self.tasks[index]
        order = torch.randperm(len(x), generator=generator)
        support, rest = order.tensor_split([self.num_support if num_support is None else num_support])
        query = rest[:num_query]
        return Episode(Batch(x[support], y[support]), Batch(x[query], y[query]))
