"""Which of torch's kernels a network may use: those that can be differentiated twice."""

import contextlib
from collections.abc import Generator, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from ibaml.algorithms.guard import Guard
from ibaml.types import Params, Tensor

_flags = Guard()
_WITHOUT_ATTENTION = ("torch.nn.modules.", "ibaml.networks.")
"""Where modules are from that call no attention, but for torch's own attention layers."""


class Kernels(NamedTuple):
    """What a network may call that has kernels without second derivatives.

    Attributes:
        attention: Whether it may call attention: it has layers of torch for that, or modules that are not known here.
        attention_layers: Whether it has torch's own.
        recurrence: Whether it has recurrent layers.
        ties: Whether a parameter or buffer of it has two names.
    """

    attention: bool
    attention_layers: bool
    recurrence: bool
    ties: bool

    def call(self, network: nn.Module, values: Params, x: Tensor) -> Tensor:
        """Returns what the network, or a part of it, gives with some values of its parameters."""
        with self.differentiable_twice():
            # To look for ties takes a fifth of a small network's pass.
            return torch.func.functional_call(network, values, (x,), tie_weights=self.ties)

    @contextlib.contextmanager
    def differentiable_twice(self) -> Generator[None, None, None]:
        """Switches to math attention and to recurrent layers without cuDNN, if the network may call them."""
        with contextlib.ExitStack() as stack:
            if self.attention or self.recurrence:
                stack.enter_context(_flags)
            if self.attention:
                stack.enter_context(sdpa_kernel(SDPBackend.MATH))
            if self.attention_layers:
                stack.enter_context(_SeenByTorchFunction())
            if self.recurrence and torch.backends.cudnn.is_available():
                stack.enter_context(torch.backends.cudnn.flags(enabled=False))
            yield


def kernels_of(network: nn.Module) -> Kernels:
    """Returns what a network may call, by its modules."""
    modules = list(network.modules())
    layers = any(isinstance(module, nn.MultiheadAttention | nn.TransformerEncoderLayer) for module in modules)
    return Kernels(
        attention=layers or not all(type(module).__module__.startswith(_WITHOUT_ATTENTION) for module in modules),
        attention_layers=layers,
        recurrence=any(isinstance(module, nn.RNNBase) for module in modules),
        ties=any(
            len([*named()]) < len([*named(remove_duplicate=False)])
            for named in (network.named_parameters, network.named_buffers)
        ),
    )


def time_first_layers(network: nn.Module) -> tuple[str, ...]:
    """Returns the names of layers of torch that take the first axis of their inputs for time, as is their default.

    Args:
        network: Which may transpose its inputs, so that this is right there.

    Examples:
        >>> time_first_layers(nn.GRU(2, 3)), time_first_layers(nn.GRU(2, 3, batch_first=True))
        (('GRU',), ())
    """
    return tuple(
        name or type(layer).__name__
        for name, layer in network.named_modules()
        if isinstance(layer, nn.RNNBase | nn.MultiheadAttention) and not layer.batch_first
    )


_SAME = 1e-2
"""How far outputs of an input alone and beside others may be apart by rounding, in half precision too."""


def require_rows_alone(what: str, layers: Sequence[str], alone: torch.Tensor, together: torch.Tensor) -> None:
    """Refuses outputs for an input that change with the others, as where these are taken for steps in time.

    Args:
        what: How messages call the network.
        layers: From ``time_first_layers``.
        alone: Outputs of the last input alone, ``[1, ...]``; the first one has nothing before it in time.
        together: Outputs of all inputs, ``[num_inputs, ...]``.

    Raises:
        ValueError: Naming the layers.
    """
    if alone.shape[1:] != together.shape[1:] or not torch.allclose(alone[-1], together[-1], rtol=_SAME, atol=_SAME):
        raise ValueError(
            f"what {what} returns for an input changes with those beside it: {', '.join(layers)} takes the first axis "
            "for time, and here that is the axis of the inputs. Build it with batch_first=True, or transpose in "
            "forward."
        )


_BEYOND_TORCH_FUNC = (
    "saved tensor hooks",
    "setup_context",
    "torch.autograd.Function",
    "use_reentrant=True",
    "does not require grad and does not have a grad_fn",
)


def is_beyond_torch_func(error: BaseException) -> bool:
    """Tells whether torch refuses a network's pass because ``torch.func`` supports no such part."""
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _BEYOND_TORCH_FUNC)


def advice_on_torch_func(network: nn.Module, error: BaseException) -> str:
    """Returns what to do about it."""
    return (
        f"the network ({type(network).__name__}) has a part that functional derivatives do not support: activation "
        "checkpointing, no_grad, or an autograd.Function without setup_context. Take it out; for less memory set "
        "max_examples_per_pass in TrainerSettings, or adapt the last layer alone, where checkpoint(..., "
        f"use_reentrant=False) works. (torch says: {error})"
    )


class _SeenByTorchFunction(TorchFunctionMode):
    """Changes nothing, but attention layers that see it leave their fused inference kernel, which has no derivatives.

    ``torch.backends.mha.set_fastpath_enabled`` would do so for all threads of the process.
    """

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        del types
        return func(*args, **(kwargs or {}))
