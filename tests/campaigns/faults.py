"""Kills trainings, fills their disk, damages files and asks from many threads, and counts what went wrong.

    make faults FAULTS_ARGS="--minutes 10 --seed 0"

Each kind of fault gets its turn until the time is over; every case has a seed, so that a failure comes back. Trainings
run in processes forked from this one, which has imported everything; each is compared, bit by bit, with one that nobody
disturbed. Prints one table of kinds, cases and failures, and exits with 1 if there was a failure.
"""

import argparse
import collections
import os
import platform
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

from . import asked, damage, disturb
from .damage import Failure

Cases = Iterator[Failure | None]


def kinds(folder: Path, seed: int) -> dict[str, Cases]:
    """Returns the kinds of faults by name, each as an endless row of cases, or one that ends."""
    return {
        "killed at any moment": disturb.killed(folder / "killed", seed),
        "killed at a write": disturb.killed_at_a_write(folder / "writes", seed),
        "signals": disturb.signals(folder / "signals", seed),
        "output closed": disturb.closed_outputs(folder / "outputs"),
        "disk full": disturb.full_disk(folder / "disk", seed),
        "two in one folder": disturb.two_in_one_folder(folder / "two", seed),
        "launcher killed": disturb.launcher_killed(folder / "launcher"),
        "killed while extracting features": asked.killed_while_extracting(folder / "features", seed),
        "model and evaluation: killed": asked.killed_while_writing(folder / "kill", seed),
        "model and evaluation: disk full": asked.full_while_writing(folder / "full", seed),
        "threads": asked.threads(seed),
        "threads of all calls, pickled meanwhile": asked.together(seed),
        "forks, pickles, copies": asked.copies(seed),
        **{f"damaged {kind.name}": damage.fuzz(kind, folder, seed) for kind in damage.KINDS},
        "misleading files": (damage.drop(bomb, folder) for bomb in damage.BOMBS),
    }


def run(cases: dict[str, Cases], seconds: float) -> tuple[dict[str, int], list[Failure]]:
    """Gives each kind its turn, the one that has had the least time first.

    Args:
        cases: Kinds of faults.
        seconds: Time for all.

    Returns:
        The number of cases of each kind, and the failures.
    """
    spent, counts = dict.fromkeys(cases, 0.0), dict.fromkeys(cases, 0)
    failures: list[Failure] = []
    open_, end = set(cases), time.monotonic() + seconds
    while open_ and time.monotonic() < end:
        kind = min(sorted(open_), key=spent.__getitem__)
        start = time.monotonic()
        try:
            failure = next(cases[kind])
        except StopIteration:
            open_.remove(kind)
            continue
        spent[kind] += time.monotonic() - start
        counts[kind] += 1
        if failure is not None:
            failures.append(failure._replace(kind=kind))
            print(f"FAILED {kind}: {failure.what}: {failure.found}", flush=True)
    return counts, failures


def table(counts: dict[str, int], failures: list[Failure]) -> str:
    """Returns the table as Markdown."""
    failed = collections.Counter(failure.kind for failure in failures)
    lines = ["| kind | cases | failures |", "|---|---:|---:|"]
    lines += [f"| {kind} | {count:,} | {failed[kind]:,} |" for kind, count in counts.items()]
    return "\n".join([*lines, f"| all | {sum(counts.values()):,} | {len(failures):,} |"])


def main() -> None:
    """Parses the arguments, runs the campaign and prints its table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0, help="time for all kinds together (default 10)")
    parser.add_argument("--seed", type=int, default=0, help="seed of all cases (default 0)")
    parser.add_argument("--only", nargs="*", help="kinds whose names hold one of these words")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        every = kinds(Path(name), arguments.seed)
        chosen = {kind: cases for kind, cases in every.items() if any(word in kind for word in arguments.only or [""])}
        counts, failures = run(chosen, 60 * arguments.minutes)
    packages = ", ".join(f"{package} {version(package)}" for package in ("torch", "numpy", "safetensors", "pillow"))
    print(f"\nSeed {arguments.seed}, {arguments.minutes:g} minutes; Python {platform.python_version()}, {packages}, ")
    print(f"{platform.system()}, {os.cpu_count()} cores.\n\n{table(counts, failures)}")
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    main()
