"""Fig. 2 of Zhang et al. 2023: what one meta-gradient costs in time and memory.

The cost of the explicit algorithms (MAML, ABML) should grow linearly with the number K of inner steps, that of the
implicit ones (iMAML, iBaML) should depend on the number L of conjugate gradient steps alone. Images are random: neither
time nor memory depends on what they show.

How it is measured:

- Every point has a process of its own. The processes of one curve (one algorithm, one L, every K) wait for one another
  and take turns repeat by repeat, so that a machine that slows down for a while does so for every K alike.
- The forward half is the inner solve and the value of the outer loss, the backward half all the rest, by the same rule
  for all four algorithms. The query set is much larger than the support set, so counting its forward pass as backward
  for the implicit algorithms alone would tilt the comparison.
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
import gc
import itertools
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Generator, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias, cast, get_args

import numpy as np
import torch

from ibaml.algorithms import make_algorithm
from ibaml.experiments.meta_gradient import (
    MetaGradientProblem,
    PassCounter,
    meta_gradient_in_halves,
    peak_bytes_of,
)
from ibaml.likelihoods import Categorical
from ibaml.model import Model, build_model
from ibaml.networks import Conv4
from ibaml.runs import resolve_device
from ibaml.solvers.inner import GradientDescent
from ibaml.solvers.linear import CG
from ibaml.types import Batch, Episode

AlgorithmName: TypeAlias = Literal["maml", "imaml", "abml", "ibaml"]
DISPLAY_NAMES = {"maml": "MAML", "imaml": "iMAML", "abml": "ABML", "ibaml": "iBaML"}
EXPLICIT: tuple[AlgorithmName, ...] = ("maml", "abml")

# The cost of a step does not depend on these, but conjugate gradients stop early where the curvature is negative, and
# an untrained network has negative curvature: the pull towards the prior has to outweigh it. It must not do so by
# orders of magnitude either, or the residual underflows before the last step.
_INNER_LEARNING_RATE = 0.005
_PROXIMAL_STRENGTH = 30.0
_TEMPERATURE = 0.01


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fig2Settings:
    """Settings of the experiment; the defaults are the paper's network and task, Conv4-32 with max-pooling.

    Attributes:
        inner_steps: Numbers K of inner steps.
        linear_steps: Numbers L of conjugate gradient steps, for the implicit algorithms.
        algorithms: Which of "maml", "imaml", "abml" and "ibaml".
        device: "auto" (CUDA if present), "cpu" or "cuda".
        num_channels: Channels of every block of the network.
        image_size: Side of the square images of three channels.
        num_ways: Classes of the task.
        num_shots: Support images per class.
        num_queries: Query images per class.
        num_samples: Weight samples S of ABML and iBaML; each costs one pass through the network.
        num_repeats: Timed repeats of every point.
        num_threads: CPU threads; None leaves torch its choice.
        seed: Seed of images, initial weights and noise.
    """

    inner_steps: tuple[int, ...] = (1, 5, 10, 15, 20, 30)
    linear_steps: tuple[int, ...] = (5, 10)
    algorithms: tuple[AlgorithmName, ...] = ("maml", "imaml", "abml", "ibaml")
    device: Literal["auto", "cpu", "cuda"] = "auto"
    num_channels: int = 32
    image_size: int = 84
    num_ways: int = 5
    num_shots: int = 1
    num_queries: int = 15
    num_samples: int = 1
    num_repeats: int = 4
    num_threads: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuses settings without a meaning."""
        for field in ("inner_steps", "linear_steps"):
            steps = getattr(self, field)
            if not steps or min(steps) < 1 or len({*steps}) < len(steps):
                raise ValueError(f"{field} must be one or more different numbers of at least 1, but is {steps}.")
        known = get_args(AlgorithmName)
        if not self.algorithms or {*self.algorithms} - {*known} or len({*self.algorithms}) < len(self.algorithms):
            raise ValueError(f"algorithms must be one or more of {', '.join(known)}, but is {self.algorithms}.")
        if self.device not in ("auto", "cpu", "cuda"):
            raise ValueError(f"device must be auto, cpu or cuda, but is {self.device!r}.")
        if self.num_ways < 2:
            raise ValueError(f"num_ways must be at least 2, but is {self.num_ways}.")
        for field in ("num_channels", "image_size", "num_shots", "num_queries", "num_samples", "num_repeats"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field} must be at least 1, but is {getattr(self, field)}.")
        if self.num_threads is not None and self.num_threads < 1:
            raise ValueError(f"num_threads must be at least 1 or None, but is {self.num_threads}.")


