"""Class indices as indicators."""

import torch

from ibaml.types import Tensor


def indicators(targets: Tensor, num_classes: int, *, like: Tensor) -> Tensor:
    """Returns 1 where an example is of a class and 0 elsewhere, ``[num_classes, num_examples]``.

    Args:
        targets: Class indices, ``[num_examples]``.
        num_classes: Classes, of which some may have no example.
        like: Gives the dtype.
    """
    # A comparison rather than `one_hot`, which reads its values and so fails under vmap.
    return (torch.arange(num_classes, device=targets.device).unsqueeze(-1) == targets).to(like.dtype)
