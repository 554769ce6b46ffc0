"""The baselines by name."""

from collections.abc import Mapping

from ibaml.baselines.base import Baseline
from ibaml.baselines.gaussian_process import SharedGaussianProcess
from ibaml.baselines.logistic_regression import LogisticRegression
from ibaml.baselines.maml import ModelAgnostic
from ibaml.baselines.neighbours import NearestNeighbours
from ibaml.baselines.pooled import Pooled
from ibaml.baselines.prototypes import PrototypicalNetwork
from ibaml.baselines.ridge import RidgeRegression

BASELINES: Mapping[str, Baseline] = {
    "logistic_regression": LogisticRegression(),
    "ridge": RidgeRegression(),
    "neighbours": NearestNeighbours(),
    "pooled": Pooled(),
    "gp": SharedGaussianProcess(),
    "prototypes": PrototypicalNetwork(),
    "maml": ModelAgnostic(),
}
"""All baselines by name, in the order in which they are fitted."""
