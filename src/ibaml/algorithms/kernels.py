"""Which of torch's kernels a network may use: those that can be differentiated twice."""

import contextlib
from collections.abc import Generator, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode


@contextlib.contextmanager
def second_derivative_kernels(network: nn.Module) -> Generator[None, None, None]:
    """Switches to kernels that can be differentiated twice: math attention, and recurrent layers without cuDNN."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        if has_attention(network):
            stack.enter_context(_SeenByTorchFunction())
        if torch.backends.cudnn.is_available() and any(isinstance(m, nn.RNNBase) for m in network.modules()):
            stack.enter_context(torch.backends.cudnn.flags(enabled=False))
        yield


class _SeenByTorchFunction(TorchFunctionMode):
    """Changes nothing, but attention layers that see it leave their fused inference kernel, which has no derivatives.

    ``torch.backends.mha.set_fastpath_enabled`` would do so for all threads of the process.
    """

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        del types
        return func(*args, **(kwargs or {}))


def has_attention(network: nn.Module) -> bool:
    """Whether a network has attention layers of torch."""
    return any(isinstance(module, nn.MultiheadAttention | nn.TransformerEncoderLayer) for module in network.modules())
