"""Freed memory stays with the process: what is allocated again brings no page faults."""

import subprocess
import sys

import pytest

from ibaml.fast import allocator

_COUNT_FAULTS = """
import resource
import torch
from ibaml.fast.allocator import keep_freed_memory

x = torch.ones(2**24)  # 64 MiB: above all that glibc keeps by itself

def num_faults():
    for _ in range(3):
        x * 2
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        x * 2
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

left_alone = num_faults()
assert keep_freed_memory()
print(left_alone, num_faults())
"""


needs_glibc = pytest.mark.skipif(not allocator.is_glibc(), reason="the C library is not glibc")


@needs_glibc
def test_kept_memory_brings_no_page_faults() -> None:
    run = subprocess.run([sys.executable, "-c", _COUNT_FAULTS], capture_output=True, text=True, check=True)
    left_alone, kept = map(int, run.stdout.split())
    assert left_alone > 100
    assert kept < 50


@needs_glibc
def test_thresholds_of_the_environment_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "131072")
    assert not allocator.keep_freed_memory.__wrapped__()


def test_other_c_libraries_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(allocator, "is_glibc", lambda: False)
    monkeypatch.setattr(allocator, "set_thresholds", lambda: pytest.fail("was called"))
    assert not allocator.keep_freed_memory.__wrapped__()
