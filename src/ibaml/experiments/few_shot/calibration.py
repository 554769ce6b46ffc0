"""How well calibrated predictions of classes are, by bins of their confidence."""

from collections.abc import Mapping
from typing import NamedTuple

import torch

from ibaml import metrics
from ibaml.metrics import Estimate, ReliabilityCurve
from ibaml.types import Tensor

NUM_BINS = 15
"""Equal-width bins of the top-class confidence."""


class Calibration(NamedTuple):
    """How well calibrated a method is.

    Attributes:
        curve: Accuracy against confidence over the queries of all tasks.
        per_task: ``ece`` and ``mce``: the mean over tasks of each task's own error.
        pooled: ``ece`` and ``mce`` of the queries of all tasks together, with a bootstrap interval over tasks.
        differences: ``ece`` and ``mce`` of a task minus those of the reference, paired; empty for the reference.
    """

    curve: ReliabilityCurve
    per_task: Mapping[str, Estimate]
    pooled: Mapping[str, Estimate]
    differences: Mapping[str, Estimate]


def calibration(probs: Tensor, labels: Tensor, reference: Tensor | None = None) -> Calibration:
    """Measures the calibration of predictions, with ``NUM_BINS`` bins.

    Args:
        probs: Predictive probabilities, shape ``[num_tasks, num_examples, num_classes]``.
        labels: Class indices, shape ``[num_tasks, num_examples]``.
        reference: Probabilities of the method to compare with, for the same examples.
    """
    per_task = {"ece": metrics.ece, "mce": metrics.mce}
    pooled = {"ece": metrics.pooled_ece, "mce": metrics.pooled_mce}
    values = {name: function(probs, labels, num_bins=NUM_BINS) for name, function in per_task.items()}
    return Calibration(
        curve=metrics.reliability_curve(probs, labels, NUM_BINS),
        per_task={name: metrics.estimate(value) for name, value in values.items()},
        pooled={
            name: function(probs, labels, generator=torch.Generator().manual_seed(0), num_bins=NUM_BINS)
            for name, function in pooled.items()
        },
        differences={}
        if reference is None
        else {
            name: metrics.paired_difference(value, per_task[name](reference, labels, num_bins=NUM_BINS))
            for name, value in values.items()
        },
    )
