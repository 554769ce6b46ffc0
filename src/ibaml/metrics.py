"""How good and how honest predictions are: per-task metric vectors, their 95% intervals, calibration, OOD detection.

The unit of replication is the task: examples of one task share one adapted posterior and are not independent, so every
interval here is over tasks. Metrics are computed in float64 on the CPU, whatever the precision and device of the
predictions. torchmetrics counts the hits and sums the squared errors. It is not used for the calibration error and the
AUROC, of which it serves as a test oracle: it rounds confidences to float32, gives a confidence of exactly 1 a bin of
its own beyond the ``num_bins`` asked for, and passes scores outside ``[0, 1]`` through a softmax or sigmoid (so one
probability of ``1 + 1e-7`` changes the calibration error of the whole task, and large uncertainties become ties).
"""

import math
from collections.abc import Sequence
from statistics import NormalDist
from typing import NamedTuple

import torch
from torchmetrics.functional.classification import multiclass_stat_scores
from torchmetrics.functional.regression import mean_squared_error

from ibaml.quantile_calibration import central_coverage, quantile_calibration_error
from ibaml.selective import selective_area
from ibaml.types import Tensor

_NORMAL_975 = NormalDist().inv_cdf(0.975)
_BOOTSTRAP_BLOCK = 2**22


class Estimate(NamedTuple):
    """A mean with a symmetric 95% confidence interval.

    ``str`` gives three decimals; a format specification applies to both numbers.

    Examples:
        >>> result = Estimate(mean=0.98213, half_width=0.0041, num_tasks=1000)
        >>> print(result)
        0.982 +- 0.004
        >>> f"{result:.1%}"
        '98.2% +- 0.4%'

    Attributes:
        mean: The estimate, in the metric's unit.
        half_width: Half the width of the 95% interval, same unit; nan where one cannot be had (a single task, or an
            infinite value).
        num_tasks: Number of independent units behind it.
    """

    mean: float
    half_width: float
    num_tasks: int

    def __str__(self) -> str:
        """Formats with three decimals."""
        return format(self, ".3f")

    def __format__(self, spec: str, /) -> str:
        """Applies a format specification of floats to both numbers."""
        spec = spec or ".3f"
        return f"{self.mean:{spec}} +- {self.half_width:{spec}}"

    @property
    def low(self) -> float:
        """Lower end of the 95% interval."""
        return self.mean - self.half_width

    @property
    def high(self) -> float:
        """Upper end of the 95% interval."""
        return self.mean + self.half_width


