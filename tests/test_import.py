"""What ``import ibaml`` loads: heavy packages come with the first call that needs them, test tools never."""

import json
import subprocess
import sys

import pytest

HEAVY = (
    "PIL",
    "botorch",
    "gpytorch",
    "lightning_fabric",
    "matplotlib",
    "pandas",
    "pooch",
    "rich",
    "scipy",
    "sklearn",
    "tensorboard",
    "torch.utils.tensorboard",
    "torchmetrics",
    "tyro",
)
MODULES = ("ibaml", "ibaml.data.sources", "ibaml.networks", "ibaml.metrics")
SCRIPT = f"""
import json, sys
import torch
before = set(sys.modules)
import {", ".join(MODULES)}
loaded = sorted(set(sys.modules) - before)
import ibaml.cli
by_command_line = sorted(set(sys.modules) - before)
sys.modules["hypothesis"] = None
try:
    import ibaml.testing
except ImportError as error:
    refusal = str(error)
print(json.dumps([loaded, by_command_line, refusal]))
"""


@pytest.fixture(scope="module")
def found() -> tuple[list[str], list[str], str]:
    """What the modules load, what the command line loads, and what the test tools say without hypothesis."""
    run = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
    return tuple(json.loads(run.stdout))


def test_no_heavy_package_is_loaded(found) -> None:
    """Not by all of these modules together, hence by none of them."""
    loaded = found[0]
    assert {*MODULES} <= {*loaded}
    assert [name for name in HEAVY if name in loaded] == []


def test_the_command_line_loads_no_more_than_what_parses_and_prints(found) -> None:
    """Pictures, tables and several processes come with the commands that need them."""
    assert "ibaml.cli" in found[1]
    assert [name for name in HEAVY if name in found[1]] == ["rich", "tyro"]


def test_the_command_line_loads_no_playground(found) -> None:
    assert [name for name in found[1] if name.startswith(("ibaml.playground", "http.server"))] == []


def test_test_tools_are_loaded_by_testing_alone(found) -> None:
    assert {"pytest", "hypothesis"}.isdisjoint(found[1])
    assert found[2] == "ibaml.testing needs pytest and hypothesis: pip install 'ibaml[test]'."
