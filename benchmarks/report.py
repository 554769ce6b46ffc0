"""The table, the headline ratios against their targets, and where they are written."""

import platform
import re
import statistics
from collections.abc import Callable, Sequence
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from typing import NamedTuple

import torch

from benchmarks.candidates import BASELINE, BASELINE_KEEPING_MEMORY, LIBRARY
from benchmarks.counting import gradient_equivalents, needed_work
from benchmarks.measure import CaseResult, Check, Measurement
from benchmarks.problems import NETWORKS, Case
from benchmarks.settings import BenchmarkSettings

# Beyond this, float32 and another order of the sums no longer explain a difference.
LARGEST_DIFFERENCE = 1e-4
LARGEST_DIFFERENCE_FLOAT64 = 1e-8

_PACKAGES = ("ibaml", "torch", "higher", "iteryne", "parallel-metalearn", "torchopt")


class Ratio(NamedTuple):
    """A headline number with its target.

    Attributes:
        name: What is compared.
        at_least: Whether the target is a lower bound.
        target: The target.
        values: One per case, with the case's description.
    """

    name: str
    at_least: bool
    target: float
    values: list[tuple[str, float]]

    @property
    def median(self) -> float:
        """Over the cases."""
        return statistics.median(value for _, value in self.values)

    @property
    def num_met(self) -> int:
        """Cases that meet the target."""
        return sum(value >= self.target if self.at_least else value <= self.target for _, value in self.values)

    def __str__(self) -> str:
        numbers = [value for _, value in self.values]
        bound = "at least" if self.at_least else "at most"
        return (
            f"| {self.name} | {self.median:.2f} | {min(numbers):.2f} to {max(numbers):.2f} | {bound} {self.target:g} "
            f"| {self.num_met} of {len(numbers)} |"
        )


def is_fair(line: Measurement) -> bool:
    """Whether a candidate ran and computed the same gradient."""
    if line.seconds is None:
        return False
    if line.float64_difference is not None:
        # In float32 another memory format alone can move the gradient by a percent: rounding decides ties of pooling
        # and signs at zero, and conjugate gradients magnify it.
        return line.float64_difference <= LARGEST_DIFFERENCE_FLOAT64
    return line.difference <= LARGEST_DIFFERENCE


def ratios(results: Sequence[CaseResult]) -> list[Ratio]:
    """Compares the library with the baseline, the fastest peer that computes the same gradient, and the limit."""

    def collect(
        name: str, algorithm: str, target: float, value: Callable[[CaseResult], float | None], at_least: bool = True
    ) -> Ratio:
        values = [(describe(result.case), value(result)) for result in results if result.case.algorithm == algorithm]
        return Ratio(name, at_least, target, [(case, number) for case, number in values if number is not None])

    found = [
        collect("iBaML: time of the plain loops / ours", "ibaml", 2.0, lambda r: _ratio(r, [BASELINE])),
        collect("MAML: time of the best peer / ours", "maml", 1.5, lambda r: _ratio(r, _peers(r))),
        collect("iMAML: time of torchopt / ours", "imaml", 2.0, lambda r: _ratio(r, _peers(r))),
        collect(
            "iBaML: our distance to the limit",
            "ibaml",
            1.5,
            lambda r: r.distance_to_limit(r.of(LIBRARY)) if is_fair(r.of(LIBRARY)) else None,
            at_least=False,
        ),
        collect("MAML: time of the plain loops / ours", "maml", 1.0, lambda r: _ratio(r, [BASELINE])),
        collect(
            "iBaML: time of plain loops that keep memory / ours",
            "ibaml",
            1.0,
            lambda r: _ratio(r, [BASELINE_KEEPING_MEMORY]),
        ),
    ]
    return [ratio for ratio in found if ratio.values]


def summary(
    results: Sequence[CaseResult],
    checks: dict[str, dict[str, Check]],
    missing: Sequence[Case],
    settings: BenchmarkSettings,
    device: str,
    command: str,
) -> str:
    """Returns the whole result as Markdown.

    Args:
        results: All measured cases.
        checks: Of ``check_on_small_network``, by algorithm.
        missing: Cases that there was no time for.
        settings: Of the run.
        device: Hardware, number of threads and version of torch.
        command: How it was run.
    """
    lines = [
        f"# Speed of meta-gradients, {date.today():%d %B %Y}",
        "",
        f"`{command}` on {device}; Python {platform.python_version()}; {_versions()}.",
        "",
        f"One meta-step of {settings.num_tasks} tasks of 5 ways and 15 queries a class, random images, float32, batch "
        f"normalisation, S = {settings.num_samples} weight samples for ABML and iBaML; every candidate on the same "
        "tensors. Times are per task: the median of at least "
        f"{settings.min_repeats} turns, in which all candidates run one after the other, and in brackets the shortest. "
        "Memory: peak of what torch's allocator handed out during the whole meta-step. Gradients and Hessian-vector "
        "products (HVPs) are counted on a small network by a probe in its outputs, per task; going back through an "
        "inner step is one HVP. Conjugate gradients run without a tolerance, so that every solve takes L steps. The "
        "accuracy on the query set, which training logs, is left out: one more forward pass.",
        "",
        "The library tells glibc to keep freed memory for reuse (`ibaml.fast.allocator`); peers leave the allocator "
        "as it is; as all share one process, it is set and reset between them. The plain loops are timed both ways, "
        "which shows how much of a ratio is the allocator's.",
        "",
        "Limit: the gradients that the algorithm cannot do without, each at the time of one plain eager forward and "
        "backward pass on the same batch in its best memory format, and each HVP at twice that time: a gradient has "
        "three products per layer (the output, its pullbacks to inputs and to weights), an HVP goes back through these "
        "three to both arguments of each, which is six. Distance: measured time over the limit. Difference: relative "
        "distance from the gradient of the plain loops; a candidate that differs in float64 counts in no ratio.",
        "",
        "| ratio of median times | median over cases | range | target | cases that meet it |",
        "|---|---|---|---|---|",
        *map(str, ratios(results)),
        "",
        *_check_lines(checks),
    ]
    for result in results:
        lines += _case_lines(result)
    if missing:
        lines += ["", f"No time was left for: {'; '.join(map(describe, missing))}."]
    return "\n".join(lines) + "\n"


