"""Is an uncertainty larger on examples that belong to none of the task's classes?"""

import math
from statistics import NormalDist

import torch

from ibaml.metrics import checked
from ibaml.metrics.intervals import Estimate
from ibaml.types import Tensor

_NORMAL_975 = NormalDist().inv_cdf(0.975)


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
        uncertainty_in: Uncertainty of in-distribution examples, any scale, ``[num_examples]`` of independent examples
            or ``[num_tasks, num_examples]``.
        uncertainty_out: Uncertainty of out-of-distribution examples, in as many axes; with a task axis, for the same
            tasks in the same order. The number of examples may differ.

    Returns:
        The area and its interval; ``num_tasks`` counts the tasks, or all examples when there is no task axis.
        ``half_width`` is nan if there are not two units of each kind.

    Raises:
        TypeError: If an argument is not floating point.
        ValueError: If a shape does not fit or a value is nan.
    """
    inside = _checked("uncertainty_in", uncertainty_in)
    outside = _checked("uncertainty_out", uncertainty_out)
    if inside.ndim != outside.ndim:
        raise ValueError(
            f"uncertainty_out has shape {list(outside.shape)}; expected as many axes as uncertainty_in, which "
            f"has shape {list(inside.shape)}."
        )
    clustered = inside.ndim == 2
    if clustered and len(inside) != len(outside):
        raise ValueError(
            f"uncertainty_out has {len(outside)} tasks; expected {len(inside)} as in uncertainty_in: "
            "for unrelated tasks pass flat vectors of examples."
        )
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


def _checked(name: str, uncertainty: Tensor) -> Tensor:
    values = checked.floating(name, uncertainty, "[num_examples] or [num_tasks, num_examples]", (1, 2))
    if values.isnan().any():
        raise ValueError(f"{name} holds {int(values.isnan().sum())} nan; expected an uncertainty for every example.")
    return values


def _placements(values: Tensor, others: Tensor) -> Tensor:
    """For each value, the fraction of ``others`` below it, ties counting half; shape of ``values``."""
    ordered = others.flatten().sort().values
    below = torch.searchsorted(ordered, values.contiguous())
    not_above = torch.searchsorted(ordered, values.contiguous(), right=True)
    return (below + not_above).to(torch.float64) / (2 * ordered.numel())
