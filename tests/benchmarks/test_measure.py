"""What a measurement says: who ran, what was counted, how the ratios follow from the times."""

import dataclasses

import pytest
import torch
from benchmarks.candidates import BASELINE, LIBRARY
from benchmarks.counting import needed_work
from benchmarks.measure import CaseResult, Check, Measurement, check_on_small_network, measure_case, plain_passes
from benchmarks.problems import Case, build_problem
from benchmarks.settings import BenchmarkSettings

from benchmarks import measure, report, run
from ibaml.experiments.fig2.run import Duration

CPU = torch.device("cpu")
MAML = Case(network="tiny", algorithm="maml", num_inner_steps=2, num_queries=2)
IBAML = Case(network="tiny", algorithm="ibaml", num_inner_steps=2, num_linear_steps=2, num_queries=2)


def one(problem):
    """The gradient of a loss that is nobody's."""
    return lambda: [torch.ones_like(leaf) for leaf in problem.meta_leaves()]


def broken(problem):
    raise RuntimeError("needs torch 1.2\nand more")


@pytest.fixture(scope="module")
def own_candidates():
    """The baseline and the library, a wrong one, and one that does not run; no peer is needed."""
    whole = measure.candidates

    def few(algorithm):
        ours = {name: make for name, make in whole(algorithm).items() if name in (BASELINE, LIBRARY)}
        return {**ours, "wrong": one, "broken": broken}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measure, "candidates", few)
        yield


@pytest.fixture(scope="module")
def result(own_candidates):
    return measure_case(MAML, device=CPU, min_repeats=2, max_repeats=2, max_seconds=0.0)


def test_all_candidates_are_measured(result):
    assert [line.candidate for line in result.measurements] == [BASELINE, LIBRARY, "wrong", "broken"]
    baseline, library = result.of(BASELINE), result.of(LIBRARY)
    assert (baseline.num_gradients, baseline.num_hvps, baseline.difference) == (3, 2, 0)
    assert library.num_hvps == 2
    assert library.difference < 1e-5
    assert min(baseline.peak_bytes, library.peak_bytes) > 0
    for line in (baseline, library):
        assert line.seconds is not None
        assert 0 < line.seconds.shortest <= line.seconds.median <= line.seconds.longest


def test_failures_and_other_gradients_are_told(result):
    assert result.of("broken").failure == "RuntimeError: needs torch 1.2"
    assert not report.is_fair(result.of("broken"))
    assert result.of("wrong").difference > 0.1
    assert not report.is_fair(result.of("wrong"))
    checks = {"wrong": Check(0.5, 1, 1), BASELINE: Check(0.0, 1, 1)}
    text = report.summary([result], {"maml": checks}, [IBAML], BenchmarkSettings(), "x", "y")
    assert "does not run: RuntimeError: needs torch 1.2" in text
    assert "(another gradient)" in text
    assert "1 of 2 gradients agree" in text
    assert "Different: wrong (maml): 5.0e-01" in text
    assert "No time was left for: Conv4-4, 16 x 16, 1-shot, iBaML, K = 2, L = 2." in text


@pytest.mark.parametrize("case", [MAML, IBAML], ids=["maml", "ibaml"])
def test_float64_check_tells_right_from_wrong(own_candidates, case):
    checks = check_on_small_network(case)
    assert checks[LIBRARY].difference < report.LARGEST_DIFFERENCE_FLOAT64
    assert checks[LIBRARY].num_hvps == needed_work(case).hvps
    assert checks["wrong"].difference > 0.1
    assert checks["wrong"].num_gradients == 0
    assert "broken" not in checks


def test_a_library_that_does_not_run_is_no_line_of_the_table(monkeypatch):
    monkeypatch.setattr(measure, "candidates", lambda algorithm: {LIBRARY: broken})
    with pytest.raises(RuntimeError, match="needs torch 1.2"):
        check_on_small_network(MAML)


