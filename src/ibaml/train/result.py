"""How training ends."""

from typing import Literal, NamedTuple

from ibaml.algorithms import MetaParameters

StopReason = Literal["completed", "time limit", "interrupted"]


class TrainingDivergedError(RuntimeError):
    """A loss or gradient was not finite. The state before the step is in the checkpoint."""


class TrainingResult(NamedTuple):
    """What training returns.

    Attributes:
        meta: Meta-parameters with the lowest validation nll, or the last ones without validation.
        last_meta: Meta-parameters after the last step.
        num_steps: Steps taken in all, over all resumptions.
        best_step: Step of ``meta``.
        stop_reason: Why training ended.
    """

    meta: MetaParameters
    last_meta: MetaParameters
    num_steps: int
    best_step: int
    stop_reason: StopReason