class ReliabilityCurve(NamedTuple):
    """Accuracy against confidence, in equal-width bins of the confidence. All float64 on the CPU.

    Attributes:
        bin_edges: Edges of the bins, shape ``[num_bins + 1]``, from 0 to 1. A bin contains its upper edge.
        confidence: Mean confidence in each bin, shape ``[num_bins]``; nan in an empty bin.
        accuracy: Fraction of correct predictions in each bin, shape ``[num_bins]``; nan in an empty bin.
        count: Number of predictions in each bin, shape ``[num_bins]``.
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


class _BinSums(NamedTuple):
    """Sufficient statistics of binned calibration errors, each of shape ``[num_tasks, num_bins]``."""

    num_examples: Tensor
    confidence: Tensor
    correct: Tensor


def accuracy(probs: Tensor, labels: Tensor) -> Tensor:
    """Fraction of examples whose most probable class is the right one; of equal probabilities the first class counts.

    Examples:
        >>> accuracy(torch.tensor([[[0.9, 0.1], [0.4, 0.6]]]), torch.tensor([[0, 0]]))
        tensor([0.5000], dtype=torch.float64)

    Args:
        probs: Predictive probabilities, shape ``[num_tasks, num_examples, num_classes]``; rows sum to one.
        labels: Class indices in ``[0, num_classes)``, shape ``[num_tasks, num_examples]``.

    Returns:
        Accuracy of each task in ``[0, 1]``, float64 of shape ``[num_tasks]``.

    Raises:
        ValueError: If a shape does not fit, a label is out of range, or the rows of ``probs`` are no distributions.
        TypeError: If ``probs`` is not floating point or ``labels`` not integer.
    """
    return _accuracy(*_checked_probs(probs, labels))


def nll(log_probs: Tensor, labels: Tensor) -> Tensor:
    """Mean negative log-likelihood ``-(1/n) sum_i log p(y_i | x_i)`` in nats.

    It takes log-probabilities, which stay finite where a probability rounds to zero. Plain probabilities are refused:
    pass ``probs.log()``. A label that was given probability zero makes the task's value infinite.

    Examples:
        >>> nll(torch.tensor([[[0.5, 0.5], [0.5, 0.5]]]).log(), torch.tensor([[0, 1]]))
        tensor([0.6931], dtype=torch.float64)

    Args:
        log_probs: Predictive log-probabilities in nats, shape ``[num_tasks, num_examples, num_classes]``.
        labels: Class indices in ``[0, num_classes)``, shape ``[num_tasks, num_examples]``.

    Returns:
        Negative log-likelihood of each task, nats per example, float64 of shape ``[num_tasks]``.

    Raises:
        ValueError: If a shape does not fit, a label is out of range, or the rows of ``log_probs`` are no distributions.
        TypeError: If ``log_probs`` is not floating point or ``labels`` not integer.
    """
    return _nll(*_checked_log_probs(log_probs, labels))


def brier(probs: Tensor, labels: Tensor) -> Tensor:
    """Brier score ``(1/n) sum_i sum_c (p_ic - [y_i = c])^2``: summed over classes, averaged over examples.

    This is the original convention (Brier 1950), in ``[0, 2]``; with two classes it is twice the score of the
    single-probability convention.

    Examples:
        >>> brier(torch.tensor([[[0.5, 0.5]]]), torch.tensor([[0]]))
        tensor([0.5000], dtype=torch.float64)

    Args:
        probs: Predictive probabilities, shape ``[num_tasks, num_examples, num_classes]``; rows sum to one.
        labels: Class indices in ``[0, num_classes)``, shape ``[num_tasks, num_examples]``.

    Returns:
        Brier score of each task, float64 of shape ``[num_tasks]``.

    Raises:
        ValueError: If a shape does not fit, a label is out of range, or the rows of ``probs`` are no distributions.
        TypeError: If ``probs`` is not floating point or ``labels`` not integer.
    """
    return _brier(*_checked_probs(probs, labels))


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
        probs: Predictive probabilities, shape ``[num_tasks, num_examples, num_classes]``; rows sum to one.
        labels: Class indices in ``[0, num_classes)``, shape ``[num_tasks, num_examples]``.
        num_bins: Number of bins, at least 1.

    Returns:
        Calibration error of each task in ``[0, 1]``, float64 of shape ``[num_tasks]``.

    Raises:
        ValueError: If a shape does not fit, a label is out of range, the rows of ``probs`` are no distributions, or
            ``num_bins`` is below 1.
        TypeError: If ``probs`` is not floating point or ``labels`` not integer.
    """
    sums = _bin_sums(*_checked_probs(probs, labels), num_bins)
    return _calibration_errors(sums.correct - sums.confidence, sums.num_examples)[0]


def mce(probs: Tensor, labels: Tensor, *, num_bins: int = 15) -> Tensor:
    """Maximum calibration error ``max_b |accuracy_b - confidence_b|`` of each task, over the bins that are not empty.

    Bins as in ``ece`` (Guo et al. 2017, eq. (5)). One example alone in a bin can set it: read it with the counts.

    Examples:
        >>> mce(torch.tensor([[[0.9, 0.1], [0.3, 0.7]]]), torch.tensor([[0, 0]]))
        tensor([0.7000], dtype=torch.float64)

    Args:
        probs: Predictive probabilities, shape ``[num_tasks, num_examples, num_classes]``; rows sum to one.
        labels: Class indices in ``[0, num_classes)``, shape ``[num_tasks, num_examples]``.
        num_bins: Number of bins, at least 1.

    Returns:
        Largest gap of each task in ``[0, 1]``, float64 of shape ``[num_tasks]``.

    Raises:
        ValueError: If a shape does not fit, a label is out of range, the rows of ``probs`` are no distributions, or
            ``num_bins`` is below 1.
        TypeError: If ``probs`` is not floating point or ``labels`` not integer.
    """
    sums = _bin_sums(*_checked_probs(probs, labels), num_bins)
    return _calibration_errors(sums.correct - sums.confidence, sums.num_examples)[1]


def mse(mean: Tensor, targets: Tensor) -> Tensor:
    """Mean squared error of the predictive mean, over examples and outputs.

    Examples:
        >>> mse(torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, 4.0]]))
        tensor([2.], dtype=torch.float64)

    Args:
        mean: Predictive means, shape ``[num_tasks, num_examples]`` or ``[num_tasks, num_examples, num_outputs]``.
        targets: Targets of the same shape.

    Returns:
        Error of each task in the target's unit squared, float64 of shape ``[num_tasks]``.

    Raises:
        ValueError: If a shape does not fit or a value is not finite.
        TypeError: If an argument is not floating point.
    """
    targets = _checked_targets("targets", targets)
    return _mse(_checked_targets("mean", mean, like=("targets", targets)), targets)


