"""Selective prediction: how accurate is a model on the share of examples that it is surest of?

A model that knows what it does not know is the more accurate the more of its unsure predictions are left to somebody
else. Only the order of the uncertainties counts, not their scale.

``uncertainty`` is any measure that is large where the prediction is unsure, such as ``prediction.total_uncertainty`` or
``1 - probs.amax(-1)``; ``correct`` (bool) says whether the prediction was right. Both have shape ``[num_tasks,
num_examples]``.
"""

import math
from typing import NamedTuple

import torch

from ibaml.metrics import checked
from ibaml.types import Tensor


class SelectiveCurve(NamedTuple):
    """Accuracy against coverage, the share of examples that are answered. All float64 on the CPU.

    Attributes:
        coverage: ``k / num_examples`` for ``k = 1 .. num_examples``.
        accuracy: Fraction of hits among the ``k`` examples of least uncertainty, same shape.
    """

    coverage: Tensor
    accuracy: Tensor

    @property
    def area(self) -> float:
        """Mean accuracy over all coverages, in ``[0, 1]``."""
        return self.accuracy.mean().item()


def selective_curve(uncertainty: Tensor, correct: Tensor) -> SelectiveCurve:
    """Accuracy against coverage of the examples of all tasks together.

    Examples of equal uncertainty are taken in random order: the curve is the mean over all their orders.

    Examples:
        >>> curve = selective_curve(torch.tensor([[0.1, 0.3, 0.2, 0.9]]), torch.tensor([[True, False, True, False]]))
        >>> curve.accuracy.tolist()  # doctest: +ELLIPSIS
        [1.0, 1.0, 0.666..., 0.5]

    Args:
        uncertainty: Uncertainty of each prediction.
        correct: Whether it was right.

    Returns:
        The curve; its property ``area`` is the mean over coverages.

    Raises:
        ValueError: If a shape does not fit or an uncertainty is nan.
        TypeError: If ``uncertainty`` is not floating point or ``correct`` not bool.
    """
    uncertainty, hits = _checked(uncertainty, correct)
    accuracy = _accuracy_of_surest(uncertainty.flatten(), hits.flatten())
    return SelectiveCurve(torch.arange(1, len(accuracy) + 1, dtype=torch.float64) / len(accuracy), accuracy)


def selective_area(uncertainty: Tensor, correct: Tensor) -> Tensor:
    """Area under the curve of accuracy against coverage of each task, ``(1/n) sum_k accuracy(k surest)``.

    It is one minus the area under the risk-coverage curve (Geifman and El-Yaniv 2017). An uncertainty that says nothing
    gives the accuracy itself, one that sorts all hits before all misses the most that is possible at that accuracy.

    Examples:
        >>> selective_area(torch.tensor([[0.1, 0.2]]), torch.tensor([[True, False]]))
        tensor([0.7500], dtype=torch.float64)

    Args:
        uncertainty: Uncertainty of each prediction.
        correct: Whether it was right.

    Returns:
        Area of each task, in ``[0, 1]``.

    Raises:
        ValueError: If a shape does not fit or an uncertainty is nan.
        TypeError: If ``uncertainty`` is not floating point or ``correct`` not bool.
    """
    uncertainty, hits = _checked(uncertainty, correct)
    return torch.stack([_accuracy_of_surest(*task).mean() for task in zip(uncertainty, hits, strict=True)])


def selective_accuracy(uncertainty: Tensor, correct: Tensor, *, coverage: float) -> Tensor:
    """Accuracy of each task on the share ``coverage`` of its examples that it is surest of.

    Examples:
        >>> selective_accuracy(torch.tensor([[0.1, 0.2]]), torch.tensor([[True, False]]), coverage=0.5)
        tensor([1.], dtype=torch.float64)

    Args:
        uncertainty: Uncertainty of each prediction.
        correct: Whether it was right.
        coverage: Share of the examples to answer, in ``(0, 1]``; rounded up to a whole number of examples.

    Returns:
        Accuracy of each task, in ``[0, 1]``.

    Raises:
        ValueError: If a shape does not fit, an uncertainty is nan, or ``coverage`` is out of range.
        TypeError: If ``uncertainty`` is not floating point or ``correct`` not bool.
    """
    if not 0 < coverage <= 1:
        raise ValueError(f"coverage is {coverage}; expected a share above 0 and at most 1, such as 0.8.")
    uncertainty, hits = _checked(uncertainty, correct)
    # The product may lie a rounding error above a whole number, as 0.07 * 100 does.
    num_answered = math.ceil(round(coverage * uncertainty.shape[1], 9))
    return torch.stack(
        [_accuracy_of_surest(*task)[max(num_answered, 1) - 1] for task in zip(uncertainty, hits, strict=True)]
    )


def _accuracy_of_surest(uncertainty: Tensor, hits: Tensor) -> Tensor:
    """Returns the accuracy on the ``k`` surest of some examples for every ``k``, shape ``[num_examples]``."""
    order = uncertainty.argsort()
    # Each hit counts as the mean of its tied examples: the mean over all orders among them.
    _, group, size = uncertainty[order].unique_consecutive(return_inverse=True, return_counts=True)
    in_group = torch.zeros(len(size), dtype=torch.float64).scatter_add(0, group, hits[order])
    expected_hits = (in_group / size)[group]
    return expected_hits.cumsum(0) / torch.arange(1, len(order) + 1, dtype=torch.float64)


def _checked(uncertainty: Tensor, correct: Tensor) -> tuple[Tensor, Tensor]:
    values = checked.floating("uncertainty", uncertainty, "[num_tasks, num_examples]", (2,))
    if correct.dtype != torch.bool:
        raise TypeError(f"correct has dtype {correct.dtype}; expected bool: pass predicted == labels.")
    if correct.shape != values.shape:
        raise ValueError(
            f"correct has shape {list(correct.shape)}; expected {list(values.shape)}, the shape of uncertainty."
        )
    if values.isnan().any():
        raise ValueError(
            f"uncertainty holds {int(values.isnan().sum())} nan; expected an uncertainty for every example."
        )
    return values, checked.float64(correct)
