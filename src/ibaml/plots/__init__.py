"""Figures: reliability diagrams, example tasks, training curves, comparisons of runs, the paper's experiments.

Every function builds a ``matplotlib.figure.Figure`` without pyplot, so that nothing opens a window, no figure
stays in a global list, and threads do not meet. ``ibaml.plots.style`` holds what they share.
"""

from ibaml.plots.comparison import comparison
from ibaml.plots.few_shot import fig3, table1
from ibaml.plots.fig1 import fig1, fig1_bounds
from ibaml.plots.fig2 import fig2
from ibaml.plots.fsmol import fsmol
from ibaml.plots.groups import groups
from ibaml.plots.reliability import reliability_diagram
from ibaml.plots.sinusoid import sinusoid
from ibaml.plots.style import Figure, save
from ibaml.plots.tasks import example_regression, example_task
from ibaml.plots.training import training_curves
from ibaml.plots.uncertainty import quantile_curves, selective_curves

__all__ = [
    "Figure",
    "comparison",
    "example_regression",
    "example_task",
    "fig1",
    "fig1_bounds",
    "fig2",
    "fig3",
    "fsmol",
    "groups",
    "quantile_curves",
    "reliability_diagram",
    "save",
    "selective_curves",
    "sinusoid",
    "table1",
    "training_curves",
]
