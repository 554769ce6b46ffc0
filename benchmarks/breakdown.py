"""Where the library's time goes: in which programs, and outside of them."""

import contextlib
import time
from collections import defaultdict
from collections.abc import Callable, Generator, Sequence
from typing import Any
from unittest import mock

from benchmarks.candidates import library
from benchmarks.problems import Problem
from ibaml.fast import derivatives
from ibaml.types import Tensor

REST = "vectors, solvers, Python"


def breakdown(problem: Problem, *, num_repeats: int = 3) -> dict[str, float]:
    """Returns the seconds per task by part of a meta-step, in the order of the parts; CPU only.

    The parts are gradients on the support and on the query set, gradients that bring the residuals along, products,
    and ``REST``: all that is done to vectors of the size of the parameters, and Python.

    Args:
        problem: The problem.
        num_repeats: Meta-steps to average over, after two that are not counted.
    """
    num_support = len(problem.episodes[0].support.y)
    with _timed_programs(num_support) as seconds:
        step = library(problem)
        for _ in range(2):
            step()
        seconds.clear()
        start = time.perf_counter()
        for _ in range(num_repeats):
            step()
        total = time.perf_counter() - start
        parts = dict(seconds)
    parts[REST] = total - sum(parts.values())
    return {name: value / num_repeats / len(problem.episodes) for name, value in sorted(parts.items(), key=_by_size)}


def _by_size(part: tuple[str, float]) -> tuple[bool, float]:
    return part[0] == REST, -part[1]


@contextlib.contextmanager
def _timed_programs(num_support: int) -> Generator[dict[str, float]]:
    """Adds up the time of all programs that are written while the context is open."""
    seconds: dict[str, float] = defaultdict(float)

    def timed(name: str, program: Callable[..., Any]) -> Callable[..., Any]:
        def run(*tensors: Tensor) -> Any:
            start = time.perf_counter()
            results = program(*tensors)
            seconds[name] += time.perf_counter() - start
            return results

        return run

    gradient, product = derivatives.trace_gradient, derivatives.trace_product

    def trace_gradient(loss: Any, point: Sequence[Tensor], constants: Sequence[Tensor], **settings: Any) -> Any:
        is_support = constants[-1].shape[-1] == num_support
        return timed(f"gradients, {'support' if is_support else 'query'}", gradient(loss, point, constants, **settings))

    def trace_product(*arguments: Any, **settings: Any) -> Any:
        names = ("gradients with residuals", "products")
        return tuple(timed(name, program) for name, program in zip(names, product(*arguments, **settings), strict=True))

    with mock.patch.multiple(derivatives, trace_gradient=trace_gradient, trace_product=trace_product):
        yield seconds
