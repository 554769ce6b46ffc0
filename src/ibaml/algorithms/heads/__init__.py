"""Algorithms whose inner problem is solved exactly, for parameters that the network's outputs are affine in."""

from ibaml.algorithms.heads.base import Head
from ibaml.algorithms.heads.gaussian_classes import GaussianClasses
from ibaml.algorithms.heads.generalized_linear import GeneralizedLinear
from ibaml.algorithms.heads.gp import GaussianProcess
from ibaml.algorithms.heads.linear_gaussian import LinearGaussian
from ibaml.algorithms.heads.neighbours import Neighbours
from ibaml.algorithms.heads.prototypes import Prototypes
from ibaml.algorithms.heads.ridge import Ridge
from ibaml.algorithms.heads.softmax import Softmax

__all__ = [
    "GaussianClasses",
    "GaussianProcess",
    "GeneralizedLinear",
    "Head",
    "LinearGaussian",
    "Neighbours",
    "Prototypes",
    "Ridge",
    "Softmax",
]
