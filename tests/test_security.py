"""What SECURITY.md promises of the sources, and that the tests it names are there."""

import ast
import re
from pathlib import Path

import pytest

SOURCES = Path(__file__).parents[1] / "src" / "ibaml"
TEXT = (Path(__file__).parents[1] / "SECURITY.md").read_text()

MODULES = {
    *("pickle", "_pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "yaml"),
    *("socket", "ssl", "urllib", "http.client", "ftplib", "smtplib", "requests", "httpx", "pooch"),
    *("subprocess", "runpy", "code", "ctypes"),
}
ALLOWED = {
    ("data/files/pickles.py", "pickle"): "its Unpickler, which names no function but numpy's own",
    ("data/files/locate.py", "pooch"): "downloads with checksums",
    ("experiments/fig2/process.py", "subprocess"): "measures memory in a process of its own",
    ("fast/allocator.py", "ctypes"): "settings of malloc",
    ("backbones/named.py", "importlib.import_module"): "a backbone that the caller names as module:name",
    ("optional.py", "importlib.import_module"): "optional dependencies, by names in the sources",
    ("train/processes.py", "distributed.all_gather_object"): "processes of one training",
}
"""Modules that may import or call what could run code or reach the network, and what for."""

CALLS = re.compile(
    r"eval|exec|compile|__import__|(\w+\.)*(import_module|all_gather_object|broadcast_object_list)"
    r"|torch\.(load|hub\.\w+)|(np|numpy)\.load|os\.(system|popen)"
)


def suspicious(source: str) -> set[str]:
    """Imports and calls that could run code from a file or reach the network."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            own = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            found |= {name for name in own if name in MODULES or name.split(".")[0] in MODULES}
        elif isinstance(node, ast.Call) and CALLS.fullmatch(name := ast.unparse(node.func)):
            found.add(name)
    return found


def test_no_module_can_run_code_of_files_or_send_anything_but_those_that_have_to():
    found = {
        (path.relative_to(SOURCES).as_posix(), name)
        for path in SOURCES.rglob("*.py")
        for name in suspicious(path.read_text())
    }
    assert found == ALLOWED.keys()


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("import pickle", "pickle"),
        ("from urllib.request import urlopen", "urllib.request"),
        ("def f(path):\n    return torch.load(path)", "torch.load"),
        ("np.load(path, allow_pickle=True)", "np.load"),
        ("torch.hub.load('a', 'b')", "torch.hub.load"),
        ("eval(text)", "eval"),
        ("os.system(text)", "os.system"),
    ],
)
def test_what_is_looked_for_is_found(source, name):
    assert suspicious(source) == {name}
    assert suspicious("import torch\nmodule.eval()\nre.compile('a')\nnp.loadtxt") == set()


def test_every_test_that_it_names_is_there():
    named = re.findall(r"`(tests/[\w/]+\.py)`", TEXT)
    assert len(named) > 15
    assert [name for name in named if not (SOURCES.parents[1] / name).is_file()] == []
