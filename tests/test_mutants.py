"""What ``make mutate`` changes, and what it passes over."""

from pathlib import Path

import pytest
from tests.campaigns import mutate
from tests.campaigns.mutants import mutants_of

ROOT = Path(__file__).parents[1] / "src" / "ibaml"

SOURCE = '''"""A module."""

LIMIT = 3

class Record:
    """A record."""

    size: int = 4

def f(x: int, *, rtol: float = 1e-6, most: int = 2 * 3) -> float:
    """Returns 5."""
    if x < LIMIT:
        raise ValueError(f"x is {x + 1}")
    return x - 7
'''


def test_defaults_messages_and_annotations_are_left_alone(tmp_path):
    path = tmp_path / "module.py"
    path.write_text(SOURCE)
    found = {(mutant.line, mutant.new) for mutant in mutants_of(path)}
    # A default that is computed is changed, as its formula may be wrong.
    of_default = {(10, "(2 / 3)"), (10, "3"), (10, "4")}
    assert found == {(3, "4"), (12, "(x <= LIMIT)"), (14, "(x + 7)"), (14, "8"), *of_default}
    assert {mutant.source_line for mutant in mutants_of(path) if mutant.line == 14} == {"return x - 7"}


def test_equivalent_mutants_are_there_and_passed_over():
    """A line that has changed since is looked at again."""
    known = mutate.equivalents(ROOT)
    assert known
    drawn = mutate.sample(ROOT, 10**6, 0, ["solvers"])
    assert len(drawn) > 300 and not known & set(drawn)


def test_an_entry_of_no_mutant_is_refused(tmp_path, monkeypatch):
    path = tmp_path / "equivalents.toml"
    path.write_text('[[equivalent]]\nfile = "tree.py"\nline = "gone"\nnew = "1"\nwhy = "none"\n')
    monkeypatch.setattr(mutate, "EQUIVALENTS", path)
    with pytest.raises(SystemExit, match="which is 0 mutants: change or remove it"):
        mutate.equivalents(ROOT)


def test_the_core_has_its_tests():
    missing = [name for tests in mutate.TESTS.values() for name in tests if not (ROOT.parents[1] / name).exists()]
    assert missing == [] and all((ROOT / part).exists() for part in mutate.TESTS)
