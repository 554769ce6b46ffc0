"""Freed memory stays with the process: what is allocated again brings no page faults."""

import os
import subprocess
import sys

import pytest

from ibaml.fast import allocator

_COUNT_FAULTS = """
import resource, sys
import torch
from ibaml.fast.allocator import keep_freed_memory

if sys.argv[1] == "kept":
    assert keep_freed_memory()
x = torch.ones(2**24)  # 64 MiB: above all that glibc keeps by itself

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

for _ in range(3):
    x * 2
before = faults()
for _ in range(5):
    x * 2
print(faults() - before)
"""


def _num_faults(how: str, **environment: str) -> int:
    run = subprocess.run(
        [sys.executable, "-c", _COUNT_FAULTS, how],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, **environment},
    )
    return int(run.stdout)


needs_glibc = pytest.mark.skipif(not allocator.is_glibc(), reason="the C library is not glibc")


@needs_glibc
def test_kept_memory_brings_no_page_faults() -> None:
    assert _num_faults("kept") < 50
    assert _num_faults("left alone") > 100


@needs_glibc
def test_thresholds_of_the_environment_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "131072")
    assert not allocator.keep_freed_memory.__wrapped__()


def test_other_c_libraries_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(allocator, "is_glibc", lambda: False)
    monkeypatch.setattr(allocator, "set_thresholds", lambda: pytest.fail("was called"))
    assert not allocator.keep_freed_memory.__wrapped__()
