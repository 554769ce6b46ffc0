"""Algorithms whose inner problem is solved exactly: heads on the features that a network computes once per task."""

from ibaml.algorithms.heads.gaussian_classes import GaussianClasses
from ibaml.algorithms.heads.linear_gaussian import LinearGaussian
from ibaml.algorithms.heads.prototypes import Prototypes
from ibaml.algorithms.heads.softmax import Softmax

__all__ = ["GaussianClasses", "LinearGaussian", "Prototypes", "Softmax"]
