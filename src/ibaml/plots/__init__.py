"""Figures: reliability diagrams, example tasks, training curves, learning curves, comparisons of runs.

Every function builds a ``matplotlib.figure.Figure`` without pyplot, so that nothing opens a window, no figure
stays in a global list, and threads do not meet. ``ibaml.plots.style`` holds what they share.
"""

from ibaml.plots.comparison import comparison
from ibaml.plots.learning import learning_curve
from ibaml.plots.reliability import reliability_diagram
from ibaml.plots.style import Figure, save
from ibaml.plots.tasks import example_regression, example_task
from ibaml.plots.training import training_curves
from ibaml.plots.uncertainty import quantile_curves, selective_curves

__all__ = [
    "Figure",
    "comparison",
    "example_regression",
    "example_task",
    "learning_curve",
    "quantile_curves",
    "reliability_diagram",
    "save",
    "selective_curves",
    "training_curves",
]
