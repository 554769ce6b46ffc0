"""Tasks given as a list."""

from collections.abc import Sequence
from typing import Any

import torch

from ibaml import tree
from ibaml.checks import require_cpu_generator, require_positive_int
from ibaml.types import Episode, PyTree


class FixedEpisodes:
    """A TaskSampler over a given sequence of episodes: each draw takes one uniformly, with replacement.

    Episodes of unequal sizes can be drawn one at a time only, because a batch of tasks is one stack of tensors.

    Args:
        episodes: Tasks with a support and a query set, without a task axis; inputs of one shape.

    Raises:
        TypeError: If inputs or targets are no tensors, or inputs differ in dtype.
        ValueError: If there are none, or the shapes of single inputs differ.

    Examples:
        >>> from ibaml.types import Batch
        >>> batch = Batch(torch.zeros(3, 2), torch.zeros(3, 1))
        >>> tasks = FixedEpisodes([Episode(batch, batch)])
        >>> tasks.sample(4, generator=torch.Generator()).support.x.shape
        torch.Size([4, 3, 2])
    """

    def __init__(self, episodes: Sequence[Episode]) -> None:
        if not episodes:
            raise ValueError("episodes is empty; expected at least one Episode.")
        for index, episode in enumerate(episodes):
            for part, batch in zip(episode._fields, episode, strict=True):
                values: tuple[Any, ...] = batch
                for name, value in zip(batch._fields, values, strict=True):
                    if not torch.is_tensor(value):
                        raise TypeError(
                            f"episode {index} has a {type(value).__name__} as {part}.{name}; expected one tensor, "
                            "[num_examples, ...]: put several inputs side by side in one, and take them apart in the "
                            "network's forward; or give pairs (X, y) with tuples or mappings of arrays as X to "
                            "MetaLearner(backbone=module), whose module has no last layer."
                        )
                    first = getattr(episodes[0].support, name)
                    if name == "x" and value.dtype != first.dtype:
                        raise TypeError(
                            f"episode {index} has {part}.{name} of dtype {value.dtype}, episode 0 of {first.dtype}: "
                            "convert all to one."
                        )
        shapes = {tuple(batch.x.shape[1:]) for episode in episodes for batch in episode}
        if len(shapes) > 1:
            raise ValueError(f"episodes have inputs of different shapes {sorted(shapes)}; expected a single shape.")
        self.episodes = tuple(episodes)
        sizes = {tuple(leaf.shape for leaf in tree.leaves(episode)) for episode in episodes}
        self.has_equal_sizes = len(sizes) == 1

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one input."""
        return tuple(self.episodes[0].support.x.shape[1:])

    @property
    def num_outputs(self) -> int:
        """Number of classes (the largest label plus one) or of target dimensions."""
        targets = [batch.y for episode in self.episodes for batch in episode]
        if targets[0].is_floating_point():
            return targets[0].shape[-1]
        return 1 + max(int(y.max()) for y in targets)

    def content(self) -> PyTree:
        """Returns what decides the draws."""
        return self.episodes

    def sample(self, num_tasks: int, *, generator: torch.Generator) -> Episode:
        """Draws tasks with replacement.

        Raises:
            ValueError: If several tasks of unequal sizes are asked for.
        """
        indices = self.sample_indices(num_tasks, generator=generator)
        if num_tasks > 1 and not self.has_equal_sizes:
            raise ValueError(
                f"num_tasks is {num_tasks}, but the episodes have unequal sizes and cannot be stacked: draw one at a "
                "time, which in training means tasks_per_step=1."
            )
        return tree.map(lambda *leaves: torch.stack(leaves), *(self.episodes[index] for index in indices))

    def sample_indices(self, num_tasks: int, *, generator: torch.Generator) -> list[int]:
        """Returns which Episodes ``sample`` draws from a generator in the same state.

        Raises:
            TypeError: If ``num_tasks`` is not an int or ``generator`` not a generator.
            ValueError: If ``num_tasks`` is below one or the generator is not on the CPU.
        """
        require_positive_int("num_tasks", num_tasks)
        require_cpu_generator(generator)
        return torch.randint(len(self.episodes), (num_tasks,), generator=generator).tolist()
