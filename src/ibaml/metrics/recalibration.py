"""What a fit of the output temperature found, and whether it was taken."""

import dataclasses

from ibaml.metrics.intervals import Estimate
from ibaml.metrics.sizes import Sizes


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recalibration:
    """The nll before and after, on tasks that the temperature was not fitted on; ``str`` is one line.

    Attributes:
        before: The temperature before.
        fitted: The temperature with the least nll on all tasks.
        is_taken: Whether it is used from now on: tasks were enough, and ``gain`` leaves zero outside its interval.
        nll_before: Mean nll in nats, with the temperature before.
        nll_after: The same of predictions whose temperature was fitted on the other tasks.
        gain: By how much the nll fell, paired over the tasks.
        num_tasks: Number of different tasks.
        num_support: How many examples of a task were known; None if that was not counted.
        least_tasks: How many tasks are needed.

    Examples:
        >>> found = Recalibration(
        ...     before=1.0,
        ...     fitted=1.4,
        ...     is_taken=True,
        ...     nll_before=Estimate(0.52, 0.04, 40),
        ...     nll_after=Estimate(0.47, 0.03, 40),
        ...     gain=Estimate(0.05, 0.01, 40),
        ...     num_tasks=40,
        ...     num_support=Sizes.of([3, 3]),
        ...     least_tasks=10,
        ... )
        >>> print(found)
        temperature 1 -> 1.4: nll 0.520 -> 0.470, gain 0.050 +- 0.010, on 40 tasks held apart, with 3 known examples
    """

    before: float
    fitted: float
    is_taken: bool
    nll_before: Estimate
    nll_after: Estimate
    gain: Estimate
    num_tasks: int
    num_support: Sizes | None = None
    least_tasks: int

    @property
    def temperature(self) -> float:
        """The temperature that is used from now on."""
        return self.fitted if self.is_taken else self.before

    def __str__(self) -> str:
        """Says what was done and why."""
        known = "" if self.num_support is None else f", with {self.num_support} known examples"
        if self.num_tasks < self.least_tasks:
            few = f"{self.num_tasks} task{'' if self.num_tasks == 1 else 's'}{known}; needed are {self.least_tasks}"
            return f"temperature stays {self.before:.3g}: {few}"
        found = f"nll {self.nll_before.mean:.3f} -> {self.nll_after.mean:.3f}, gain {self.gain}"
        on = f"on {self.num_tasks} tasks held apart{known}"
        if self.is_taken:
            return f"temperature {self.before:.3g} -> {self.fitted:.3g}: {found}, {on}"
        return f"temperature stays {self.before:.3g}: with {self.fitted:.3g} {found} (not clear), {on}"

    def __repr__(self) -> str:
        """As ``str``: what a user wants to see of it."""
        return f"<{self}>"
