"""The measurement of the playground's drawings."""

import pytest

from benchmarks import sketches


def test_shares_of_a_few_tasks(monkeypatch, capsys):
    found = sketches.measure(2, 1, num_tasks=3)
    assert set(found) == {"right", "turned away", "noticed"}
    assert found["right"].mean >= 80 and all(0 <= one.mean <= 100 for one in found.values())
    assert sketches.measure(2, 1, num_tasks=3) == found
    monkeypatch.setattr(sketches, "TASKS", ((2, 1),))
    monkeypatch.setattr("sys.argv", ["sketches", "--num-tasks", "3"])
    sketches.main()
    assert f"| 2 | 1 | {found['right'].mean:.1f} +- " in capsys.readouterr().out


def test_there_is_help(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["sketches", "--help"])
    with pytest.raises(SystemExit):
        sketches.main()
    assert "--num-tasks" in capsys.readouterr().out
