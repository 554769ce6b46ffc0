"""Means over tasks with 95% intervals."""

import math
from typing import NamedTuple

from ibaml.metrics import checked
from ibaml.types import Tensor


class Estimate(NamedTuple):
    """A mean with a symmetric 95% confidence interval.

    ``str`` gives three decimals; a format specification applies to both numbers.

    Examples:
        >>> result = Estimate(mean=0.98213, half_width=0.0041, num_tasks=1000)
        >>> print(result)
        0.982 +- 0.004
        >>> f"{result:.1%}", f"{result:+.2f}"
        ('98.2% +- 0.4%', '+0.98 +- 0.00')

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
        """Applies a format specification of floats to both numbers; a sign that it asks for is the mean's alone."""
        spec = spec or ".3f"
        return f"{self.mean:{spec}} +- {self.half_width:{spec.lstrip('+')}}"

    @property
    def low(self) -> float:
        """Lower end of the 95% interval."""
        return self.mean - self.half_width

    @property
    def high(self) -> float:
        """Upper end of the 95% interval."""
        return self.mean + self.half_width


def estimate(values: Tensor) -> Estimate:
    """Mean over tasks with its 95% Student interval ``mean +- t_(0.975, T - 1) s / sqrt(T)``.

    ``s`` is the sample standard deviation of the per-task values. The interval assumes independent tasks and a mean
    that is close to normal; with the hundreds of tasks of a usual evaluation the t quantile is the normal 1.96.

    Examples:
        >>> import torch
        >>> print(estimate(torch.tensor([0.9, 1.0, 0.8, 0.9])))
        0.900 +- 0.130

    Args:
        values: One value per task, ``[num_tasks]``.

    Returns:
        The estimate; ``half_width`` is nan for a single task or when a value is infinite.

    Raises:
        TypeError: If ``values`` is not floating point.
        ValueError: If ``values`` is not a vector, is empty, or holds nan.
    """
    values = checked.floating("values", values, "[num_tasks]", (1,))
    if values.isnan().any():
        raise ValueError(
            f"values holds {int(values.isnan().sum())} nan of {len(values)}; expected one number per task: "
            "drop the failed tasks and report how many there were."
        )
    num_tasks = len(values)
    mean = values.mean().item()
    if num_tasks == 1 or not math.isfinite(mean):
        return Estimate(mean, math.nan, num_tasks)
    # Here, so that importing the library does not import scipy.
    from scipy.special import stdtrit

    quantile = float(stdtrit(num_tasks - 1, 0.975))
    return Estimate(mean, quantile * values.std().item() / math.sqrt(num_tasks), num_tasks)


def paired_difference(a: Tensor, b: Tensor) -> Estimate:
    """Mean over tasks of ``a - b`` with its 95% Student interval, for two methods on the same tasks in the same order.

    Pairing removes the variation between tasks, usually most of the variance; two overlapping single intervals say
    little about a difference.

    Examples:
        >>> import torch
        >>> print(paired_difference(torch.tensor([0.9, 0.7, 0.5]), torch.tensor([0.8, 0.6, 0.4])))
        0.100 +- 0.000

    Args:
        a: Per-task values of one method, ``[num_tasks]``.
        b: Per-task values of the other, ``[num_tasks]``.

    Returns:
        Estimate of the mean difference; the methods differ at the 5% level if its interval excludes zero.

    Raises:
        TypeError: If an argument is not floating point.
        ValueError: If the shapes differ, are no vectors, are empty, or values are nan.
    """
    first, second = (checked.floating(name, value, "[num_tasks]", (1,)) for name, value in (("a", a), ("b", b)))
    if a.shape != b.shape:
        raise ValueError(
            f"b has shape {list(b.shape)}; expected {list(a.shape)}, the shape of a: "
            "a paired difference needs both methods on the same tasks."
        )
    return estimate(first - second)
