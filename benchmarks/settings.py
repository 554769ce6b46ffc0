"""What the benchmarks measure, and how often."""

import dataclasses
from pathlib import Path
from typing import Literal

from benchmarks.problems import EXPLICIT, AlgorithmName, Case, NetworkName

_ALGORITHMS: tuple[AlgorithmName, ...] = ("ibaml", "maml", "imaml", "abml")


@dataclasses.dataclass(frozen=True, kw_only=True)
class BenchmarkSettings:
    """Settings of a run.

    Attributes:
        full: The whole grid: every algorithm with K and L in {5, 10, 15} on every network, also ResNet-12 at 84 x 84.
            It takes hours on a CPU. Otherwise K = L = 5 and, on the two Conv4 with one shot, some K = L = 10 and 15.
        device: "auto" (CUDA if present), "cpu" or "cuda".
        num_threads: CPU threads; None leaves torch its choice.
        min_repeats: Least number of timed turns per case.
        max_repeats: Largest number of timed turns per case.
        max_seconds: A case gets no further turn after so long.
        max_minutes: No further case begins after so long; the result names the missing ones. None: no limit.
        num_samples: Weight samples S of ABML and iBaML.
        num_tasks: Tasks of a meta-step.
        only: Measure only cases whose network is among these; empty: all.
    """

    full: bool = False
    device: Literal["auto", "cpu", "cuda"] = "auto"
    num_threads: int | None = None
    min_repeats: int = 3
    max_repeats: int = 15
    max_seconds: float = 10.0
    max_minutes: float | None = None
    num_samples: int = 2
    num_tasks: int = 2
    only: tuple[NetworkName, ...] = ()

    def __post_init__(self) -> None:
        """Refuses settings without a meaning."""
        if self.device not in ("auto", "cpu", "cuda"):
            raise ValueError(f"device must be auto, cpu or cuda, but is {self.device!r}.")
        if self.num_threads is not None and self.num_threads < 1:
            raise ValueError(f"num_threads must be at least 1 or None, but is {self.num_threads}.")
        if not 1 <= self.min_repeats <= self.max_repeats:
            raise ValueError(
                f"min_repeats must be between 1 and max_repeats = {self.max_repeats}, but is {self.min_repeats}."
            )
        if not self.max_seconds >= 0:
            raise ValueError(f"max_seconds must be at least 0, but is {self.max_seconds}.")

        if self.max_minutes is not None and not self.max_minutes > 0:
            raise ValueError(f"max_minutes must be positive or None, but is {self.max_minutes}.")

    def cases(self) -> list[Case]:
        """Lists the cases."""
        found = self._full_grid() if self.full else self._short_grid()
        return [case for case in found if not self.only or case.network in self.only]

    def _short_grid(self) -> list[Case]:
        # In the order of importance: when the time is up, the last ones are missing.
        grid: list[tuple[NetworkName, int, int, tuple[AlgorithmName, ...]]] = [
            ("conv4_64_28", 1, 5, _ALGORITHMS),
            ("conv4_32_84", 1, 5, _ALGORITHMS),
            ("mlp", 1, 5, _ALGORITHMS),
            ("conv4_64_28", 5, 5, _ALGORITHMS),
            ("conv4_64_28", 1, 10, ("ibaml", "maml")),
            ("conv4_32_84", 1, 10, ("ibaml",)),
            ("conv4_32_84", 5, 5, ("ibaml", "maml")),
            ("resnet12_28", 1, 5, ("ibaml", "maml")),
            ("conv4_64_28", 1, 15, ("ibaml", "maml")),
            ("conv4_32_84", 1, 15, ("ibaml",)),
        ]
        return [
            self._case(network, algorithm, num_shots, num_steps, num_steps)
            for network, num_shots, num_steps, algorithms in grid
            for algorithm in algorithms
        ]

    def _full_grid(self) -> list[Case]:
        networks: tuple[NetworkName, ...] = ("mlp", "conv4_64_28", "conv4_32_84", "resnet12_28", "resnet12_84")
        return [
            self._case(network, algorithm, num_shots, num_inner_steps, num_linear_steps)
            for network in networks
            for num_shots in (1, 5)
            for algorithm in _ALGORITHMS
            for num_inner_steps in (5, 10, 15)
            for num_linear_steps in ((5,) if algorithm in EXPLICIT else (5, 10, 15))
        ]

    def _case(
        self,
        network: NetworkName,
        algorithm: AlgorithmName,
        num_shots: int,
        num_steps: int,
        num_linear_steps: int,
    ) -> Case:
        return Case(
            network=network,
            algorithm=algorithm,
            num_shots=num_shots,
            num_inner_steps=num_steps,
            num_linear_steps=None if algorithm in EXPLICIT else num_linear_steps,
            num_samples=self.num_samples,
            num_tasks=self.num_tasks,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class AccuracySettings:
    """Settings of the comparison.

    Attributes:
        budgets: Pairs (K, L) of inner steps and Hessian-vector products.
        relative_learning_rates: Grid of learning rates. The unit is the method's own: the inverse of the largest
            curvature for gradient descent, a Newton step for the natural gradient, a standard deviation of the prior
            for Adam.
        num_tuning_tasks: Tasks that learning rates are chosen on.
        num_tasks: Tasks that the error is measured on.
        num_channels: Channels of the Conv4.
        image_size: Side of its images.
        prior_log_vars: Ranges of the prior's log-variances: as initialised, and as spread as training makes them.
        num_samples: Weight samples S.
        temperature: Of the inner problem of the Conv4.
        seed: Seed of tasks, weights and noise.
        num_threads: CPU threads; None leaves torch its choice.
        output: The result file; None: benchmarks/results/DATE-accuracy-per-cost.md.
        update_readme: Put the headline ratios into the README.
    """

    budgets: tuple[tuple[int, int], ...] = ((5, 5), (10, 10))
    relative_learning_rates: tuple[float, ...] = tuple(2.0 ** (k / 2) for k in range(-7, 3))
    num_tuning_tasks: int = 2
    num_tasks: int = 3
    num_channels: int = 8
    image_size: int = 14
    prior_log_vars: tuple[tuple[float, float], ...] = ((-10.0, -9.0), (-10.0, -8.0))
    num_samples: int = 1
    temperature: float = 0.05
    seed: int = 0
    num_threads: int | None = None
    output: Path | None = None
    update_readme: bool = False

    def __post_init__(self) -> None:
        """Refuses settings without a meaning."""
        for field in ("budgets", "relative_learning_rates", "prior_log_vars"):
            if not getattr(self, field):
                raise ValueError(f"{field} must have at least one entry, but is empty.")
        if min(min(budget) for budget in self.budgets) < 1:
            raise ValueError(f"budgets must be pairs of numbers of at least 1, but are {self.budgets}.")
        if not min(self.relative_learning_rates) > 0:
            raise ValueError(f"relative_learning_rates must be positive, but are {self.relative_learning_rates}.")
        for field in ("num_tuning_tasks", "num_tasks", "num_samples"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field} must be at least 1, but is {getattr(self, field)}.")
