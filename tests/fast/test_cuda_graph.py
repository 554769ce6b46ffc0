"""What is done when capturing fails, and when the device is lost; without a device, by stand-ins."""

import logging
from typing import Any

import pytest
import torch

from ibaml.fast import DeviceLostError, is_device_lost, replayed
from ibaml.fast import cuda_graph as module

MISALIGNED = "CUDA error: misaligned address"


class OnCuda:
    """A tensor's description; all that ``replayed`` looks at before it captures."""

    shape, dtype, device = (2,), torch.float32, torch.device("cuda:0")


def captured_by(monkeypatch: pytest.MonkeyPatch, graph: Any) -> None:
    monkeypatch.setattr(module, "_Graph", graph)


def raising(error: Exception) -> Any:
    def raise_it(*_: object) -> Any:
        raise error

    return raise_it


@pytest.mark.parametrize(
    ("error", "lost"),
    [
        (torch.AcceleratorError(MISALIGNED), True),
        (RuntimeError(MISALIGNED), True),
        (DeviceLostError("a kernel failed"), True),
        (torch.OutOfMemoryError("CUDA out of memory"), False),
        (RuntimeError("CUDA error: operation not permitted when stream is capturing"), False),
        (RuntimeError("shapes do not match"), False),
        (ValueError(MISALIGNED), False),
    ],
)
def test_which_errors_lose_the_device(error: Exception, lost: bool) -> None:
    assert is_device_lost(error) == lost


@pytest.mark.parametrize("error", [torch.AcceleratorError(MISALIGNED), RuntimeError(MISALIGNED)])
def test_nothing_is_called_after_the_device_is_lost(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    captured_by(monkeypatch, raising(error))
    function = replayed(lambda _: pytest.fail("was called on a lost device"))
    with pytest.raises(DeviceLostError, match=r"a kernel failed, .* \(CUDA error: misaligned address\)"):
        function(OnCuda())


def test_a_replay_that_fails_loses_the_device_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    class Graph:
        def __init__(self, *_: object) -> None:
            self.replay = raising(RuntimeError(MISALIGNED))

    captured_by(monkeypatch, Graph)
    with pytest.raises(DeviceLostError, match="misaligned address"):
        replayed(lambda _: 1)(OnCuda())


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("operation not permitted when capturing")]
)
def test_what_cannot_be_captured_is_called(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, error: Exception
) -> None:
    captured_by(monkeypatch, raising(error))
    with caplog.at_level(logging.WARNING):
        assert [replayed(lambda _: 7)(OnCuda()) for _ in range(2)] == [7, 7]
    assert "no CUDA graph could be captured, every kernel is launched anew" in caplog.text


def test_other_errors_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    captured_by(monkeypatch, raising(RuntimeError("cannot be captured")))
    with pytest.raises(RuntimeError, match="^of the function$"):
        replayed(raising(RuntimeError("of the function")))(OnCuda())


def test_no_more_than_eight_graphs_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    count = 0

    class Graph:
        def __init__(self, *_: object) -> None:
            nonlocal count
            count += 1

        def replay(self, _: object) -> str:
            return "replayed"

    def with_shape(size: int) -> OnCuda:
        leaf = OnCuda()
        leaf.shape = (size,)
        return leaf

    captured_by(monkeypatch, Graph)
    function = replayed(lambda _: "called")
    assert [function(with_shape(size)) for size in range(10)] == 8 * ["replayed"] + 2 * ["called"]
    assert count == 8


def test_on_the_cpu_functions_are_called() -> None:
    assert replayed(lambda x: x + 1)(torch.ones(())) == 2