class Duration(NamedTuple):
    """How long the repeats of one measurement took, in seconds.

    Attributes:
        median: Of the repeats.
        shortest: What else happens on the machine can only add to a time, so this is the cleanest value.
        longest: The other end of the spread.
    """

    median: float
    shortest: float
    longest: float


class CostPoint(NamedTuple):
    """The cost of one meta-gradient of one task.

    A gradient or product is that of the mean nll of one batch under one weight sample.

    Attributes:
        algorithm: "maml", "imaml", "abml" or "ibaml".
        num_inner_steps: K.
        num_linear_steps: L; None for the explicit algorithms.
        forward_seconds: Time of the inner solve and the outer loss.
        backward_seconds: Time of the meta-gradient after that.
        total_seconds: Time of both.
        peak_bytes: Peak memory over both halves.
        num_forward_gradients: Gradients during the forward half.
        num_backward_gradients: Gradients during the backward half.
        num_hvps: Hessian-vector products that were really made; an unrolled step costs one.
    """

    algorithm: AlgorithmName
    num_inner_steps: int
    num_linear_steps: int | None
    forward_seconds: Duration
    backward_seconds: Duration
    total_seconds: Duration
    peak_bytes: int
    num_forward_gradients: int
    num_backward_gradients: int
    num_hvps: int


class Fig2Result(NamedTuple):
    """All points of the experiment.

    Attributes:
        settings: The settings, with the device that "auto" stood for.
        device: Hardware, number of threads and version of torch.
        points: Curve by curve, in the order of ``settings``.
    """

    settings: Fig2Settings
    device: str
    points: list[CostPoint]


class Slope(NamedTuple):
    """How the cost of one curve depends on the number of inner steps.

    Attributes:
        algorithm: Of the curve.
        num_linear_steps: Of the curve.
        first: The smaller number of inner steps that is compared.
        last: The larger one.
        backward_seconds: ``cost(last) / cost(first) - 1`` for the shortest backward time.
        total_seconds: The same for the shortest time of both halves.
        peak_bytes: The same for peak memory.
        backward_seconds_bend: Largest distance of the shortest backward times from their least-squares line in K, over
            their mean: near 0 if the time is linear in K. All K count.
        peak_bytes_bend: The same for peak memory.
    """

    algorithm: AlgorithmName
    num_linear_steps: int | None
    first: int
    last: int
    backward_seconds: float
    total_seconds: float
    peak_bytes: float
    backward_seconds_bend: float
    peak_bytes_bend: float


