"""How good and how honest predictions are: per-task values, their 95% intervals, calibration, selection, detection.

The unit of replication is the task: examples of one task share one adapted posterior and are not independent, so every
interval is over tasks. All functions compute in float64 on the CPU, whatever the precision and device of the
predictions, and give one value per task, float64 of shape ``[num_tasks]``, unless they say otherwise. Their arguments
are checked: a TypeError tells of a wrong dtype, a ValueError of a shape, range or sum that does not fit.

| module | what |
|---|---|
| `intervals` | means over tasks with 95% intervals, paired differences |
| `classification` | accuracy, nll, Brier score of class probabilities |
| `regression` | squared error, nll, coverage of given intervals |
| `calibration` | ECE and MCE of classes, per task and pooled; calibration of quantiles |
| `selective` | accuracy on the examples that a model is surest of |
| `sizes` | how many examples tasks had |
| `recalibration` | what a fit of the output temperature found |
| `learning` | scores against the number of known examples |
| `abstention` | the confidence from which errors are as rare as wanted |
| `detection` | AUROC of an uncertainty as detector of foreign examples |
"""

from ibaml.metrics.abstention import AbstentionCurve, abstention_curve
from ibaml.metrics.calibration import (
    QuantileCurve,
    ReliabilityCurve,
    central_coverage,
    ece,
    mce,
    pooled_ece,
    pooled_mce,
    quantile_calibration_error,
    quantile_curve,
    reliability_curve,
)
from ibaml.metrics.classification import accuracy, brier, nll
from ibaml.metrics.detection import ood_auroc
from ibaml.metrics.intervals import Estimate, estimate, paired_difference
from ibaml.metrics.learning import LearningCurve
from ibaml.metrics.recalibration import Recalibration
from ibaml.metrics.regression import central_interval, coverage, density_nll, gaussian_nll, mse
from ibaml.metrics.reports import classification_report, regression_report
from ibaml.metrics.selective import SelectiveCurve, selective_accuracy, selective_area, selective_curve
from ibaml.metrics.sizes import Sizes

__all__ = [
    "AbstentionCurve",
    "Estimate",
    "LearningCurve",
    "QuantileCurve",
    "Recalibration",
    "ReliabilityCurve",
    "SelectiveCurve",
    "Sizes",
    "abstention_curve",
    "accuracy",
    "brier",
    "central_coverage",
    "central_interval",
    "classification_report",
    "coverage",
    "density_nll",
    "ece",
    "estimate",
    "gaussian_nll",
    "mce",
    "mse",
    "nll",
    "ood_auroc",
    "paired_difference",
    "pooled_ece",
    "pooled_mce",
    "quantile_calibration_error",
    "quantile_curve",
    "regression_report",
    "reliability_curve",
    "selective_accuracy",
    "selective_area",
    "selective_curve",
]
