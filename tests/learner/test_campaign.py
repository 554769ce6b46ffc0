"""A seeded few of the cases of ``make faults``: learners that are asked, killed, or left without a disk."""

import itertools

import pytest
from tests.campaigns import asked


@pytest.mark.parametrize(
    ("disturb", "num_cases"),
    [(asked.killed_while_writing, 3), (asked.full_while_writing, 3), (asked.killed_while_extracting, 1)],
    ids=["model and evaluation killed", "model and evaluation without a disk", "features killed"],
)
def test_what_is_written_is_whole(disturb, num_cases, tmp_path, monkeypatch):
    monkeypatch.setenv("IBAML_DATA", str(tmp_path / "cache"))
    found = list(itertools.islice(disturb(tmp_path / "case", 0), num_cases))
    assert found == num_cases * [None]


def test_all_calls_from_eight_threads_answer_as_from_one():
    assert next(asked.together(0)) is None
