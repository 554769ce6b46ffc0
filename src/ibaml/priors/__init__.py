"""Priors over the adapted weights: families of distributions, one file each."""

from collections.abc import Mapping

from ibaml.priors.base import ImplicitSystem, Prior
from ibaml.priors.diagonal import DiagonalGaussian, DiagonalPrior, kl_divergence
from ibaml.priors.full import FullGaussian, FullPrior
from ibaml.priors.point import PointPrior

PRIORS: Mapping[str, type[Prior]] = {"point": PointPrior, "diagonal": DiagonalPrior, "full": FullPrior}

__all__ = [
    "PRIORS",
    "DiagonalGaussian",
    "DiagonalPrior",
    "FullGaussian",
    "FullPrior",
    "ImplicitSystem",
    "PointPrior",
    "Prior",
    "kl_divergence",
]
