"""Abstention: from which confidence on is a model wrong no more often than asked?

A curve of the error against the confidence that an answer needs, found on held-out tasks, and a threshold on it for a
wanted error rate (selective classification, Geifman and El-Yaniv 2017).
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

from ibaml.metrics import checked
from ibaml.types import Tensor

_LEVEL = 0.95


class AbstentionCurve(NamedTuple):
    """How often answers of at least some confidence were wrong. All float64 on the CPU, ``[num_thresholds]``.

    Attributes:
        confidence: The confidence that an answer needs, ascending; the first is the least that occurred.
        coverage: Share of the examples that are then answered.
        error: Share of these whose answer was wrong.
        error_bound: Upper end of a one-sided 95% interval of that share.
    """

    confidence: Tensor
    coverage: Tensor
    error: Tensor
    error_bound: Tensor

    def min_confidence(self, max_error: float) -> float:
        """Returns the least confidence whose ``error_bound`` is at most ``max_error``; infinite if there is none.

        The bound holds for each threshold by itself; that the best of many is taken could make it weaker. Of 1,600
        simulated sets of 100 or 200 tasks, 5% led to a threshold whose true error was larger than asked for (in the
        worst of eight settings 7%). By ``error`` instead of its bound it would have been half of them.
        """
        passing = torch.nonzero(self.error_bound <= max_error)
        return float(self.confidence[passing[0, 0]]) if len(passing) else math.inf


def abstention_curve(
    confidence: Sequence[Tensor], correct: Sequence[Tensor], *, num_thresholds: int = 200
) -> AbstentionCurve:
    """Error against the confidence that an answer needs, of the examples of all tasks together.

    The bound is that of Clopper and Pearson (1934) for ``n / deff`` instead of ``n`` independent answers (Korn and
    Graubard 1998), because examples of a task are wrong together. The design effect ``deff`` is the variance of the
    error rate between tasks over that of independent answers, times the square of the ratio of Student's to the normal
    quantile; at least 1.

    Examples:
        >>> confidence = [torch.tensor([0.9, 0.6]), torch.tensor([0.8, 0.4])]
        >>> correct = [torch.tensor([True, True]), torch.tensor([True, False])]
        >>> curve = abstention_curve(confidence, correct)
        >>> curve.coverage.tolist(), curve.error.tolist()
        ([1.0, 0.75, 0.5, 0.25], [0.25, 0.0, 0.0, 0.0])

    Args:
        confidence: Confidence of each answer, such as ``probs.amax(-1)``, one vector a task; tasks may differ in size.
        correct: Whether it was right (bool), likewise.
        num_thresholds: Thresholds at most. They leave equal numbers of answers between them.

    Returns:
        The curve; its bounds are 1 for a single task.

    Raises:
        ValueError: If there are no tasks, a shape does not fit, a confidence is nan, or ``num_thresholds`` is below 1.
        TypeError: If a confidence is not floating point or ``correct`` not bool.
    """
    if num_thresholds < 1:
        raise ValueError(f"num_thresholds is {num_thresholds}; expected at least 1.")
    if len(confidence) == 0 or len(confidence) != len(correct):
        raise ValueError(
            f"there are {len(confidence)} vectors of confidence and {len(correct)} of correct; expected one of each "
            "for every task, and at least one task."
        )
    tasks = [_checked(index, *task) for index, task in enumerate(zip(confidence, correct, strict=True))]
    ordered = torch.cat([values for values, _ in tasks]).sort().values
    total = len(ordered)
    places = torch.arange(min(num_thresholds, total), dtype=torch.float64) * (total / min(num_thresholds, total))
    thresholds = ordered[places.long()].unique()
    # Each [num_tasks, num_thresholds].
    answered = torch.stack([(values >= thresholds[:, None]).sum(-1) for values, _ in tasks]).double()
    wrong = torch.stack([((values >= thresholds[:, None]) & ~hits).sum(-1) for values, hits in tasks]).double()
    number = answered.sum(0)
    error = wrong.sum(0) / number
    return AbstentionCurve(thresholds, number / total, error, _upper_bound(answered, wrong, number, error))


def _upper_bound(answered: Tensor, wrong: Tensor, number: Tensor, error: Tensor) -> Tensor:
    # Here, so that importing the library does not import scipy.
    from scipy.stats import beta, norm, t

    num_tasks = len(answered)
    if num_tasks == 1:
        return torch.ones_like(error)
    between = ((wrong - error * answered) ** 2).sum(0) * num_tasks / (num_tasks - 1)
    effect = torch.where((error > 0) & (error < 1), between / (number * error * (1 - error)), 1.0)
    effect = effect.clamp_min(1) * float(t.ppf(_LEVEL, num_tasks - 1) / norm.ppf(_LEVEL)) ** 2
    effective = number / effect
    misses = effective * error
    # Of all answers wrong the bound is 1, where the beta distribution has no second parameter.
    bound = beta.ppf(_LEVEL, (misses + 1).numpy(), (effective - misses).clamp_min(1e-9).numpy())
    return torch.where(error < 1, torch.from_numpy(bound), 1.0)


def _checked(task: int, confidence: Tensor, correct: Tensor) -> tuple[Tensor, Tensor]:
    values = checked.floating(f"confidence of task {task}", confidence, "[num_examples]", (1,))
    if correct.dtype != torch.bool:
        raise TypeError(f"correct of task {task} has dtype {correct.dtype}; expected bool: pass predicted == labels.")
    if correct.shape != values.shape:
        raise ValueError(
            f"correct of task {task} has shape {list(correct.shape)}; expected {list(values.shape)}, as confidence."
        )
    if values.isnan().any():
        raise ValueError(
            f"confidence of task {task} holds {int(values.isnan().sum())} nan; expected a number for each."
        )
    return values, correct.cpu()
