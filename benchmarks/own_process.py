"""Measures meta-steps in processes of their own: ``python -m benchmarks.own_process --help``.

``benchmarks.run`` times all candidates side by side in one process, where one's allocations change what the next one
meets. Here each candidate has a process to itself, as in a training script, and the processes take turns: what the
allocator of the C library costs shows, and is counted in page faults.
"""

import dataclasses
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from datetime import date
from pathlib import Path
from typing import NamedTuple

import tyro

_ROOT = Path(__file__).resolve().parent.parent
_CASES = (
    ("conv4_32_84", "ibaml"),
    ("conv4_32_84", "maml"),
    ("conv4_32_84", "imaml"),
    ("conv4_64_28", "ibaml"),
    ("conv4_64_28", "maml"),
    ("mlp", "ibaml"),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments:
    """What to measure.

    Attributes:
        num_turns: Processes per candidate.
        num_steps: Timed meta-steps in each, after two that are not timed.
        output: The result file; None: benchmarks/results/DATE-own-process.md.
        worker: Network, algorithm and candidate: measure them here and print the result (used by the processes).
    """

    num_turns: int = 3
    num_steps: int = 7
    output: Path | None = None
    worker: tuple[str, str, str] | None = None


class Turn(NamedTuple):
    """One process.

    Attributes:
        seconds: Median time of a meta-step, per task.
        page_faults: Minor page faults per task.
    """

    seconds: float
    page_faults: float


def main(arguments: Arguments) -> None:
    """Runs the comparison, or one process of it."""
    if arguments.worker is not None:
        print(json.dumps(measure(*arguments.worker, num_steps=arguments.num_steps)))
        return
    from benchmarks.candidates import BASELINE, LIBRARY
    from benchmarks.problems import NETWORKS
    from ibaml.learner.folder import write_text

    lines: list[str] = []
    for network, algorithm in _CASES:
        turns: dict[str, list[Turn]] = {BASELINE: [], LIBRARY: []}
        for _ in range(arguments.num_turns):
            for candidate, found in turns.items():
                found.append(_in_own_process(network, algorithm, candidate, arguments.num_steps))
        medians = {name: Turn(*map(statistics.median, zip(*found, strict=True))) for name, found in turns.items()}
        loops, ours = medians[BASELINE], medians[LIBRARY]
        lines.append(
            f"| {NETWORKS[network]} | {algorithm} | {loops.seconds:.4f} | {ours.seconds:.4f} "
            f"| {loops.seconds / ours.seconds:.2f} | {loops.page_faults:,.0f} | {ours.page_faults:,.0f} |"
        )
        print(lines[-1], file=sys.stderr, flush=True)
    output = arguments.output or _ROOT / "benchmarks" / "results" / f"{date.today().isoformat()}-own-process.md"
    write_text(output, _report(arguments, lines))
    print(f"Written to {output}", file=sys.stderr)


def measure(network: str, algorithm: str, candidate: str, *, num_steps: int) -> Turn:
    """Times a candidate in this process, which must not have computed anything before."""
    import resource

    from benchmarks.candidates import candidates
    from benchmarks.problems import EXPLICIT, Case, build_problem

    case = Case(network=network, algorithm=algorithm, num_linear_steps=None if algorithm in EXPLICIT else 5)
    step = candidates(case.algorithm)[candidate](build_problem(case))
    for _ in range(2):
        step()
    seconds: list[float] = []
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(num_steps):
        start = time.perf_counter()
        step()
        seconds.append((time.perf_counter() - start) / case.num_tasks)
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults
    return Turn(statistics.median(seconds), faults / num_steps / case.num_tasks)


def _in_own_process(network: str, algorithm: str, candidate: str, num_steps: int) -> Turn:
    command = [sys.executable, "-m", "benchmarks.own_process", "--num-steps", str(num_steps)]
    command += ["--worker", network, algorithm, candidate]
    run = subprocess.run(command, capture_output=True, text=True, check=True, cwd=_ROOT, env=os.environ)
    return Turn(*json.loads(run.stdout))


def _report(arguments: Arguments, lines: list[str]) -> str:
    import torch

    from ibaml.experiments.report import describe_device

    device = f"{describe_device(torch.device('cpu'))}, torch {torch.__version__}"
    command = f"python -m benchmarks.own_process {' '.join(sys.argv[1:])}".strip()
    return "\n".join(
        [
            f"# Meta-steps in processes of their own, {date.today():%d %B %Y}",
            "",
            f"`{command}` on {device}; Python {platform.python_version()}, torch {torch.__version__}, "
            f"{' '.join(platform.libc_ver())}.",
            "",
            "Two tasks of 5 ways and 1 shot, 15 queries a class, K = L = 5, S = 2, float32, as in the other file. Each "
            f"number is the median over {arguments.num_turns} processes, which took turns, of the median over "
            f"{arguments.num_steps} meta-steps, per task. Page faults are those that need no disk.",
            "",
            "| network | algorithm | plain loops, s | ibaml, s | ratio | page faults, loops | page faults, ibaml |",
            "|---|---|---:|---:|---:|---:|---:|",
            *lines,
            "",
        ]
    )


if __name__ == "__main__":
    main(tyro.cli(Arguments))