def run(settings: Fig2Settings, *, on_progress: Callable[[int, int], None] | None = None) -> Fig2Result:
    """Measures all points.

    Args:
        settings: Settings of the experiment.
        on_progress: Called after every measurement with the number of those done and of all.

    Raises:
        ValueError: If ``settings.device`` is "cuda" and torch finds no CUDA device.
        RuntimeError: If a measuring process fails; the message ends with what it wrote to its standard error.

    Cost:
        ``num_repeats + 1`` meta-gradients per point and one start of Python. One process per K is alive at a time.
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
            stack.enter_context(_measuring_process(settings, algorithm, num_inner_steps, num_linear_steps))
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


def slope(points: Iterable[CostPoint], *, first: int | None = None, last: int | None = None) -> list[Slope]:
    """Compares the cost at a large number of inner steps with that at a small one, curve by curve.

    Args:
        points: Points of a result; every curve has the same numbers of inner steps.
        first: Smaller number of inner steps. None: 5, or the smallest if 5 is not one of several.
        last: Larger number of inner steps. None: the largest.

    Raises:
        ValueError: If ``first`` or ``last`` was not measured, or ``first`` is not below ``last``.
    """
    curves: dict[tuple[AlgorithmName, int | None], dict[int, CostPoint]] = {}
    for point in points:
        curves.setdefault((point.algorithm, point.num_linear_steps), {})[point.num_inner_steps] = point
    slopes: list[Slope] = []
    for (algorithm, num_linear_steps), curve in curves.items():
        end = last if last is not None else max(curve)
        start = first if first is not None else (5 if 5 in curve and end > 5 else min(curve))
        if start not in curve or end not in curve or start >= end:
            raise ValueError(
                f"first and last must be two of the numbers of inner steps {sorted(curve)}, the smaller one first, but "
                f"are {start} and {end}."
            )
        backward = {k: point.backward_seconds.shortest for k, point in curve.items()}
        total = {k: point.total_seconds.shortest for k, point in curve.items()}
        memory = {k: float(point.peak_bytes) for k, point in curve.items()}
        slopes.append(
            Slope(
                algorithm,
                num_linear_steps,
                start,
                end,
                backward_seconds=backward[end] / backward[start] - 1,
                total_seconds=total[end] / total[start] - 1,
                peak_bytes=memory[end] / memory[start] - 1,
                backward_seconds_bend=_bend(backward),
                peak_bytes_bend=_bend(memory),
            )
        )
    return slopes


def curve_name(algorithm: AlgorithmName, num_linear_steps: int | None) -> str:
    """Returns the name of a curve for readers.

    Examples:
        >>> curve_name("maml", None), curve_name("ibaml", 5)
        ('MAML', 'iBaML, L = 5')
    """
    name = DISPLAY_NAMES[algorithm]
    return name if num_linear_steps is None else f"{name}, L = {num_linear_steps}"


def rows(result: Fig2Result) -> list[dict[str, object]]:
    """Returns one flat row per point, for a CSV file; times in seconds, memory in bytes."""
    table: list[dict[str, object]] = []
    for point in result.points:
        row: dict[str, object] = {}
        for name, value in point._asdict().items():
            if isinstance(value, Duration):
                row |= {f"{name}_{statistic}": seconds for statistic, seconds in value._asdict().items()}
            else:
                row[name] = value
        table.append(row)
    return table


def summary(result: Fig2Result) -> str:
    """Returns all numbers and how they came about as Markdown."""
    settings = result.settings
    lines = [
        "# Fig. 2: cost of one meta-gradient",
        "",
        f"One meta-gradient of Conv4-{settings.num_channels} (max-pooling, batch normalisation), "
        f"{settings.image_size} x {settings.image_size} x 3 random images, {settings.num_ways}-way "
        f"{settings.num_shots}-shot, {settings.num_queries} query images a class, "
        f"{settings.num_samples} weight sample(s), float32; {result.device}. Times are medians of "
        f"{settings.num_repeats} interleaved repeats (shortest to longest) in a process per point; memory is the peak "
        "of what torch's allocator handed out during both halves. Forward: inner solve and outer loss. Gradients "
        "(forward + backward) and Hessian-vector products are counted, per batch and weight sample. Conjugate "
        "gradients run L steps without a tolerance; so that they meet no negative curvature, the strength of iMAML's "
        f"proximal term is {_PROXIMAL_STRENGTH:g} (temperature of ABML and iBaML {_TEMPERATURE:g}, inner learning rate "
        f"{_INNER_LEARNING_RATE:g}).",
        "",
        "| algorithm | K | backward, s | forward + backward, s | peak memory, MB | gradients | HVPs |",
        "|---|---|---|---|---|---|---|",
    ]
    for point in result.points:
        backward, total = point.backward_seconds, point.total_seconds
        lines.append(
            f"| {curve_name(point.algorithm, point.num_linear_steps)} | {point.num_inner_steps} "
            f"| {backward.median:.3f} ({backward.shortest:.3f} to {backward.longest:.3f}) "
            f"| {total.median:.3f} ({total.shortest:.3f} to {total.longest:.3f}) "
            f"| {point.peak_bytes / 1e6:.1f} "
            f"| {point.num_forward_gradients} + {point.num_backward_gradients} | {point.num_hvps} |"
        )
    if len(settings.inner_steps) > 1:
        slopes = slope(result.points)
        lines += [
            "",
            f"From K = {slopes[0].first} to K = {slopes[0].last}, shortest times; in brackets the largest distance "
            "from a straight line through all K, relative to the mean:",
            "",
            "| algorithm | backward time | forward + backward | peak memory |",
            "|---|---|---|---|",
        ]
        lines += [
            f"| {curve_name(each.algorithm, each.num_linear_steps)} "
            f"| {each.backward_seconds:+.1%} ({each.backward_seconds_bend:.1%}) | {each.total_seconds:+.1%} "
            f"| {each.peak_bytes:+.2%} ({each.peak_bytes_bend:.2%}) |"
            for each in slopes
        ]
    ratios = _ratios(result)
    if ratios:
        lines += ["", "Ratios, median over the points that both have:", "", *ratios]
    early = [point for point in result.points if point.num_hvps < _num_hvps_asked(settings, point)]
    if early:
        names = ", ".join(f"{curve_name(p.algorithm, p.num_linear_steps)} at K = {p.num_inner_steps}" for p in early)
        lines += ["", f"Conjugate gradients stopped before step L, so that the cost is too low: {names}."]
    return "\n".join(lines) + "\n"


def build_problem(
    settings: Fig2Settings,
    algorithm: AlgorithmName,
    num_inner_steps: int,
    num_linear_steps: int | None,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> tuple[MetaGradientProblem, Model]:
    """Builds network, algorithm and a random task.

    Args:
        settings: Sizes and seed.
        algorithm: Which algorithm.
        num_inner_steps: K.
        num_linear_steps: L; None for an explicit algorithm.
        device: Where everything lies.
        dtype: Floating-point type of everything.

    Returns:
        The problem, and the model whose nll it uses.
    """
    generator = torch.Generator().manual_seed(settings.seed)
    network = Conv4(
        settings.num_ways,
        in_channels=3,
        image_size=settings.image_size,
        channels=settings.num_channels,
        downsample="max_pool",
        generator=generator,
    )
    model = build_model(network.to(dtype), Categorical()).to(torch.device(device))

    def batch(num_each: int) -> Batch:
        size = (settings.num_ways * num_each, *network.input_shape)
        images = torch.randn(size, generator=generator, dtype=dtype)
        return Batch(images.to(device), torch.arange(settings.num_ways, device=device).repeat_interleave(num_each))

    chosen: dict[str, Any] = {"inner": GradientDescent(num_steps=num_inner_steps, learning_rate=_INNER_LEARNING_RATE)}
    if num_linear_steps is not None:
        # A tolerance of zero is never met, so that every solve takes L steps.
        chosen["linear"] = CG(max_steps=num_linear_steps, rtol=0.0)
    if algorithm == "imaml":
        chosen["proximal_strength"] = _PROXIMAL_STRENGTH
    if algorithm in ("abml", "ibaml"):
        chosen |= {"num_samples": settings.num_samples, "temperature": _TEMPERATURE}
    built = make_algorithm(algorithm, **chosen)
    meta = built.init(model.adapted, model.shared, generator=generator)
    noise = built.draw_noise(meta, generator=generator)
    episode = Episode(batch(settings.num_shots), batch(settings.num_queries))
    return MetaGradientProblem(built, model.nll, meta, episode, noise), model


def _curves(settings: Fig2Settings) -> list[tuple[AlgorithmName, int | None]]:
    return [
        (algorithm, num_linear_steps)
        for algorithm in settings.algorithms
        for num_linear_steps in ([None] if algorithm in EXPLICIT else settings.linear_steps)
    ]


def _num_hvps_asked(settings: Fig2Settings, point: CostPoint) -> int:
    per_sample = point.num_inner_steps if point.num_linear_steps is None else point.num_linear_steps
    return per_sample * (settings.num_samples if point.algorithm in ("abml", "ibaml") else 1)


def _duration(seconds: Sequence[float]) -> Duration:
    return Duration(statistics.median(seconds), min(seconds), max(seconds))


def _bend(curve: dict[int, float]) -> float:
    steps, values = np.array(list(curve), dtype=np.float64), np.array(list(curve.values()))
    line = np.polynomial.Polynomial.fit(steps, values, deg=min(1, len(steps) - 1))
    return float(np.abs(values - line(steps)).max() / values.mean())


def _ratios(result: Fig2Result) -> list[str]:
    """Compares Gaussians with weights at equal K and L, and implicit with explicit at K = L."""
    points = {(point.algorithm, point.num_inner_steps, point.num_linear_steps): point for point in result.points}
    compared: dict[str, list[tuple[CostPoint, CostPoint]]] = {}
    for (algorithm, num_inner_steps, num_linear_steps), point in points.items():
        for plain, bayesian in (("maml", "abml"), ("imaml", "ibaml")):
            other = points.get((bayesian, num_inner_steps, num_linear_steps))
            if algorithm == plain and other is not None:
                name = f"{DISPLAY_NAMES[bayesian]} / {DISPLAY_NAMES[plain]} at equal K and L"
                compared.setdefault(name, []).append((other, point))
        for explicit, implicit in (("maml", "imaml"), ("abml", "ibaml")):
            other = points.get((explicit, num_inner_steps, None))
            if algorithm == implicit and num_linear_steps == num_inner_steps and other is not None:
                name = f"{DISPLAY_NAMES[implicit]} / {DISPLAY_NAMES[explicit]} at K = L"
                compared.setdefault(name, []).append((point, other))
    return [
        f"- {name}: backward time {statistics.median(_backward_ratio(*pair) for pair in pairs):.2f}, peak memory "
        f"{statistics.median(a.peak_bytes / b.peak_bytes for a, b in pairs):.2f}"
        for name, pairs in compared.items()
    ]


def _backward_ratio(a: CostPoint, b: CostPoint) -> float:
    return a.backward_seconds.shortest / b.backward_seconds.shortest


def describe_device(device: torch.device) -> str:
    """Returns the name of the hardware, the number of CPU threads and the version of torch, for a result file."""
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}"
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError, StopIteration):
        # Linux leaves the name of the processor out of what Python's platform module asks for.
        info = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.partition(":")[2].strip() for line in info if line.startswith("model name"))
    return f"{name}, {torch.get_num_threads()} thread(s), torch {torch.__version__}"


# What a measuring process runs; the request follows as the last argument.
_COMMAND = (sys.executable, "-m", "ibaml.experiments.fig2")


@contextlib.contextmanager
def _measuring_process(
    settings: Fig2Settings, algorithm: AlgorithmName, num_inner_steps: int, num_linear_steps: int | None
) -> Generator[Callable[[str], dict[str, Any]]]:
    """Starts a process for one point and gives a function that sends it a command and returns its answer."""
    request = json.dumps([dataclasses.asdict(settings), algorithm, num_inner_steps, num_linear_steps])
    with (
        tempfile.TemporaryFile("w+") as errors,
        subprocess.Popen(
            [*_COMMAND, request], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True
        ) as process,
    ):

        def ask(command: str) -> dict[str, Any]:
            assert process.stdin is not None and process.stdout is not None
            answer = ""
            with contextlib.suppress(BrokenPipeError):
                process.stdin.write(f"{command}\n")
                process.stdin.flush()
                answer = process.stdout.readline()
            if answer:
                return json.loads(answer)
            code = process.wait()
            errors.seek(0)
            raise RuntimeError(
                f"the process that measures {curve_name(algorithm, num_linear_steps)} at K = {num_inner_steps} ended "
                f"with code {code}:\n{errors.read()[-2000:]}"
            )

        try:
            yield ask
        finally:
            process.kill()
            # What a broken pipe still holds cannot be delivered, and closing it would say so again.
            with contextlib.suppress(BrokenPipeError):
                cast(Any, process.stdin).close()


def _serve(request: str, commands: Iterable[str], answer: Callable[[str], object]) -> None:
    """What a measuring process does: builds its problem, then measures once per command.

    "count" gives memory and counts and warms up; "time" gives the times of one repeat.
    """
    fields, algorithm, num_inner_steps, num_linear_steps = json.loads(request)
    # JSON knows no tuples.
    fields = {name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()}
    settings = Fig2Settings(**cast(dict[str, Any], fields))
    if settings.num_threads is not None:
        torch.set_num_threads(settings.num_threads)
    device = resolve_device(settings.device)
    problem, model = build_problem(settings, algorithm, num_inner_steps, num_linear_steps, device=device)
    for command in commands:
        answered = _count(problem, model, device) if command.strip() == "count" else _time(problem, device)
        answer(json.dumps(answered))


def _count(problem: MetaGradientProblem, model: Model, device: torch.device) -> dict[str, Any]:
    if device.type == "cuda":
        # CUDA's libraries allocate workspaces with the first call and keep them.
        list(meta_gradient_in_halves(problem))
    counter = PassCounter()
    halves = meta_gradient_in_halves(problem._replace(nll=counter.nll(model)))
    forward_gradients: list[int] = []

    def both_halves() -> None:
        next(halves)
        forward_gradients.append(counter.num_gradients)
        next(halves)

    peak_bytes = peak_bytes_of(both_halves, device)
    point = {
        "peak_bytes": peak_bytes,
        "num_forward_gradients": forward_gradients[0],
        "num_backward_gradients": counter.num_gradients - forward_gradients[0],
        "num_hvps": counter.num_hvps,
    }
    return {"device": describe_device(device), "point": point}


def _time(problem: MetaGradientProblem, device: torch.device) -> dict[str, float]:
    gc.collect()
    halves = meta_gradient_in_halves(problem)
    if device.type == "cuda":
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(3)]
        torch.cuda.synchronize(device)
        marks[0].record()
        next(halves)
        marks[1].record()
        next(halves)
        marks[2].record()
        torch.cuda.synchronize(device)
        milliseconds = [start.elapsed_time(end) for start, end in zip(marks[:2], marks[1:], strict=True)]
        return {"forward": milliseconds[0] / 1e3, "backward": milliseconds[1] / 1e3}
    start = time.perf_counter()
    next(halves)
    middle = time.perf_counter()
    next(halves)
    return {"forward": middle - start, "backward": time.perf_counter() - middle}


if __name__ == "__main__":
    _serve(sys.argv[1], sys.stdin, partial(print, flush=True))
