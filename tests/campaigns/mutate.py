"""Changes the numerical core in one small place at a time, and counts how often the tests notice.

    make mutate MUTATE_ARGS="--number 60 --seed 0"

A mutant is noticed if a test that belongs to its file fails or takes much longer. A survivor is either equivalent (no
input tells it from the original), and then stands in ``equivalents.toml`` with the reason, or a test is missing, or the
code is not needed. Each mutant is run in a process forked from one that has
imported torch, on a copy of the sources; the tests are run once on the unchanged sources before.
"""

import argparse
import contextlib
import importlib
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from .mutants import Mutant, mutants_of

Outcome = Literal["passed", "failed", "too slow"]

TESTS: dict[str, tuple[str, ...]] = {
    "algorithms/heads": ("tests/algorithms/heads",),
    "hypergradients": ("tests/hypergradients",),
    "likelihoods": ("tests/likelihoods",),
    "metrics": ("tests/metrics",),
    "posterior/fitted.py": ("tests/posterior", "tests/learner/test_learner.py", "tests/learner/test_trust.py"),
    "posterior/task.py": ("tests/posterior", "tests/learner/test_learner.py", "tests/learner/test_trust.py"),
    "priors": ("tests/priors",),
    "solvers": ("tests/solvers",),
    "tree.py": ("tests/test_tree.py", "tests/solvers/linear", "tests/priors"),
}
"""Files and folders of the numerical core below src/ibaml, and the tests that belong to them."""

EQUIVALENTS = Path(__file__).with_name("equivalents.toml")
"""Mutants that are passed over, each with its reason."""

_IMPORTED = ("torch", "scipy.stats", "scipy.optimize", "pandas", "safetensors.torch")
"""Once, before the forks: what tests import, but for the package and plugins of pytest, which have to come later."""

_OPTIONS = ("-x", "-q", "-m", "not slow", "-p", "no:cacheprovider")


class Checked(NamedTuple):
    """A mutant and what the tests make of it."""

    mutant: Mutant
    outcome: Outcome


def part_of(path: str) -> str:
    """Returns the part of the core, a key of ``TESTS``, that a file below src/ibaml belongs to.

    Examples:
        >>> part_of("solvers/linear/cg.py")
        'solvers'
    """
    return next(part for part in TESTS if path == part or path.startswith(f"{part}/"))


def own_tests(path: str) -> tuple[str, ...]:
    """Returns the test file that has the name of a file below src/ibaml, if there is one."""
    mirrored = Path("tests") / Path(path).with_name(f"test_{Path(path).name}")
    return (mirrored.as_posix(),) if mirrored.exists() else ()


def equivalents(root: Path) -> set[Mutant]:
    """Returns the mutants that ``equivalents.toml`` names.

    Args:
        root: The folder src/ibaml.

    Raises:
        SystemExit: If one is of no place any more, or of several.
    """
    named: set[Mutant] = set()
    for entry in tomllib.loads(EQUIVALENTS.read_text())["equivalent"]:
        found = [one for one in mutants_of(root / entry["file"]) if (one.source_line, one.new) == _key(entry)]
        if len(found) != 1:
            raise SystemExit(f"{EQUIVALENTS.name} has {entry}, which is {len(found)} mutants: change or remove it.")
        named.update(found)
    return named


def _key(entry: dict[str, str]) -> tuple[str, str]:
    return entry["line"], entry["new"]


def sample(root: Path, number: int, seed: int, only: Sequence[str] = tuple(TESTS)) -> list[Mutant]:
    """Draws mutants without replacement, none of them equivalent; a file is as likely as it has places to change.

    Args:
        root: The folder src/ibaml.
        number: How many; all, if there are fewer.
        seed: Seed of the draw.
        only: Files and folders below it.
    """
    found = {path for name in only for path in ([root / name] if name.endswith(".py") else (root / name).rglob("*.py"))}
    passed_over = equivalents(root)
    every = [mutant for path in sorted(found) for mutant in mutants_of(path) if mutant not in passed_over]
    return random.Random(seed).sample(every, min(number, len(every)))


