"""The experiments by name, one line each; ``ibaml reproduce`` makes its sub-commands of them."""

from collections.abc import Mapping
from typing import Any

from ibaml.experiments.few_shot.fig3 import FIG3
from ibaml.experiments.few_shot.table1 import TABLE1
from ibaml.experiments.fig1.report import FIG1
from ibaml.experiments.fig2.report import FIG2
from ibaml.experiments.fsmol.report import FSMOL
from ibaml.experiments.groups.report import GROUPS
from ibaml.experiments.report import Experiment
from ibaml.experiments.sinusoid.report import SINUSOID
from ibaml.experiments.study.report import STUDY

EXPERIMENTS: Mapping[str, Experiment[Any]] = {
    "fig1": FIG1,
    "fig2": FIG2,
    "table1": TABLE1,
    "fig3": FIG3,
    "sinusoid": SINUSOID,
    "fsmol": FSMOL,
    "groups": GROUPS,
    "study": STUDY,
}
"""Name on the command line to experiment."""


def experiment_name(settings: object) -> str:
    """Returns the name of the experiment that some settings are for.

    Raises:
        TypeError: If they are for none.
    """
    for name, experiment in EXPERIMENTS.items():
        if type(settings) is experiment.settings:
            return name
    raise TypeError(f"settings must be those of one of {', '.join(EXPERIMENTS)}, got {type(settings).__name__}.")
