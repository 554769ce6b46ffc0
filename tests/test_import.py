"""What ``import ibaml`` loads: heavy packages come with the first call that needs them."""

import subprocess
import sys

import pytest

HEAVY = (
    "PIL",
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
SCRIPT = "import sys, torch; before = set(sys.modules); import {}; print(*(set(sys.modules) - before))"


@pytest.mark.parametrize("module", ["ibaml", "ibaml.data.sources", "ibaml.networks", "ibaml.metrics"])
def test_no_heavy_package_is_loaded(module):
    loaded = subprocess.run(
        [sys.executable, "-c", SCRIPT.format(module)], capture_output=True, text=True, check=True
    ).stdout.split()
    assert module in loaded
    assert [name for name in HEAVY if name in loaded] == []
