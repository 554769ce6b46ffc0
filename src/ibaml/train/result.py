"""How training ends."""

import math
from typing import Literal, NamedTuple

from ibaml.algorithms import MetaParameters
from ibaml.metrics import AbstentionCurve

StopReason = Literal["completed", "time limit", "interrupted"]


class TrainingDivergedError(RuntimeError):
    """A loss or gradient was not finite. The state before the step is in the checkpoint."""


class Chosen(NamedTuple):
    """The state that training chose so far.

    Attributes:
        meta: Meta-parameters with the lowest validation nll, or the last ones without validation.
        step: Their step; 0 before the first choice.
        nll: Their validation nll; infinite before the first validation.
        temperature: Output temperature that fits the validation tasks best there; 1 without any.
        abstention: How often confident predictions of the validation tasks were wrong, at it; for classes.
    """

    meta: MetaParameters
    step: int = 0
    nll: float = math.inf
    temperature: float = 1.0
    abstention: AbstentionCurve | None = None


class TrainingResult(NamedTuple):
    """What training returns.

    Attributes:
        chosen: The chosen state.
        last_meta: Meta-parameters after the last step.
        num_steps: Steps taken in all, over all resumptions.
        stop_reason: Why training ended.
        seconds: Seconds spent in all, validations but the last included.
        ended_by: The signal that ended it; None if it was none, or came to another process.
    """

    chosen: Chosen
    last_meta: MetaParameters
    num_steps: int
    stop_reason: StopReason
    seconds: float
    ended_by: int | None = None

    @property
    def meta(self) -> MetaParameters:
        """Meta-parameters with the lowest validation nll, or the last ones without validation."""
        return self.chosen.meta

    @property
    def best_step(self) -> int:
        """Step of ``meta``."""
        return self.chosen.step
