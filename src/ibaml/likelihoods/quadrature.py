"""Integrals over an output that is Gaussian: what a posterior in closed form makes of a likelihood without one."""

import math
from collections.abc import Callable

import torch

from ibaml.types import Tensor

_LEAST_VARIANCE = 1e-14
"""Of an output in ``log_expectation``: less is taken for so much, which changes an nll by less than rounding does."""

_NUM_SEARCHES = 25
_NUM_POINTS, _REACH = 65, 9.0
_NUM_NODES, _FURTHEST = 129, 7.0


def log_expectation(
    log_prob: Callable[[Tensor], Tensor],
    slopes: Callable[[Tensor], tuple[Tensor, Tensor]],
    likeliest: Tensor,
    mean: Tensor,
    variance: Tensor,
) -> Tensor:
    """Returns ``log E p(f)`` for ``f ~ N(mean, variance)``, elementwise in float64, where ``log p`` is concave.

    The integrand ``exp(log p(mean + t) - t^2 / (2 variance))`` has one mode. Around it, in units of the width that its
    curvature gives, the trapezoidal rule converges exponentially, wherever a surprising value pulls the mode. The
    points are held fixed in a derivative: the integral does not depend on where they lie.

    Args:
        log_prob: ``log p``, elementwise, for ``f`` with a further leading axis as well.
        slopes: First and second derivative of ``-log p``, elementwise.
        likeliest: Where ``p`` is largest, in a shape that ``mean`` expands; it may be infinite.
        mean: Of the output, ``[...]``.
        variance: Of the output, in a shape that ``mean`` expands.

    Cost:
        25 evaluations of ``slopes`` and 65 of ``log_prob``.
    """
    mean = mean.double()
    variance = variance.double().clamp_min(_LEAST_VARIANCE).expand_as(mean)
    centre, spread = mean.detach(), variance.detach()
    # The slope of -log p increases: the mode is between the mean and where p is largest, or where the slope at the mean
    # would take it.
    slope, _ = slopes(centre)
    furthest = (spread * slope).abs()
    end = torch.minimum(torch.maximum(likeliest - centre, -furthest), furthest)
    low, high, shift = end.clamp_max(0), end.clamp_min(0), end
    for _ in range(_NUM_SEARCHES):
        slope, curvature = slopes(centre + shift)
        slope = slope + shift / spread
        low, high = torch.where(slope < 0, shift, low), torch.where(slope > 0, shift, high)
        newton = shift - slope / (curvature + 1 / spread)
        shift = torch.where((newton >= low) & (newton <= high), newton, 0.5 * (low + high))
    shift = shift.detach()
    width = (slopes(centre + shift)[1] + 1 / spread).rsqrt().detach()
    grid = torch.linspace(-_REACH, _REACH, _NUM_POINTS, dtype=mean.dtype, device=mean.device)
    away = shift + width * grid.reshape(-1, *(1 for _ in mean.shape))
    found = torch.logsumexp(log_prob(mean + away) - 0.5 * away**2 / variance, 0)
    step = 2 * _REACH / (_NUM_POINTS - 1)
    return found + torch.log(width * step) - 0.5 * torch.log(2 * math.pi * variance)


def expectation(function: Callable[[Tensor], Tensor], mean: Tensor, variance: Tensor) -> Tensor:
    """Returns ``E function(f)`` for ``f ~ N(mean, variance)``, elementwise in float64, by 129 values of the function.

    By the trapezoidal rule to 7 standard deviations: the error is that of rounding for functions that change little
    within a tenth of one, and that of a jump is at most a fortieth.

    Args:
        function: Elementwise, for ``f`` with a further leading axis.
        mean: ``[...]``.
        variance: In a shape that ``mean`` expands.
    """
    mean = mean.double()
    nodes = torch.linspace(-_FURTHEST, _FURTHEST, _NUM_NODES, dtype=mean.dtype, device=mean.device)
    weights = torch.softmax(-0.5 * nodes**2, 0)
    variance = variance.double()
    # A root has no derivative at zero.
    deviation = torch.where(variance > 0, torch.where(variance > 0, variance, 1.0).sqrt(), 0.0)
    at = mean + deviation * nodes.reshape(-1, *(1 for _ in mean.shape))
    return torch.tensordot(weights, function(at), 1)
