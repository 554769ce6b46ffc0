"""Counts against formulas, the split gradient against the whole one, memory against known sizes, slopes by hand."""

import dataclasses
import io
import itertools
import json
import re
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch

from ibaml import tree
from ibaml.experiments import fig2
from ibaml.experiments.fig2 import (
    EXPLICIT,
    AlgorithmName,
    CostPoint,
    Duration,
    Fig2Result,
    Fig2Settings,
    MetaGradientProblem,
    PassCounter,
    build_problem,
    curve_name,
    meta_gradient_in_halves,
    peak_bytes_of,
    rows,
    run,
    slope,
    summary,
)
from ibaml.model import Model

ALGORITHMS: tuple[AlgorithmName, ...] = ("maml", "imaml", "abml", "ibaml")
CPU = torch.device("cpu")
TINY = Fig2Settings(
    inner_steps=(1, 2),
    linear_steps=(3,),
    device="cpu",
    num_channels=4,
    image_size=16,
    num_queries=2,
    num_repeats=2,
    num_threads=1,
)


def problem(
    name: AlgorithmName, num_inner_steps: int, num_linear_steps: int = 3, **changes: Any
) -> tuple[MetaGradientProblem, Model]:
    settings = dataclasses.replace(TINY, **changes)
    linear = None if name in EXPLICIT else num_linear_steps
    return build_problem(settings, name, num_inner_steps, linear, dtype=torch.float64)


@pytest.mark.parametrize("name", ALGORITHMS)
@pytest.mark.parametrize("num_samples", [1, 2])
def test_the_two_halves_give_the_hypergradient_of_the_library(name: AlgorithmName, num_samples: int) -> None:
    built, _ = problem(name, 2, num_samples=num_samples)
    nothing, gradient = meta_gradient_in_halves(built)
    assert nothing is None
    expected, info = built.algorithm.hypergradient(built.nll, built.meta, built.episode, built.noise)
    assert float(tree.norm(expected)) > 1e-3
    torch.testing.assert_close(gradient, expected, rtol=1e-10, atol=1e-10)
    assert built.algorithm.num_samples == (1 if name in ("maml", "imaml") else num_samples)
    if name not in EXPLICIT:
        # So that the solver has no reason to stop before its last step.
        assert not info.linear_converged


@pytest.mark.parametrize("name", ALGORITHMS)
def test_the_outer_loss_is_that_of_the_library(name: AlgorithmName) -> None:
    built, _ = problem(name, 2)
    info = built.algorithm.hypergradient(built.nll, built.meta, built.episode, built.noise)[1]
    value = built.outer_loss(built.adapt(built.meta), built.meta)
    torch.testing.assert_close(value, info.outer_loss, rtol=1e-12, atol=0)


def counts(name: AlgorithmName, num_inner_steps: int, num_linear_steps: int, num_samples: int) -> list[int]:
    built, model = problem(name, num_inner_steps, num_linear_steps, num_samples=num_samples)
    counter = PassCounter()
    halves = meta_gradient_in_halves(built._replace(nll=counter.nll(model)))
    next(halves)
    forward, forward_hvps = counter.num_gradients, counter.num_hvps
    next(halves)
    return [forward, forward_hvps, counter.num_gradients - forward, counter.num_hvps]


@pytest.mark.parametrize(("num_inner_steps", "num_linear_steps", "num_samples"), [(1, 2, 1), (3, 1, 2)])
def test_counts_agree_with_the_formulas(num_inner_steps: int, num_linear_steps: int, num_samples: int) -> None:
    k, l, s = num_inner_steps, num_linear_steps, num_samples  # noqa: E741 - as in the paper
    # Forward: K steps and the gradient norm of the result. Backward: the query set and K products, or the query set,
    # the inner gradient and L products. ABML's outer loss looks at the support set as well. For weights the library
    # takes the mixed derivative by one more gradient; the Gaussian form knows it.
    assert counts("maml", k, l, s) == [k + 1, 0, 1, k]
    assert counts("imaml", k, l, s) == [k + 1, 0, 3, l]
    assert counts("abml", k, l, s) == [s * (k + 1), 0, 2 * s, s * k]
    assert counts("ibaml", k, l, s) == [s * (k + 1), 0, 2 * s, s * l]


