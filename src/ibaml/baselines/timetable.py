"""How long a comparison takes, said before it starts and as it goes on."""

import contextlib
import time
from collections.abc import Generator, Sequence

from ibaml.baselines.base import Baseline, Problem
from ibaml.baselines.training import TrainedBaseline, expected_seconds

_SHORT = 2.0
_BUSY = 0.7
"""Share of a core below which a training on the CPU has waited for other work."""


class Timetable:
    """Tells the user what is waited for.

    Args:
        problem: The tasks, and who is told.
        seconds: Time of training.
        baselines: What is to be fitted; what is fitted already takes no time.
    """

    def __init__(self, problem: Problem, seconds: float, baselines: Sequence[Baseline]) -> None:
        self._problem, self._seconds = problem, seconds
        self._expected = {
            one.name: _expected(one, problem, seconds) for one in baselines if isinstance(one, TrainedBaseline)
        }
        self._left = sum(self._expected.values())

    def announce(self) -> None:
        """Says what trains, and how long all of it takes."""
        if self._left < _SHORT:
            return
        each = ", ".join(f"{name} {duration(one)}" for name, one in self._expected.items())
        self._problem.say(
            f"Fitting takes about {duration(self._left)}: {each}. Each trains for {self._seconds:.0f} s by the clock, "
            "after a trial of a quarter of that for each of its settings."
        )

    @contextlib.contextmanager
    def fitting(self, name: str) -> Generator[None]:
        """Says that a baseline is fitted, and afterwards whether the machine was busy.

        Args:
            name: Of the baseline.
        """
        expected = self._expected.get(name, 0.0)
        left = f"; {duration(self._left)} left in all" if self._left >= _SHORT else ""
        about = f", about {duration(expected)}" if expected >= _SHORT else ""
        self._problem.say(f"{name}: fitting{about}{left}")
        start, processor = time.monotonic(), time.process_time()
        yield
        self._left -= expected
        taken = time.monotonic() - start
        share = (time.process_time() - processor) / max(taken, 1e-9)
        if expected >= _SHORT and self._problem.learner.device.type == "cpu" and share < _BUSY:
            self._problem.say(
                f"    {name} had {share:.0%} of a core, as other work ran beside it. If the learner had more, compare "
                "again on an idle machine, or give it more seconds."
            )


def duration(seconds: float) -> str:
    """Returns a time in words.

    Args:
        seconds: Not negative.

    Examples:
        >>> duration(41.7), duration(200)
        ('42 s', '3.3 min')
    """
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.1f} min"


def _expected(baseline: TrainedBaseline, problem: Problem, seconds: float) -> float:
    try:
        return expected_seconds(baseline.settings(problem), seconds)
    except ValueError:
        # Fitting will say why, at once.
        return 0.0
