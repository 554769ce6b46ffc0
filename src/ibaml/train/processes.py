"""Processes that share the tasks of a meta-step.

Every process holds all meta-parameters and draws all tasks from the same generator, computes its own share of them and
takes part in one sum per step; then all apply the same update. The number of processes is therefore no part of a run's
state. ``torchrun`` starts the processes, Lightning Fabric joins them into a group (environment, device, threads, back
end), and ``torch.distributed`` carries the sum. No network is wrapped. Fabric is imported only where there is more than
one process.
"""

import contextlib
import dataclasses
import logging
import os
import re
import signal
import sys
import uuid
from collections.abc import Callable, Generator, Sequence
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
from torch import distributed

from ibaml import tree
from ibaml.types import PyTree, Tensor

T = TypeVar("T")
_CPU = torch.device("cpu")
_AGREED = "The first process has the same error."

TIMEOUT = timedelta(minutes=30)
"""Longest wait for another process in a collective operation; the last resort against one that hangs. One that dies is
noticed at once, by its closed connections (gloo) or by the launcher."""


class ProcessLostError(RuntimeError):
    """Another process of the run has died or hangs."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Processes:
    """The processes of a run, seen from one of them; by default that one alone, and then every method is free.

    All methods but ``share`` and ``is_abandoned`` are collective: every process calls them, in the same order.

    Attributes:
        rank: Number of this process, from 0.
        size: Number of processes.
        device: Where this process computes.
        launcher: Id of the process that started these ones and waits for them; None if nobody does.
    """

    rank: int = 0
    size: int = 1
    device: torch.device = _CPU
    launcher: int | None = None

    def __post_init__(self) -> None:
        """Refuses a rank that is not below the size."""
        if not 0 <= self.rank < self.size:
            raise ValueError(f"rank must be in [0, {self.size}), the number of processes, but is {self.rank}.")

    @property
    def is_first(self) -> bool:
        """Whether this is the process that writes and prints."""
        return self.rank == 0

    @property
    def is_abandoned(self) -> bool:
        """Whether the launcher has died, so that nobody would notice how these processes end, or could stop them."""
        return self.launcher is not None and os.getppid() != self.launcher

    def share(self, count: int) -> range:
        """Returns which of ``count`` items this process computes: neighbours, and one more or less than any other.

        Examples:
            >>> [list(Processes(rank=rank, size=2).share(5)) for rank in range(2)]
            [[0, 1], [2, 3, 4]]
        """
        return range(self.rank * count // self.size, (self.rank + 1) * count // self.size)

    def sum(self, tensors: PyTree) -> PyTree:
        """Adds pytrees of equal structure over all processes, with one all-reduce of one vector.

        The result has the same bits everywhere. The vector has the widest dtype of the leaves and at least float32.

        Args:
            tensors: Tensors on ``device``, of the same shapes, and in dicts of the same order, in every process.

        Returns:
            The sums, in the dtypes of the leaves; the argument itself if there is one process.

        Raises:
            ProcessLostError: If another process has died, or does not come within the time limit.

        Cost:
            Each process sends and receives about ``2 (size - 1) / size`` times the vector, and keeps one copy of it.
        """
        if self.size == 1:
            return tensors
        flat, unravel = tree.ravel(tensors)
        vector = flat.to(torch.promote_types(flat.dtype, torch.float32))
        # Not Fabric's all_reduce, which puts a barrier, a second collective, before each sum.
        with _lost_processes_named(self):
            distributed.all_reduce(vector)
        return tree.map(lambda leaf, total: total.to(leaf.dtype), tensors, unravel(vector))

    def gather(self, function: Callable[[], T]) -> list[T]:
        """Calls a function in every process and returns all results, by rank, to each.

        Args:
            function: What to call. Results are pickled.

        Raises:
            Exception: In every process, if the function raised in any: what the lowest of these processes raised.
            ProcessLostError: If another process has died, or does not come within the time limit.
        """
        if self.size == 1:
            return [function()]
        outcomes: list[tuple[Any, Exception | None]] = [(None, None)] * self.size
        own = _outcome(function)
        with _lost_processes_named(self):
            distributed.all_gather_object(outcomes, own)
        for _, error in outcomes:
            if error is not None:
                if not self.is_first:
                    error.add_note(_AGREED)
                raise error
        return [value for value, _ in outcomes]

    def together(self, function: Callable[[], T]) -> T:
        """Calls a function in every process and returns its own result to each, or the same error to all.

        Raises:
            Exception: In every process, if the function raised in any: what the lowest of these processes raised.
            ProcessLostError: If another process has died, or does not come within the time limit.
        """
        own: list[T] = []
        self.gather(lambda: own.append(function()))
        return own[0]

    def on_first(self, function: Callable[[], T]) -> T:
        """Calls a function in the first process only and returns its result to all.

        Args:
            function: What to call. The result is pickled.

        Raises:
            Exception: In every process, if the function raised: what it raised.
            ProcessLostError: If another process has died, or does not come within the time limit.
        """
        return self.gather(lambda: function() if self.is_first else cast(T, None))[0]

    def first_then_others(self, function: Callable[[], T]) -> T:
        """Calls a function in every process, and in the first one before all others, so that it can fill a cache.

        Raises:
            Exception: In every process, if the function raised in any: what the lowest of these processes raised.
            ProcessLostError: If another process has died, or does not come within the time limit.
        """
        own: list[T] = []
        self.on_first(lambda: own.append(function()))
        return self.together(lambda: own[0] if own else function())


def is_told_by_first(error: BaseException) -> bool:
    """Tells whether the first process has the same error, so that this one need not print it."""
    cause: BaseException | None = error
    while cause is not None:
        if _AGREED in getattr(cause, "__notes__", ()):
            return True
        cause = cause.__cause__
    return False


def num_launched() -> int:
    """Returns how many processes ``torchrun`` has started for this run; 1 without it."""
    return int(os.environ["WORLD_SIZE"]) if distributed.is_torchelastic_launched() else 1


def launched_rank() -> int:
    """Returns the number that ``torchrun`` has given this process; 0 without it."""
    return int(os.environ["RANK"]) if distributed.is_torchelastic_launched() else 0


def require_devices(device: torch.device, count: int) -> None:
    """Refuses a number of processes on this machine that its devices cannot serve.

    Args:
        device: ``cpu``, or ``cuda`` without a number.
        count: Number of processes on this machine.

    Raises:
        ValueError: If the number is below 1, there are fewer CUDA devices, or one of them is named.
    """
    if count < 1:
        raise ValueError(f"devices must be at least 1, but is {count}.")
    if count > 1 and ":" in str(device):
        raise ValueError(
            f"device is {str(device)!r}, which names one device, but {count} processes need one each: use "
            f"{device.type!r}, and choose among several with CUDA_VISIBLE_DEVICES."
        )
    if device.type == "cuda" and count > torch.cuda.device_count():
        raise ValueError(
            f"devices is {count}, but this torch finds {torch.cuda.device_count()} CUDA device(s) on this machine: use "
            "at most so many, or processes on the CPU with --device cpu."
        )


@contextlib.contextmanager
def connect(device: torch.device = _CPU, *, timeout: timedelta = TIMEOUT) -> Generator[Processes, None, None]:
    """Joins the processes that ``torchrun`` has started; without it, or with one process, no group is made.

    Args:
        device: ``cpu``, or ``cuda``, of which each process on a machine gets the one with its local number.
        timeout: Longest wait for another process.

    Yields:
        The group.

    Raises:
        ValueError: If there are fewer CUDA devices than processes, or Lightning Fabric is missing.
        ProcessLostError: If not all processes can be joined.
    """
    if num_launched() == 1:
        yield Processes(device=device)
        return
    require_devices(device, int(os.environ["LOCAL_WORLD_SIZE"]))
    processes = _join(device, timeout)
    yield processes
    # Not after an error, when the others may never come. The first process may still be writing: an exit code other
    # than 0 of another one would have the launcher stop it.
    processes.on_first(lambda: None)
    distributed.destroy_process_group()


def launch(arguments: Sequence[str], count: int) -> int:
    """Runs ``python ARGUMENTS`` in several processes on this machine, as ``torchrun`` does, until all have ended.

    When one fails, the others get SIGTERM, and SIGKILL if they have not ended 30 seconds later. SIGINT and SIGTERM are
    passed on once.

    Args:
        arguments: Arguments of the Python interpreter.
        count: Number of processes.

    Returns:
        0, or the exit code of the first process that failed by itself (130 after SIGINT or SIGTERM).

    Raises:
        ProcessLostError: If a process was killed, naming it.
    """
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=count,
        run_id=str(uuid.uuid4()),
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",  # a free port
        max_restarts=0,
    )
    # It reports each failure at length; the processes and the exception below say the same in a sentence. It also keeps
    # the signals that it handles.
    disabled = logging.root.manager.disable
    handlers = {number: signal.getsignal(number) for number in signal.valid_signals()}
    logging.disable(logging.ERROR)
    try:
        elastic_launch(config, sys.executable)("-u", *arguments)
    except SignalException:
        return 130
    except ChildFailedError as error:
        # Only those that ended before the others were told to.
        failures = sorted(error.failures.items(), key=lambda item: item[1].timestamp)
        for rank, failure in failures:
            if failure.exitcode < 0:
                name = signal.Signals(-failure.exitcode).name
                raise ProcessLostError(
                    f"process {rank} of {count} (id {failure.pid}) was killed by {name}; the others were stopped."
                ) from error
        return failures[0][1].exitcode
    finally:
        logging.disable(disabled)
        for number, handler in handlers.items():
            if handler is not None and handler != signal.getsignal(number):
                signal.signal(number, handler)
    return 0


def _join(device: torch.device, timeout: timedelta) -> Processes:
    try:
        from lightning_fabric import Fabric
        from lightning_fabric.strategies.ddp import DDPStrategy
    except ImportError as error:
        raise ValueError(
            f"{num_launched()} processes need Lightning Fabric, which is not installed: pip install 'ibaml[processes]'."
        ) from error
    # Before anything that takes time: a process whose parent dies gets another one.
    launcher = os.getppid()
    # It announces the back end with a banner.
    logging.getLogger("lightning_fabric").setLevel(logging.WARNING)
    num_local = int(os.environ["LOCAL_WORLD_SIZE"])
    fabric = Fabric(
        accelerator=device.type,
        devices=num_local,
        num_nodes=num_launched() // num_local,
        strategy=DDPStrategy(process_group_backend="nccl" if device.type == "cuda" else "gloo", timeout=timeout),
    )
    with _lost_processes_named(Processes(rank=launched_rank(), size=num_launched())):
        fabric.launch()
    return Processes(rank=fabric.global_rank, size=fabric.world_size, device=fabric.device, launcher=launcher)


def _outcome(function: Callable[[], T]) -> tuple[T | None, Exception | None]:
    try:
        return function(), None
    except Exception as error:
        return None, error


@contextlib.contextmanager
def _lost_processes_named(processes: Processes) -> Generator[None, None, None]:
    """Turns the errors of a back end, all of them RuntimeErrors, into one that says what happened."""
    try:
        yield
    except RuntimeError as error:
        # Of gloo's sentence, without its source file before and its advice behind.
        reason = re.sub(r"^\[\S*\] ", "", (str(error) or type(error).__name__).splitlines()[0]).split(". ")[0]
        raise ProcessLostError(
            f"process {processes.rank} of {processes.size} cannot reach the others: one has died or hangs ({reason})."
        ) from error


def placed(leaf: Tensor, share: range, count: int) -> Tensor:
    """Returns a process's rows among zeros, so that the sum over processes has the rows of all, bit by bit.

    Examples:
        >>> placed(torch.tensor([1.0, 2.0]), range(1, 3), 4)
        tensor([0., 1., 2., 0.])
    """
    full = leaf.new_zeros((count, *leaf.shape[1:]))
    full[share.start : share.stop] = leaf
    return full
