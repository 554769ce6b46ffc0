"""Priors over the adapted weights: families of distributions, one file each."""

from collections.abc import Mapping

from ibaml.priors.base import ImplicitSystem, Prior
from ibaml.priors.diagonal import DiagonalGaussian, DiagonalPrior, kl_divergence
from ibaml.priors.point import PointPrior

PRIORS: Mapping[str, type[Prior]] = {"point": PointPrior, "diagonal": DiagonalPrior}

__all__ = ["PRIORS", "DiagonalGaussian", "DiagonalPrior", "ImplicitSystem", "PointPrior", "Prior", "kl_divergence"]
