"""Calibration: do predicted probabilities agree with observed frequencies?

*Of classes*: binned gaps between confidence (probability of the most probable class) and accuracy. ``probs`` has shape
``[num_tasks, num_examples, num_classes]`` with rows that are distributions, ``labels`` are class indices,
``[num_tasks, num_examples]``. torchmetrics' calibration error is no substitute: it rounds confidences to float32, gives
a confidence of exactly 1 a bin of its own beyond the ``num_bins`` asked for, and passes values outside ``[0, 1]``, as
one of ``1 + 1e-7`` is, through a softmax.

*Of quantiles*: has a predictive p-quantile a share p of the targets below it, for every p? These functions take
``cdf``, the predictive distribution function at the targets (``F(y) = P(target <= y)``: ``prediction.cdf``), of shape
``[num_tasks, num_examples]`` or ``[num_tasks, num_examples, num_outputs]``. For a calibrated model of a continuous
target it is uniform on ``[0, 1]``, whatever the distributions are (the probability integral transform).
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

from ibaml.metrics import checked
from ibaml.metrics.intervals import Estimate
from ibaml.types import Tensor

_BOOTSTRAP_BLOCK = 2**22


class ReliabilityCurve(NamedTuple):
    """Accuracy against confidence, in equal-width bins of the confidence. All float64 on the CPU.

    Attributes:
        bin_edges: Edges of the bins, ``[num_bins + 1]``, from 0 to 1. A bin contains its upper edge.
        confidence: Mean confidence in each bin, ``[num_bins]``; nan in an empty bin.
        accuracy: Fraction of correct predictions in each bin, ``[num_bins]``; nan in an empty bin.
        count: Number of predictions in each bin, ``[num_bins]``.
    """

    bin_edges: Tensor
    confidence: Tensor
    accuracy: Tensor
    count: Tensor  # pyright: ignore[reportIncompatibleMethodOverride]  # hides tuple.count, of no use on tensors

    @property
    def ece(self) -> float:
        """Expected calibration error of the pooled predictions, in ``[0, 1]``."""
        return _calibration_errors(self._gap_sum(), self.count)[0].item()

    @property
    def mce(self) -> float:
        """Maximum calibration error of the pooled predictions, in ``[0, 1]``."""
        return _calibration_errors(self._gap_sum(), self.count)[1].item()

    def _gap_sum(self) -> Tensor:
        return ((self.accuracy - self.confidence) * self.count).nan_to_num(nan=0.0)


class QuantileCurve(NamedTuple):
    """Observed against predicted probability. All float64 on the CPU.

    Attributes:
        level: Predicted probabilities ``p``, ``[num_levels]``.
        frequency: Fraction of targets at or below their predictive p-quantile, same shape; the diagonal is ideal.
    """

    level: Tensor
    frequency: Tensor


class _BinSums(NamedTuple):
    """Sufficient statistics of binned calibration errors, each of shape ``[num_tasks, num_bins]``."""

    num_examples: Tensor
    confidence: Tensor
    correct: Tensor


def ece(probs: Tensor, labels: Tensor, *, num_bins: int = 15) -> Tensor:
    """Expected calibration error ``sum_b (n_b / n) |accuracy_b - confidence_b|`` of each task.

    Top-class confidence in ``num_bins`` equal-width bins ``((b - 1) / num_bins, b / num_bins]`` (Guo et al. 2017,
    eq. (3)). With few examples in a task the value is biased upwards, by up to about
    ``0.4 sqrt(num_bins / n)`` for a perfectly calibrated predictor; compare methods at the same number of examples,
    or see ``pooled_ece``.

    Examples:
        >>> ece(torch.tensor([[[0.9, 0.1], [0.9, 0.1]]]), torch.tensor([[0, 1]]))
        tensor([0.4000], dtype=torch.float64)

    Args:
        probs: Predictive probabilities.
        labels: Class indices.
        num_bins: Number of bins, at least 1.

    Returns:
        Calibration error of each task, in ``[0, 1]``.

    Raises:
        TypeError: If a dtype does not fit.
        ValueError: If a shape does not fit, a label is out of range, a row is no distribution, or ``num_bins`` is below
            1.
    """
    sums = _bin_sums(*checked.probabilities(probs, labels), num_bins)
    return _calibration_errors(sums.correct - sums.confidence, sums.num_examples)[0]


def mce(probs: Tensor, labels: Tensor, *, num_bins: int = 15) -> Tensor:
    """Maximum calibration error ``max_b |accuracy_b - confidence_b|`` of each task, over the bins that are not empty.

    Bins as in ``ece`` (Guo et al. 2017, eq. (5)). One example alone in a bin can set it: read it with the counts.

    Examples:
        >>> mce(torch.tensor([[[0.9, 0.1], [0.3, 0.7]]]), torch.tensor([[0, 0]]))
        tensor([0.7000], dtype=torch.float64)

    Args:
        probs: Predictive probabilities.
        labels: Class indices.
        num_bins: Number of bins, at least 1.

    Returns:
        Largest gap of each task, in ``[0, 1]``.

    Raises:
        TypeError: As ``ece``.
        ValueError: As ``ece``.
    """
    sums = _bin_sums(*checked.probabilities(probs, labels), num_bins)
    return _calibration_errors(sums.correct - sums.confidence, sums.num_examples)[1]


def reliability_curve(probs: Tensor, labels: Tensor, num_bins: int = 15) -> ReliabilityCurve:
    """Bins the top-class confidence of all examples of all tasks together; bins as in ``ece``.

    Examples:
        >>> curve = reliability_curve(torch.tensor([[[0.9, 0.1], [0.3, 0.7]]]), torch.tensor([[0, 0]]), num_bins=2)
        >>> curve.confidence[1].item(), curve.accuracy[1].item(), curve.count[1].item()  # doctest: +ELLIPSIS
        (0.7999..., 0.5, 2.0)

    Args:
        probs: Predictive probabilities.
        labels: Class indices.
        num_bins: Number of bins, at least 1.

    Returns:
        The curve; its properties ``ece`` and ``mce`` are the pooled calibration errors.

    Raises:
        TypeError: As ``ece``.
        ValueError: As ``ece``.
    """
    sums = _bin_sums(*checked.probabilities(probs, labels), num_bins)
    count = sums.num_examples.sum(0)
    return ReliabilityCurve(_bin_edges(num_bins), sums.confidence.sum(0) / count, sums.correct.sum(0) / count, count)


def pooled_ece(
    probs: Tensor | Sequence[Tensor],
    labels: Tensor | Sequence[Tensor],
    *,
    generator: torch.Generator,
    num_bins: int = 15,
    num_resamples: int = 1000,
) -> Estimate:
    """Expected calibration error of the examples of all tasks together, with a bootstrap interval over tasks.

    ``half_width`` is half the distance between the 2.5% and 97.5% quantiles of ``num_resamples`` recomputations on
    tasks drawn with replacement. It is laid around the pooled value rather than placed at the quantiles: the absolute
    value in the error biases every recomputation upwards.

    Examples:
        >>> probs, labels = torch.tensor([[[0.9, 0.1]], [[0.9, 0.1]]]), torch.tensor([[0], [0]])
        >>> print(pooled_ece(probs, labels, generator=torch.Generator().manual_seed(0)))
        0.100 +- 0.000

    Args:
        probs: Predictive probabilities. Tasks of unequal sizes as a sequence of tensors ``[num_examples,
            num_classes]``.
        labels: Class indices, or a sequence likewise.
        generator: Source of the resamples, on the CPU.
        num_bins: Number of bins, at least 1.
        num_resamples: Number of bootstrap resamples, at least 2.

    Returns:
        The estimate, in ``[0, 1]``.

    Raises:
        TypeError: If a dtype does not fit.
        ValueError: If a shape does not fit, a label is out of range, a row is no distribution, the numbers of tasks
            differ or are 0, ``num_bins`` is below 1 or ``num_resamples`` below 2.
    """
    return _pooled_errors(_sums_of_tasks(probs, labels, num_bins), generator, num_resamples)[0]


def pooled_mce(
    probs: Tensor | Sequence[Tensor],
    labels: Tensor | Sequence[Tensor],
    *,
    generator: torch.Generator,
    num_bins: int = 15,
    num_resamples: int = 1000,
) -> Estimate:
    """Maximum calibration error of the examples of all tasks together; arguments and interval as in ``pooled_ece``.

    Examples:
        >>> probs, labels = torch.tensor([[[0.9, 0.1]], [[0.9, 0.1]]]), torch.tensor([[0], [0]])
        >>> print(pooled_mce(probs, labels, generator=torch.Generator().manual_seed(0)))
        0.100 +- 0.000

    Args:
        probs: As in ``pooled_ece``.
        labels: As in ``pooled_ece``.
        generator: Source of the resamples, on the CPU.
        num_bins: Number of bins, at least 1.
        num_resamples: Number of bootstrap resamples, at least 2.

    Returns:
        The estimate, in ``[0, 1]``.

    Raises:
        TypeError: As ``pooled_ece``.
        ValueError: As ``pooled_ece``.
    """
    return _pooled_errors(_sums_of_tasks(probs, labels, num_bins), generator, num_resamples)[1]


def quantile_curve(cdf: Tensor, *, num_levels: int = 19) -> QuantileCurve:
    """Observed against predicted probability of the targets of all tasks together (Kuleshov et al. 2018).

    Examples:
        >>> quantile_curve(torch.tensor([[0.1, 0.2, 0.3, 0.9]]), num_levels=1).frequency
        tensor([0.7500], dtype=torch.float64)

    Args:
        cdf: Predictive distribution function at the targets.
        num_levels: Number of levels, evenly spaced strictly between 0 and 1, at least 1.

    Raises:
        TypeError: If ``cdf`` is not floating point.
        ValueError: If the shape does not fit, a value is outside ``[0, 1]``, or ``num_levels`` is below 1.
    """
    if num_levels < 1:
        raise ValueError(f"num_levels is {num_levels}; expected at least 1.")
    values = checked.distribution_function(cdf).flatten()
    level = torch.arange(1, num_levels + 1, dtype=torch.float64) / (num_levels + 1)
    return QuantileCurve(level, (values <= level.unsqueeze(-1)).to(torch.float64).mean(-1))


def quantile_calibration_error(cdf: Tensor) -> Tensor:
    """Mean over all levels of the gap between observed and predicted probability, of each task.

    ``integral over p from 0 to 1 of |fraction of targets with F(y) <= p, minus p|``: the distance between the curve and
    the diagonal, computed exactly rather than on a grid of levels. It is the Wasserstein distance of the values from
    the uniform distribution; 0 is ideal, 0.5 the worst, reached when every target lies on the same side of all its
    predictive mass. Few examples bias it upwards, by ``0.31 / sqrt(n)`` for a calibrated model: compare at the same
    ``n``, or pool tasks of one size by ``cdf.reshape(1, -1)``.

    Examples:
        >>> quantile_calibration_error(torch.tensor([[0.0, 0.0], [0.25, 0.75]]))
        tensor([0.5000, 0.1250], dtype=torch.float64)

    Args:
        cdf: Predictive distribution function at the targets.

    Returns:
        Error of each task, in ``[0, 0.5]``.

    Raises:
        TypeError: If ``cdf`` is not floating point.
        ValueError: If the shape does not fit or a value is outside ``[0, 1]``.
    """
    values = checked.distribution_function(cdf).flatten(1).sort(-1).values
    num_values = values.shape[1]
    edges = torch.arange(num_values + 1, dtype=torch.float64) / num_values
    # The i-th smallest value is the observed quantile for all p between the edges i / n and (i + 1) / n. The integral
    # of |value - p| over that stretch is a difference of the antiderivative sign(t) t^2 / 2 of |t|.
    before, after = edges[:-1] - values, edges[1:] - values
    return ((after * after.abs() - before * before.abs()) / 2).sum(-1)


def central_coverage(cdf: Tensor, *, level: float = 0.9) -> Tensor:
    """Fraction of targets inside their central predictive interval, of each task: ``|F(y) - 1/2| <= level / 2``.

    The interval is that of the predictive distribution itself, whatever its shape: its ends are the quantiles at
    ``(1 - level) / 2`` and ``(1 + level) / 2``, which need not be computed.

    Examples:
        >>> central_coverage(torch.tensor([[0.01, 0.3, 0.5, 0.94]]))
        tensor([0.7500], dtype=torch.float64)

    Args:
        cdf: Predictive distribution function at the targets.
        level: Probability inside the interval, in ``(0, 1)``.

    Returns:
        Fraction of each task's examples and outputs, in ``[0, 1]``.

    Raises:
        TypeError: If ``cdf`` is not floating point.
        ValueError: If the shape does not fit, a value is outside ``[0, 1]``, or ``level`` is out of range.
    """
    if not 0 < level < 1:
        raise ValueError(f"level is {level}; expected a probability strictly between 0 and 1, such as 0.9.")
    return ((checked.distribution_function(cdf).flatten(1) - 0.5).abs() <= level / 2).to(torch.float64).mean(-1)


def _bin_edges(num_bins: int) -> Tensor:
    return torch.arange(num_bins + 1, dtype=torch.float64) / num_bins


def _bin_sums(probs: Tensor, labels: Tensor, num_bins: int) -> _BinSums:
    if num_bins < 1:
        raise ValueError(f"num_bins is {num_bins}; expected at least 1.")
    prediction = probs.argmax(-1)
    # A float32 softmax may sum, and so reach, slightly above one.
    confidence = probs.amax(-1).clamp(max=1.0)
    correct = (prediction == labels).to(torch.float64)
    # Inner edges only: index b when edges[b] < confidence <= edges[b + 1], and 1.0 falls in the last bin.
    index = torch.bucketize(confidence, _bin_edges(num_bins)[1:-1])
    zeros = torch.zeros(len(probs), num_bins, dtype=torch.float64)
    return _BinSums(
        num_examples=zeros.scatter_add(1, index, torch.ones_like(confidence)),
        confidence=zeros.scatter_add(1, index, confidence),
        correct=zeros.scatter_add(1, index, correct),
    )


def _sums_of_tasks(probs: Tensor | Sequence[Tensor], labels: Tensor | Sequence[Tensor], num_bins: int) -> _BinSums:
    if isinstance(probs, torch.Tensor) and isinstance(labels, torch.Tensor):
        return _bin_sums(*checked.probabilities(probs, labels), num_bins)
    if len(probs) != len(labels) or len(probs) == 0:
        raise ValueError(
            f"probs has {len(probs)} tasks and labels {len(labels)}; expected as many of each, at least one."
        )
    of_tasks: list[_BinSums] = []
    for index, (task_probs, task_labels) in enumerate(zip(probs, labels, strict=True)):
        try:
            values = checked.probabilities(task_probs.unsqueeze(0), task_labels.unsqueeze(0))
        except (TypeError, ValueError) as error:
            raise type(error)(f"task {index} by itself: {error}") from error
        of_tasks.append(_bin_sums(*values, num_bins))
    return _BinSums(*(torch.cat(field) for field in zip(*of_tasks, strict=True)))


def _calibration_errors(gap_sum: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
    """Returns ECE and MCE from the sums of (correct - confidence) and the counts, shape ``[..., num_bins]``."""
    gap_sum = gap_sum.abs()
    expected = gap_sum.sum(-1) / count.sum(-1)
    # An empty bin has gap_sum 0, so the clamped division leaves it out of the maximum.
    return expected, (gap_sum / count.clamp(min=1.0)).amax(-1)


def _pooled_errors(sums: _BinSums, generator: torch.Generator, num_resamples: int) -> tuple[Estimate, Estimate]:
    if num_resamples < 2:
        raise ValueError(f"num_resamples is {num_resamples}; expected at least 2, better 1000.")
    num_tasks = len(sums.num_examples)
    gap_sum = sums.correct - sums.confidence
    point = _calibration_errors(gap_sum.sum(0), sums.num_examples.sum(0))
    if num_tasks == 1:
        return Estimate(point[0].item(), math.nan, 1), Estimate(point[1].item(), math.nan, 1)
    # Both errors depend on a resample only through the bin sums, so a resample is a row of task multiplicities and the
    # bootstrap a matrix product; in blocks, to bound the memory with very many tasks.
    block = max(1, _BOOTSTRAP_BLOCK // num_tasks)
    resampled: list[tuple[Tensor, Tensor]] = []
    for start in range(0, num_resamples, block):
        rows = min(block, num_resamples - start)
        draws = torch.randint(num_tasks, (rows, num_tasks), generator=generator)
        weights = torch.zeros(rows, num_tasks, dtype=torch.float64)
        weights.scatter_add_(1, draws, torch.ones_like(draws, dtype=torch.float64))
        resampled.append(_calibration_errors(weights @ gap_sum, weights @ sums.num_examples))
    levels = torch.tensor([0.025, 0.975], dtype=torch.float64)
    results: list[Estimate] = []
    for value, draws in zip(point, zip(*resampled, strict=True), strict=True):
        low, high = torch.cat(draws).quantile(levels)
        results.append(Estimate(value.item(), (high - low).item() / 2, num_tasks))
    return results[0], results[1]
