"""Tasks of unequal size, split afresh into support and query at every draw."""

import abc
from collections.abc import Sequence
from typing import Literal

import torch

from ibaml import tree
from ibaml.checks import require_cpu_generator, require_positive_int
from ibaml.types import Batch, ClassScope, Episode, PyTree, Tensor


class RaggedTasks(abc.ABC):
    """A TaskSampler over tasks of unequal size: the tasks of one draw share their sizes, so that they stack.

    All tasks of a draw have the support size of the draw, and query sets as large as the smallest of them allows. How
    tasks and support sizes are drawn and how a task is split is what the subclasses differ in.

    Args:
        capacities: Number of examples that every split of a task can use, int64, ``[num_tasks]``.
        num_query: Largest query set of a draw; None: no limit.
    """

    def __init__(self, capacities: Tensor, *, num_query: int | None) -> None:
        self.capacities = capacities
        self.num_query = num_query

    def __len__(self) -> int:
        """Number of tasks that can be drawn."""
        return len(self.capacities)

    @property
    @abc.abstractmethod
    def has_equal_sizes(self) -> bool:
        """Whether all draws have the same sizes."""

    @abc.abstractmethod
    def _draw(self, num_tasks: int, generator: torch.Generator) -> tuple[list[int], int]:
        """Returns which tasks are drawn, and their support size."""

    def sample(self, num_tasks: int, *, generator: torch.Generator) -> Episode:
        """Draws tasks with replacement and splits them.

        Args:
            num_tasks: Number of tasks, at least one.
            generator: CPU generator; its state alone decides the result.

        Raises:
            TypeError: If ``num_tasks`` is not an int or ``generator`` not a generator.
            ValueError: If ``num_tasks`` is below one or the generator is not on the CPU.
        """
        require_positive_int("num_tasks", num_tasks)
        require_cpu_generator(generator)
        indices, num_support = self._draw(num_tasks, generator)
        largest = int(self.capacities[indices].min()) - num_support
        num_query = largest if self.num_query is None else min(self.num_query, largest)
        episodes = [self.episode(index, num_support, num_query, generator=generator) for index in indices]
        return tree.map(lambda *leaves: torch.stack(leaves), *episodes)

    def sample_indices(self, num_tasks: int, *, generator: torch.Generator) -> list[int]:
        """Returns which tasks ``sample`` draws from a generator in the same state; arguments and errors as there."""
        require_positive_int("num_tasks", num_tasks)
        require_cpu_generator(generator)
        return self._draw(num_tasks, generator)[0]

    @abc.abstractmethod
    def episode(
        self, index: int, num_support: int | None = None, num_query: int | None = None, *, generator: torch.Generator
    ) -> Episode:
        """Splits one task, without a task axis.

        Args:
            index: Which task, from 0 to ``len(tasks) - 1``.
            num_support: Support size; 0 leaves all to the query. None: that of the draws, if they have one, or what
                suits the task.
            num_query: Query size. None: all the rest.
            generator: CPU generator.
        """


