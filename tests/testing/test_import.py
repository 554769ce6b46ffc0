"""``import ibaml`` needs no test tools, and ``ibaml.testing`` says which it needs."""

import subprocess
import sys

PROGRAM = """
import sys
import ibaml
assert not {"pytest", "hypothesis"} & sys.modules.keys()
sys.modules["hypothesis"] = None
try:
    import ibaml.testing
except ImportError as error:
    assert str(error) == "ibaml.testing needs pytest and hypothesis: pip install 'ibaml[test]'.", error
else:
    raise AssertionError("nothing was said")
"""


def test_test_tools_are_imported_by_testing_alone() -> None:
    subprocess.run([sys.executable, "-c", PROGRAM], check=True)
