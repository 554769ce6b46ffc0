"""Modules in evaluation mode, without a change to them, and what tells one module's weights from another's."""

import hashlib
import re
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

# The mode is an attribute of the module, which other threads would see change: one pass at a time.
_ONE_PASS_AT_A_TIME = threading.Lock()
_ADDRESS = re.compile(r"0x[0-9a-fA-F]+")


@contextmanager
def evaluation_mode(module: nn.Module | None) -> Generator[None]:
    """Puts a module into evaluation mode without gradients for the time of a block, then back into its own mode.

    Running statistics stay as they are and dropout does nothing. Each part gets back the mode that it had, as parts
    may differ. Blocks of several threads wait for each other.

    Args:
        module: None: gradients are off, and that is all.
    """
    with _ONE_PASS_AT_A_TIME, torch.no_grad():
        parts = [] if module is None else list(module.modules())
        modes = [part.training for part in parts]
        # Not by train(): a module may have one of its own, which keeps some parts in another mode.
        for part in parts:
            part.training = False
        try:
            yield
        finally:
            for part, mode in zip(parts, modes, strict=True):
                part.training = mode


def module_of(function: Callable[..., Any]) -> nn.Module | None:
    """Returns the module whose weights decide what a callable returns, as far as that can be seen.

    Args:
        function: A module, or a method of one, such as ``SentenceTransformer.encode``.

    Examples:
        >>> module = nn.Linear(2, 3)
        >>> module_of(module.forward) is module, module_of(len)
        (True, None)
    """
    if isinstance(function, nn.Module):
        return function
    owner = getattr(function, "__self__", None)
    return owner if isinstance(owner, nn.Module) else None


def weights_stamp(module: nn.Module) -> tuple[tuple[int, int], ...]:
    """Returns numbers that change when a tensor of a module is written to or replaced; cheap, for this process."""
    return tuple((tensor.data_ptr(), tensor._version) for _, tensor in _named_tensors(module))  # pyright: ignore[reportPrivateUsage]


def weights_digest(module: nn.Module) -> str:
    """Returns the SHA-256 of a module: its structure as it prints, and all parameters and buffers.

    Two modules that print alike, with the same weights, and compute different things are not told apart: name them.

    Args:
        module: On any device; the digest does not depend on it, nor on the mode.

    Cost:
        Reads all weights once: a second for some hundred million.
    """
    kinds = [f"{name}:{type(part).__module__}.{type(part).__qualname__}" for name, part in module.named_modules()]
    value = hashlib.sha256("\n".join([*kinds, _ADDRESS.sub("", repr(module))]).encode())
    for name, tensor in _named_tensors(module):
        value.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        value.update(flat.view(torch.uint8).numpy().tobytes())
    return value.hexdigest()


def _named_tensors(module: nn.Module) -> list[tuple[str, torch.Tensor]]:
    return sorted([*module.named_parameters(), *module.named_buffers()], key=lambda named: named[0])
