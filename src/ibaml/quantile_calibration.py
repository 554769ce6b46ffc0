"""Calibration of regression: does a predictive p-quantile have a share p of the targets below it, for every p?

All functions take the value of the predictive distribution function at the target, ``F(y) = P(target <= y)``, which
``RegressionPrediction.cdf`` gives. For a calibrated model it is uniform on ``[0, 1]``, whatever the distributions are
(the probability integral transform). Computed in float64 on the CPU, as in ``ibaml.metrics``.
"""

from typing import NamedTuple

import torch

from ibaml.types import Tensor


class QuantileCurve(NamedTuple):
    """Observed against predicted probability. All float64 on the CPU.

    Attributes:
        level: Predicted probabilities ``p``, ``[num_levels]``.
        frequency: Fraction of targets at or below their predictive p-quantile, same shape; the diagonal is ideal.
    """

    level: Tensor
    frequency: Tensor


def quantile_curve(cdf: Tensor, *, num_levels: int = 19) -> QuantileCurve:
    """Observed against predicted probability of the targets of all tasks together (Kuleshov et al. 2018).

    Examples:
        >>> quantile_curve(torch.tensor([[0.1, 0.2, 0.3, 0.9]]), num_levels=1).frequency
        tensor([0.7500], dtype=torch.float64)

    Args:
        cdf: Predictive distribution function at the targets, in ``[0, 1]``, shape ``[num_tasks, num_examples]`` or
            ``[num_tasks, num_examples, num_outputs]``.
        num_levels: Number of levels, evenly spaced strictly between 0 and 1, at least 1.

    Raises:
        ValueError: If the shape does not fit, a value is outside ``[0, 1]``, or ``num_levels`` is below 1.
        TypeError: If ``cdf`` is not floating point.
    """
    if num_levels < 1:
        raise ValueError(f"num_levels is {num_levels}; expected at least 1.")
    values = _checked(cdf).flatten()
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
        cdf: Predictive distribution function at the targets, in ``[0, 1]``, shape ``[num_tasks, num_examples]`` or
            ``[num_tasks, num_examples, num_outputs]``.

    Returns:
        Error of each task in ``[0, 0.5]``, float64 of shape ``[num_tasks]``.

    Raises:
        ValueError: If the shape does not fit or a value is outside ``[0, 1]``.
        TypeError: If ``cdf`` is not floating point.
    """
    values = _checked(cdf).flatten(1).sort(-1).values
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
        cdf: Predictive distribution function at the targets, in ``[0, 1]``, shape ``[num_tasks, num_examples]`` or
            ``[num_tasks, num_examples, num_outputs]``.
        level: Probability inside the interval, in ``(0, 1)``.

    Returns:
        Fraction of each task's examples and outputs, in ``[0, 1]``, float64 of shape ``[num_tasks]``.

    Raises:
        ValueError: If the shape does not fit, a value is outside ``[0, 1]``, or ``level`` is out of range.
        TypeError: If ``cdf`` is not floating point.
    """
    if not 0 < level < 1:
        raise ValueError(f"level is {level}; expected a probability strictly between 0 and 1, such as 0.9.")
    return ((_checked(cdf).flatten(1) - 0.5).abs() <= level / 2).to(torch.float64).mean(-1)


def _checked(cdf: Tensor) -> Tensor:
    if not cdf.is_floating_point():
        raise TypeError(f"cdf has dtype {cdf.dtype}; expected a floating-point tensor.")
    if cdf.ndim not in (2, 3) or cdf.numel() == 0:
        raise ValueError(
            f"cdf has shape {list(cdf.shape)}; expected [num_tasks, num_examples] or [num_tasks, num_examples, "
            "num_outputs], none of them zero."
        )
    values = cdf.detach().cpu().to(torch.float64)
    outside = ~((values >= 0) & (values <= 1))
    if outside.any():
        raise ValueError(
            f"cdf has {int(outside.sum())} values outside [0, 1]; expected probabilities: pass "
            "prediction.cdf(targets), not the targets."
        )
    return values
