"""What is learned from predictions of held-out tasks: the output temperature, and when to abstain.

Temperature scaling (Guo et al. 2017) rescales confidence by one number. The curve of errors against the confidence that
then results is what a threshold for a wanted error rate is read from.
"""

import math
from collections.abc import Sequence

import torch

from ibaml.likelihoods import ClassPrediction, Prediction
from ibaml.metrics import AbstentionCurve, Recalibration, Sizes, abstention_curve, estimate
from ibaml.types import Tensor

LEAST_TASKS = 10
"""Different tasks that a temperature takes: fewer do not tell how much tasks differ."""

_NUM_FOLDS = 10
_GRID = [math.log(20.0) * (index - 20) / 20 for index in range(41)]
"""Logarithms of temperatures."""


def fit_abstention(
    predictions: Sequence[Prediction], targets: Sequence[Tensor], *, sources: Sequence[int] | None = None
) -> AbstentionCurve | None:
    """Returns how often class predictions of at least some confidence were wrong; None for numbers.

    Args:
        predictions: One prediction per held-out task, tempered.
        targets: Its class indices.
        sources: As of ``recalibrate``; draws of one task count as one task.
    """
    if not all(isinstance(prediction, ClassPrediction) for prediction in predictions):
        return None
    answers: dict[int, list[tuple[Tensor, Tensor]]] = {}
    for source, prediction, target in zip(sources or range(len(targets)), predictions, targets, strict=True):
        assert isinstance(prediction, ClassPrediction)
        answers.setdefault(source, []).append((prediction.confidence, prediction.labels == target))
    of_tasks = [[torch.cat(part) for part in zip(*one, strict=True)] for one in answers.values()]
    return abstention_curve([confidence for confidence, _ in of_tasks], [correct for _, correct in of_tasks])


def recalibrate(
    predictions: Sequence[Prediction],
    targets: Sequence[Tensor],
    *,
    before: float = 1.0,
    sources: Sequence[int] | None = None,
    num_support: Sequence[int] = (),
) -> Recalibration:
    """Fits the temperature with the least mean nll, and takes it if its gain is clear.

    A few tasks know one number badly, and a wrong one harms every later prediction. The gain is measured on tasks that
    the temperature was not fitted on (cross-fitting, in ten folds), paired over the tasks; it has to leave zero outside
    its 95% interval, of at least ``LEAST_TASKS`` different tasks.

    Args:
        predictions: One prediction per held-out task, of temperature 1.
        targets: As of ``fit_temperature``.
        before: The temperature that stays if the gain over it is not clear.
        sources: Which task each prediction is of, where a task comes several times. None: all are different.
        num_support: How many rows of each were known, for the result alone.

    Raises:
        ValueError: If there are no tasks.

    Cost:
        About 70 evaluations of the nll; no network is run.
    """
    on_grid = _on_grid(predictions, targets)
    fitted = _least(predictions, targets, on_grid)
    numbers: dict[int, int] = {}
    task = torch.tensor([numbers.setdefault(one, len(numbers)) for one in sources or range(len(predictions))])
    old = _nll(predictions, targets, [before] * len(predictions))
    new = _nll(predictions, targets, _cross_fitted(on_grid, task))
    # Where the nll is infinite at both there is nothing to gain.
    gains = (old - new).nan_to_num(nan=0.0, posinf=math.inf, neginf=-math.inf)
    each = range(len(numbers))
    nll_before, nll_after, gain = (
        estimate(torch.stack([values[task == one].mean() for one in each])) for values in (old, new, gains)
    )
    is_clear = gain.mean == math.inf or gain.mean > gain.half_width
    return Recalibration(
        before=before,
        fitted=fitted,
        is_taken=is_clear and len(numbers) >= LEAST_TASKS,
        nll_before=nll_before,
        nll_after=nll_after,
        gain=gain,
        num_tasks=len(numbers),
        num_support=Sizes.of(num_support) if num_support else None,
        least_tasks=LEAST_TASKS,
    )


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
    return _least(predictions, targets, _on_grid(predictions, targets))


def _least(predictions: Sequence[Prediction], targets: Sequence[Tensor], on_grid: Tensor) -> float:
    """Returns the temperature of the least mean nll from the valley of the grid on."""
    # Here, so that importing the library does not import scipy.
    from scipy.optimize import minimize_scalar

    def mean_nll(log_temperature: float) -> float:
        return float(_nll(predictions, targets, [math.exp(log_temperature)] * len(predictions)).mean())

    best = int(on_grid.mean(1).nan_to_num(nan=math.inf).argmin())
    valley = _GRID[max(best - 1, 0)], _GRID[min(best + 1, len(_GRID) - 1)]
    return math.exp(minimize_scalar(mean_nll, bounds=valley, method="bounded", options={"xatol": 1e-7}).x)


def _cross_fitted(on_grid: Tensor, task: Tensor) -> list[float]:
    """Returns for each prediction the temperature of the least mean nll on the tasks of the other folds.

    The bottom of a valley is that of the parabola through its three points of the grid.

    Args:
        on_grid: As ``_on_grid`` returns it.
        task: Number of the task that each prediction is of.
    """
    fold = task % _NUM_FOLDS
    chosen = [1.0] * len(task)
    for held_apart in fold.unique().tolist():
        others = on_grid[:, fold != held_apart]
        log_temperature = _bottom(others.mean(1)) if others.shape[1] else 0.0
        for index in torch.nonzero(fold == held_apart).flatten().tolist():
            chosen[index] = math.exp(log_temperature)
    return chosen


def _bottom(values: Tensor) -> float:
    best = int(values.nan_to_num(nan=math.inf).argmin())
    if not 0 < best < len(_GRID) - 1:
        return _GRID[best]
    left, middle, right = values[best - 1 : best + 2].tolist()
    curvature = left - 2 * middle + right
    if not (math.isfinite(curvature) and curvature > 0):
        return _GRID[best]
    return _GRID[best] + 0.5 * (left - right) / curvature * (_GRID[1] - _GRID[0])


def _on_grid(predictions: Sequence[Prediction], targets: Sequence[Tensor]) -> Tensor:
    """Returns the nll at each temperature of the grid, float64 ``[len(_GRID), num_tasks]``."""
    if not predictions:
        raise ValueError("calibration needs at least one task, but there are none.")
    return torch.stack([_nll(predictions, targets, [math.exp(value)] * len(predictions)) for value in _GRID])


def _nll(predictions: Sequence[Prediction], targets: Sequence[Tensor], temperatures: Sequence[float]) -> Tensor:
    """Returns the mean nll of each task at a temperature of its own, float64 ``[num_tasks]``."""
    return torch.stack(
        [
            prediction.tempered(temperature).nll(target).double().mean()
            for prediction, target, temperature in zip(predictions, targets, temperatures, strict=True)
        ]
    )