def describe(case: Case) -> str:
    """Names a case."""
    return f"{NETWORKS[case.network]}, {case.num_shots}-shot, {case.name}"


def readme_text(results: Sequence[CaseResult], device: str, result_file: str) -> str:
    """Returns the lines for the README."""
    return "\n".join(
        [
            f"Measured on {date.today():%d %B %Y} on {device}, 5-way tasks, {len(results)} cases; the command and",
            f"the whole table are in [{result_file}]({result_file}).",
            "",
            "| ratio of median times | median over cases | range | target | cases that meet it |",
            "|---|---|---|---|---|",
            *map(str, ratios(results)),
        ]
    )


def replace_between_markers(text: str, name: str, new: str) -> str:
    """Puts text between the two markers of a name, such as ``<!-- speed: begin -->`` and ``<!-- speed: end -->``.

    Raises:
        ValueError: If the markers are not there exactly once.
    """
    start, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    pattern = re.compile(f"(?<={re.escape(start)}\n).*?(?={re.escape(end)})", re.DOTALL)
    if len(pattern.findall(text)) != 1:
        raise ValueError(f"the README must have the lines {start} and {end} exactly once.")
    return pattern.sub(lambda _: f"{new}\n", text)


def _peers(result: CaseResult) -> list[str]:
    ours = (BASELINE, BASELINE_KEEPING_MEMORY, LIBRARY)
    return [line.candidate for line in result.measurements if line.candidate not in ours]


def _ratio(result: CaseResult, others: Sequence[str]) -> float | None:
    """Returns the time of the fastest of some candidates over that of the library."""
    ours = result.of(LIBRARY)
    lines = [line for line in result.measurements if line.candidate in others and is_fair(line)]
    times = [line.seconds.median for line in lines if line.seconds is not None]
    return min(times) / ours.seconds.median if is_fair(ours) and ours.seconds is not None and times else None


def _check_lines(checks: dict[str, dict[str, Check]]) -> list[str]:
    different = [
        f"{name} ({algorithm}): {check.difference:.1e}"
        for algorithm, by_candidate in checks.items()
        for name, check in by_candidate.items()
        if not check.difference <= LARGEST_DIFFERENCE_FLOAT64
    ]
    num_checked = sum(map(len, checks.values()))
    text = (
        f"In float64, on a small Conv4 with batch normalisation, {num_checked - len(different)} of {num_checked} "
        f"gradients agree with that of the plain loops to {LARGEST_DIFFERENCE_FLOAT64:g}."
    )
    if different:
        text += f" Different: {'; '.join(different)}."
    return [text]


def _case_lines(result: CaseResult) -> list[str]:
    case, work = result.case, needed_work(result.case)
    lines = [
        "",
        f"## {describe(case)}",
        "",
        f"Needed: {work.num_gradients} gradients and {work.hvps} HVPs, {gradient_equivalents(case):g} "
        f"gradient-equivalents by batch size. Plain pass: {result.support_seconds.median * 1e3:.2f} ms on the support "
        f"set ({result.plain}), {result.query_seconds.median * 1e3:.2f} ms on the query set. Limit: "
        f"{result.limit_seconds:.4f} s.",
        "",
        "| candidate | s per task | peak memory, MB | gradients | HVPs | distance to the limit | difference |",
        "|---|---|---|---|---|---|---|",
    ]
    for line in result.measurements:
        if line.seconds is None:
            lines.append(f"| {line.candidate} | does not run: {line.failure} | | | | | |")
            continue
        lines.append(
            f"| {line.candidate} | {line.seconds.median:.4f} ({line.seconds.shortest:.4f}) "
            f"| {line.peak_bytes / 1e6:.1f} | {line.num_gradients:g} | {line.num_hvps:g} "
            f"| {result.distance_to_limit(line):.2f} "
            f"| {line.difference:.1e}{'' if is_fair(line) else ' (another gradient)'} |"
        )
    if result.parts:
        total = sum(result.parts.values())
        shares = (f"{name} {seconds * 1e3:.1f} ms ({seconds / total:.0%})" for name, seconds in result.parts.items())
        lines += ["", f"Where our time goes: {', '.join(shares)}."]
    return lines


def _versions() -> str:
    return ", ".join(f"{name} {_version(name)}" for name in _PACKAGES)


def _version(package: str) -> str:
    if package == "torch":
        return torch.__version__
    try:
        return version(package)
    except PackageNotFoundError:
        return "(not installed)"
