"""Sinusoid regression, the toy problem of Finn et al. 2017, section 5.1."""

import dataclasses
import math
from pathlib import Path
from typing import ClassVar

import torch

from ibaml.checks import require_cpu_generator, require_positive_int
from ibaml.data.columns import Column
from ibaml.data.preprocessing import Preprocessing
from ibaml.data.sources.base import Split, queries_in
from ibaml.data.standardizer import IDENTITY
from ibaml.types import Batch, Episode, Tensor


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sinusoid:
    """Sinusoids of random amplitude and phase.

    Attributes:
        num_shots: Support points of a task.
        num_queries: Query points of a training task.
        num_test_queries: Query points of a validation or test task.
        noise_std: Standard deviation of the noise on the targets.

    Raises:
        TypeError: If a count is not an int.
        ValueError: If a count is below one or ``noise_std`` is negative.
    """

    num_shots: int
    num_queries: int = 10
    num_test_queries: int = 100
    noise_std: float = 0.0
    name: ClassVar[str] = "sinusoid"
    is_image: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Checks the settings; the sampler refuses what it cannot have."""
        require_positive_int("num_test_queries", self.num_test_queries)
        self.sampler("train")

    def sampler(self, split: Split, *, data: Path | None = None, device: torch.device | str = "cpu") -> "SinusoidTasks":
        """Returns the sampler of a split, which differs in the number of queries alone; see ``TaskSource.sampler``."""
        num_queries = queries_in(self, split)
        return SinusoidTasks(num_shots=self.num_shots, num_queries=num_queries, noise_std=self.noise_std)

    def preprocessing(self) -> Preprocessing | None:
        """Returns how tables with the columns x and y become inputs: as they are."""
        return Preprocessing(
            inputs=IDENTITY,
            input_shape=(1,),
            targets=IDENTITY,
            num_outputs=1,
            columns=(Column("x"),),
            target_columns=("y",),
        )


def require_range(name: str, value: tuple[float, float]) -> tuple[float, float]:
    """Returns ``value`` if it is a pair of finite numbers in ascending order.

    Args:
        name: Name of the argument, for the message.
        value: What the caller passed.

    Returns:
        The pair, as floats.

    Raises:
        ValueError: If there are not two finite numbers with the first at most the second.
    """
    if len(value) != 2 or not all(math.isfinite(end) for end in value) or value[0] > value[1]:
        raise ValueError(f"{name} must be two finite numbers (low, high) with low <= high, got {value!r}.")
    return float(value[0]), float(value[1])


class SinusoidTasks:
    """Regression on ``y = A sin(x - phase) + noise``; amplitude ``A`` and phase differ from task to task.

    ``A``, ``phase`` and ``x`` are uniform over their ranges (Finn et al. 2017, section 5.1: 0.1..5, 0..pi, -5..5,
    no noise); the noise is Gaussian.

    Args:
        num_shots: Support points of a task.
        num_queries: Query points of a task.
        amplitude: Range of ``A``.
        phase: Range of the phase, in radians.
        x_range: Range of the inputs.
        noise_std: Standard deviation of the noise on ``y``, at least 0.

    Raises:
        TypeError: If a count is not an int.
        ValueError: If a count is below one, a range is not an ascending pair or ``noise_std`` is negative.

    Examples:
        >>> tasks = SinusoidTasks(num_shots=5, num_queries=10)
        >>> episode = tasks.sample(3, generator=torch.Generator().manual_seed(0))
        >>> episode.support.x.shape, episode.query.y.shape
        (torch.Size([3, 5, 1]), torch.Size([3, 10, 1]))
    """

    def __init__(
        self,
        *,
        num_shots: int,
        num_queries: int,
        amplitude: tuple[float, float] = (0.1, 5.0),
        phase: tuple[float, float] = (0.0, math.pi),
        x_range: tuple[float, float] = (-5.0, 5.0),
        noise_std: float = 0.0,
    ) -> None:
        """Checks and keeps the ranges; see the class for the arguments."""
        self.num_shots = require_positive_int("num_shots", num_shots)
        self.num_queries = require_positive_int("num_queries", num_queries)
        self.amplitude = require_range("amplitude", amplitude)
        self.phase = require_range("phase", phase)
        self.x_range = require_range("x_range", x_range)
        if not (math.isfinite(noise_std) and noise_std >= 0):
            raise ValueError(f"noise_std must be a finite number of at least 0, got {noise_std!r}.")
        self.noise_std = float(noise_std)

    @property
    def has_equal_sizes(self) -> bool:
        """True: every draw has the same sizes."""
        return True

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one input: ``(1,)``."""
        return (1,)

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
            An Episode of float32 tensors on the CPU: ``x`` and ``y`` of shape ``[num_tasks, num_examples, 1]``.

        Raises:
            TypeError: If ``num_tasks`` is not an int or ``generator`` not a generator.
            ValueError: If ``num_tasks`` is below one or the generator is not on the CPU.
        """
        require_positive_int("num_tasks", num_tasks)
        require_cpu_generator(generator)
        num_points = self.num_shots + self.num_queries

        def uniform(bounds: tuple[float, float], *shape: int) -> Tensor:
            low, high = bounds
            return low + (high - low) * torch.rand(*shape, generator=generator)

        amplitude = uniform(self.amplitude, num_tasks, 1, 1)
        phase = uniform(self.phase, num_tasks, 1, 1)
        x = uniform(self.x_range, num_tasks, num_points, 1)
        noise = self.noise_std * torch.randn(num_tasks, num_points, 1, generator=generator)
        y = amplitude * torch.sin(x - phase) + noise
        return Episode(
            support=Batch(x=x[:, : self.num_shots], y=y[:, : self.num_shots]),
            query=Batch(x=x[:, self.num_shots :], y=y[:, self.num_shots :]),
        )
