"""What is learned from predictions of held-out tasks: the output temperature, and when to abstain.

Temperature scaling (Guo et al. 2017) rescales confidence by one number. The curve of errors against the confidence that
then results is what a threshold for a wanted error rate is read from.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from ibaml.likelihoods import ClassPrediction, Prediction
from ibaml.metrics import AbstentionCurve, Recalibration, Sizes, abstention_curve, estimate
from ibaml.types import Tensor

LEAST_TASKS = 10
"""Different tasks that a temperature takes: fewer do not tell how much tasks differ."""

_NUM_FOLDS = 10
_NUM_EACH_WAY = 20
_STEP = math.log(20.0) / _NUM_EACH_WAY
"""Of the grid of logarithms of temperatures."""
_NUM_EXTENSIONS, _LEAST_GAIN = 2, 1e-3


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
        As of ``fit_temperature``.
    """
    nll = _nll_of(predictions, targets)
    on_grid = _on_grid(nll)
    fitted = _least(nll, on_grid)
    numbers: dict[int, int] = {}
    task = torch.tensor([numbers.setdefault(one, len(numbers)) for one in sources or range(len(predictions))])
    old, new = nll(torch.full((len(task),), before).double()), nll(_cross_fitted(on_grid, task))
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

    It is searched on the logarithmic scale: a grid from 1/20 to 20, and beyond to 1/8000 and 8000 as long as that gains
    0.001 nats, finds the valley (a mixture of Gaussians over weight samples may have several) and Brent's method its
    bottom. Where every prediction is right, a lower temperature always gains a little.

    Args:
        predictions: One prediction per held-out task.
        targets: Its class indices, or targets of shape ``[num_examples, num_outputs]``.

    Raises:
        ValueError: If there are no tasks.

    Cost:
        About 70 evaluations of the nll, 40 more at most; no network is run.
    """
    nll = _nll_of(predictions, targets)
    return _least(nll, _on_grid(nll))


_Nll = Callable[[Tensor], Tensor]
"""Temperature of each task to its mean nll, float64 ``[num_tasks]``; one temperature may serve all."""


class _Grid(NamedTuple):
    """The nll of each task at some temperatures.

    Attributes:
        logarithms: Of the temperatures, increasing by ``_STEP``.
        nll: Float64 ``[num_temperatures, num_tasks]``.
    """

    logarithms: list[float]
    nll: Tensor


def _on_grid(nll: _Nll) -> _Grid:
    """Returns the nll from 1/20 to 20, and beyond an end where it goes on to fall."""

    def at(places: range) -> dict[int, Tensor]:
        return {place: nll(torch.tensor([place * _STEP]).double().exp()) for place in places}

    def mean(place: int) -> float:
        return float(found[place].mean().nan_to_num(nan=math.inf))

    found = at(range(-_NUM_EACH_WAY, _NUM_EACH_WAY + 1))
    best = min(found, key=mean)
    for _ in range(_NUM_EXTENSIONS):
        if best not in (min(found), max(found)):
            break
        found |= at(range(best + 1, best + 1 + _NUM_EACH_WAY) if best > 0 else range(best - _NUM_EACH_WAY, best))
        reached = min(found, key=mean)
        if not mean(best) - mean(reached) >= _LEAST_GAIN:
            break
        best = reached
    places = sorted(place for place in found if abs(place) <= max(abs(best), _NUM_EACH_WAY))
    return _Grid([place * _STEP for place in places], torch.stack([found[place] for place in places]))


def _least(nll: _Nll, on_grid: _Grid) -> float:
    """Returns the temperature of the least mean nll from the valley of the grid on."""
    # Here, so that importing the library does not import scipy.
    from scipy.optimize import minimize_scalar

    def mean_nll(log_temperature: float) -> float:
        return float(nll(torch.tensor([log_temperature]).double().exp()).mean())

    lowest = on_grid.logarithms[int(on_grid.nll.mean(1).nan_to_num(nan=math.inf).argmin())]
    valley = (lowest - _STEP, lowest + _STEP)
    return math.exp(minimize_scalar(mean_nll, bounds=valley, method="bounded", options={"xatol": 1e-7}).x)


def _cross_fitted(on_grid: _Grid, task: Tensor) -> Tensor:
    """Returns for each prediction the temperature of the least mean nll on the tasks of the other folds.

    The bottom of a valley is that of the parabola through its three points of the grid.

    Args:
        on_grid: As ``_on_grid`` returns it.
        task: Number of the task that each prediction is of.
    """
    fold = task % _NUM_FOLDS
    chosen = torch.ones(len(task), dtype=torch.float64)
    for held_apart in fold.unique():
        others = on_grid.nll[:, fold != held_apart]
        if others.shape[1]:
            chosen[fold == held_apart] = math.exp(_bottom(on_grid.logarithms, others.mean(1)))
    return chosen


def _bottom(logarithms: Sequence[float], values: Tensor) -> float:
    best = int(values.nan_to_num(nan=math.inf).argmin())
    if not 0 < best < len(logarithms) - 1:
        return logarithms[best]
    left, middle, right = values[best - 1 : best + 2].tolist()
    curvature = left - 2 * middle + right
    if not (math.isfinite(curvature) and curvature > 0):
        return logarithms[best]
    return logarithms[best] + 0.5 * (left - right) / curvature * _STEP


def _nll_of(predictions: Sequence[Prediction], targets: Sequence[Tensor]) -> _Nll:
    if not predictions:
        raise ValueError("calibration needs at least one task, but there are none.")
    of_classes = [one for one in predictions if isinstance(one, ClassPrediction)]
    if len(of_classes) == len(predictions):
        return _nll_of_classes(of_classes, targets)

    def nll(temperatures: Tensor) -> Tensor:
        each = zip(predictions, targets, temperatures.expand(len(predictions)).tolist(), strict=True)
        return torch.stack([one.tempered(factor).nll(target).double().mean() for one, target, factor in each])

    return nll


def _nll_of_classes(predictions: Sequence[ClassPrediction], targets: Sequence[Tensor]) -> _Nll:
    """Does it for classes, of all tasks at once and with samples averaged once for all temperatures."""
    parts = [one.tensors()["log_probs"] for one in predictions]
    most = max(part.shape[-1] for part in parts)
    log_probs = torch.cat(
        [torch.nn.functional.pad(part, (0, most - part.shape[-1]), value=-math.inf) for part in parts]
    )
    labels = torch.cat([target.cpu() for target in targets]).unsqueeze(-1)
    sizes = torch.tensor([len(target) for target in targets])
    task = torch.repeat_interleave(torch.arange(len(sizes)), sizes)

    def nll(temperatures: Tensor) -> Tensor:
        factors = temperatures.expand(len(sizes))[task].unsqueeze(-1)
        each = -torch.log_softmax(log_probs / factors, -1).gather(-1, labels).squeeze(-1)
        return torch.zeros(len(sizes), dtype=torch.float64).index_add(0, task, each) / sizes

    return nll
