"""The one display of progress: a bar on a terminal, a line now and then elsewhere."""

import contextlib
import sys
import time
from collections.abc import Generator
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from rich.console import Console

_SECONDS_BEFORE = 2.0
_SECONDS_BETWEEN_LINES = 20.0


def console_of(progress: "bool | Console | None") -> "Console | None":
    """Returns where progress is shown, if anywhere.

    Args:
        progress: A console of one's own; True: stderr; None: stderr if it is a terminal; False: nowhere.
    """
    if progress is None:
        # Closed, or replaced by something that is no file: nobody looks at it.
        with contextlib.suppress(AttributeError, ValueError):
            progress = sys.stderr.isatty()
    if not isinstance(progress, bool):
        return progress
    if not progress:
        return None
    from rich.console import Console  # only for those who want to see the progress

    return Console(stderr=True)


class ProgressBar:
    """Shows how far some work has come, with the time that is left; a context manager.

    The bar comes after two seconds: what is done sooner shows none.

    Args:
        console: Where it is shown; None is silent.
        name: Word before the numbers, such as ``"step"``.
        total: Number of parts; None until ``update`` tells it.
        done: Parts that were done before.
    """

    def __init__(self, console: "Console | None", name: str, total: int | None = None, *, done: int = 0) -> None:
        from rich import progress  # takes long, and importing the library needs none

        self._console = console
        self._name = name
        self._total, self._first, self._start = total, done, time.monotonic()
        self._last_line = self._start
        self._progress = progress.Progress(
            progress.TextColumn(f"[bold]{name}"),
            progress.BarColumn(bar_width=24),
            progress.MofNCompleteColumn(),
            progress.TextColumn("{task.fields[status]}"),
            progress.TimeElapsedColumn(),
            progress.TextColumn("left"),
            progress.TimeRemainingColumn(elapsed_when_finished=False),
            console=console,
            disable=console is None or not console.is_terminal,
        )
        self._task = self._progress.add_task(name, total=total, completed=done, status="")
        self._is_shown = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        with self._unless_it_fails():
            if self._is_shown:
                self._progress.stop()

    @contextlib.contextmanager
    def _unless_it_fails(self) -> Generator[None]:
        """Shows nothing any more once that fails: a closed terminal or pipe, or a full disk, ends no work."""
        try:
            yield
        # SystemExit: what rich makes of a pipe that nobody reads. ValueError: a closed file.
        except (OSError, ValueError, SystemExit):
            self._console = None
            self._progress.disable = True

    def update(self, done: int, total: int | None = None, *, status: str = "") -> None:
        """Shows that so many parts are done."""
        self._total = total or self._total
        now = time.monotonic()
        with self._unless_it_fails():
            if not self._is_shown and now - self._start > _SECONDS_BEFORE:
                self._progress.start()
                self._is_shown = True
            self._progress.update(self._task, completed=done, total=self._total, status=status)
        if self._console is None or self._console.is_terminal or self._total is None or done <= self._first:
            return
        if now - self._last_line > _SECONDS_BETWEEN_LINES:
            self._last_line = now
            left = (now - self._start) / (done - self._first) * (self._total - done)
            words = " ".join(filter(None, (self._name, f"{done}/{self._total}", status)))
            self.say(f"{words}, {left / 60:.1f} min left")

    def say(self, line: str) -> None:
        """Prints a line above the bar."""
        if self._console is not None and not say(self._console, line):
            self._console = None
            self._progress.disable = True


def say(console: "Console | None", line: str, *, markup: bool = False) -> bool:
    """Prints a line, or says by False that nobody can read it: a closed terminal or pipe, or a full disk, ends no work.

    Args:
        console: Where; None is silent.
        line: What.
        markup: Whether words in brackets are styles of rich.
    """
    if console is None:
        return True
    try:
        console.print(line, soft_wrap=True, markup=markup, highlight=False)
    # SystemExit: what rich makes of a pipe that nobody reads. ValueError: a closed file, or a letter that it lacks.
    except (OSError, ValueError, SystemExit):
        return False
    return True
