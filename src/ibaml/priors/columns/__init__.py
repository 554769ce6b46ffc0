"""Gaussian priors over the columns of a linear head: families of distributions, one file each."""

from ibaml.priors.columns.base import ColumnPrior
from ibaml.priors.columns.diagonal import DiagonalColumnPrior, DiagonalColumns
from ibaml.priors.columns.full import FullColumnPrior, FullColumns
from ibaml.priors.columns.low_rank import LowRankColumnPrior, LowRankColumns

__all__ = [
    "ColumnPrior",
    "DiagonalColumnPrior",
    "DiagonalColumns",
    "FullColumnPrior",
    "FullColumns",
    "LowRankColumnPrior",
    "LowRankColumns",
]
