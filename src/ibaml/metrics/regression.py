"""Scores of predictions of real targets, one value per task.

Means, variances, ends of intervals and targets have shape ``[num_tasks, num_examples]`` or ``[num_tasks, num_examples,
num_outputs]``, all the same.
"""

import math
from statistics import NormalDist

import torch

from ibaml.metrics import checked
from ibaml.types import Tensor


def mse(mean: Tensor, targets: Tensor) -> Tensor:
    """Mean squared error of the predictive mean, over examples and outputs.

    Examples:
        >>> mse(torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, 4.0]]))
        tensor([2.], dtype=torch.float64)

    Args:
        mean: Predictive means.
        targets: Targets.

    Returns:
        Error of each task in the target's unit squared.

    Raises:
        TypeError: If a dtype does not fit.
        ValueError: If a shape does not fit or a value is not finite.
    """
    targets = checked.targets("targets", targets)
    mean = checked.targets("mean", mean, like=("targets", targets))
    return ((mean - targets) ** 2).flatten(1).mean(-1)


def density_nll(log_density: Tensor) -> Tensor:
    """Mean negative log predictive density ``-(1/n) sum_i log p(y_i | x_i)`` in nats.

    Examples:
        >>> density_nll(torch.tensor([[-1.0, -2.0]]))
        tensor([1.5000], dtype=torch.float64)

    Args:
        log_density: Log predictive density at each target, joint over its outputs, ``[num_tasks, num_examples]``;
            ``-inf`` is allowed.

    Returns:
        Nats per example of each task.

    Raises:
        TypeError: If the dtype does not fit.
        ValueError: If the shape does not fit or a value is nan or ``+inf``.
    """
    log_density = checked.floating("log_density", log_density, "[num_tasks, num_examples]", (2,))
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
        mean: Predictive means.
        variance: Predictive variances in the target's unit squared, positive.
        targets: Targets.

    Returns:
        Nats per example of each task.

    Raises:
        TypeError: If a dtype does not fit.
        ValueError: If a shape does not fit, a value is not finite, or a variance is not positive.
    """
    targets = checked.targets("targets", targets)
    mean = checked.targets("mean", mean, like=("targets", targets))
    variance = checked.variances(variance, targets)
    terms = 0.5 * (torch.log(2 * math.pi * variance) + (targets - mean) ** 2 / variance)
    return (terms.sum(-1) if terms.ndim == 3 else terms).mean(-1)


def coverage(lower: Tensor, upper: Tensor, targets: Tensor) -> Tensor:
    """Fraction of targets inside their predictive interval, ends included.

    Examples:
        >>> coverage(torch.zeros(1, 4), torch.ones(1, 4), torch.tensor([[-0.5, 0.0, 0.5, 1.5]]))
        tensor([0.5000], dtype=torch.float64)

    Args:
        lower: Lower ends.
        upper: Upper ends, nowhere below ``lower``.
        targets: Targets.

    Returns:
        Fraction of each task's examples and outputs, in ``[0, 1]``.

    Raises:
        TypeError: If a dtype does not fit.
        ValueError: If a shape does not fit, a value is not finite, or an upper end lies below the lower one.
    """
    targets = checked.targets("targets", targets)
    lower = checked.targets("lower", lower, like=("targets", targets))
    upper = checked.targets("upper", upper, like=("targets", targets))
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
