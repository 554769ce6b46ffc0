"""Every refusal of the metrics by its message."""

import math
import re
from collections.abc import Callable

import pytest
import torch

from ibaml import metrics


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


P = torch.full((2, 3, 4), 0.25)
Y = torch.zeros(2, 3, dtype=torch.int64)
R = torch.zeros(2, 3)
NAN = torch.full((2, 3), math.nan)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: metrics.accuracy(P[0], Y), ValueError, "probs has shape [3, 4]; expected [num_tasks, num_examples,"),
        (lambda: metrics.accuracy(P[:0], Y[:0]), ValueError, "probs has shape [0, 3, 4]; expected"),
        (lambda: metrics.accuracy(P.long(), Y), TypeError, "probs has dtype torch.int64; expected a floating-point"),
        (lambda: metrics.accuracy(P, R), TypeError, "labels has dtype torch.float32; expected class indices"),
        (lambda: metrics.brier(P, Y[:, :2]), ValueError, "labels has shape [2, 2]; expected [2, 3]"),
        (lambda: metrics.brier(P, Y + 4), ValueError, "labels range from 4 to 4; expected class indices from 0 to 3"),
        (lambda: metrics.brier(P, Y - 1), ValueError, "labels range from -1 to -1"),
        (lambda: metrics.ece(P * math.nan, Y), ValueError, "probs holds 24 nan"),
        (lambda: metrics.ece(-P, Y), ValueError, "probs goes down to -0.25"),
        (lambda: metrics.mce(2 * P, Y), ValueError, "probs has a row whose sum is off by 1;"),
        (lambda: metrics.mce(P, Y, num_bins=0), ValueError, "num_bins is 0; expected at least 1"),
        (lambda: metrics.nll(P, Y), ValueError, "log_probs has a row whose exponentials sum to 1 +- 4.136"),
        (lambda: metrics.nll(P * math.nan, Y), ValueError, "log_probs holds 24 nan"),
        (lambda: metrics.nll(P[0], Y), ValueError, "log_probs has shape [3, 4]"),
        (lambda: metrics.reliability_curve(P, Y, 0), ValueError, "num_bins is 0"),
        (
            lambda: metrics.pooled_ece(P, Y, generator=generator(), num_resamples=1),
            ValueError,
            "num_resamples is 1; expected at least 2",
        ),
        (
            lambda: metrics.pooled_ece([*P], [Y[0]], generator=generator()),
            ValueError,
            "probs has 2 tasks and labels 1; expected as many of each, at least one",
        ),
        (
            lambda: metrics.pooled_mce([], [], generator=generator()),
            ValueError,
            "probs has 0 tasks and labels 0; expected as many",
        ),
        (
            lambda: metrics.pooled_ece([P[0], 2 * P[1]], [*Y], generator=generator()),
            ValueError,
            "task 1 by itself: probs has a row whose sum is off by 1;",
        ),
        (
            lambda: metrics.pooled_ece([*P], [Y[0], R[0]], generator=generator()),
            TypeError,
            "task 1 by itself: labels has dtype torch.float32",
        ),
        (lambda: metrics.mse(R[0], R[0]), ValueError, "targets has shape [3]; expected [num_tasks, num_examples] or"),
        (lambda: metrics.mse(R[:1], R), ValueError, "mean has shape [1, 3]; expected [2, 3], the shape of targets"),
        (lambda: metrics.mse(NAN, R), ValueError, "mean holds 6 values that are not finite"),
        (lambda: metrics.mse(Y, R), TypeError, "mean has dtype torch.int64"),
        (lambda: metrics.gaussian_nll(R, R, R), ValueError, "variance goes down to 0; expected positive"),
        (lambda: metrics.density_nll(NAN), ValueError, "log_density holds 6 nan or +inf"),
        (lambda: metrics.density_nll(R[0]), ValueError, "log_density has shape [3]"),
        (lambda: metrics.density_nll(Y), TypeError, "log_density has dtype torch.int64"),
        (lambda: metrics.coverage(R, R - 1, R), ValueError, "upper lies below lower in 6 places"),
        (lambda: metrics.central_interval(R, R, 1.0), ValueError, "level is 1.0; expected a probability strictly"),
        (lambda: metrics.estimate(R), ValueError, "values has shape [2, 3]; expected [num_tasks]"),
        (lambda: metrics.estimate(R[0, :0]), ValueError, "values has shape [0]"),
        (lambda: metrics.estimate(NAN[0]), ValueError, "values holds 3 nan of 3"),
        (lambda: metrics.estimate(Y[0]), TypeError, "values has dtype torch.int64"),
        (lambda: metrics.paired_difference(R[0], R[0, :2]), ValueError, "b has shape [2]; expected [3]"),
        (lambda: metrics.paired_difference(R[0], Y[0]), TypeError, "b has dtype torch.int64"),
        (lambda: metrics.ood_auroc(NAN, R), ValueError, "uncertainty_in holds 6 nan"),
        (lambda: metrics.ood_auroc(R, Y), TypeError, "uncertainty_out has dtype torch.int64"),
        (lambda: metrics.ood_auroc(R, R[0]), ValueError, "uncertainty_out has shape [3]; expected as many axes"),
        (lambda: metrics.ood_auroc(R, R[:1]), ValueError, "uncertainty_out has 1 tasks; expected 2"),
        (lambda: metrics.ood_auroc(P, P), ValueError, "uncertainty_in has shape [2, 3, 4]"),
        (
            lambda: metrics.regression_report(R, R + 1, R, log_density=R[0]),
            ValueError,
            "log_density has shape [3]; expected [2, 3]",
        ),
        (
            lambda: metrics.regression_report(R, R + 1, R, cdf=R[:1]),
            ValueError,
            "cdf has shape [1, 3]; expected [2, 3], the shape of targets",
        ),
        (
            lambda: metrics.regression_report(R, R + 1, R, cdf=R + 2),
            ValueError,
            "cdf has 6 values outside [0, 1]",
        ),
    ],
)
def test_bad_input_is_refused(call: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        call()
