"""What is learned from predictions of held-out tasks: the output temperature, and when to abstain.

Temperature scaling (Guo et al. 2017) rescales confidence by one number. The curve of errors against the confidence that
then results is what a threshold for a wanted error rate is read from.
"""

import math
from collections.abc import Sequence

import torch

from ibaml.likelihoods import ClassPrediction, Prediction
from ibaml.metrics import AbstentionCurve, abstention_curve, estimate
from ibaml.types import Tensor

_LOG_RANGE = (-math.log(20.0), math.log(20.0))
_NUM_GRID = 41


def fit_abstention(predictions: Sequence[Prediction], targets: Sequence[Tensor]) -> AbstentionCurve | None:
    """Returns how often class predictions of at least some confidence were wrong; None for numbers.

    Args:
        predictions: One prediction per held-out task, tempered.
        targets: Its class indices.
    """
    confidence: list[Tensor] = []
    correct: list[Tensor] = []
    for prediction, target in zip(predictions, targets, strict=True):
        if not isinstance(prediction, ClassPrediction):
            return None
        confidence.append(prediction.confidence)
        correct.append(prediction.labels == target)
    return abstention_curve(confidence, correct)


def output_temperature(predictions: Sequence[Prediction], targets: Sequence[Tensor]) -> float:
    """Returns the temperature with the least mean nll if its gain is clear, else 1.

    A few tasks know one number badly, and a wrong one harms every later prediction: the gain over 1 has to leave zero
    outside its 95% interval, paired over tasks.

    Args:
        predictions: One prediction per held-out task.
        targets: As of ``fit_temperature``.

    Raises:
        ValueError: If there are no tasks.
    """
    temperature = fit_temperature(predictions, targets)
    gains = _nll(predictions, targets, 1.0) - _nll(predictions, targets, temperature)
    if bool((gains == math.inf).any()):
        return temperature
    # Where the nll is infinite at both there is nothing to gain.
    gain = estimate(gains.nan_to_num())
    return temperature if gain.mean > gain.half_width else 1.0


def fit_temperature(predictions: Sequence[Prediction], targets: Sequence[Tensor]) -> float:
    """Returns the temperature with the least mean nll, every task of the same weight.

    It is searched between 1/20 and 20 on the logarithmic scale: a grid finds the valley (a mixture of Gaussians over
    weight samples may have several) and Brent's method its bottom.

    Args:
        predictions: One prediction per held-out task.
        targets: Its class indices, or targets of shape ``[num_examples, num_outputs]``.

    Raises:
        ValueError: If there are no tasks.

    Cost:
        About 70 evaluations of the nll; no network is run.
    """
    if not predictions:
        raise ValueError("calibration needs at least one task, but there are none.")
    # Here, so that importing the library does not import scipy.
    from scipy.optimize import minimize_scalar

    def mean_nll(log_temperature: float) -> float:
        return float(_nll(predictions, targets, math.exp(log_temperature)).mean())

    low, high = _LOG_RANGE
    grid = [low + (high - low) * index / (_NUM_GRID - 1) for index in range(_NUM_GRID)]
    best = min(range(_NUM_GRID), key=lambda index: mean_nll(grid[index]))
    valley = grid[max(best - 1, 0)], grid[min(best + 1, _NUM_GRID - 1)]
    return math.exp(minimize_scalar(mean_nll, bounds=valley, method="bounded", options={"xatol": 1e-7}).x)


def _nll(predictions: Sequence[Prediction], targets: Sequence[Tensor], temperature: float) -> Tensor:
    """Returns the mean nll of each task, float64 ``[num_tasks]``."""
    return torch.stack(
        [
            prediction.tempered(temperature).nll(target).double().mean()
            for prediction, target in zip(predictions, targets, strict=True)
        ]
    )
