"""How training ends."""

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

from ibaml.algorithms import Algorithm, MetaParameters
from ibaml.metrics import AbstentionCurve
from ibaml.train.settings import TrainerSettings
from ibaml.types import HypergradientInfo, Tensor

StopReason = Literal["completed", "time limit", "interrupted"]


class TrainingDivergedError(RuntimeError):
    """A loss or gradient was not finite. The state before the step is in the checkpoint."""


def raise_divergence(
    step: int,
    tasks: Sequence[int],
    info: HypergradientInfo,
    norm: Tensor,
    algorithm: Algorithm,
    settings: TrainerSettings,
    where: str,
) -> None:
    """Raises the error of a step whose hypergradient is not finite.

    Args:
        step: The step.
        tasks: Numbers of its tasks that are to blame.
        info: Diagnostics of all its tasks.
        norm: Norm of the hypergradient.
        algorithm: What computed it.
        settings: Settings of the loop.
        where: Says where the state before is.

    Raises:
        TrainingDivergedError: In every case.
    """
    raise TrainingDivergedError(
        f"step {step}: the hypergradient is not finite (norm {float(norm)}; tasks {tasks} of the step; their inner "
        f"gradient norms {info.inner_grad_norm[tasks].tolist()}). Likely causes: inner steps ({algorithm.describe()}) "
        f"or learning_rate ({settings.learning_rate}) too large, or inputs far from unit scale. {where}"
    )


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