class TaskSplits(RaggedTasks):
    """A TaskSampler over given tasks of unequal size, without leaks from support to query.

    A task is chosen uniformly, and with it a support size between the smallest that it admits and four fifths of what
    it has, uniformly on the logarithmic scale (few-shot tasks are what the prior matters for); the other tasks of the
    draw come uniformly from those that are large enough. ``num_support`` fixes the support size instead.

    Splits are free of leaks: rows that agree in inputs and target are one group, and a group is never on both sides.
    Rows come as they come, so that a rare class is as rare in a support set as it is in its task and often absent from
    it; with ``stratify``, and always where classes are of their task, the support holds every class that the task has.

    Args:
        tasks: Inputs and targets of each task: float, ``[num_examples, *input_shape]``, and class indices (int64) or
            real targets ``[num_examples, num_outputs]``.
        num_outputs: Number of network outputs.
        num_ways: Classes differ from task to task: each draw takes this many of a task's classes and numbers them
            afresh in random order; ``"all"``: it takes all of them. None: class indices mean the same in all tasks, or
            the targets are real.
        num_support: Support examples of every draw; None lets them vary.
        num_query: Largest number of query examples of a draw.
        stratify: Whether the support holds every class of the task, for classes that all tasks share: right only where
            whoever adapts to a new task sees to that as well.
        group_duplicates: Whether identical rows stay on one side. False: each row by itself, for inputs of few distinct
            values, where equal rows are different measurements.
        groups: Number of each row's group, per task, from ``row_groups``; None: found in the tasks. For tensors that
            lost digits which told rows apart.
        names: Names of the tasks, for messages.

    Raises:
        ValueError: If there are no tasks, or one cannot be split in the wanted way.

    Examples:
        >>> sizes = (4, 9)
        >>> tasks = [Batch(torch.rand(n, 2), torch.rand(n, 1)) for n in sizes]
        >>> sampler = TaskSplits(tasks, num_outputs=1, num_support=3)
        >>> episode = sampler.sample(5, generator=torch.Generator().manual_seed(0))
        >>> episode.support.x.shape
        torch.Size([5, 3, 2])
    """

    def __init__(
        self,
        tasks: Sequence[Batch],
        *,
        num_outputs: int,
        num_ways: int | Literal["all"] | None = None,
        num_support: int | None = None,
        num_query: int = 64,
        stratify: bool = False,
        group_duplicates: bool = True,
        groups: Sequence[Tensor] | None = None,
        names: Sequence[str] | None = None,
    ) -> None:
        if not tasks:
            raise ValueError("tasks is empty; expected at least one task.")
        if num_support is not None:
            require_positive_int("num_support", num_support)
        self.tasks = tuple(tasks)
        self.num_outputs = num_outputs
        self.num_ways: int | Literal["all"] | None = num_ways
        self.num_support = num_support
        self.stratify = stratify
        self.group_duplicates = group_duplicates
        require_positive_int("num_query", num_query)
        self.names = tuple(map(str, range(len(tasks)))) if names is None else tuple(names)
        if not group_duplicates:
            groups = [torch.arange(len(task.y)) for task in self.tasks]
        self._groups = [row_groups(task) for task in self.tasks] if groups is None else list(groups)
        self._smallest = torch.tensor([self._smallest_support(task) for task in self.tasks])
        super().__init__(torch.tensor([self._usable(index) for index in range(len(self.tasks))]), num_query=num_query)
        for index, name in enumerate(self.names):
            if num_support is not None and num_support < int(self._smallest[index]):
                raise ValueError(
                    f"num_support is {num_support}, but task {name!r} has {int(self._smallest[index])} classes and its "
                    "support needs one example of each: raise num_support."
                )
        needed = self._smallest if num_support is None else torch.full_like(self._smallest, num_support)
        if too_small := torch.nonzero(self.capacities < needed + 1).flatten().tolist():
            self._refuse(too_small, int(needed[too_small[0]]))

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one input."""
        return tuple(self.tasks[0].x.shape[1:])

    @property
    def class_scope(self) -> ClassScope:
        """Whether class indices mean the same in all tasks."""
        return "shared" if self.num_ways is None else "per_task"

    @property
    def has_equal_sizes(self) -> bool:
        """Whether all draws have the same sizes: a fixed support, and enough for the largest query set everywhere."""
        if self.num_support is None or self.num_query is None:
            return False
        return int(self.capacities.min()) >= self.num_support + self.num_query

    @property
    def smallest_supports(self) -> Tensor:
        """Smallest support of a split, int64, ``[num_tasks]``: 1, or where it holds every class their number."""
        return self._smallest

    def restricted(self, indices: Sequence[int], *, num_support: int | None, num_query: int) -> "TaskSplits":
        """Returns a sampler over some of the tasks, with sizes as in the constructor."""
        return TaskSplits(
            [self.tasks[index] for index in indices],
            num_outputs=self.num_outputs,
            num_ways=self.num_ways,
            num_support=num_support,
            num_query=num_query,
            stratify=self.stratify,
            group_duplicates=self.group_duplicates,
            groups=[self._groups[index] for index in indices],
            names=[self.names[index] for index in indices],
        )

    def content(self) -> PyTree:
        """Returns what decides the draws."""
        return self.tasks, self._groups, self.num_ways, self.num_support, self.num_query, self.stratify

    def _draw(self, num_tasks: int, generator: torch.Generator) -> tuple[list[int], int]:
        first = int(torch.randint(len(self.tasks), (), generator=generator))
        capacity = int(self.capacities[first])
        num_support = self._draw_support(capacity, int(self._smallest[first]), generator)
        assert self.num_query is not None
        wanted = num_support + min(self.num_query, capacity - num_support)
        fitting = torch.nonzero((self.capacities >= wanted) & (self._smallest <= num_support)).flatten()
        others = fitting[torch.randint(len(fitting), (num_tasks - 1,), generator=generator)].tolist()
        return [first, *others], num_support

    def _draw_support(self, capacity: int, smallest: int, generator: torch.Generator) -> int:
        if self.num_support is not None:
            return self.num_support
        largest = max(smallest, min(capacity - 1, 4 * capacity // 5))
        uniform = float(torch.rand((), generator=generator, dtype=torch.float64))
        return min(largest, int(smallest * ((largest + 1) / smallest) ** uniform))

    def episode(
        self, index: int, num_support: int | None = None, num_query: int | None = None, *, generator: torch.Generator
    ) -> Episode:
        """Splits one task, without a task axis; see ``RaggedTasks``."""
        task, groups = self.tasks[index], self._groups[index]
        rows = torch.arange(len(task.y))
        labels = None if task.y.is_floating_point() else task.y
        if self.num_ways is not None:
            assert labels is not None
            classes = labels.unique()
            chosen = classes[torch.randperm(len(classes), generator=generator)[: self._ways(task)]]
            position = (labels.unsqueeze(1) == chosen).to(torch.int64)
            rows = torch.nonzero(position.any(1)).flatten()
            labels = position.argmax(1)
        wanted = None if labels is None or not self._holds_every_class else labels[rows]
        order = rows[self._order(groups[rows], wanted, generator)]
        if num_support is None:
            num_support = self.num_support or max(len(order) // 2, int(self._smallest[index]))
        support, rest = order[:num_support], order[num_support:]
        query = rest[~torch.isin(groups[rest], groups[support])][:num_query]
        targets = task.y if labels is None else labels
        return Episode(Batch(task.x[support], targets[support]), Batch(task.x[query], targets[query]))

    def split(self, index: int, *, generator: torch.Generator) -> Episode:
        """Splits one task with a support size as draws have it, without a task axis; see ``RaggedTasks.episode``."""
        num_support = self._draw_support(int(self.capacities[index]), int(self._smallest[index]), generator)
        return self.episode(index, num_support, self.num_query, generator=generator)

    def _order(self, groups: Tensor, labels: Tensor | None, generator: torch.Generator) -> Tensor:
        """Returns the rows in random order, groups together, one row of each class and the rest of its group first."""
        order = torch.randperm(len(groups), generator=generator)
        _, group = groups.unique(return_inverse=True)
        key = torch.rand(int(group.max()) + 1, generator=generator, dtype=torch.float64)[group]
        if labels is not None:
            first = torch.stack([order[labels[order] == label][0] for label in labels.unique()])
            key = torch.where(torch.isin(group, group[first]), key - 1, key)
            key[first] = -2.0
        return order[torch.argsort(key[order], stable=True)]

    @property
    def _holds_every_class(self) -> bool:
        return self.stratify or self.num_ways is not None

    def _smallest_support(self, task: Batch) -> int:
        if task.y.is_floating_point() or not self._holds_every_class:
            return 1
        return len(task.y.unique()) if self.num_ways is None else self._ways(task)

    def _ways(self, task: Batch) -> int:
        """Returns how many classes of a task a draw takes."""
        return self.num_ways if isinstance(self.num_ways, int) else len(task.y.unique())

    def _usable(self, index: int) -> int:
        """Returns how many examples any split has: rows of a group cut by the end of the support go to neither side."""
        task, groups = self.tasks[index], self._groups[index]
        total, most_cut = len(task.y), int(self._smallest[index]) + 1
        if self.num_ways is not None:
            _, sizes = task.y.unique(return_counts=True)
            if len(sizes) < self._ways(task):
                raise ValueError(
                    f"task {self.names[index]!r} has {len(sizes)} classes, but num_ways is {self.num_ways}: drop "
                    "the task or lower num_ways."
                )
            total = int(sizes.sort().values[: self._ways(task)].sum())
        _, group_sizes = groups.unique(return_counts=True)
        return total - int((group_sizes.sort(descending=True).values[:most_cut] - 1).sum())

    def _refuse(self, too_small: Sequence[int], smallest: int) -> None:
        """Tells of the first task that is too small, and names the others."""
        index, *others = too_small
        task, groups = self.tasks[index], self._groups[index]
        num_rows, num_groups = len(task.y), len(groups.unique())
        repeated = (
            f", {num_rows - num_groups} of them copies of others (identical rows stay on one side of a split; with "
            "group_duplicates=False they count as measurements of their own)"
            if num_groups < num_rows
            else ""
        )
        shown = ", ".join(repr(self.names[other]) for other in others[:10])
        more = " and others" if len(others) > 10 else ""
        also = f" So are {len(others)} more: {shown}{more}." if others else ""
        raise ValueError(
            f"task {self.names[index]!r} has {num_rows} examples{repeated}; a split needs at least {smallest} for the "
            f"support and 1 for the query: drop the task or give it more.{also}"
        )


def row_groups(task: Batch) -> Tensor:
    """Numbers the rows so that identical ones, target included, have the same number."""
    # Adding zero makes -0.0 equal to 0.0, whose bytes differ.
    columns = torch.cat(
        [(part + 0.0).double().flatten(1) if part.ndim > 1 else part.double().unsqueeze(1) for part in task], 1
    )
    numbers: dict[bytes, int] = {}
    return torch.tensor([numbers.setdefault(row.tobytes(), len(numbers)) for row in columns.numpy()])
