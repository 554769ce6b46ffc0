"""Priors over the adapted weights, or over the columns of a head: families of distributions, one file each."""

from collections.abc import Mapping

from ibaml.priors.base import ImplicitSystem, Prior
from ibaml.priors.columns import ColumnPrior, DiagonalColumnPrior, FullColumnPrior, LowRankColumnPrior
from ibaml.priors.diagonal import DiagonalGaussian, DiagonalPrior, kl_divergence
from ibaml.priors.full import FullGaussian, FullPrior
from ibaml.priors.point import PointPrior

PRIORS: Mapping[str, type[Prior]] = {"point": PointPrior, "diagonal": DiagonalPrior, "full": FullPrior}
COLUMN_PRIORS: Mapping[str, type[ColumnPrior]] = {
    "diagonal": DiagonalColumnPrior,
    "full": FullColumnPrior,
    "low_rank": LowRankColumnPrior,
}

__all__ = [
    "COLUMN_PRIORS",
    "PRIORS",
    "ColumnPrior",
    "DiagonalColumnPrior",
    "DiagonalGaussian",
    "DiagonalPrior",
    "FullColumnPrior",
    "FullGaussian",
    "FullPrior",
    "ImplicitSystem",
    "LowRankColumnPrior",
    "PointPrior",
    "Prior",
    "kl_divergence",
]
