"""Classes that are Gaussian clusters in a few directions of many features, new ones in each task."""

import dataclasses
import math
from pathlib import Path
from typing import ClassVar

import torch

from ibaml.checks import require_cpu_generator, require_positive_int
from ibaml.data.preprocessing import Preprocessing
from ibaml.data.sources.base import Split, queries_in
from ibaml.data.standardizer import IDENTITY
from ibaml.types import Batch, ClassScope, Episode, Tensor

_SUBSPACE_SEED = 0
"""All tasks of a size differ in the same directions, whoever draws them."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mixtures:
    """Tasks of Gaussian clusters that differ in a subspace, which is the same for all tasks.

    Attributes:
        num_ways: Classes of a task, new in each.
        num_shots: Support rows of a class.
        num_queries: Query rows of a training task, of classes at random.
        num_test_queries: The same of a validation or test task.
        num_features: Features of a row.
        num_informative: Dimensions of the subspace in which the classes differ.
        separation: Standard deviation of the class means in the subspace; that of the rows around them is 1.

    Raises:
        TypeError: If a count is not an int.
        ValueError: If a count is below one, there are more informative directions than features, or ``separation`` is
            not positive.
    """

    num_ways: int = 5
    num_shots: int = 3
    num_queries: int = 25
    num_test_queries: int = 75
    num_features: int = 20
    num_informative: int = 4
    separation: float = 1.5
    name: ClassVar[str] = "mixtures"
    is_image: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Checks the settings."""
        counts = ("num_ways", "num_shots", "num_queries", "num_test_queries", "num_features", "num_informative")
        for name in counts:
            require_positive_int(name, getattr(self, name))
        if self.num_informative > self.num_features:
            raise ValueError(
                f"num_informative is {self.num_informative}, more than num_features, {self.num_features}: expected at "
                "most as many."
            )
        if not 0 < self.separation < math.inf:
            raise ValueError(f"separation must be positive and finite, but is {self.separation}.")

    def sampler(self, split: Split, *, data: Path | None = None, device: torch.device | str = "cpu") -> "MixtureTasks":
        """Returns the sampler of a split, which differs in the number of queries alone; see ``TaskSource.sampler``."""
        return MixtureTasks(self, num_queries=queries_in(self, split))

    def preprocessing(self) -> Preprocessing:
        """Returns how tables become inputs: as they are; labels are those of each task."""
        return Preprocessing(inputs=IDENTITY, input_shape=(self.num_features,), num_outputs=self.num_ways)


class MixtureTasks:
    """Classification of rows ``x = B mean_c + noise``, where the columns of ``B`` span the informative subspace.

    Args:
        settings: What the tasks are like.
        num_queries: Query rows of a task.

    Examples:
        >>> tasks = MixtureTasks(Mixtures(num_ways=3, num_shots=2), num_queries=4)
        >>> episode = tasks.sample(7, generator=torch.Generator().manual_seed(0))
        >>> episode.support.x.shape, episode.query.y.shape
        (torch.Size([7, 6, 20]), torch.Size([7, 4]))
    """

    class_scope: ClassVar[ClassScope] = "per_task"
    has_equal_sizes = True

    def __init__(self, settings: Mixtures, *, num_queries: int) -> None:
        self.settings = settings
        self.num_queries = require_positive_int("num_queries", num_queries)
        generator = torch.Generator().manual_seed(_SUBSPACE_SEED)
        directions = torch.randn(settings.num_features, settings.num_informative, generator=generator)
        self.subspace: Tensor = torch.linalg.qr(directions).Q

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one input."""
        return (self.settings.num_features,)

    @property
    def num_outputs(self) -> int:
        """Number of classes of a task."""
        return self.settings.num_ways

    def sample(self, num_tasks: int, *, generator: torch.Generator) -> Episode:
        """Draws tasks.

        Args:
            num_tasks: Number of tasks, at least one.
            generator: CPU generator; its state alone decides the result.

        Returns:
            An Episode on the CPU: ``x`` float32 ``[num_tasks, num_examples, num_features]``, ``y`` int64 ``[num_tasks,
            num_examples]``; the support holds the classes one after the other.

        Raises:
            TypeError: If ``num_tasks`` is not an int or ``generator`` not a generator.
            ValueError: If ``num_tasks`` is below one or the generator is not on the CPU.
        """
        require_positive_int("num_tasks", num_tasks)
        require_cpu_generator(generator)
        settings = self.settings
        num_ways, num_support = settings.num_ways, settings.num_ways * settings.num_shots
        means = settings.separation * torch.randn(num_tasks, num_ways, settings.num_informative, generator=generator)
        known = torch.arange(num_ways).repeat_interleave(settings.num_shots).expand(num_tasks, num_support)
        asked = torch.randint(num_ways, (num_tasks, self.num_queries), generator=generator)
        labels = torch.cat([known, asked], 1)
        noise = torch.randn(*labels.shape, settings.num_features, generator=generator)
        x = torch.take_along_dim(means, labels.unsqueeze(-1), 1) @ self.subspace.T + noise
        return Episode(
            support=Batch(x[:, :num_support], labels[:, :num_support]),
            query=Batch(x[:, num_support:], labels[:, num_support:]),
        )
