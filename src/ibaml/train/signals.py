"""Signals that end training after the running step."""

import contextlib
import signal
import threading
from collections.abc import Callable, Generator
from types import FrameType
from typing import Any


@contextlib.contextmanager
def caught_signals() -> Generator[list[int], None, None]:
    """Collects SIGINT and SIGTERM instead of acting on them; a second SIGINT raises KeyboardInterrupt.

    Outside the main thread, which alone gets signals, nothing is collected.
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
    for number in (signal.SIGINT, signal.SIGTERM):
        previous[number] = signal.signal(number, handle)
    try:
        yield caught
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
