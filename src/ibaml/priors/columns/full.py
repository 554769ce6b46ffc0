"""Weights with any covariance, for few features: correlated intercepts and slopes."""

import dataclasses
from typing import ClassVar, NamedTuple

import torch

from ibaml.priors.columns.base import ColumnSettings
from ibaml.priors.full import require_few_weights, unit_triangular
from ibaml.types import Tensor


class FullColumns(NamedTuple):
    """Weights with covariance ``C C^T``: ``C = diag(exp(log_scale)) L``, where ``L`` is unit lower triangular.

    Attributes:
        mean: Mean of each weight, ``[num_priors, num_inputs]``; no columns (``[0, num_inputs]``) for zero.
        log_scale: Natural logarithm of the diagonal of ``C``, ``[num_priors, num_inputs]``.
        lower: What ``L`` has below its diagonal, row after row, ``[num_priors, num_inputs (num_inputs - 1) / 2]``.
    """

    mean: Tensor
    log_scale: Tensor
    lower: Tensor

    def factor(self) -> Tensor:
        """Returns ``C``, ``[num_priors, num_inputs, num_inputs]``."""
        return torch.exp(self.log_scale).unsqueeze(-1) * unit_triangular(self.lower, self.log_scale.shape[-1])


@dataclasses.dataclass(frozen=True, kw_only=True)
class FullColumnPrior(ColumnSettings):
    """Weights with a full covariance, in the coordinates of ``FullPrior``; all covariances start at zero.

    Attributes are those of ``ColumnSettings``. The constant is the last weight, so that a covariance of slopes and
    intercept is learned as what the slopes say of the intercept.
    """

    is_diagonal: ClassVar[bool] = False

    def init(self, num_inputs: int, num_columns: int, /, *, like: Tensor) -> FullColumns:
        """See ``ColumnPrior``.

        Raises:
            ValueError: If there are too many weights for a covariance matrix.
        """
        require_few_weights(num_inputs, "use DiagonalColumnPrior or LowRankColumnPrior")
        log_scale = 0.5 * self.initial_log_var(num_inputs, num_columns, like=like)
        lower = log_scale.new_zeros(len(log_scale), num_inputs * (num_inputs - 1) // 2)
        return FullColumns(self.initial_mean(num_inputs, num_columns, like=like), log_scale, lower)

    def mean(self, member: FullColumns, /) -> Tensor:
        """See ``ColumnPrior``."""
        return member.mean if self.learn_mean else torch.zeros_like(member.log_scale)

    def whiten(self, member: FullColumns, features: Tensor, /) -> Tensor:
        """See ``ColumnPrior``."""
        return features @ member.factor()

    def colour(self, member: FullColumns, whitened: Tensor, /) -> Tensor:
        """See ``ColumnPrior``."""
        return (member.factor() @ whitened.unsqueeze(-1)).squeeze(-1)

    def from_moments(self, mean: Tensor, covariance: Tensor, /, *, like: FullColumns) -> FullColumns:
        """Returns the Gaussian of these moments; see ``ColumnPrior``."""
        factor = torch.linalg.cholesky(covariance)
        scale = torch.diagonal(factor, dim1=-2, dim2=-1)
        rows, columns = torch.tril_indices(*factor.shape[-2:], offset=-1)
        return FullColumns(
            self.as_learned(mean, like=like.mean),
            torch.log(scale).to(like.log_scale.dtype),
            (factor / scale.unsqueeze(-1))[:, rows, columns].to(like.lower.dtype),
        )

    def parameter_groups(self, member: FullColumns, /) -> tuple[list[Tensor], list[Tensor]]:
        """Returns the means, and what makes the covariance."""
        return [member.mean], [member.log_scale, member.lower]
