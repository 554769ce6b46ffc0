"""The problems that a benchmark is asked for on the command line, one line for all such benchmarks."""

import argparse
from collections.abc import Callable, Iterable

import torch


def print_reports(report: Callable[[str], str], problems: Iterable[str], *, about: str | None) -> None:
    """Prints the report of each problem that the command line names, or of all, computed by one thread.

    Args:
        report: Computes and words one.
        problems: Their names.
        about: What ``--help`` says.
    """
    names = list(problems)
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("problem", nargs="*", metavar="PROBLEM", help=", ".join(names))
    asked = parser.parse_args().problem
    if unknown := [name for name in asked if name not in names]:
        parser.error(f"there is no problem {unknown[0]!r}; expected some of {', '.join(names)}")
    torch.set_num_threads(1)
    for chosen in asked or names:
        print(report(chosen), end="\n\n", flush=True)
