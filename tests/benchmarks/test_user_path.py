"""The benchmark of what a user waits for runs, small, and its table has a number in every row."""

import re

from benchmarks.user_path import Sizes, of_features, of_images, of_processes, of_tables

SMALL = Sizes(rounds=1, processes=1, groups=10, tasks=4, steps=1)


def numbers(rows: list[str]) -> list[float]:
    found = [re.fullmatch(r"\| .+ \| (-?[\d.]+) (?:ms|s|times) \| (?:at most [\d.]+)? \|", row) for row in rows]
    assert all(found), rows
    return [float(match[1]) for match in found if match]


def test_tables():
    assert all(value > 0 for value in numbers(of_tables(SMALL)))


def test_images(glyph_cache, monkeypatch):
    monkeypatch.setenv("IBAML_DATA", str(glyph_cache))
    (ratio,) = numbers(of_images(SMALL))
    assert ratio > 0


def test_processes():
    # Importing the library takes longer than torch alone, of which it is a part.
    imported, help_text, first, later = numbers(of_processes(SMALL))
    assert min(first, later) > 0 and max(imported, help_text) < 60


def test_features():
    assert len(numbers(of_features(SMALL))) == 2
