"""Scores against the number of known examples of a task."""

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

from ibaml.metrics import LearningCurve
from ibaml.plots.style import BLUE, GREY, STYLE, WIDTH, new_figure

_LABELS = {
    "nll": "nll (nats)",
    "rmse": "Root mean squared error",
    "accuracy": "Accuracy",
    "coverage_90": "Coverage of 90% intervals",
    "ece_pooled": "ECE, pooled",
}
_IDEAL = {"coverage_90": 0.9, "ece_pooled": 0.0}


def learning_curve(curve: LearningCurve, *, title: str = "How many known rows are enough?") -> Figure:
    """A panel for each score with its 95% interval over tasks; dashed where a score of honest predictions lies.

    Examples:
        >>> from ibaml.metrics import Estimate
        >>> scores = {"nll": (Estimate(0.9, 0.1, 20), Estimate(0.5, 0.1, 20))}
        >>> curve = LearningCurve(num_support=(0, 5), scores=scores, num_tasks=20, num_left_out=0)
        >>> learning_curve(curve).axes[0].get_ylabel()
        'nll (nats)'

    Args:
        curve: From ``MetaLearner.learning_curve``.
        title: Title of the figure.
    """
    with mpl.rc_context(STYLE):
        figure = new_figure(WIDTH, 3.2)
        figure.suptitle(title)
        panels = figure.subplots(1, len(curve.scores), squeeze=False)[0]
        # Numbers of rows grow by factors: equal steps show each.
        places = np.arange(len(curve.num_support))
        for axes, (name, values) in zip(panels, curve.scores.items(), strict=True):
            means = [value.mean for value in values]
            # A single task has no interval.
            widths = np.nan_to_num([value.half_width for value in values])
            if name in _IDEAL:
                axes.axhline(_IDEAL[name], ls="--", color=GREY, lw=1.2)
            axes.errorbar(places, means, yerr=widths, fmt="o-", color=BLUE, ms=5, lw=1.6, capsize=3)
            axes.set(xlabel="Known rows", ylabel=_LABELS.get(name, name))
            axes.set_xticks(places, [str(number) for number in curve.num_support])
            axes.grid(True, axis="y")
    return figure
