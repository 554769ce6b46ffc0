"""Weights that a few common factors correlate, for many features."""

import dataclasses
import math
from typing import ClassVar, NamedTuple

import torch

from ibaml.priors.columns.base import ColumnSettings
from ibaml.types import Tensor

# Of the variance of each weight, at the most, where training starts.
_SHARE_OF_LOADINGS = 0.1


class LowRankColumns(NamedTuple):
    """Weights with covariance ``diag(s^2) + U U^T``: ``mean + diag(s) e + U f`` with standard normal ``e`` and ``f``.

    Here ``s = exp(log_var / 2)`` and ``U = diag(s) V``, so that the loadings ``V`` have no unit.

    Attributes:
        mean: Mean of each weight, ``[num_priors, num_inputs]``; no columns (``[0, num_inputs]``) for zero.
        log_var: Natural logarithm of ``s^2``, ``[num_priors, num_inputs]``.
        loadings: ``V``, ``[num_priors, num_inputs, rank]``.
    """

    mean: Tensor
    log_var: Tensor
    loadings: Tensor


@dataclasses.dataclass(frozen=True, kw_only=True)
class LowRankColumnPrior(ColumnSettings):
    """Weights with a covariance that is diagonal but for a few factors: ``C = [diag(s), U]``.

    Attributes:
        rank: Number of factors. The other attributes are those of ``ColumnSettings``.

    Raises:
        ValueError: If ``rank`` is not positive.
    """

    rank: int = 4

    is_diagonal: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Refuses settings out of range."""
        super().__post_init__()
        if self.rank < 1:
            raise ValueError(f"rank must be at least 1, but is {self.rank}.")

    def init(self, num_inputs: int, num_columns: int, /, *, like: Tensor) -> LowRankColumns:
        """See ``ColumnPrior``. Loadings start small, as the first cosines over the weights.

        At zero they would stay there: the covariance is even in them.
        """
        total = self.initial_log_var(num_inputs, num_columns, like=like)
        position = (torch.arange(num_inputs, dtype=like.dtype, device=like.device) + 0.5) / num_inputs
        frequency = math.pi * torch.arange(1, self.rank + 1, dtype=like.dtype, device=like.device)
        loadings = math.sqrt(_SHARE_OF_LOADINGS / self.rank) * torch.cos(position.unsqueeze(-1) * frequency)
        log_var = total - torch.log1p((loadings**2).sum(-1))
        every = loadings.expand(len(total), -1, -1).clone()
        return LowRankColumns(self.initial_mean(num_inputs, num_columns, like=like), log_var, every)

    def mean(self, member: LowRankColumns, /) -> Tensor:
        """See ``ColumnPrior``."""
        return member.mean if self.learn_mean else torch.zeros_like(member.log_var)

    def whiten(self, member: LowRankColumns, features: Tensor, /) -> Tensor:
        """See ``ColumnPrior``; the rank is ``num_inputs + rank``."""
        scaled = features * torch.exp(0.5 * member.log_var).unsqueeze(-2)
        return torch.cat([scaled, scaled @ member.loadings], -1)

    def colour(self, member: LowRankColumns, whitened: Tensor, /) -> Tensor:
        """See ``ColumnPrior``."""
        own, factors = whitened.split([member.log_var.shape[-1], member.loadings.shape[-1]], -1)
        common = (member.loadings @ factors.unsqueeze(-1)).squeeze(-1)
        return torch.exp(0.5 * member.log_var) * (own + common)

    def from_moments(self, mean: Tensor, covariance: Tensor, /, *, like: LowRankColumns) -> None:
        """Returns None: the factors of a covariance are found by iteration; see ``ColumnPrior``."""
        del mean, covariance, like

    def parameter_groups(self, member: LowRankColumns, /) -> tuple[list[Tensor], list[Tensor]]:
        """Returns the means, and what makes the covariance."""
        return [member.mean], [member.log_var, member.loadings]