def test_the_probe_changes_neither_values_nor_derivatives() -> None:
    built, model = problem("maml", 1)
    counted = PassCounter().nll(model)

    def losses(nll: Any) -> Any:
        def mean(weights: Any) -> torch.Tensor:
            return nll(weights, built.meta.shared, built.episode.support).mean()

        prior = built.meta.prior
        gradient, pullback = torch.func.vjp(torch.func.grad(mean), prior)[:2]
        return mean(prior), gradient, pullback(prior)

    torch.testing.assert_close(losses(counted), losses(model.nll), rtol=1e-14, atol=0)


class TestPeakBytes:
    def test_is_the_largest_sum_of_what_is_alive_at_once(self) -> None:
        kept = torch.zeros(1000)

        def function() -> torch.Tensor:
            first = torch.empty(50_000, dtype=torch.uint8)
            second = torch.empty(30_000, dtype=torch.uint8)
            del first
            third = torch.empty(40_000, dtype=torch.uint8)
            del second
            return kept[:10].add_(1) if third is not None else kept

        assert peak_bytes_of(function, CPU) == 80_000

    def test_ignores_what_an_earlier_call_left_behind(self) -> None:
        left: list[torch.Tensor] = []

        def function() -> None:
            left.append(torch.empty(70_000, dtype=torch.uint8))

        assert peak_bytes_of(function, CPU) == 70_000
        assert peak_bytes_of(function, CPU) == 70_000

    def test_of_a_call_that_allocates_nothing(self) -> None:
        assert peak_bytes_of(lambda: None, CPU) == 0

    def test_on_cuda_asks_its_allocator(self, monkeypatch: pytest.MonkeyPatch) -> None:
        device = torch.device("cuda")
        calls: list[str] = []

        def record(name: str, value: int | None, given: torch.device) -> int | None:
            assert given == device
            calls.append(name)
            return value

        for name, value in [("synchronize", None), ("reset_peak_memory_stats", None)]:
            monkeypatch.setattr(torch.cuda, name, partial(record, name, value))
        monkeypatch.setattr(torch.cuda, "memory_allocated", partial(record, "before", 300))
        monkeypatch.setattr(torch.cuda, "max_memory_allocated", partial(record, "peak", 1000))
        assert peak_bytes_of(lambda: calls.append("function"), device) == 700
        assert calls == ["synchronize", "before", "reset_peak_memory_stats", "function", "synchronize", "peak"]


def peak_bytes(name: AlgorithmName, num_inner_steps: int, num_linear_steps: int = 1) -> int:
    built, _ = problem(name, num_inner_steps, num_linear_steps)
    return peak_bytes_of(lambda: list(meta_gradient_in_halves(built)), CPU)


@pytest.mark.parametrize("name", EXPLICIT)
def test_peak_memory_of_explicit_algorithms_is_linear_in_the_number_of_inner_steps(name: AlgorithmName) -> None:
    at_1, at_2, at_3 = (peak_bytes(name, num_inner_steps) for num_inner_steps in (1, 2, 3))
    assert at_3 - at_2 == at_2 - at_1 > 0.1 * at_1


