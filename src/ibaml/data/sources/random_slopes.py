"""Lines with an intercept and slopes that differ from task to task and are correlated: what mixed models are for."""

import dataclasses
import math
from pathlib import Path
from typing import ClassVar

import torch

from ibaml.checks import require_cpu_generator, require_positive_int
from ibaml.data.preprocessing import Preprocessing
from ibaml.data.sources.base import Split, queries_in
from ibaml.data.standardizer import IDENTITY
from ibaml.types import Batch, Episode


@dataclasses.dataclass(frozen=True, kw_only=True)
class RandomSlopes:
    """Tasks of linear regression whose weights are normal with mean 0, variance 1 and one correlation between all.

    Attributes:
        num_shots: Support rows of a task.
        num_queries: Query rows of a training task.
        num_test_queries: Query rows of a validation or test task.
        num_features: Features of a row, standard normal.
        correlation: Correlation of any two of the weights, the intercept among them.
        noise_std: Standard deviation of the noise on the targets.

    Raises:
        TypeError: If a count is not an int.
        ValueError: If a count is below one, ``correlation`` is not in [0, 1), or ``noise_std`` is not positive.
    """

    num_shots: int = 5
    num_queries: int = 20
    num_test_queries: int = 50
    num_features: int = 3
    correlation: float = 0.5
    noise_std: float = 0.5
    name: ClassVar[str] = "random_slopes"
    is_image: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Checks the settings."""
        for name in ("num_shots", "num_queries", "num_test_queries", "num_features"):
            require_positive_int(name, getattr(self, name))
        if not 0 <= self.correlation < 1:
            raise ValueError(f"correlation must be at least 0 and below 1, but is {self.correlation}.")
        if not 0 < self.noise_std < math.inf:
            raise ValueError(f"noise_std must be positive and finite, but is {self.noise_std}.")

    def sampler(
        self, split: Split, *, data: Path | None = None, device: torch.device | str = "cpu"
    ) -> "RandomSlopesTasks":
        """Returns the sampler of a split, which differs in the number of queries alone; see ``TaskSource.sampler``."""
        return RandomSlopesTasks(self, num_queries=queries_in(self, split))

    def preprocessing(self) -> Preprocessing:
        """Returns how tables become inputs: as they are."""
        return Preprocessing(inputs=IDENTITY, input_shape=(self.num_features,), targets=IDENTITY, num_outputs=1)


class RandomSlopesTasks:
    """Regression on ``y = w_0 + x.w + noise`` with ``w = sqrt(c) f + sqrt(1 - c) e`` for standard normal ``f``, ``e``.

    One ``f`` is common to all weights of a task, so that ``c`` is their correlation.

    Args:
        settings: What the tasks are like.
        num_queries: Query rows of a task.

    Examples:
        >>> tasks = RandomSlopesTasks(RandomSlopes(num_shots=4), num_queries=6)
        >>> episode = tasks.sample(7, generator=torch.Generator().manual_seed(0))
        >>> episode.support.x.shape, episode.query.y.shape
        (torch.Size([7, 4, 3]), torch.Size([7, 6, 1]))
    """

    has_equal_sizes = True

    def __init__(self, settings: RandomSlopes, *, num_queries: int) -> None:
        self.settings = settings
        self.num_queries = require_positive_int("num_queries", num_queries)

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one input."""
        return (self.settings.num_features,)

    @property
    def num_outputs(self) -> int:
        """Number of target dimensions: 1."""
        return 1

    def sample(self, num_tasks: int, *, generator: torch.Generator) -> Episode:
        """Draws tasks.

        Args:
            num_tasks: Number of tasks, at least one.
            generator: CPU generator; its state alone decides the result.

        Returns:
            An Episode of float32 tensors on the CPU: ``x`` ``[num_tasks, num_examples, num_features]`` and ``y``
            ``[num_tasks, num_examples, 1]``.

        Raises:
            TypeError: If ``num_tasks`` is not an int or ``generator`` not a generator.
            ValueError: If ``num_tasks`` is below one or the generator is not on the CPU.
        """
        require_positive_int("num_tasks", num_tasks)
        require_cpu_generator(generator)
        settings, num_known = self.settings, self.settings.num_shots
        common = torch.randn(num_tasks, 1, 1, generator=generator)
        own = torch.randn(num_tasks, settings.num_features + 1, 1, generator=generator)
        weights = math.sqrt(settings.correlation) * common + math.sqrt(1 - settings.correlation) * own
        x = torch.randn(num_tasks, num_known + self.num_queries, settings.num_features, generator=generator)
        noise = torch.randn(*x.shape[:-1], 1, generator=generator)
        y = weights[:, :1] + x @ weights[:, 1:] + settings.noise_std * noise
        return Episode(Batch(x[:, :num_known], y[:, :num_known]), Batch(x[:, num_known:], y[:, num_known:]))
