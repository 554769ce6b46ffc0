"""Inputs that come as tensors and are used as they are: whether a task's are like those of training."""

import math
import warnings
from pathlib import Path
from typing import NamedTuple

import torch

from ibaml.types import Episode, Tensor

_FAR = 10
"""How many times the spread of training a value may lie outside it without a warning."""


class RawInputs(NamedTuple):
    """What a training task's inputs were like.

    Attributes:
        shape: Of one example.
        is_floating_point: Whether they were floating-point numbers, and no whole ones such as tokens.
        low: Least value.
        high: Largest value.
    """

    shape: tuple[int, ...]
    is_floating_point: bool
    low: float
    high: float

    @property
    def are_pixels(self) -> bool:
        """Whether they look like images in [0, 1]."""
        return len(self.shape) == 3 and self.is_floating_point and self.low >= 0 and self.high <= 1


def refuse_path(argument: str, value: object) -> None:
    """Refuses a path where values are expected.

    Args:
        argument: How messages call it.
        value: What came.

    Raises:
        TypeError: If it is a path or a text, which nobody but the caller should open.
    """
    if isinstance(value, str | Path):
        raise TypeError(
            f"{argument} is the path {str(value)!r}; expected an array: ibaml.data.load_class_folder reads a folder of "
            "class folders of images, and `ibaml predict` on the command line takes folders and tables."
        )


def raw_inputs_of(task: Episode) -> RawInputs:
    """Returns what the inputs of a task are like.

    Args:
        task: With at least one query example.
    """
    x = task.query.x
    values = torch.cat([task.support.x.flatten(), x.flatten()])
    return RawInputs(tuple(x.shape[1:]), x.is_floating_point(), float(values.min()), float(values.max()))


def check_raw(argument: str, x: Tensor, known: RawInputs) -> None:
    """Refuses inputs that the network of such tasks cannot mean, with what to do.

    Args:
        argument: How messages call the inputs.
        x: Inputs, ``[num_examples, ...]``.
        known: What those of training were like.

    Raises:
        TypeError: If whole numbers came in place of floating-point ones, or the reverse.
        ValueError: If the axes are others, or in another order.

    Warns:
        RuntimeWarning: If values lie far outside those of training.
    """
    given = tuple(x.shape[1:])
    is_turned = given != known.shape and sorted(given) == sorted(known.shape)
    is_last = len(known.shape) == 3 and given == (*known.shape[1:], known.shape[0])
    expected = (
        f"the model takes tensors as it was trained on, {'floating-point' if known.is_floating_point else 'whole'} "
        f"numbers from {known.low:.3g} to {known.high:.3g} of shape [num_examples, {', '.join(map(str, known.shape))}]"
    )
    came = f"{argument} has dtype {str(x.dtype).removeprefix('torch.')} and shape {list(x.shape)}, but {expected}"
    moves = ".permute(0, 3, 1, 2)" if is_last else ""
    if x.is_floating_point() != known.is_floating_point:
        advice = "torch.as_tensor(x)" + moves + (".float()" if known.is_floating_point else ".long()")
        if known.are_pixels:
            advice += " / 255 (of an inverted model 1 minus that)"
        raise TypeError(f"{came}: pass {advice}.{_OF_RUNS if known.are_pixels else ''}")
    if len(given) != len(known.shape) or is_turned:
        advice = f"pass torch.as_tensor(x){moves}" if moves else "reshape or turn the axes"
        raise ValueError(f"{came}: {advice}.")
    spread = known.high - known.low
    if x.numel() and spread > 0:
        low, high = float(x.min()), float(x.max())
        # What is not finite is refused later, by its place.
        is_finite = math.isfinite(low) and math.isfinite(high)
        if is_finite and (low < known.low - _FAR * spread or high > known.high + _FAR * spread):
            advice = "divide pixels of 0..255 by 255" if known.are_pixels else "check its units and scale"
            warnings.warn(
                f"{argument} has values from {low:.3g} to {high:.3g}, but the model was trained on values from "
                f"{known.low:.3g} to {known.high:.3g} and scales nothing: {advice}.",
                RuntimeWarning,
                stacklevel=2,
            )


_OF_RUNS = " ibaml.recipes.load_learner(folder) reads images of 0..255 as the recipe of a run does."
