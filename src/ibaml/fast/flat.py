"""Adapted parameters as one vector: a solver's step is then one operation instead of one for each parameter.

Kernels that load several numbers at once need addresses that are multiples of theirs; on CUDA a tensor that starts
elsewhere is slow at best, and some kernels fail ("misaligned address"), which ends the process's use of the device. Two
things therefore hold here. Rows of a flat matrix (weight samples, tasks) start at multiples of 128 bytes: memory
between rows is left unused, so that no sum ever sees it. And a parameter that would start elsewhere in its vector is
copied.
"""

import math

import torch

from ibaml.types import Params, Tensor

FLAT = "flat"
"""The one name of adapted parameters that have been flattened."""

_ALIGNMENT = 32
"""Numbers: 128 bytes in single precision."""


def flatten(parameters: Params, *, num_axes: int = 0) -> Params:
    """Concatenates parameters to one vector.

    Args:
        parameters: Tensors by name.
        num_axes: Leading axes that all of them have in common (tasks, weight samples), which are kept.

    Returns:
        The vector, under the name ``"flat"``; no parameters stay none.
    """
    if not parameters:
        return {}
    pieces = [value.reshape(*value.shape[:num_axes], -1) for value in parameters.values()]
    flat = torch.cat(pieces, dim=-1)
    size = flat.shape[-1]
    if num_axes == 0 or size % _ALIGNMENT == 0:
        return {FLAT: flat}
    rows = flat.new_empty(*flat.shape[:-1], math.ceil(size / _ALIGNMENT) * _ALIGNMENT)[..., :size]
    return {FLAT: rows.copy_(flat)}


def unflatten(flat: Params, like: Params) -> Params:
    """Returns the parameters that ``flatten`` concatenated; names and shapes are those of ``like``."""
    start, parameters = 0, Params()
    # One split, the derivative of which is one concatenation; that of each slice would be a vector of zeros.
    pieces = flat[FLAT].split([value.numel() for value in like.values()])
    for piece, (name, value) in zip(pieces, like.items(), strict=True):
        parameters[name] = _aligned(piece, start).view(value.shape)
        start += value.numel()
    return parameters


def _aligned(piece: Tensor, start: int) -> Tensor:
    """Returns a piece of a vector, copied on CUDA if it does not start at a multiple of 128 bytes."""
    return piece.clone() if start % _ALIGNMENT and _needs_alignment(piece) else piece


def _needs_alignment(piece: Tensor) -> bool:
    return piece.is_cuda