def density_nll(log_density: Tensor) -> Tensor:
    """Mean negative log predictive density ``-(1/n) sum_i log p(y_i | x_i)`` in nats.

    Examples:
        >>> density_nll(torch.tensor([[-1.0, -2.0]]))
        tensor([1.5000], dtype=torch.float64)

    Args:
        log_density: Log predictive density at each target, joint over its outputs, shape
            ``[num_tasks, num_examples]``; ``-inf`` is allowed.

    Returns:
        Nats per example, float64 of shape ``[num_tasks]``.

    Raises:
        ValueError: If the shape does not fit or a value is nan or ``+inf``.
        TypeError: If ``log_density`` is not floating point.
    """
    _check_floating("log_density", log_density)
    _check_shape("log_density", log_density, "[num_tasks, num_examples]", (2,))
    log_density = _float64(log_density)
    bad = log_density.isnan() | (log_density == math.inf)
    if bad.any():
        raise ValueError(
            f"log_density holds {int(bad.sum())} nan or +inf values; expected log densities below +inf: "
            "check the predictive variance for zeros."
        )
    return -log_density.mean(-1)


def gaussian_nll(mean: Tensor, variance: Tensor, targets: Tensor) -> Tensor:
    """Mean negative log density of Gaussian predictions with independent outputs, in nats.

    ``(1/n) sum_i sum_k (1/2) [log(2 pi var_ik) + (y_ik - mean_ik)^2 / var_ik]``: summed over outputs, averaged over
    examples. For a mixture of Gaussians (one per weight sample) this is an approximation by the first two moments; pass
    the mixture's own log density to ``density_nll`` instead.

    Examples:
        >>> gaussian_nll(torch.zeros(1, 3), torch.ones(1, 3), torch.zeros(1, 3))
        tensor([0.9189], dtype=torch.float64)

    Args:
        mean: Predictive means, shape ``[num_tasks, num_examples]`` or ``[num_tasks, num_examples, num_outputs]``.
        variance: Predictive variances in the target's unit squared, same shape, positive.
        targets: Targets, same shape.

    Returns:
        Nats per example, float64 of shape ``[num_tasks]``.

    Raises:
        ValueError: If a shape does not fit, a value is not finite, or a variance is not positive.
        TypeError: If an argument is not floating point.
    """
    targets = _checked_targets("targets", targets)
    mean = _checked_targets("mean", mean, like=("targets", targets))
    variance = _checked_variance(variance, targets)
    terms = 0.5 * (torch.log(2 * math.pi * variance) + (targets - mean) ** 2 / variance)
    return (terms.sum(-1) if terms.ndim == 3 else terms).mean(-1)


def coverage(lower: Tensor, upper: Tensor, targets: Tensor) -> Tensor:
    """Fraction of targets inside their predictive interval, ends included.

    Examples:
        >>> coverage(torch.zeros(1, 4), torch.ones(1, 4), torch.tensor([[-0.5, 0.0, 0.5, 1.5]]))
        tensor([0.5000], dtype=torch.float64)

    Args:
        lower: Lower ends, shape ``[num_tasks, num_examples]`` or ``[num_tasks, num_examples, num_outputs]``.
        upper: Upper ends, same shape, nowhere below ``lower``.
        targets: Targets, same shape.

    Returns:
        Fraction of each task's examples and outputs, in ``[0, 1]``, float64 of shape ``[num_tasks]``.

    Raises:
        ValueError: If a shape does not fit, a value is not finite, or an upper end lies below the lower one.
        TypeError: If an argument is not floating point.
    """
    targets = _checked_targets("targets", targets)
    lower = _checked_targets("lower", lower, like=("targets", targets))
    upper = _checked_targets("upper", upper, like=("targets", targets))
    if (upper < lower).any():
        raise ValueError(
            f"upper lies below lower in {int((upper < lower).sum())} places; expected lower <= upper: "
            "check the order of the arguments (lower, upper, targets)."
        )
    inside = (lower <= targets) & (targets <= upper)
    return inside.flatten(1).to(torch.float64).mean(-1)


def central_interval(mean: Tensor, variance: Tensor, level: float = 0.9) -> tuple[Tensor, Tensor]:
    """Central interval ``mean +- z sqrt(variance)`` of a Gaussian prediction, ``z`` the normal quantile.

    Examples:
        >>> lower, upper = central_interval(torch.zeros(1), torch.ones(1), level=0.95)
        >>> upper
        tensor([1.9600])

    Args:
        mean: Predictive means, any shape.
        variance: Predictive variances, same shape, not negative.
        level: Probability inside the interval, in ``(0, 1)``.

    Returns:
        Lower and upper ends, of the shape and type of ``mean``.

    Raises:
        ValueError: If ``level`` is outside ``(0, 1)``.
    """
    if not 0 < level < 1:
        raise ValueError(f"level is {level}; expected a probability strictly between 0 and 1, such as 0.9.")
    radius = NormalDist().inv_cdf((1 + level) / 2) * variance.sqrt()
    return mean - radius, mean + radius


