"""One thread at a time where state is shared that cannot be avoided: a module's parameters, flags of the process."""

import abc
import contextlib
import copy
import os
import threading
import weakref
from typing import Any, Self

from torch import nn


class Guard:
    """A lock that a thread may take again, and that copies and pickles as a new one.

    ``torch.func.functional_call`` puts tensors into a module for the time of a call, and torch's flags say for the
    whole process which kernels are used: without a lock two threads would see each other's.

    A fork waits until no other thread holds it, so that the child does not start with a module in the middle of a call.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()
        _guards.add(self)

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._lock.release()

    def __reduce__(self) -> tuple[Any, ...]:
        """Copies share no module with the original."""
        return Guard, ()


class CopiedAtRest(abc.ABC):
    """What holds a network, and is copied and pickled at a moment when no other thread runs it.

    In the middle of a call a module has the tensors of that call for parameters, which may not even be copied. Pickle
    walks through an object after having asked for its state, so that the state is a copy.
    """

    @abc.abstractmethod
    def network_guard(self) -> Guard | None:
        """Returns the guard of the network; None if there is none yet."""

    def __getstate__(self) -> dict[str, Any]:
        """Returns a deep copy of the attributes, for pickle: for its time there are two of all tensors."""
        with self.network_guard() or contextlib.nullcontext():
            return copy.deepcopy(vars(self))

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Returns a copy of this and all that it holds, made once."""
        other = memo[id(self)] = object.__new__(type(self))
        with self.network_guard() or contextlib.nullcontext():
            vars(other).update(copy.deepcopy(vars(self), memo))
        return other

    def __copy__(self) -> Self:
        """Returns another one of the same attributes, the network among them."""
        other = object.__new__(type(self))
        vars(other).update(vars(self))
        return other


_guards: weakref.WeakSet[Guard] = weakref.WeakSet()
_of_networks: weakref.WeakKeyDictionary[nn.Module, Guard] = weakref.WeakKeyDictionary()
_access = Guard()
_held_at_fork: list[Guard] = []


def guard_of(network: nn.Module) -> Guard:
    """Returns the guard of a module, the same for all who build a model of it."""
    with _access:
        return _of_networks.setdefault(network, Guard())


def _before_fork() -> None:
    for guard in [_access, *(guard for guard in _guards if guard is not _access)]:
        guard.__enter__()
        _held_at_fork.append(guard)


def _after_fork() -> None:
    while _held_at_fork:
        _held_at_fork.pop().__exit__()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before_fork, after_in_parent=_after_fork, after_in_child=_after_fork)