@pytest.mark.parametrize("name", ["imaml", "ibaml"])
def test_peak_memory_of_implicit_algorithms_depends_on_no_number_of_steps(name: AlgorithmName) -> None:
    assert peak_bytes(name, 1) == peak_bytes(name, 3) == peak_bytes(name, 1, 2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"inner_steps": ()}, "inner_steps must be one or more different numbers of at least 1, but is ()."),
        ({"inner_steps": (5, 0)}, "inner_steps must be one or more different numbers of at least 1, but is (5, 0)."),
        ({"linear_steps": (5, 5)}, "linear_steps must be one or more different numbers of at least 1, but is (5, 5)."),
        ({"algorithms": ()}, "algorithms must be one or more of maml, imaml, abml, ibaml, but is ()."),
        (
            {"algorithms": ("fomaml",)},
            "algorithms must be one or more of maml, imaml, abml, ibaml, but is ('fomaml',).",
        ),
        ({"algorithms": ("maml",) * 2}, "of maml, imaml, abml, ibaml, but is ('maml', 'maml')."),
        ({"device": "tpu"}, "device must be auto, cpu or cuda, but is 'tpu'."),
        ({"num_ways": 1}, "num_ways must be at least 2, but is 1."),
        ({"num_channels": 0}, "num_channels must be at least 1, but is 0."),
        ({"image_size": 0}, "image_size must be at least 1, but is 0."),
        ({"num_shots": 0}, "num_shots must be at least 1, but is 0."),
        ({"num_queries": 0}, "num_queries must be at least 1, but is 0."),
        ({"num_samples": 0}, "num_samples must be at least 1, but is 0."),
        ({"num_repeats": 0}, "num_repeats must be at least 1, but is 0."),
        ({"num_threads": 0}, "num_threads must be at least 1 or None, but is 0."),
    ],
)
def test_settings_without_a_meaning_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        Fig2Settings(**changes)


def test_cuda_without_cuda_is_refused_before_any_process_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(fig2, "_measuring_process", None)
    with pytest.raises(ValueError, match="device is 'cuda', but this torch finds no CUDA device"):
        run(dataclasses.replace(TINY, device="cuda"))


@pytest.mark.parametrize(("available", "device"), [(True, "cuda"), (False, "cpu")])
def test_auto_is_cuda_where_there_is_cuda(monkeypatch: pytest.MonkeyPatch, available: bool, device: str) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
    monkeypatch.setattr(fig2, "_measuring_process", FakeProcess)
    FakeProcess.log = []
    settings = dataclasses.replace(TINY, device="auto", algorithms=("maml",))
    assert run(settings).settings.device == device
    assert {settings.device for settings, *_ in FakeProcess.log} == {device}


class FakeProcess:
    """Stands in for a measuring process; its n-th repeat takes 10 K + n seconds forward, and the negative backward."""

    log: list[tuple[Fig2Settings, str, int, int | None, str]] = []

    def __init__(self, *point: Any) -> None:
        self.point = point
        self.repeats = itertools.count(1)

    def __enter__(self) -> Callable[[str], dict[str, Any]]:
        return self.answer

    def __exit__(self, *_: object) -> None:
        self.log.append((*self.point, "end"))

    def answer(self, command: str) -> dict[str, Any]:
        self.log.append((*self.point, command))
        _, algorithm, num_inner_steps, num_linear_steps = self.point
        if command == "count":
            names = ("peak_bytes", "num_forward_gradients", "num_backward_gradients", "num_hvps")
            numbers = (1000 * num_inner_steps, num_inner_steps + 1, 1, num_linear_steps or num_inner_steps)
            return {"device": "a machine", "point": dict(zip(names, numbers, strict=True))}
        time = 10 * num_inner_steps + next(self.repeats) ** 2
        return {"forward": time, "backward": 100 - time}


