"""What a learner is, as a record that JSON can hold."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from ibaml.algorithms import Algorithm
from ibaml.likelihoods import Likelihood
from ibaml.networks import NetworkSettings
from ibaml.types import ClassScope


@dataclasses.dataclass(frozen=True, kw_only=True)
class LearnerSettings:
    """Settings of a ``MetaLearner``, which ``MetaLearner.from_settings`` builds.

    Attributes:
        network: The network; None for a module that is not one of ``ibaml.networks``.
        algorithm: What adapts, with all its settings.
        likelihood: Name of a likelihood, or one with settings of its own.
        adapt: Name patterns of the parameters that each task adapts.
        freeze: Name patterns of parameters that never change.
        classes: Whether labels mean the same in all tasks (``"shared"``) or each task has its own (``"per_task"``).

    Raises:
        TypeError: If the algorithm is none.
    """

    network: NetworkSettings | None
    algorithm: Algorithm
    likelihood: str | Likelihood = "categorical"
    adapt: tuple[str, ...] = ("*",)
    freeze: tuple[str, ...] = ()
    classes: ClassScope = "shared"

    def __post_init__(self) -> None:
        """Refuses what is no algorithm."""
        if not hasattr(self.algorithm, "hypergradient"):
            raise TypeError(f"algorithm must be a record such as ibaml.maml(), but is {self.algorithm!r}.")

    def arguments(self) -> dict[str, Any]:
        """Returns all but the network as arguments of ``MetaLearner``."""
        return {name: getattr(self, name) for name in ("algorithm", "likelihood", "adapt", "freeze", "classes")}


def as_patterns(patterns: str | Sequence[str]) -> tuple[str, ...]:
    """Returns name patterns as a tuple, also of a single one."""
    return (patterns,) if isinstance(patterns, str) else tuple(patterns)
