"""All metrics of one kind of target at once."""

import torch

from ibaml.metrics import checked
from ibaml.metrics.calibration import central_coverage, ece, mce, pooled_ece, pooled_mce, quantile_calibration_error
from ibaml.metrics.classification import accuracy, brier, nll
from ibaml.metrics.intervals import Estimate, estimate
from ibaml.metrics.regression import coverage, density_nll, gaussian_nll, mse
from ibaml.metrics.selective import selective_area
from ibaml.types import Tensor


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
    log_probs, labels = checked.log_probabilities(log_probs, labels)
    probs = log_probs.exp()
    seed = 0 if generator is None else int(torch.randint(2**40, (), generator=generator))

    def resamples() -> torch.Generator:
        return torch.Generator().manual_seed(seed)

    entropy = torch.special.entr(probs).sum(-1)
    return {
        "accuracy": estimate(accuracy(probs, labels)),
        "nll": estimate(nll(log_probs, labels)),
        "brier": estimate(brier(probs, labels)),
        "ece": estimate(ece(probs, labels, num_bins=num_bins)),
        "mce": estimate(mce(probs, labels, num_bins=num_bins)),
        "selective_area": estimate(selective_area(entropy, probs.argmax(-1) == labels)),
        "ece_pooled": pooled_ece(probs, labels, generator=resamples(), num_bins=num_bins),
        "mce_pooled": pooled_mce(probs, labels, generator=resamples(), num_bins=num_bins),
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
    targets = checked.targets("targets", targets)
    mean = checked.targets("mean", mean, like=("targets", targets))
    variance = checked.variances(variance, targets)
    if log_density is not None and log_density.shape != targets.shape[:2]:
        raise ValueError(
            f"log_density has shape {list(log_density.shape)}; expected {list(targets.shape[:2])}, "
            "[num_tasks, num_examples] as in targets: sum independent outputs first."
        )
    cdf = (
        torch.special.ndtr((targets - mean) / variance.sqrt())
        if cdf is None
        else checked.targets("cdf", cdf, like=("targets", targets))
    )
    covered = central_coverage(cdf) if interval is None else coverage(*interval, targets)
    task_nll = gaussian_nll(mean, variance, targets) if log_density is None else density_nll(log_density)
    return {
        "mse": estimate(mse(mean, targets)),
        "nll": estimate(task_nll),
        "coverage_90": estimate(covered),
        "quantile_calibration_error": estimate(quantile_calibration_error(cdf)),
    }
