"""The processes take turns; what one answers; settings that are refused."""

import dataclasses
import io
import itertools
import json
import re
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch

from ibaml.algorithms.model import Model
from ibaml.experiments.fig2 import process
from ibaml.experiments.fig2 import run as fig2
from ibaml.experiments.fig2.cost import HypergradientProblem, peak_bytes_of
from ibaml.experiments.fig2.process import build_problem
from ibaml.experiments.fig2.report import summary
from ibaml.experiments.fig2.run import run
from ibaml.experiments.fig2.settings import EXPLICIT, AlgorithmName, CostPoint, Duration, Fig2Settings

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
) -> tuple[HypergradientProblem, Model]:
    settings = dataclasses.replace(TINY, **changes)
    linear = None if name in EXPLICIT else num_linear_steps
    return build_problem(settings, name, num_inner_steps, linear, dtype=torch.float64)


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
    monkeypatch.setattr(fig2, "measuring_process", None)
    with pytest.raises(ValueError, match="device is 'cuda', but this torch finds no CUDA device"):
        run(dataclasses.replace(TINY, device="cuda"))


@pytest.mark.parametrize(("available", "device"), [(True, "cuda"), (False, "cpu")])
def test_auto_is_cuda_where_there_is_cuda(monkeypatch: pytest.MonkeyPatch, available: bool, device: str) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
    monkeypatch.setattr(fig2, "measuring_process", FakeProcess)
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
    monkeypatch.setattr(fig2, "measuring_process", FakeProcess)
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
    assert (point.num_forward_gradients, point.num_backward_gradients, point.num_hvps) == (2, 3, 3)
    # That process and this one agree to the byte, but for the copy of the outputs that the counter's probe makes.
    built, _ = build_problem(TINY, "imaml", 1, 3)
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in that process: kernels for several threads may need memory of their own
    try:
        here = peak_bytes_of(built.hypergradient, CPU)
    finally:
        torch.set_num_threads(num_threads)
    assert 0 <= point.peak_bytes - here <= 2000
    assert "stopped before" not in summary(result)


def test_a_process_that_fails_at_once_is_reported_with_what_it_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "COMMAND", (sys.executable, "-c", "import sys; sys.exit('x' * 3000 + ' no memory')"))
    message = r"the process that measures MAML at K = 1 ended with code 1:\nx{1989} no memory\n$"
    with pytest.raises(RuntimeError, match=message):
        run(dataclasses.replace(TINY, algorithms=("maml",)))


def test_a_process_that_fails_between_two_measurements_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    code = "import sys; input(); print('{}', flush=True); sys.stdin.close(); sys.exit(3)"
    monkeypatch.setattr(process, "COMMAND", (sys.executable, "-c", code))
    progress: list[int] = []
    with pytest.raises(RuntimeError, match="the process that measures iMAML, L = 3 at K = 1 ended with code 3:"):
        run(dataclasses.replace(TINY, algorithms=("imaml",)), on_progress=lambda done, _: progress.append(done))
    assert progress == [1, 2]


def test_what_a_process_answers() -> None:
    request = json.dumps([dataclasses.asdict(dataclasses.replace(TINY, num_threads=None)), "maml", 1, None])
    answers: list[dict[str, Any]] = []
    process.serve(request, io.StringIO("count\ntime\ntime\n"), lambda line: answers.append(json.loads(line)))
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

    class Problem:
        def hypergradient(self, on_forward: Callable[[], None]) -> None:
            for _ in range(3):
                clock.append("forward")
                on_forward()
            clock.extend(["backward"] * 5)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda _: clock.append("synchronize"))
    # A mark counts itself, and the last of the forward half's is its end.
    assert process._time(Problem(), torch.device("cuda")) == {"forward": 6.0, "backward": 6.0}  # pyright: ignore[reportArgumentType]
    assert clock[0] == "synchronize"
