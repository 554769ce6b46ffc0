"""Independent weights, each with a variance of its own."""

import dataclasses
from typing import ClassVar, NamedTuple

import torch

from ibaml.priors.columns.base import ColumnSettings
from ibaml.types import Tensor


class DiagonalColumns(NamedTuple):
    """Independent weights.

    Attributes:
        mean: Mean of each weight, ``[num_priors, num_inputs]``; no columns (``[0, num_inputs]``) for zero.
        log_var: Natural logarithm of the variance of each weight, ``[num_priors, num_inputs]``.
    """

    mean: Tensor
    log_var: Tensor


@dataclasses.dataclass(frozen=True, kw_only=True)
class DiagonalColumnPrior(ColumnSettings):
    """Independent weights, each with a variance of its own: ``C = diag(exp(log_var / 2))``.

    Attributes are those of ``ColumnSettings``.
    """

    is_diagonal: ClassVar[bool] = True

    def init(self, num_inputs: int, num_columns: int, /, *, like: Tensor) -> DiagonalColumns:
        """See ``ColumnPrior``."""
        return DiagonalColumns(
            self.initial_mean(num_inputs, num_columns, like=like),
            self.initial_log_var(num_inputs, num_columns, like=like),
        )

    def mean(self, member: DiagonalColumns, /) -> Tensor:
        """See ``ColumnPrior``."""
        return member.mean if self.learn_mean else torch.zeros_like(member.log_var)

    def whiten(self, member: DiagonalColumns, features: Tensor, /) -> Tensor:
        """See ``ColumnPrior``."""
        return features * torch.exp(0.5 * member.log_var).unsqueeze(-2)

    def colour(self, member: DiagonalColumns, whitened: Tensor, /) -> Tensor:
        """See ``ColumnPrior``."""
        return whitened * torch.exp(0.5 * member.log_var)

    def from_moments(self, mean: Tensor, covariance: Tensor, /, *, like: DiagonalColumns) -> DiagonalColumns:
        """Returns independent weights of the same means and variances; see ``ColumnPrior``."""
        variance = torch.diagonal(covariance, dim1=-2, dim2=-1)
        return DiagonalColumns(self.as_learned(mean, like=like.mean), torch.log(variance).to(like.log_var.dtype))

    def parameter_groups(self, member: DiagonalColumns, /) -> tuple[list[Tensor], list[Tensor]]:
        """Returns the means, and the log-variances."""
        return [member.mean], [member.log_var]
