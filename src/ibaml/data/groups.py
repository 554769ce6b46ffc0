"""Regression tasks from one table with a column of groups: patients, schools, animals, machines.

A task is a group: some of its rows are the support set, the others the query set.
"""

from collections.abc import Sequence

import torch

from ibaml.data.arguments import require_cpu_generator, require_positive_int
from ibaml.types import Batch, Episode, Tensor


class GroupedTasks:
    """A TaskSampler over the groups of a table.

    The groups of a draw are taken with replacement, and their query sets are cut to the size of the smallest, so that
    the draw is one stack of tensors.

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
        names: The groups, in order of first appearance; those with too few rows for a query are left out.

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
        self.num_queries = None if num_queries is None else require_positive_int("num_queries", num_queries)
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
        self._batches = [Batch(x[rows], y[rows]) for rows in large.values()]

    def __len__(self) -> int:
        """Number of groups that can be drawn."""
        return len(self.names)

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one input: the number of features."""
        return tuple(self._batches[0].x.shape[1:])

    @property
    def num_outputs(self) -> int:
        """Number of target dimensions."""
        return self._batches[0].y.shape[-1]

    def sample(self, num_tasks: int, *, generator: torch.Generator) -> Episode:
        """Draws tasks.

        Args:
            num_tasks: Number of tasks, at least one.
            generator: CPU generator; its state alone decides the result.

        Raises:
            TypeError: If ``num_tasks`` is not an int or ``generator`` not a generator.
            ValueError: If ``num_tasks`` is below one or the generator is not on the CPU.
        """
        require_positive_int("num_tasks", num_tasks)
        require_cpu_generator(generator)
        chosen = torch.randint(len(self), (num_tasks,), generator=generator).tolist()
        episodes = [self.episode(index, generator=generator) for index in chosen]
        num_queries = min(len(episode.query.y) for episode in episodes)
        return Episode(
            Batch(
                torch.stack([episode.support.x for episode in episodes]),
                torch.stack([episode.support.y for episode in episodes]),
            ),
            Batch(
                torch.stack([episode.query.x[:num_queries] for episode in episodes]),
                torch.stack([episode.query.y[:num_queries] for episode in episodes]),
            ),
        )

    def episode(self, index: int, *, generator: torch.Generator) -> Episode:
        """Draws a support and a query set of a given group, without a task axis.

        Args:
            index: Which group, from 0 to ``len(tasks) - 1``.
            generator: CPU generator.
        """
        x, y = self._batches[index]
        order = torch.randperm(len(x), generator=generator)
        stop = None if self.num_queries is None else self.num_support + self.num_queries
        support, query = order[: self.num_support], order[self.num_support : stop]
        return Episode(Batch(x[support], y[support]), Batch(x[query], y[query]))