def estimate(values: Tensor) -> Estimate:
    """Mean over tasks with its 95% Student interval ``mean +- t_(0.975, T - 1) s / sqrt(T)``.

    ``s`` is the sample standard deviation of the per-task values. The interval assumes independent tasks and a mean
    that is close to normal; with the hundreds of tasks of a usual evaluation the t quantile is the normal 1.96.

    Examples:
        >>> print(estimate(torch.tensor([0.9, 1.0, 0.8, 0.9])))
        0.900 +- 0.130

    Args:
        values: One value per task, shape ``[num_tasks]``.

    Returns:
        The estimate; ``half_width`` is nan for a single task or when a value is infinite.

    Raises:
        ValueError: If ``values`` is not a vector, is empty, or holds nan.
        TypeError: If ``values`` is not floating point.
    """
    _check_floating("values", values)
    _check_shape("values", values, "[num_tasks]", (1,))
    values = _float64(values)
    if values.isnan().any():
        raise ValueError(
            f"values holds {int(values.isnan().sum())} nan of {len(values)}; expected one number per task: "
            "drop the failed tasks and report how many there were."
        )
    num_tasks = len(values)
    mean = values.mean().item()
    if num_tasks == 1 or not math.isfinite(mean):
        return Estimate(mean, math.nan, num_tasks)
    half_width = _student_975(num_tasks - 1) * values.std().item() / math.sqrt(num_tasks)
    return Estimate(mean, half_width, num_tasks)


def paired_difference(a: Tensor, b: Tensor) -> Estimate:
    """Mean over tasks of ``a - b`` with its 95% Student interval, for two methods on the same tasks in the same order.

    Pairing removes the variation between tasks, usually most of the variance; two overlapping single intervals say
    little about a difference.

    Examples:
        >>> print(paired_difference(torch.tensor([0.9, 0.7, 0.5]), torch.tensor([0.8, 0.6, 0.4])))
        0.100 +- 0.000

    Args:
        a: Per-task values of one method, shape ``[num_tasks]``.
        b: Per-task values of the other, shape ``[num_tasks]``.

    Returns:
        Estimate of the mean difference; the methods differ at the 5% level if its interval excludes zero.

    Raises:
        ValueError: If the shapes differ, are no vectors, are empty, or values are nan.
        TypeError: If an argument is not floating point.
    """
    _check_floating("a", a)
    _check_floating("b", b)
    if a.shape != b.shape:
        raise ValueError(
            f"b has shape {list(b.shape)}; expected {list(a.shape)}, the shape of a: "
            "a paired difference needs both methods on the same tasks."
        )
    return estimate(_float64(a) - _float64(b))


