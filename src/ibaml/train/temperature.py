"""What is learned from predictions of held-out tasks: the output temperature, and when to abstain.

Temperature scaling (Guo et al. 2017) rescales confidence by one number. The curve of errors against the confidence that
then results is what a threshold for a wanted error rate is read from.
"""

import math
from collections.abc import Callable, Sequence

import torch

from ibaml.likelihoods import ClassPrediction, Prediction
from ibaml.metrics import AbstentionCurve, abstention_curve, estimate
from ibaml.types import Tensor

_NUM_EACH_WAY = 20
_STEP = math.log(20.0) / _NUM_EACH_WAY
"""Of the grid of logarithms of temperatures."""
_NUM_EXTENSIONS, _LEAST_GAIN = 2, 1e-3


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
    temperature, nll = fit_temperature(predictions, targets), _nll_of(predictions, targets)
    gains = nll(1.0) - nll(temperature)
    if bool((gains == math.inf).any()):
        return temperature
    # Where the nll is infinite at both there is nothing to gain.
    gain = estimate(gains.nan_to_num())
    return temperature if gain.mean > gain.half_width else 1.0


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
        About 70 evaluations of the nll; no network is run.
    """
    if not predictions:
        raise ValueError("calibration needs at least one task, but there are none.")
    # Here, so that importing the library does not import scipy.
    from scipy.optimize import minimize_scalar

    nll = _nll_of(predictions, targets)

    def mean_nll(log_temperature: float) -> float:
        return float(nll(math.exp(log_temperature)).mean())

    losses = {place: mean_nll(place * _STEP) for place in range(-_NUM_EACH_WAY, _NUM_EACH_WAY + 1)}
    best = min(losses, key=losses.__getitem__)
    for _ in range(_NUM_EXTENSIONS):
        if best not in (min(losses), max(losses)):
            break
        further = range(best + 1, best + 1 + _NUM_EACH_WAY) if best > 0 else range(best - _NUM_EACH_WAY, best)
        losses |= {place: mean_nll(place * _STEP) for place in further}
        reached = min(losses, key=losses.__getitem__)
        if losses[best] - losses[reached] < _LEAST_GAIN:
            break
        best = reached
    valley = ((best - 1) * _STEP, (best + 1) * _STEP)
    return math.exp(minimize_scalar(mean_nll, bounds=valley, method="bounded", options={"xatol": 1e-7}).x)


def _nll_of(predictions: Sequence[Prediction], targets: Sequence[Tensor]) -> Callable[[float], Tensor]:
    """Returns what gives the mean nll of each task at a temperature, float64 ``[num_tasks]``."""
    of_classes = [one for one in predictions if isinstance(one, ClassPrediction)]
    if len(of_classes) == len(predictions):
        return _nll_of_classes(of_classes, targets)

    def nll(temperature: float) -> Tensor:
        tempered = (one.tempered(temperature) for one in predictions)
        return torch.stack([one.nll(target).double().mean() for one, target in zip(tempered, targets, strict=True)])

    return nll


def _nll_of_classes(predictions: Sequence[ClassPrediction], targets: Sequence[Tensor]) -> Callable[[float], Tensor]:
    """Does it for classes, of all tasks at once and with samples averaged once for all temperatures."""
    parts = [one.tensors()["log_probs"] for one in predictions]
    most = max(part.shape[-1] for part in parts)
    log_probs = torch.cat(
        [torch.nn.functional.pad(part, (0, most - part.shape[-1]), value=-math.inf) for part in parts]
    )
    labels = torch.cat([target.cpu() for target in targets]).unsqueeze(-1)
    sizes = torch.tensor([len(target) for target in targets])
    task = torch.repeat_interleave(torch.arange(len(sizes)), sizes)

    def nll(temperature: float) -> Tensor:
        each = -torch.log_softmax(log_probs / temperature, -1).gather(-1, labels).squeeze(-1)
        return torch.zeros(len(sizes), dtype=torch.float64).index_add(0, task, each) / sizes

    return nll