def run_tests(tests: Sequence[str], sources: Path, seconds: float) -> Outcome:
    """Runs tests in a forked process.

    Args:
        tests: Files and folders.
        sources: Folder of the package to test.
        seconds: Time limit.
    """
    child = os.fork()
    if child == 0:
        code = 1
        try:
            code = _test(tests, sources)
        finally:
            os._exit(code)
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return "failed" if status else "passed"
        time.sleep(0.05)
    # Its group, as tests start processes of their own.
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return "too slow"


def _test(tests: Sequence[str], sources: Path) -> int:
    import pytest

    os.setpgid(0, 0)
    sys.path.insert(0, str(sources))
    # Of the processes that tests start.
    os.environ["PYTHONPATH"] = str(sources)
    nothing = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 1)
    os.dup2(nothing, 2)
    return int(pytest.main([*_OPTIONS, *tests]))


class Tests:
    """Runs the tests of a file on what lies in a folder; first those of its own, which notice most changes.

    Args:
        sources: The folder, with the unchanged package.
        quick: Whether the tests of its own are enough where a file has some.
    """

    def __init__(self, sources: Path, *, quick: bool = False) -> None:
        self._sources, self._quick = sources, quick
        self._seconds: dict[tuple[str, ...], float] = {}

    def stages(self, path: str) -> list[tuple[str, ...]]:
        """Returns what is run one after the other for a file below src/ibaml."""
        stages = [tests for tests in (own_tests(path), TESTS[part_of(path)]) if tests]
        return stages[:1] if self._quick else stages

    def time(self, tests: tuple[str, ...]) -> None:
        """Runs tests on the unchanged sources, once.

        Raises:
            SystemExit: If they fail.
        """
        if tests not in self._seconds:
            start = time.monotonic()
            if run_tests(tests, self._sources, 3600.0) != "passed":
                raise SystemExit(f"{' '.join(tests)} fail without any change.")
            self._seconds[tests] = time.monotonic() - start

    def outcome(self, mutant: Mutant, root: Path) -> Outcome:
        """Runs the tests on a mutant.

        Args:
            mutant: The change.
            root: The folder src/ibaml of the original.
        """
        place = mutant.path.relative_to(root)
        original = mutant.path.read_bytes()
        copy = self._sources / root.name / place
        for tests in self.stages(place.as_posix()):
            self.time(tests)
            copy.write_bytes(mutant.apply(original))
            try:
                outcome = run_tests(tests, self._sources, 60 + 5 * self._seconds[tests])
            finally:
                copy.write_bytes(original)
            if outcome != "passed":
                return outcome
        return "passed"


def check(mutants: Sequence[Mutant], root: Path, *, quick: bool = False) -> list[Checked]:
    """Runs the tests on each mutant and prints what they make of it; Ctrl-C ends it with those that are done.

    Args:
        mutants: What to run.
        root: The folder src/ibaml.
        quick: As of ``Tests``.

    Raises:
        SystemExit: If tests fail on the unchanged sources.
    """
    checked: list[Checked] = []
    with tempfile.TemporaryDirectory() as folder, contextlib.suppress(KeyboardInterrupt):
        shutil.copytree(root, Path(folder) / root.name, ignore=shutil.ignore_patterns("__pycache__"))
        tests = Tests(Path(folder), quick=quick)
        for number, mutant in enumerate(mutants, 1):
            checked.append(Checked(mutant, tests.outcome(mutant, root)))
            word = {"passed": "SURVIVED"}.get(checked[-1].outcome, checked[-1].outcome)
            print(f"{number:4} of {len(mutants)} {word:8} {mutant}", flush=True)
    return checked


def main() -> None:
    """Draws mutants, runs the tests on them, and prints score and survivors."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--number", type=int, default=60, help="mutants to draw (default 60)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the draw (default 0)")
    parser.add_argument("--only", nargs="*", default=tuple(TESTS), help="files and folders below src/ibaml")
    parser.add_argument("--quick", action="store_true", help="only the test file of the same name, where there is one")
    arguments = parser.parse_args()
    for name in _IMPORTED:
        importlib.import_module(name)

    root = Path("src/ibaml")
    checked = check(sample(root, arguments.number, arguments.seed, arguments.only), root, quick=arguments.quick)
    survivors = [one.mutant for one in checked if one.outcome == "passed"]
    print(f"\n{len(checked) - len(survivors)} of {len(checked)} mutants noticed (seed {arguments.seed}).")
    for mutant in survivors:
        print(f"  {mutant}")


if __name__ == "__main__":
    main()
