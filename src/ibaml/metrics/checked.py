"""Arguments of metrics, checked and brought to float64 on the CPU."""

import torch

from ibaml.types import Tensor


def float64(value: Tensor) -> Tensor:
    """Returns a detached copy in float64 on the CPU."""
    # First to the CPU: some accelerators have no float64, and scatter-adds on others are not reproducible.
    return value.detach().cpu().to(torch.float64)


def floating(name: str, value: Tensor, expected: str, num_axes: tuple[int, ...]) -> Tensor:
    """Returns a real tensor of one of some numbers of axes in float64.

    Raises:
        TypeError: If it is not floating point.
        ValueError: If it is empty or has another number of axes.
    """
    if not value.is_floating_point():
        raise TypeError(f"{name} has dtype {value.dtype}; expected a floating-point tensor.")
    if value.ndim not in num_axes or value.numel() == 0:
        raise ValueError(f"{name} has shape {list(value.shape)}; expected {expected}, none of them zero.")
    return float64(value)


def probabilities(probs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Returns class probabilities and labels in float64 and int64.

    Raises:
        TypeError: If ``probs`` is not floating point or ``labels`` not integer.
        ValueError: If a shape does not fit, a label is out of range, or a row of ``probs`` is no distribution.
    """
    values, labels = _of_classes("probs", probs, labels)
    if values.isnan().any():
        raise ValueError(
            f"probs holds {int(values.isnan().sum())} nan; expected probabilities: did the network diverge?"
        )
    if (values < 0).any():
        raise ValueError(
            f"probs goes down to {values.min().item():.4g}; expected probabilities of 0 or more: "
            "pass a softmax of the logits."
        )
    error, tolerance = (values.sum(-1) - 1).abs().max().item(), _row_tolerance(probs.dtype)
    if error > tolerance:
        raise ValueError(
            f"probs has a row whose sum is off by {error:.4g}; expected rows that sum to 1 within {tolerance:.0e}: "
            "pass a softmax of the logits."
        )
    return values, labels


def log_probabilities(log_probs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Returns log-probabilities and labels in float64 and int64.

    Raises:
        TypeError: If ``log_probs`` is not floating point or ``labels`` not integer.
        ValueError: If a shape does not fit, a label is out of range, or a row of ``log_probs`` is no distribution.
    """
    values, labels = _of_classes("log_probs", log_probs, labels)
    if values.isnan().any():
        raise ValueError(
            f"log_probs holds {int(values.isnan().sum())} nan; expected log-probabilities: did the network diverge?"
        )
    error, tolerance = (values.exp().sum(-1) - 1).abs().max().item(), _row_tolerance(log_probs.dtype)
    if error > tolerance:
        raise ValueError(
            f"log_probs has a row whose exponentials sum to 1 +- {error:.4g}; expected 1 within {tolerance:.0e}: "
            "pass a log_softmax of the logits, or probs.log()."
        )
    return values, labels


def targets(name: str, value: Tensor, like: tuple[str, Tensor] | None = None) -> Tensor:
    """Returns finite numbers of shape ``[num_tasks, num_examples]``, or with a third axis of outputs, in float64.

    Args:
        name: How messages call the argument.
        value: The argument.
        like: Name and value of another argument, whose shape this one must have.

    Raises:
        TypeError: If the value is not floating point.
        ValueError: If the shape does not fit or a value is not finite.
    """
    values = floating(name, value, "[num_tasks, num_examples] or [num_tasks, num_examples, num_outputs]", (2, 3))
    if like is not None and value.shape != like[1].shape:
        raise ValueError(
            f"{name} has shape {list(value.shape)}; expected {list(like[1].shape)}, the shape of {like[0]}."
        )
    if not values.isfinite().all():
        raise ValueError(
            f"{name} holds {int((~values.isfinite()).sum())} values that are not finite; expected numbers."
        )
    return values


def variances(variance: Tensor, like: Tensor) -> Tensor:
    """Returns positive variances of the shape of targets in float64.

    Raises:
        TypeError: If they are not floating point.
        ValueError: If the shape does not fit, or one is not positive and finite.
    """
    variance = targets("variance", variance, like=("targets", like))
    if (variance <= 0).any():
        raise ValueError(
            f"variance goes down to {variance.min().item():.4g}; expected positive values in the target's unit "
            "squared: pass variances, not log-variances."
        )
    return variance


def distribution_function(cdf: Tensor) -> Tensor:
    """Returns values of a predictive distribution function in float64.

    Raises:
        TypeError: If they are not floating point.
        ValueError: If the shape does not fit or a value is outside ``[0, 1]``.
    """
    values = floating("cdf", cdf, "[num_tasks, num_examples] or [num_tasks, num_examples, num_outputs]", (2, 3))
    outside = ~((values >= 0) & (values <= 1))
    if outside.any():
        raise ValueError(
            f"cdf has {int(outside.sum())} values outside [0, 1]; expected probabilities: pass "
            "prediction.cdf(targets), not the targets."
        )
    return values


def _of_classes(name: str, values: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    wide = floating(name, values, "[num_tasks, num_examples, num_classes]", (3,))
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise TypeError(f"labels has dtype {labels.dtype}; expected class indices of an integer dtype such as int64.")
    if labels.shape != values.shape[:2]:
        raise ValueError(
            f"labels has shape {list(labels.shape)}; expected {list(values.shape[:2])}, "
            f"[num_tasks, num_examples] as in {name}."
        )
    lowest, highest = int(labels.min()), int(labels.max())
    if lowest < 0 or highest >= values.shape[-1]:
        raise ValueError(
            f"labels range from {lowest} to {highest}; expected class indices from 0 to {values.shape[-1] - 1}, "
            f"the last axis of {name}."
        )
    return wide, labels.detach().cpu().to(torch.int64)


def _row_tolerance(dtype: torch.dtype) -> float:
    # Wide enough for an average over weight samples in half precision, far below any real mistake.
    return max(1e-4, 10 * torch.finfo(dtype).eps)
