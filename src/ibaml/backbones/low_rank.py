"""Low-rank adapters in a backbone, by ``peft``: few parameters to be learned in the place of its weights."""

import copy
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ibaml.checks import require_positive_int
from ibaml.optional import require


def low_rank(module: nn.Module, layers: Sequence[str], *, rank: int = 8, seed: int = 0) -> nn.Module:
    """Returns a copy of a module with ``W + B A`` in the place of some weight matrices ``W`` (Hu et al. 2022, LoRA).

    It computes what the module does, as ``B`` starts at zero. To be learned with the names of the adapters,
    ``MetaLearner(backbone=low_rank(module, ...), fine_tune="*lora_*")``; ``load`` wants the same call again.

    Args:
        module: The module; not changed. Layers that ``peft`` knows (linear, convolution, embedding) can be adapted.
        layers: Names of layers, or their last parts, such as ``["query", "value"]``.
        rank: Rows of ``A``.
        seed: Of ``A``.

    Raises:
        ImportError: If ``peft`` is not installed.
        TypeError: If the rank is no integer.
        ValueError: If the rank is not positive, no layer has such a name, or ``peft`` does not know its kind.
    """
    peft: Any = require("peft", "peft", "peft")
    require_positive_int("rank", rank)
    settings = peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=list(layers))
    try:
        adapted: nn.Module = peft.inject_adapter_in_model(settings, copy.deepcopy(module))
    except ValueError as error:
        kinds = (nn.Linear, nn.Conv2d, nn.Embedding)
        names = [name for name, part in module.named_modules() if isinstance(part, kinds)]
        raise ValueError(
            f"layers is {list(layers)}, which peft does not adapt ({error}); there are {', '.join(names) or 'none'}."
        ) from error
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in adapted.named_parameters():
            if "lora_A" in name:
                # As nn.Linear starts, from a generator of our own: peft draws from the global one.
                bound = 1 / math.sqrt(value[0].numel())
                value.copy_(bound * (2 * torch.rand(value.shape, generator=generator) - 1))
    return adapted