def test_plain_passes_agree_and_leave_the_network_alone():
    problem = build_problem(dataclasses.replace(MAML, num_shots=5), dtype=torch.float64)
    ways = plain_passes(problem.network, problem.episodes[0].support)
    first, last = ways["channels first"](), ways["channels last"]()
    assert list(ways) == ["channels first", "channels last"]
    for a, b in zip(first, last, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    assert all(parameter.is_contiguous() for parameter in problem.network.parameters())


def seconds(value):
    return Duration(value, value, value)


def invented(case, **medians):
    lines = [Measurement(name.replace("_", " "), seconds=seconds(value)) for name, value in medians.items()]
    lines[0] = lines[0]._replace(candidate=BASELINE)
    return CaseResult(case, "channels first", seconds(0.5), seconds(2.0), lines, {"products": 0.75, "rest": 0.25})


def test_limit_and_ratios_by_hand():
    # Three gradients (two on the support set), two products of two gradients each: 2 * 0.5 + 2 + 2 * 2 * 0.5 = 5.
    result = invented(MAML, loops=30.0, fast_peer=12.0, slow_peer=20.0, ibaml=10.0)
    assert result.limit_seconds == 5.0
    assert result.distance_to_limit(result.of("ibaml")) == 2.0
    best_peer, loops = report.ratios([result])
    assert (best_peer.median, best_peer.num_met) == (1.2, 0)
    assert (loops.median, loops.num_met) == (3.0, 1)


def test_a_wrong_peer_is_not_the_best():
    result = invented(MAML, loops=30.0, wrong=1.0, right=20.0, ibaml=10.0)
    lines = [line._replace(difference=0.1) if line.candidate == "wrong" else line for line in result.measurements]
    assert report.ratios([result._replace(measurements=lines)])[0].median == 2.0


def test_ratio_line_for_readers():
    results = [invented(IBAML, loops=30.0, ibaml=10.0), invented(IBAML, loops=15.0, ibaml=10.0)]
    line = str(report.ratios(results)[0])
    assert line == "| iBaML: time of the plain loops / ours | 2.25 | 1.50 to 3.00 | at least 2 | 1 of 2 |"


def test_readme_section_is_replaced():
    text = "before\n<!-- speed: begin -->\nold\n<!-- speed: end -->\nafter\n"
    new = report.replace_between_markers(text, "speed", r"new \1")
    assert new == text.replace("old", r"new \1")
    with pytest.raises(ValueError, match="must have the lines <!-- accuracy: begin --> and"):
        report.replace_between_markers(text, "accuracy", "new")


def test_a_run_writes_its_result_and_stops_when_the_time_is_up(result, monkeypatch, tmp_path, capsys):
    asked = []
    monkeypatch.setattr(run, "measure_case", lambda case, **how: asked.append((case, how)) or result)
    monkeypatch.setattr(run, "check_on_small_network", lambda case: {BASELINE: Check(0.0, 1, 1)})
    monkeypatch.setattr(BenchmarkSettings, "cases", lambda self: [MAML, IBAML])
    file = tmp_path / "speed.md"
    run.main(run.Arguments(output=file, device="cpu", min_repeats=1, max_repeats=1, max_minutes=1e-9))
    ((case, how),) = asked
    assert case == MAML and how["device"] == CPU and how["min_repeats"] == how["max_repeats"] == 1
    text = file.read_text()
    assert text.count("\n## ") == 1
    assert "## Conv4-4, 16 x 16, 1-shot, MAML, K = 2" in text
    assert "No time was left for: Conv4-4, 16 x 16, 1-shot, iBaML, K = 2, L = 2." in text
    printed = capsys.readouterr()
    assert text in printed.out
    assert "[1/2] Conv4-4" in printed.err


def test_short_and_full_grid():
    short, full = BenchmarkSettings().cases(), BenchmarkSettings(full=True).cases()
    assert len(set(short)) == len(short)
    assert len(set(full)) == len(full) == 5 * 2 * (3 + 9 + 3 + 9)
    assert set(short) <= set(full)
    assert {case.network for case in BenchmarkSettings(only=("mlp",)).cases()} == {"mlp"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"device": "tpu"}, "device must be auto, cpu or cuda, but is 'tpu'"),
        ({"num_threads": 0}, "num_threads must be at least 1 or None, but is 0"),
        ({"min_repeats": 9, "max_repeats": 3}, "min_repeats must be between 1 and max_repeats = 3, but is 9"),
        ({"max_seconds": -1.0}, "max_seconds must be at least 0, but is -1.0"),
        ({"max_minutes": 0.0}, "max_minutes must be positive or None, but is 0.0"),
    ],
)
def test_settings_without_a_meaning_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        BenchmarkSettings(**changes)
