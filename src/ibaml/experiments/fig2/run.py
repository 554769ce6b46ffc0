"""Fig. 2 of Zhang et al. 2023: what one hypergradient costs in time and memory.

The cost of the explicit algorithms (MAML, ABML) should grow linearly with the number K of inner steps, that of the
implicit ones (iMAML, iBaML) should depend on the number L of conjugate gradient steps alone. Images are random: neither
time nor memory depends on what they show.

How it is measured:

- It is the library's own hypergradient (``Algorithm.hypergradient``), of the plain nll of a model: automatic
  differentiation as in the paper, without the programs of ``ibaml.fast``.
- Every point has a process of its own. The processes of one curve (one algorithm, one L, every K) wait for one another
  and take turns repeat by repeat, so that a machine that slows down for a while does so for every K alike.
- The forward half is the inner solve and the value of the outer loss, the backward half all the rest, by the same rule
  for all four algorithms. The query set is much larger than the support set, so counting its forward pass as backward
  for the implicit algorithms alone would tilt the comparison. Where the one ends is seen from the passes of the nll.
- Memory is the peak, over both halves, of the bytes that torch's allocator has handed out and not got back, above the
  level before: ``torch.cuda.max_memory_allocated`` on CUDA, the allocation events of ``torch.profiler`` on the CPU. It
  repeats to the byte. The growth of the process's resident set repeats to half a percent only, and only with a tuned
  ``malloc``; at the default size it comes out 70 MB smaller (380 against 450 MB for iBaML, 521 against 593 for MAML at
  K = 5), because the derivative of batch normalisation asks for a buffer of 68 MB that it never writes to. Scratch
  memory that the convolution library keeps for itself is not counted.
- Gradients and Hessian-vector products are counted by a probe in the network's outputs during a pass that is not timed.
"""

import contextlib
import dataclasses
import itertools
import statistics
from collections.abc import Callable, Sequence
from typing import Any

from ibaml.experiments.fig2.process import measuring_process
from ibaml.experiments.fig2.settings import EXPLICIT, AlgorithmName, CostPoint, Duration, Fig2Result, Fig2Settings
from ibaml.train.devices import resolve_device


def run(settings: Fig2Settings, *, on_progress: Callable[[int, int], None] | None = None) -> Fig2Result:
    """Measures all points.

    Args:
        settings: Settings of the experiment.
        on_progress: Called after every measurement with the number of those done and of all.

    Raises:
        ValueError: If ``settings.device`` is "cuda" and torch finds no CUDA device.
        RuntimeError: If a measuring process fails; the message ends with what it wrote to its standard error.

    Cost:
        ``num_repeats + 1`` hypergradients per point and one start of Python. One process per K is alive at a time.
    """
    settings = dataclasses.replace(settings, device="cuda" if resolve_device(settings.device).type == "cuda" else "cpu")
    curves = _curves(settings)
    num_measurements = len(curves) * len(settings.inner_steps) * (settings.num_repeats + 1)
    done = itertools.count(1)

    def on_measurement() -> None:
        if on_progress is not None:
            on_progress(next(done), num_measurements)

    device = ""
    points: list[CostPoint] = []
    for algorithm, num_linear_steps in curves:
        device, curve = _measure_curve(settings, algorithm, num_linear_steps, on_measurement)
        points += curve
    return Fig2Result(settings, device, points)


def _measure_curve(
    settings: Fig2Settings,
    algorithm: AlgorithmName,
    num_linear_steps: int | None,
    on_measurement: Callable[[], None],
) -> tuple[str, list[CostPoint]]:
    """Returns what it was measured on, and the points of one curve."""
    with contextlib.ExitStack() as stack:
        ask = [
            stack.enter_context(measuring_process(settings, algorithm, num_inner_steps, num_linear_steps))
            for num_inner_steps in settings.inner_steps
        ]
        answers: list[list[dict[str, Any]]] = [[] for _ in ask]
        for command in ("count", *["time"] * settings.num_repeats):
            for ask_process, answers_of_process in zip(ask, answers, strict=True):
                answers_of_process.append(ask_process(command))
                on_measurement()
    points = [
        CostPoint(
            algorithm,
            num_inner_steps,
            num_linear_steps,
            forward_seconds=_duration([each["forward"] for each in times]),
            backward_seconds=_duration([each["backward"] for each in times]),
            total_seconds=_duration([each["forward"] + each["backward"] for each in times]),
            **counts["point"],
        )
        for num_inner_steps, (counts, *times) in zip(settings.inner_steps, answers, strict=True)
    ]
    return answers[0][0]["device"], points


def _curves(settings: Fig2Settings) -> list[tuple[AlgorithmName, int | None]]:
    return [
        (algorithm, num_linear_steps)
        for algorithm in settings.algorithms
        for num_linear_steps in ([None] if algorithm in EXPLICIT else settings.linear_steps)
    ]


def _duration(seconds: Sequence[float]) -> Duration:
    return Duration(statistics.median(seconds), min(seconds), max(seconds))