def test_the_processes_of_a_curve_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fig2, "_measuring_process", FakeProcess)
    FakeProcess.log = []
    progress: list[tuple[int, int]] = []
    settings = dataclasses.replace(TINY, algorithms=("ibaml", "maml"), linear_steps=(3, 1), num_repeats=3)
    result = run(settings, on_progress=lambda *numbers: progress.append(numbers))
    curves = [("ibaml", 3), ("ibaml", 1), ("maml", None)]
    turns = [(k, command) for command in ("count", "time", "time", "time") for k in (1, 2)]
    # Processes end in the opposite order of their starts.
    assert [entry[1:] for entry in FakeProcess.log] == [
        (name, k, num_linear_steps, command)
        for name, num_linear_steps in curves
        for k, command in [*turns, (2, "end"), (1, "end")]
    ]
    assert progress == [(done, 24) for done in range(1, 25)]
    assert result.settings == settings
    assert result.device == "a machine"
    assert [(point.algorithm, point.num_linear_steps, point.num_inner_steps) for point in result.points] == [
        (*curve, k) for curve in curves for k in (1, 2)
    ]
    # Squares, so that the median is not the mean.
    assert result.points[3] == CostPoint(
        "ibaml", 2, 1, Duration(24, 21, 29), Duration(76, 71, 79), Duration(100, 100, 100), 2000, 3, 1, 1
    )


def test_a_run_in_a_real_process() -> None:
    result = run(dataclasses.replace(TINY, algorithms=("imaml",), inner_steps=(2,)))
    assert f", 1 thread(s), torch {torch.__version__}" in result.device
    (point,) = result.points
    assert (point.algorithm, point.num_inner_steps, point.num_linear_steps) == ("imaml", 2, 3)
    forward, backward, total = point.forward_seconds, point.backward_seconds, point.total_seconds
    assert 0 < forward.shortest <= forward.median <= forward.longest < 60
    assert 0 < backward.shortest <= backward.median <= backward.longest < 60
    assert forward.shortest + backward.shortest <= total.shortest <= total.longest < 120
    assert (point.num_forward_gradients, point.num_backward_gradients, point.num_hvps) == (3, 3, 3)
    # That process and this one agree to the byte, but for the copy of the outputs that the counter's probe makes.
    built, _ = build_problem(TINY, "imaml", 1, 3)
    here = peak_bytes_of(lambda: list(meta_gradient_in_halves(built)), CPU)
    assert 0 <= point.peak_bytes - here <= 2000
    assert "stopped before" not in summary(result)


def test_a_process_that_fails_at_once_is_reported_with_what_it_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fig2, "_COMMAND", (sys.executable, "-c", "import sys; sys.exit('x' * 3000 + ' no memory')"))
    message = r"the process that measures MAML at K = 1 ended with code 1:\nx{1989} no memory\n$"
    with pytest.raises(RuntimeError, match=message):
        run(dataclasses.replace(TINY, algorithms=("maml",)))


def test_a_process_that_fails_between_two_measurements_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    code = "import sys; input(); print('{}', flush=True); sys.stdin.close(); sys.exit(3)"
    monkeypatch.setattr(fig2, "_COMMAND", (sys.executable, "-c", code))
    progress: list[int] = []
    with pytest.raises(RuntimeError, match="the process that measures iMAML, L = 3 at K = 1 ended with code 3:"):
        run(dataclasses.replace(TINY, algorithms=("imaml",)), on_progress=lambda done, _: progress.append(done))
    assert progress == [1, 2]


def test_what_a_process_answers() -> None:
    request = json.dumps([dataclasses.asdict(dataclasses.replace(TINY, num_threads=None)), "maml", 1, None])
    answers: list[dict[str, Any]] = []
    fig2._serve(request, io.StringIO("count\ntime\ntime\n"), lambda line: answers.append(json.loads(line)))
    counts, *times = answers
    assert counts["point"].pop("peak_bytes") > 10_000
    assert counts["point"] == {"num_forward_gradients": 2, "num_backward_gradients": 1, "num_hvps": 1}
    assert f"{torch.get_num_threads()} thread(s)" in counts["device"]
    assert len(times) == 2
    assert all(sorted(each) == ["backward", "forward"] and min(each.values()) > 0 for each in times)


