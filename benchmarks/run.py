"""Measures the speed of meta-gradients and writes the result: ``python -m benchmarks.run --help``."""

import os

# The profiler that watches memory logs two lines per use; torch reads this when it is imported.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")

import dataclasses  # noqa: E402
import sys  # noqa: E402
import time  # noqa: E402
import warnings  # noqa: E402
from datetime import date  # noqa: E402
from pathlib import Path  # noqa: E402

import torch  # noqa: E402
import tyro  # noqa: E402

from benchmarks import report  # noqa: E402
from benchmarks.counting import gradient_equivalents  # noqa: E402
from benchmarks.measure import CaseResult, check_on_small_network, measure_case  # noqa: E402
from benchmarks.problems import Case  # noqa: E402
from benchmarks.settings import BenchmarkSettings  # noqa: E402
from ibaml.experiments.report import describe_device  # noqa: E402
from ibaml.learner.folder import write_text
from ibaml.train.devices import resolve_device  # noqa: E402

_ROOT = Path(__file__).resolve().parent.parent
# About how many milliseconds one gradient on a support image takes; only for the estimate of the time that is left.
_COST = {"mlp": 0.3, "conv4_64_28": 2.0, "conv4_32_84": 6.0, "resnet12_28": 35.0, "resnet12_84": 300.0, "tiny": 0.2}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments(BenchmarkSettings):
    """Settings of a run and where it writes.

    Attributes:
        output: The result file; None: benchmarks/results/DATE-speed.md.
        update_readme: Put the headline ratios into the README.
    """

    output: Path | None = None
    update_readme: bool = False


def main(arguments: Arguments) -> None:
    """Runs the benchmark."""
    warnings.filterwarnings("ignore", category=FutureWarning, module="torchopt")
    if arguments.num_threads is not None:
        torch.set_num_threads(arguments.num_threads)
    device = resolve_device(arguments.device)
    cases = arguments.cases()
    checks = {case.algorithm: check_on_small_network(case) for case in reversed(cases)}
    results = _measure(arguments, cases, device)
    output = arguments.output or _ROOT / "benchmarks" / "results" / f"{date.today().isoformat()}-speed.md"
    command = f"python -m benchmarks.run {' '.join(sys.argv[1:])}".strip()
    hardware = f"{describe_device(device)}, torch {torch.__version__}"
    text = report.summary(results, checks, cases[len(results) :], arguments, hardware, command)
    write_text(output, text)
    print(text)
    print(f"Written to {output}", file=sys.stderr)
    if arguments.update_readme:
        readme = _ROOT / "README.md"
        lines = report.readme_text(results, hardware, output.resolve().relative_to(_ROOT).as_posix())
        write_text(readme, report.replace_between_markers(readme.read_text(), "speed", lines))


def _measure(arguments: Arguments, cases: list[Case], device: torch.device) -> list[CaseResult]:
    results: list[CaseResult] = []
    costs = [
        gradient_equivalents(case) * _COST[case.network] * case.num_shots * (3 if case.algorithm == "maml" else 1)
        for case in cases
    ]
    start = time.monotonic()
    for index, case in enumerate(cases):
        elapsed = time.monotonic() - start
        if index and arguments.max_minutes is not None and elapsed > 60 * arguments.max_minutes:
            break
        left = f", about {elapsed * sum(costs[index:]) / sum(costs[:index]) / 60:.0f} min left" if index else ""
        print(f"[{index + 1}/{len(cases)}{left}] {report.describe(case)}", file=sys.stderr, flush=True)
        results.append(
            measure_case(
                case,
                device=device,
                min_repeats=arguments.min_repeats,
                max_repeats=arguments.max_repeats,
                max_seconds=arguments.max_seconds,
            )
        )
    return results


if __name__ == "__main__":
    main(tyro.cli(Arguments))
