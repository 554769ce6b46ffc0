"""Time, memory and correctness of all candidates on one case, taking turns."""

import contextlib
import copy
import dataclasses
import gc
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks import allocator
from benchmarks.breakdown import breakdown
from benchmarks.candidates import BASELINE, KEEPS_MEMORY, LIBRARY, Candidate, candidates, library
from benchmarks.counting import GRADIENTS_PER_HVP, counted_passes, needed_work
from benchmarks.problems import Case, MetaStep, Problem, build_problem
from ibaml import tree
from ibaml.experiments.fig2.cost import peak_bytes_of
from ibaml.experiments.fig2.settings import Duration
from ibaml.fast import channels_last
from ibaml.types import Batch, Tensor

# A single forward and backward pass takes milliseconds; the shortest of a few per turn is steadier.
_PLAIN_PER_TURN = 3


class Measurement(NamedTuple):
    """One candidate on one case; numbers are per task.

    Attributes:
        candidate: Name.
        seconds: Time; None if the candidate does not run.
        peak_bytes: Peak memory of the whole meta-step, of all tasks.
        num_gradients: Gradients, counted on a small network.
        num_hvps: Hessian-vector products, counted there.
        difference: Relative distance from the gradient of the baseline.
        float64_difference: The same in float64 on a small network; None if that was not looked at.
        failure: Why it does not run, or "".
    """

    candidate: str
    seconds: Duration | None = None
    peak_bytes: int = 0
    num_gradients: float = 0
    num_hvps: float = 0
    difference: float = 0
    float64_difference: float | None = None
    failure: str = ""


class CaseResult(NamedTuple):
    """All candidates on one case.

    Attributes:
        case: The case.
        plain: Name of the fastest way to do one plain forward and backward pass on the support set.
        support_seconds: Time of that.
        query_seconds: Time of the fastest plain forward and backward pass on the query set.
        measurements: One per candidate.
        parts: Where the library's time goes, in seconds per task.
    """

    case: Case
    plain: str
    support_seconds: Duration
    query_seconds: Duration
    measurements: list[Measurement]
    parts: dict[str, float]

    def of(self, candidate: str) -> Measurement:
        """Returns the line of a candidate."""
        return next(each for each in self.measurements if each.candidate == candidate)

    @property
    def limit_seconds(self) -> float:
        """Time of the needed work if every part took as long as a plain forward and backward pass on its batch."""
        work = needed_work(self.case)
        on_support = work.support_gradients + GRADIENTS_PER_HVP * work.hvps
        return on_support * self.support_seconds.median + work.query_gradients * self.query_seconds.median

    def distance_to_limit(self, measurement: Measurement) -> float:
        """Returns the median time of a candidate over that limit."""
        assert measurement.seconds is not None
        return measurement.seconds.median / self.limit_seconds


def measure_case(
    case: Case, *, device: torch.device, min_repeats: int, max_repeats: int, max_seconds: float
) -> CaseResult:
    """Measures one case: one pass that watches memory, then timed turns of all candidates.

    Args:
        case: The case.
        device: Where to measure.
        min_repeats: Least number of turns.
        max_repeats: Largest number of turns.
        max_seconds: No further turn begins after so long, once there were ``min_repeats``.
    """
    problem = build_problem(case, device=device)
    steps: dict[str, MetaStep] = {}
    found: dict[str, Measurement] = {}
    reference: list[Tensor] = []
    checks = check_on_small_network(case)
    for name, make in candidates(case.algorithm).items():
        step, found[name], gradient = _first_pass(name, make, problem, reference, checks.get(name))
        if step is not None:
            steps[name] = step
        if name == BASELINE:
            reference = gradient
    episode = problem.episodes[0]
    plain = {
        (part, way): step
        for part in episode._fields
        for way, step in plain_passes(problem.network, getattr(episode, part)).items()
    }
    seconds: dict[object, list[float]] = {name: [] for name in [*steps, *plain]}
    start = time.perf_counter()
    for turn in range(max_repeats):
        if turn >= min_repeats and time.perf_counter() - start > max_seconds:
            break
        for kept in (False, True):
            group = [name for name in steps if (name in KEEPS_MEMORY) == kept]
            allocator.use(kept=kept)
            # Not timed: the first step after the change gets its pages anew.
            steps[group[0]]()
            for name in group:
                seconds[name].append(_seconds_of(steps[name], device) / case.num_tasks)
        for name, step in plain.items():
            seconds[name].append(min(_seconds_of(step, device) for _ in range(_PLAIN_PER_TURN)))
    best = {
        part: min((name for name in plain if name[0] == part), key=lambda name: statistics.median(seconds[name]))
        for part in episode._fields
    }
    lines = [each._replace(seconds=_duration(seconds[name])) if name in steps else each for name, each in found.items()]
    support, query = (_duration(seconds[best[part]]) for part in episode._fields)
    parts = breakdown(problem) if device.type == "cpu" else {}
    return CaseResult(case, best["support"][1], support, query, lines, parts)