def test_times_on_cuda_are_those_of_its_events(monkeypatch: pytest.MonkeyPatch) -> None:
    clock: list[str] = []

    class Event:
        def __init__(self, *, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            clock.append("mark")
            self.at = len(clock)

        def elapsed_time(self, end: "Event") -> float:
            assert clock[-1] == "synchronize"
            return 1000.0 * (end.at - self.at)

    def halves(_: object) -> Any:
        clock.extend(["forward"] * 3)
        yield None
        clock.extend(["backward"] * 5)
        yield "gradient"

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda _: clock.append("synchronize"))
    monkeypatch.setattr(fig2, "meta_gradient_in_halves", halves)
    # A mark counts itself.
    assert fig2._time(problem("maml", 1)[0], torch.device("cuda")) == {"forward": 4.0, "backward": 6.0}
    assert clock[0] == "synchronize"


def point(
    algorithm: AlgorithmName, num_inner_steps: int, num_linear_steps: int | None, backward: float, peak: int, hvps: int
) -> CostPoint:
    return CostPoint(
        algorithm,
        num_inner_steps,
        num_linear_steps,
        forward_seconds=Duration(0.5, 0.25, 1.0),
        # The median is far off, as on a busy machine.
        backward_seconds=Duration(9 * backward, backward, 10 * backward),
        total_seconds=Duration(10 * backward, 1 + backward, 11 * backward),
        peak_bytes=peak,
        num_forward_gradients=num_inner_steps + 1,
        num_backward_gradients=1,
        num_hvps=hvps,
    )


POINTS = [
    *(point("maml", k, None, 1.0 + k, 100 + 10 * k, k) for k in (1, 5, 30)),
    point("imaml", 1, 5, 3.0, 120, 5),
    point("imaml", 5, 5, 5.0, 120, 5),
    point("imaml", 30, 5, 4.0, 150, 5),
    *(point("abml", k, None, 2.0 + 2 * k, 300 + 30 * k, k) for k in (1, 5, 30)),
]
RESULT = Fig2Result(
    Fig2Settings(inner_steps=(1, 5, 30), linear_steps=(5,), algorithms=("maml", "imaml", "abml")), "a machine", POINTS
)


def test_slopes_by_hand() -> None:
    maml, imaml, abml = slope(POINTS)
    assert (maml.algorithm, maml.num_linear_steps, maml.first, maml.last) == ("maml", None, 5, 30)
    assert maml[4:] == pytest.approx((31 / 6 - 1, 32 / 7 - 1, 400 / 150 - 1, 0, 0), abs=1e-12)
    assert (imaml.algorithm, imaml.num_linear_steps) == ("imaml", 5)
    assert (imaml.backward_seconds, imaml.total_seconds, imaml.peak_bytes) == (
        pytest.approx(-0.2),
        pytest.approx(-1 / 6),
        pytest.approx(0.25),
    )
    # Least squares by hand: mean K is 12 and mean time is 4, the slope is (-11 * -1 + -7 * 1 + 18 * 0) / 494.
    residuals = [value - 4 - 4 / 494 * (k - 12) for k, value in [(1, 3.0), (5, 5.0), (30, 4.0)]]
    assert imaml.backward_seconds_bend == pytest.approx(max(map(abs, residuals)) / 4)
    assert abml.backward_seconds == pytest.approx(maml.backward_seconds)


def test_slopes_between_other_numbers_of_inner_steps() -> None:
    assert [(each.first, each.last) for each in slope(POINTS[:2])] == [(1, 5)]
    (maml,) = slope(POINTS[:3], first=1, last=5)
    assert maml.backward_seconds == pytest.approx(2)
    assert (maml.first, maml.last) == (1, 5)


