"""Signals that end training after the running step, and reach whom they were meant for afterwards."""

import contextlib
import contextvars
import signal
import sys
import threading
from collections.abc import Callable, Generator
from types import FrameType
from typing import Any

_results_are_read: contextvars.ContextVar[bool] = contextvars.ContextVar("_results_are_read", default=False)


@contextlib.contextmanager
def caught_signals() -> Generator[list[int], None, None]:
    """Collects SIGINT, SIGTERM and SIGHUP instead of acting on them; a second SIGINT raises KeyboardInterrupt.

    A SIGHUP that is ignored, as under ``nohup``, stays so. Outside the main thread, which alone gets signals, nothing
    is collected.
    """
    caught: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield caught
        return

    def handle(number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and caught:
            raise KeyboardInterrupt
        caught.append(number)

    previous: dict[int, Callable[..., Any] | int | None] = {}
    for number in (signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", None)):
        if number is None or (number not in (signal.SIGINT, signal.SIGTERM) and _is_ignored(number)):
            continue
        previous[number] = signal.signal(number, handle)
    try:
        yield caught
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def results_are_read() -> Generator[None, None, None]:
    """Says that the caller looks at ``stop_reason`` itself and ends: nothing is passed on within the block."""
    token = _results_are_read.set(True)
    try:
        yield
    finally:
        _results_are_read.reset(token)


def pass_on(number: int | None, told: str, *, is_saved: bool) -> None:
    """Passes a signal that has ended a training on to the program, which would else go on as if nothing had happened.

    SIGINT stays here if the state is saved: who works at a prompt gets the learner so far.

    Args:
        number: The signal. None: there was none.
        told: What is printed on stderr.
        is_saved: Whether the state is in a run folder.

    Raises:
        KeyboardInterrupt: Of SIGINT, unless the program handles it otherwise.
    """
    if number is None or _results_are_read.get():
        return
    with contextlib.suppress(OSError, ValueError, AttributeError):
        print(f"Training was ended by {signal.Signals(number).name} {told}", file=sys.stderr, flush=True)
    if number != signal.SIGINT or not is_saved:
        signal.raise_signal(number)


def _is_ignored(number: int) -> bool:
    return signal.getsignal(number) == signal.SIG_IGN
