"""Functions on CUDA tensors, captured once and replayed: launching a small kernel takes longer than running it."""

import functools
import logging
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar, cast

import torch

from ibaml import tree

_logger = logging.getLogger(__name__)
_MOST_GRAPHS = 8
"""Each holds its memory; tasks of many sizes would need one each."""

_P = ParamSpec("_P")
_R = TypeVar("_R")
_NUM_WARM_UP_CALLS = 2


class DeviceLostError(RuntimeError):
    """A kernel failed on the device: the process cannot use it any more, whatever it does next."""


def is_device_lost(error: BaseException) -> bool:
    """Tells whether an error of torch means that the process has lost its device.

    Memory that ran out, and operations that cannot be captured, leave the device as it was.
    """
    if isinstance(error, DeviceLostError):
        return True
    if isinstance(error, torch.OutOfMemoryError) or "captur" in str(error):
        return False
    return isinstance(error, torch.AcceleratorError) or (isinstance(error, RuntimeError) and "CUDA error" in str(error))


def replayed(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """Returns the function, replaying a CUDA graph of it wherever all its arguments are on one CUDA device.

    The first calls for new shapes run as they are, so that kernels are chosen and programs written; then the function
    is captured. What it returns is copied, so that the next call does not change it. On other devices, for more than
    eight sets of shapes, and if the function cannot be captured, which is logged, it is called as it is.

    Args:
        function: Takes and returns pytrees of tensors, has no side effects, and does the same operations for all values
            of its arguments. What it closes over is read at the addresses of the first call.

    Raises:
        DeviceLostError: If a kernel fails. Nothing that follows on the device could succeed.
    """
    graphs: dict[Any, _Graph | None] = {}

    @functools.wraps(function)
    def call(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        leaves = tree.leaves((args, kwargs))
        devices = {leaf.device for leaf in leaves}
        if len(devices) != 1 or next(iter(devices)).type != "cuda":
            return function(*args, **kwargs)
        key = tuple((leaf.shape, leaf.dtype, leaf.device) for leaf in leaves)
        try:
            if key not in graphs and len(graphs) < _MOST_GRAPHS:
                graphs[key] = _captured(function, (args, kwargs))
            graph = graphs.get(key)
            return function(*args, **kwargs) if graph is None else cast(_R, graph.replay((args, kwargs)))
        except RuntimeError as error:
            if is_device_lost(error):
                raise DeviceLostError(
                    f"a kernel failed, and with it the process's use of the device ({error})"
                ) from error
            raise

    return call


def _captured(function: Callable[..., Any], arguments: Any) -> "_Graph | None":
    """Returns the captured call, or None if that is not possible."""
    try:
        return _Graph(function, arguments)
    except RuntimeError as error:
        if is_device_lost(error):
            raise
        _logger.warning("no CUDA graph could be captured, every kernel is launched anew: %s", error)
        return None


class _Graph:
    """A captured call: its arguments and results live at fixed addresses."""

    def __init__(self, function: Callable[..., Any], arguments: Any) -> None:
        self._arguments = tree.map(lambda leaf: leaf.detach().clone(), arguments)
        args, kwargs = self._arguments
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(_NUM_WARM_UP_CALLS):
                function(*args, **kwargs)
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._result = function(*args, **kwargs)

    def replay(self, arguments: Any) -> Any:
        for target, source in zip(tree.leaves(self._arguments), tree.leaves(arguments), strict=True):
            target.copy_(source, non_blocking=True)
        self._graph.replay()
        return tree.map(torch.clone, self._result)