class Check(NamedTuple):
    """What a candidate computes and how often it passes through the network, on a small network.

    Attributes:
        difference: Relative distance from the gradient of the baseline, in float64.
        num_gradients: Gradients per task.
        num_hvps: Hessian-vector products per task.
    """

    difference: float
    num_gradients: float
    num_hvps: float


def check_on_small_network(case: Case) -> dict[str, Check]:
    """Checks all candidates; a peer that does not run is left out. Counts do not depend on the network."""
    problem = build_problem(dataclasses.replace(case, network="tiny"), dtype=torch.float64)
    found: dict[str, Check] = {}
    reference: list[Tensor] = []
    for name, make in candidates(case.algorithm).items():
        # What keeps a peer from running is told when the case is measured.
        with contextlib.suppress(*([] if name in (BASELINE, LIBRARY) else [Exception])):
            gradient = make(problem)()
            reference = gradient if name == BASELINE else reference
            difference = relative_difference(gradient, reference)
            with counted_passes(problem.network) as counter:
                (partial(make, fast=False) if make is library else make)(problem)()
            counts = counter.num_gradients / case.num_tasks, counter.num_hvps / case.num_tasks
            found[name] = Check(difference, *counts)
    return found


def plain_passes(network: nn.Module, batch: Batch) -> dict[str, Callable[[], object]]:
    """Returns ways to compute one gradient of the nll in eager mode: with channels first and, for images, last."""

    def gradient(network: nn.Module, x: Tensor) -> Callable[[], object]:
        parameters = list(network.parameters())
        return lambda: torch.autograd.grad(F.cross_entropy(network(x), batch.y), parameters)

    # Copies: the peers leave gradients in the network's own parameters.
    ways = {"channels first": gradient(copy.deepcopy(network), batch.x)}
    if batch.x.ndim == 4:
        moved = copy.deepcopy(network)
        for parameter in moved.parameters():
            parameter.data = channels_last(parameter.data)
        ways["channels last"] = gradient(moved, channels_last(batch.x))
    return ways


def relative_difference(gradient: Sequence[Tensor], reference: Sequence[Tensor]) -> float:
    """Returns ``||gradient - reference|| / ||reference||``, NaN if it is not finite."""
    gradient, reference = list(gradient), list(reference)
    return float(tree.norm(tree.sub(gradient, reference)) / tree.norm(reference))


def _first_pass(
    name: str, make: Candidate, problem: Problem, reference: list[Tensor], check: Check | None
) -> tuple[MetaStep | None, Measurement, list[Tensor]]:
    """Builds a candidate and runs it, to watch memory and to see what it computes."""
    results: list[list[Tensor]] = []
    try:
        step = make(problem)
        if problem.device.type == "cuda" or make is library:
            # CUDA's libraries allocate workspaces with the first call and keep them, and the library prepares itself.
            step()
        peak_bytes = peak_bytes_of(lambda: results.append(step()), problem.device)
    # Anything at all can go wrong in code written for another version of torch; the reason goes into the table.
    except Exception as error:
        if name in (BASELINE, LIBRARY):
            raise
        reason = (str(error).strip().splitlines() or [""])[0]
        return None, Measurement(name, failure=f"{type(error).__name__}: {reason}"), []
    gradient = [each.detach().clone() for each in results[0]]
    difference = relative_difference(gradient, reference) if reference else 0.0
    line = Measurement(name, peak_bytes=peak_bytes, difference=difference)
    if check is not None:
        line = line._replace(
            num_gradients=check.num_gradients, num_hvps=check.num_hvps, float64_difference=check.difference
        )
    return step, line, gradient


def _seconds_of(step: Callable[[], object], device: torch.device) -> float:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def _duration(seconds: Sequence[float]) -> Duration:
    return Duration(statistics.median(seconds), min(seconds), max(seconds))
