"""What ``import ibaml`` loads: heavy packages come with the first call that needs them."""

import subprocess
import sys

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
MODULES = ("ibaml", "ibaml.data.sources", "ibaml.networks", "ibaml.metrics")
SCRIPT = (
    f"import sys, torch; before = set(sys.modules); import {', '.join(MODULES)}; print(*(set(sys.modules) - before))"
)


def test_no_heavy_package_is_loaded():
    """Not by all of these modules together, hence by none of them."""
    loaded = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True).stdout.split()
    assert {*MODULES} <= {*loaded}
    assert [name for name in HEAVY if name in loaded] == []