def reliability_curve(probs: Tensor, labels: Tensor, num_bins: int = 15) -> ReliabilityCurve:
    """Bins the top-class confidence of all examples of all tasks together; bins as in ``ece``.

    Examples:
        >>> curve = reliability_curve(torch.tensor([[[0.9, 0.1], [0.3, 0.7]]]), torch.tensor([[0, 0]]), num_bins=2)
        >>> curve.confidence[1].item(), curve.accuracy[1].item(), curve.count[1].item()  # doctest: +ELLIPSIS
        (0.7999..., 0.5, 2.0)

    Args:
        probs: Predictive probabilities, shape ``[num_tasks, num_examples, num_classes]``; rows sum to one.
        labels: Class indices in ``[0, num_classes)``, shape ``[num_tasks, num_examples]``.
        num_bins: Number of bins, at least 1.

    Returns:
        The curve; its properties ``ece`` and ``mce`` are the pooled calibration errors.

    Raises:
        ValueError: If a shape does not fit, a label is out of range, the rows of ``probs`` are no distributions, or
            ``num_bins`` is below 1.
        TypeError: If ``probs`` is not floating point or ``labels`` not integer.
    """
    sums = _bin_sums(*_checked_probs(probs, labels), num_bins)
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
        probs: Predictive probabilities, shape ``[num_tasks, num_examples, num_classes]``; rows sum to one. Tasks of
            unequal sizes as a sequence of tensors, ``[num_examples, num_classes]`` each.
        labels: Class indices in ``[0, num_classes)``, shape ``[num_tasks, num_examples]``, or a sequence likewise.
        generator: Source of the resamples, on the CPU.
        num_bins: Number of bins, at least 1.
        num_resamples: Number of bootstrap resamples, at least 2.

    Returns:
        The estimate, in ``[0, 1]``.

    Raises:
        ValueError: If a shape does not fit, a label is out of range, the rows of ``probs`` are no distributions, the
            numbers of tasks differ or are 0, ``num_bins`` is below 1 or ``num_resamples`` below 2.
        TypeError: If ``probs`` is not floating point or ``labels`` not integer.
    """
    return _pooled_calibration(_sums_of_tasks(probs, labels, num_bins), generator, num_resamples)[0]


def pooled_mce(
    probs: Tensor | Sequence[Tensor],
    labels: Tensor | Sequence[Tensor],
    *,
    generator: torch.Generator,
    num_bins: int = 15,
    num_resamples: int = 1000,
) -> Estimate:
    """Maximum calibration error of the examples of all tasks together, with a bootstrap interval as ``pooled_ece``.

    Examples:
        >>> probs, labels = torch.tensor([[[0.9, 0.1]], [[0.9, 0.1]]]), torch.tensor([[0], [0]])
        >>> print(pooled_mce(probs, labels, generator=torch.Generator().manual_seed(0)))
        0.100 +- 0.000

    Args:
        probs: Predictive probabilities, shape ``[num_tasks, num_examples, num_classes]``; rows sum to one. Tasks of
            unequal sizes as a sequence of tensors, ``[num_examples, num_classes]`` each.
        labels: Class indices in ``[0, num_classes)``, shape ``[num_tasks, num_examples]``, or a sequence likewise.
        generator: Source of the resamples, on the CPU.
        num_bins: Number of bins, at least 1.
        num_resamples: Number of bootstrap resamples, at least 2.

    Returns:
        The estimate, in ``[0, 1]``.

    Raises:
        ValueError: If a shape does not fit, a label is out of range, the rows of ``probs`` are no distributions, the
            numbers of tasks differ or are 0, ``num_bins`` is below 1 or ``num_resamples`` below 2.
        TypeError: If ``probs`` is not floating point or ``labels`` not integer.
    """
    return _pooled_calibration(_sums_of_tasks(probs, labels, num_bins), generator, num_resamples)[1]


def ood_auroc(uncertainty_in: Tensor, uncertainty_out: Tensor) -> Estimate:
    """Probability that an out-of-distribution example is more uncertain than an in-distribution one.

    ``A = (1 / m n) sum_ij ([u_out_j > u_in_i] + [u_out_j = u_in_i] / 2)`` (ties count half), the area under the ROC
    curve of the uncertainty as detector: 0.5 is chance, 1 is perfect. The 95% interval ``A +- 1.96 sqrt(var)`` uses
    the variance of DeLong et al. (1988) from the placements of each example among those of the other kind; with a task
    axis its extension to clusters (Obuchowski 1997), which allows examples of one task to be correlated in any way. It
    shrinks to zero width at an area of exactly 0 or 1, where it should not be believed.

    Examples:
        >>> print(ood_auroc(torch.tensor([0.1, 0.2, 0.3]), torch.tensor([0.25, 0.4, 0.5])))
        0.889 +- 0.308

    Args:
        uncertainty_in: Uncertainty of in-distribution examples, any scale, shape ``[num_examples]`` of independent
            examples or ``[num_tasks, num_examples]``.
        uncertainty_out: Uncertainty of out-of-distribution examples, in as many axes; with a task axis, for the same
            tasks in the same order. The number of examples may differ.

    Returns:
        The area and its interval; ``num_tasks`` counts the tasks, or all examples when there is no task axis.
        ``half_width`` is nan if there are not two units of each kind.

    Raises:
        ValueError: If a shape does not fit or a value is nan.
        TypeError: If an argument is not floating point.
    """
    for name, value in (("uncertainty_in", uncertainty_in), ("uncertainty_out", uncertainty_out)):
        _check_floating(name, value)
        _check_shape(name, value, "[num_examples] or [num_tasks, num_examples]", (1, 2))
        if value.isnan().any():
            raise ValueError(f"{name} holds {int(value.isnan().sum())} nan; expected an uncertainty for every example.")
    if uncertainty_in.ndim != uncertainty_out.ndim:
        raise ValueError(
            f"uncertainty_out has shape {list(uncertainty_out.shape)}; expected as many axes as uncertainty_in, which "
            f"has shape {list(uncertainty_in.shape)}."
        )
    clustered = uncertainty_in.ndim == 2
    if clustered and len(uncertainty_in) != len(uncertainty_out):
        raise ValueError(
            f"uncertainty_out has {len(uncertainty_out)} tasks; expected {len(uncertainty_in)} as in uncertainty_in: "
            "for unrelated tasks pass flat vectors of examples."
        )
    inside, outside = _float64(uncertainty_in), _float64(uncertainty_out)
    placement_in = 1 - _placements(inside, outside)
    placement_out = _placements(outside, inside)
    area = placement_out.mean().item()
    # One row per independent unit; the deviations of a row are summed because they move together.
    deviation_in = (placement_in.reshape(len(inside), -1) - area).sum(-1)
    deviation_out = (placement_out.reshape(len(outside), -1) - area).sum(-1)
    units_in, units_out = len(inside), len(outside)
    num_units = units_in if clustered else units_in + units_out
    if min(units_in, units_out) < 2:
        return Estimate(area, math.nan, num_units)
    num_in, num_out = inside.numel(), outside.numel()
    variance = (deviation_in**2).sum() * units_in / (units_in - 1) / num_in**2
    variance = variance + (deviation_out**2).sum() * units_out / (units_out - 1) / num_out**2
    if clustered:
        covariance = (deviation_in * deviation_out).sum() * units_in / (units_in - 1) / (num_in * num_out)
        variance = (variance + 2 * covariance).clamp(min=0.0)
    return Estimate(area, _NORMAL_975 * math.sqrt(variance.item()), num_units)


def classification_report(
    log_probs: Tensor, labels: Tensor, *, num_bins: int = 15, generator: torch.Generator | None = None
) -> dict[str, Estimate]:
    """All classification metrics with 95% intervals.

    Examples:
        >>> log_probs = torch.tensor([[[0.8, 0.2], [0.4, 0.6]], [[0.8, 0.2], [0.3, 0.7]]]).log()
        >>> report = classification_report(log_probs, torch.tensor([[0, 1], [0, 1]]))
        >>> print(report["accuracy"])
        1.000 +- 0.000

    Args:
        log_probs: Predictive log-probabilities in nats, shape ``[num_tasks, num_examples, num_classes]``.
        labels: Class indices in ``[0, num_classes)``, shape ``[num_tasks, num_examples]``.
        num_bins: Number of confidence bins of the calibration errors, at least 1.
        generator: Source of the bootstrap resamples, on the CPU; by default one freshly seeded with 0, so that a
            report is a function of its inputs.

    Returns:
        ``accuracy``, ``nll`` (nats), ``brier``, ``ece``, ``mce``, ``selective_area`` (by the entropy of the
        prediction): means of the per-task values; ``ece_pooled``, ``mce_pooled``: the examples of all tasks in one set
        of bins.

    Raises:
        ValueError: If a shape does not fit, a label is out of range, the rows of ``log_probs`` are no distributions,
            or ``num_bins`` is below 1.
        TypeError: If ``log_probs`` is not floating point or ``labels`` not integer.
    """
    log_probs, labels = _checked_log_probs(log_probs, labels)
    probs = log_probs.exp()
    sums = _bin_sums(probs, labels, num_bins)
    task_ece, task_mce = _calibration_errors(sums.correct - sums.confidence, sums.num_examples)
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    ece_pooled, mce_pooled = _pooled_calibration(sums, generator, num_resamples=1000)
    return {
        "accuracy": estimate(_accuracy(probs, labels)),
        "nll": estimate(_nll(log_probs, labels)),
        "brier": estimate(_brier(probs, labels)),
        "ece": estimate(task_ece),
        "mce": estimate(task_mce),
        "selective_area": estimate(_selective_area(probs, labels)),
        "ece_pooled": ece_pooled,
        "mce_pooled": mce_pooled,
    }


def regression_report(
    mean: Tensor,
    variance: Tensor,
    targets: Tensor,
    *,
    log_density: Tensor | None = None,
    interval: tuple[Tensor, Tensor] | None = None,
    cdf: Tensor | None = None,
) -> dict[str, Estimate]:
    """All regression metrics with 95% intervals over tasks.

    Without ``log_density`` and ``cdf`` the prediction is taken to be Gaussian with the given moments, an approximation
    if it is a mixture over weight samples.

    Examples:
        >>> report = regression_report(torch.zeros(2, 3), torch.ones(2, 3), torch.tensor([[0.0, 1.0, 2.0]] * 2))
        >>> print(report["mse"], "|", report["coverage_90"])
        1.667 +- 0.000 | 0.667 +- 0.000

    Args:
        mean: Predictive means, shape ``[num_tasks, num_examples]`` or ``[num_tasks, num_examples, num_outputs]``.
        variance: Total predictive variances (noise included) in the target's unit squared, same shape, positive.
        targets: Targets, same shape.
        log_density: Log predictive density at each target, joint over outputs, shape ``[num_tasks, num_examples]``.
        interval: The 5% and 95% predictive quantiles, each of the shape of ``mean``. None: those that ``cdf`` implies.
        cdf: Predictive distribution function at the targets, in ``[0, 1]``, shape of ``mean``.

    Returns:
        ``mse`` (target's unit squared), ``nll`` (nats per example), ``coverage_90`` (fraction inside the central 90%
        interval; 0.9 is ideal), ``quantile_calibration_error``.

    Raises:
        ValueError: If a shape does not fit, a value is not finite, a variance is not positive, a value of ``cdf`` is
            outside ``[0, 1]``, or an upper end lies below the lower one.
        TypeError: If an argument is not floating point.
    """
    targets = _checked_targets("targets", targets)
    mean = _checked_targets("mean", mean, like=("targets", targets))
    variance = _checked_variance(variance, targets)
    if log_density is not None and log_density.shape != targets.shape[:2]:
        raise ValueError(
            f"log_density has shape {list(log_density.shape)}; expected {list(targets.shape[:2])}, "
            "[num_tasks, num_examples] as in targets: sum independent outputs first."
        )
    cdf = (
        torch.special.ndtr((targets - mean) / variance.sqrt())
        if cdf is None
        else _checked_targets("cdf", cdf, like=("targets", targets))
    )
    covered = central_coverage(cdf) if interval is None else coverage(*interval, targets)
    task_nll = gaussian_nll(mean, variance, targets) if log_density is None else density_nll(log_density)
    return {
        "mse": estimate(_mse(mean, targets)),
        "nll": estimate(task_nll),
        "coverage_90": estimate(covered),
        "quantile_calibration_error": estimate(quantile_calibration_error(cdf)),
    }


def _accuracy(probs: Tensor, labels: Tensor) -> Tensor:
    # Counts, not the finished ratio: torchmetrics divides in float32. argmax is documented to take the first maximum.
    scores = multiclass_stat_scores(
        probs.argmax(-1),
        labels,
        num_classes=max(probs.shape[-1], 2),
        average="micro",
        multidim_average="samplewise",
        validate_args=False,
    )
    return scores[:, 0].to(torch.float64) / labels.shape[1]


def _nll(log_probs: Tensor, labels: Tensor) -> Tensor:
    return -log_probs.gather(-1, labels.unsqueeze(-1)).squeeze(-1).mean(-1)


def _brier(probs: Tensor, labels: Tensor) -> Tensor:
    one_hot = torch.nn.functional.one_hot(labels, probs.shape[-1])
    return ((probs - one_hot) ** 2).sum(-1).mean(-1)


def _selective_area(probs: Tensor, labels: Tensor) -> Tensor:
    return selective_area(torch.special.entr(probs).sum(-1), probs.argmax(-1) == labels)


def _mse(mean: Tensor, targets: Tensor) -> Tensor:
    # Tasks as torchmetrics' outputs: it reduces over the first axis.
    flat_mean, flat_targets = mean.flatten(1).T.contiguous(), targets.flatten(1).T.contiguous()
    return mean_squared_error(flat_mean, flat_targets, num_outputs=len(mean)).reshape(-1)


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
        return _bin_sums(*_checked_probs(probs, labels), num_bins)
    if len(probs) != len(labels) or len(probs) == 0:
        raise ValueError(
            f"probs has {len(probs)} tasks and labels {len(labels)}; expected as many of each, at least one."
        )
    of_tasks: list[_BinSums] = []
    for index, (task_probs, task_labels) in enumerate(zip(probs, labels, strict=True)):
        try:
            checked = _checked_probs(task_probs.unsqueeze(0), task_labels.unsqueeze(0))
        except (TypeError, ValueError) as error:
            raise type(error)(f"task {index} by itself: {error}") from error
        of_tasks.append(_bin_sums(*checked, num_bins))
    return _BinSums(*(torch.cat(field) for field in zip(*of_tasks, strict=True)))


def _calibration_errors(gap_sum: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
    """Returns ECE and MCE from the sums of (correct - confidence) and the counts, shape ``[..., num_bins]``."""
    gap_sum = gap_sum.abs()
    expected = gap_sum.sum(-1) / count.sum(-1)
    # An empty bin has gap_sum 0, so the clamped division leaves it out of the maximum.
    return expected, (gap_sum / count.clamp(min=1.0)).amax(-1)


def _pooled_calibration(sums: _BinSums, generator: torch.Generator, num_resamples: int) -> tuple[Estimate, Estimate]:
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


def _placements(values: Tensor, others: Tensor) -> Tensor:
    """For each value, the fraction of ``others`` below it, ties counting half; shape of ``values``."""
    ordered = others.flatten().sort().values
    below = torch.searchsorted(ordered, values.contiguous())
    not_above = torch.searchsorted(ordered, values.contiguous(), right=True)
    return (below + not_above).to(torch.float64) / (2 * ordered.numel())


def _student_975(degrees: int) -> float:
    """The 97.5% quantile of Student's t distribution; relative error below 1e-9."""
    z, v = _NORMAL_975, degrees
    if v >= 100:
        # Abramowitz and Stegun 26.7.5, the expansion about the normal quantile.
        terms = (
            (z**3 + z) / 4,
            (5 * z**5 + 16 * z**3 + 3 * z) / 96,
            (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
            (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
        )
        return z + sum(term / v**power for power, term in enumerate(terms, start=1))
    # With t = sqrt(v) tan(angle), P(|T| < t) is a finite sum (26.7.3 and 26.7.4), increasing in the angle: bisect.
    low, high = 0.0, math.pi / 2
    for _ in range(60):
        angle = (low + high) / 2
        low, high = (angle, high) if _student_central(angle, v) < 0.95 else (low, angle)
    return math.sqrt(v) * math.tan((low + high) / 2)


def _student_central(angle: float, degrees: int) -> float:
    odd = degrees % 2
    cosine = math.cos(angle)
    term = cosine if odd else 1.0
    total = 0.0
    for k in range(1 + odd, degrees, 2):
        total += term
        term *= cosine**2 * k / (k + 1)
    total *= math.sin(angle)
    return (angle + total) * 2 / math.pi if odd else total


def _float64(value: Tensor) -> Tensor:
    # First to the CPU: some accelerators have no float64, and scatter-adds on others are not reproducible.
    return value.detach().cpu().to(torch.float64)


def _check_floating(name: str, value: Tensor) -> None:
    if not value.is_floating_point():
        raise TypeError(f"{name} has dtype {value.dtype}; expected a floating-point tensor.")


def _check_shape(name: str, value: Tensor, expected: str, num_axes: tuple[int, ...]) -> None:
    if value.ndim not in num_axes or value.numel() == 0:
        raise ValueError(f"{name} has shape {list(value.shape)}; expected {expected}, none of them zero.")


def _check_labels(name: str, probs: Tensor, labels: Tensor) -> None:
    _check_floating(name, probs)
    _check_shape(name, probs, "[num_tasks, num_examples, num_classes]", (3,))
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise TypeError(f"labels has dtype {labels.dtype}; expected class indices of an integer dtype such as int64.")
    if labels.shape != probs.shape[:2]:
        raise ValueError(
            f"labels has shape {list(labels.shape)}; expected {list(probs.shape[:2])}, "
            f"[num_tasks, num_examples] as in {name}."
        )
    lowest, highest = int(labels.min()), int(labels.max())
    if lowest < 0 or highest >= probs.shape[-1]:
        raise ValueError(
            f"labels range from {lowest} to {highest}; expected class indices from 0 to {probs.shape[-1] - 1}, "
            f"the last axis of {name}."
        )


def _row_tolerance(dtype: torch.dtype) -> float:
    # Wide enough for an average over weight samples in half precision, far below any real mistake.
    return max(1e-4, 10 * torch.finfo(dtype).eps)


def _checked_probs(probs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    _check_labels("probs", probs, labels)
    tolerance = _row_tolerance(probs.dtype)
    probs, labels = _float64(probs), labels.detach().cpu().to(torch.int64)
    if probs.isnan().any():
        raise ValueError(
            f"probs holds {int(probs.isnan().sum())} nan; expected probabilities: did the network diverge?"
        )
    if (probs < 0).any():
        raise ValueError(
            f"probs goes down to {probs.min().item():.4g}; expected probabilities of 0 or more: "
            "pass a softmax of the logits."
        )
    error = (probs.sum(-1) - 1).abs().max().item()
    if error > tolerance:
        raise ValueError(
            f"probs has a row whose sum is off by {error:.4g}; expected rows that sum to 1 within {tolerance:.0e}: "
            "pass a softmax of the logits."
        )
    return probs, labels


def _checked_log_probs(log_probs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    _check_labels("log_probs", log_probs, labels)
    tolerance = _row_tolerance(log_probs.dtype)
    log_probs, labels = _float64(log_probs), labels.detach().cpu().to(torch.int64)
    if log_probs.isnan().any():
        raise ValueError(
            f"log_probs holds {int(log_probs.isnan().sum())} nan; expected log-probabilities: did the network diverge?"
        )
    error = (log_probs.exp().sum(-1) - 1).abs().max().item()
    if error > tolerance:
        raise ValueError(
            f"log_probs has a row whose exponentials sum to 1 +- {error:.4g}; expected 1 within {tolerance:.0e}: "
            "pass a log_softmax of the logits, or probs.log()."
        )
    return log_probs, labels


def _checked_targets(name: str, value: Tensor, like: tuple[str, Tensor] | None = None) -> Tensor:
    _check_floating(name, value)
    _check_shape(name, value, "[num_tasks, num_examples] or [num_tasks, num_examples, num_outputs]", (2, 3))
    if like is not None and value.shape != like[1].shape:
        raise ValueError(
            f"{name} has shape {list(value.shape)}; expected {list(like[1].shape)}, the shape of {like[0]}."
        )
    value = _float64(value)
    if not value.isfinite().all():
        raise ValueError(f"{name} holds {int((~value.isfinite()).sum())} values that are not finite; expected numbers.")
    return value


def _checked_variance(variance: Tensor, targets: Tensor) -> Tensor:
    variance = _checked_targets("variance", variance, like=("targets", targets))
    if (variance <= 0).any():
        raise ValueError(
            f"variance goes down to {variance.min().item():.4g}; expected positive values in the target's unit "
            "squared: pass variances, not log-variances."
        )
    return variance