@pytest.mark.parametrize("steps", [{"first": 2}, {"last": 29}, {"first": 30}, {"first": 5, "last": 1}])
def test_slopes_between_what_was_not_measured_are_refused(steps: dict[str, int]) -> None:
    start, end = steps.get("first", 5), steps.get("last", 30)
    message = (
        "first and last must be two of the numbers of inner steps [1, 5, 30], the smaller one first, but are "
        f"{start} and {end}."
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        slope(POINTS, **steps)


def test_rows_are_flat_and_complete() -> None:
    table = rows(RESULT)
    assert len(table) == len(POINTS)
    assert table[3] == {
        "algorithm": "imaml",
        "num_inner_steps": 1,
        "num_linear_steps": 5,
        "forward_seconds_median": 0.5,
        "forward_seconds_shortest": 0.25,
        "forward_seconds_longest": 1.0,
        "backward_seconds_median": 27.0,
        "backward_seconds_shortest": 3.0,
        "backward_seconds_longest": 30.0,
        "total_seconds_median": 30.0,
        "total_seconds_shortest": 4.0,
        "total_seconds_longest": 33.0,
        "peak_bytes": 120,
        "num_forward_gradients": 2,
        "num_backward_gradients": 1,
        "num_hvps": 5,
    }


def test_the_summary_has_every_number_and_how_it_was_measured() -> None:
    text = summary(RESULT)
    assert "5-way 1-shot, 15 query images a class, 1 weight sample(s), float32; a machine." in text
    assert "proximal term is 30 (temperature of ABML and iBaML 0.01, inner learning rate 0.005)." in text
    assert "| MAML | 30 | 279.000 (31.000 to 310.000) | 310.000 (32.000 to 341.000) | 0.0 | 31 + 1 | 30 |" in text
    assert text.count("\n| iMAML, L = 5 |") == 4
    assert "From K = 5 to K = 30, shortest times" in text
    assert "| MAML | +416.7% (0.0%) | +357.1% | +166.67% (0.00%) |" in text
    assert "- ABML / MAML at equal K and L: backward time 2.00, peak memory 3.00" in text
    assert "- iMAML / MAML at K = L: backward time 0.83, peak memory 0.80" in text
    assert "| iBaML" not in text
    assert "iBaML /" not in text
    assert "stopped before" not in text


def test_the_summary_of_a_single_number_of_inner_steps_has_no_slopes() -> None:
    text = summary(Fig2Result(Fig2Settings(inner_steps=(5,), algorithms=("maml",)), "a machine", POINTS[1:2]))
    assert "From K" not in text
    assert "Ratios" not in text


def test_the_summary_names_the_points_where_the_solver_stopped_early() -> None:
    points = [point("imaml", 1, 5, 3.0, 120, 4), point("ibaml", 1, 5, 3.0, 120, 10), point("ibaml", 5, 5, 3.0, 120, 9)]
    settings = Fig2Settings(inner_steps=(1,), linear_steps=(5,), num_samples=2)
    text = summary(Fig2Result(settings, "a machine", points))
    assert text.endswith("so that the cost is too low: iMAML, L = 5 at K = 1, iBaML, L = 5 at K = 5.\n")


def test_names_for_readers() -> None:
    assert [curve_name(name, None) for name in ALGORITHMS] == ["MAML", "iMAML", "ABML", "iBaML"]


@pytest.mark.parametrize("differentiate_outside", [True, False])
def test_passes_are_counted_for_every_member_of_a_batch(differentiate_outside):
    counter = PassCounter()

    def step(weight: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        def loss(weight: torch.Tensor) -> torch.Tensor:
            return (counter.watch(weight * x) ** 3).sum()

        return loss(weight - 0.1 * torch.func.grad(loss)(weight))

    weight, x = torch.ones(()), torch.rand(4, 3)
    if differentiate_outside:
        torch.func.grad(lambda weight: torch.func.vmap(step, in_dims=(None, 0))(weight, x).sum())(weight)
    else:
        torch.func.vmap(torch.func.grad(step), in_dims=(None, 0))(weight, x)
    # For each of the four: the inner and the outer gradient, and one product to go back through the step.
    assert (counter.num_gradients, counter.num_hvps) == (4 * 2, 4 * 1)
