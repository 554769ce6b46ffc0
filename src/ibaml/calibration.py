"""Temperature scaling (Guo et al. 2017): one number, fitted on held-out tasks, that rescales confidence."""

import math
from collections.abc import Callable, Sequence

import torch

from ibaml.likelihoods import Prediction
from ibaml.types import Tensor

_LOG_RANGE = (-math.log(20.0), math.log(20.0))
_NUM_GRID = 41
_GOLDEN = (math.sqrt(5) - 1) / 2


def fit_temperature(predictions: Sequence[Prediction], targets: Sequence[Tensor]) -> float:
    """Returns the temperature with the least mean nll, every task of the same weight.

    It is searched between 1/20 and 20 on the logarithmic scale: a grid finds the valley (a mixture of Gaussians over
    weight samples may have several) and golden sections its bottom.

    Args:
        predictions: One prediction per held-out task.
        targets: Its class indices, or targets of shape ``[num_examples, num_outputs]``.

    Raises:
        ValueError: If there are no tasks.

    Cost:
        About 80 evaluations of the nll; no network is run.
    """
    if not predictions:
        raise ValueError("calibration needs at least one task, but there are none.")

    def mean_nll(log_temperature: float) -> float:
        temperature = math.exp(log_temperature)
        values = [
            prediction.tempered(temperature).nll(target).double().mean()
            for prediction, target in zip(predictions, targets, strict=True)
        ]
        return float(torch.stack(values).mean())

    low, high = _LOG_RANGE
    grid = [low + (high - low) * index / (_NUM_GRID - 1) for index in range(_NUM_GRID)]
    best = min(range(_NUM_GRID), key=lambda index: mean_nll(grid[index]))
    return math.exp(_golden_section(mean_nll, grid[max(best - 1, 0)], grid[min(best + 1, _NUM_GRID - 1)]))


def _golden_section(function: Callable[[float], float], low: float, high: float) -> float:
    """Returns the minimum of a function with one valley between two points."""
    left, right = high - _GOLDEN * (high - low), low + _GOLDEN * (high - low)
    at_left, at_right = function(left), function(right)
    while high - low > 1e-6:
        if at_left < at_right:
            high, right, at_right = right, left, at_left
            left = high - _GOLDEN * (high - low)
            at_left = function(left)
        else:
            low, left, at_left = left, right, at_right
            right = low + _GOLDEN * (high - low)
            at_right = function(right)
    return (low + high) / 2
