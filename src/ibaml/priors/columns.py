"""Gaussian priors over the columns of a linear head, one column of weights for each output.

A column has one weight for each feature and a last one for the constant. Its prior is ``N(mean, C C^T)``. Heads see it
through features alone: with ``w = mean + C e`` the outputs are ``Z mean + (Z C) e`` with standard normal ``e``, so a
prior is its mean and the product ``Z C``. Columns may share one prior (``tied``), as those of exchangeable classes do.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

import torch

from ibaml.types import Tensor


class ColumnPrior(Protocol):
    """A family of priors over columns: a record of settings, whose members are pytrees of tensors."""

    @property
    def tied(self) -> bool:
        """Whether all columns have one prior: then a head may have any number of them."""
        ...

    def init(self, num_inputs: int, num_columns: int, /, *, like: Tensor) -> Any:
        """Returns the member that training starts from: mean zero, and outputs of the variance that was asked for.

        Args:
            num_inputs: Weights of a column: features, and the constant as the last.
            num_columns: Columns of the head; one prior serves all if ``tied``.
            like: Gives dtype and device.
        """
        ...

    def mean(self, member: Any, /) -> Tensor:
        """Returns the mean of each column, ``[num_priors, num_inputs]``, where ``num_priors`` is 1 if ``tied``."""
        ...

    def whiten(self, member: Any, features: Tensor, /) -> Tensor:
        """Returns ``Z C`` for each column, ``[num_priors, num_examples, rank]``.

        Args:
            member: The prior.
            features: ``Z``, ``[num_examples, num_inputs]``.
        """
        ...

    def colour(self, member: Any, whitened: Tensor, /) -> Tensor:
        """Returns ``C e``, ``[num_columns, num_inputs]``, for ``e`` of shape ``[num_columns, rank]``."""
        ...

    def parameter_groups(self, member: Any, /) -> tuple[list[Tensor], list[Tensor]]:
        """Returns the tensors that say where a member is, and those that say how wide it is, on a log scale."""
        ...


class DiagonalColumns(NamedTuple):
    """Independent weights.

    Attributes:
        mean: Mean of each weight, ``[num_priors, num_inputs]``; no columns (``[0, num_inputs]``) for zero.
        log_var: Natural logarithm of the variance of each weight, ``[num_priors, num_inputs]``.
    """

    mean: Tensor
    log_var: Tensor


@dataclasses.dataclass(frozen=True, kw_only=True)
class DiagonalColumnPrior:
    """Independent weights, each with a variance of its own.

    Attributes:
        tied: Whether all columns have one prior.
        learn_mean: Whether the mean is learned; else it stays zero. A common mean of all classes says nothing.
        initial_variance: Variance of an output at features of unit variance, where training starts: each feature's
            weight has ``initial_variance / num_features``.
        initial_bias_variance: Variance of the constant's weight there.

    Raises:
        ValueError: If a variance is not positive.
    """

    tied: bool = False
    learn_mean: bool = True
    initial_variance: float = 1.0
    initial_bias_variance: float = 1.0

    def __post_init__(self) -> None:
        """Refuses settings out of range."""
        for name in ("initial_variance", "initial_bias_variance"):
            value = getattr(self, name)
            if not 0 < value < math.inf:
                raise ValueError(f"{name} must be positive and finite, but is {value}.")

    def init(self, num_inputs: int, num_columns: int, /, *, like: Tensor) -> DiagonalColumns:
        """See ``ColumnPrior``."""
        num_priors = 1 if self.tied else num_columns
        log_var = like.new_full((num_priors, num_inputs), math.log(self.initial_variance / max(num_inputs - 1, 1)))
        log_var[:, -1] = math.log(self.initial_bias_variance)
        return DiagonalColumns(like.new_zeros(num_priors if self.learn_mean else 0, num_inputs), log_var)

    def mean(self, member: DiagonalColumns, /) -> Tensor:
        """See ``ColumnPrior``."""
        return member.mean if self.learn_mean else torch.zeros_like(member.log_var)

    def whiten(self, member: DiagonalColumns, features: Tensor, /) -> Tensor:
        """See ``ColumnPrior``."""
        return features * torch.exp(0.5 * member.log_var).unsqueeze(-2)

    def colour(self, member: DiagonalColumns, whitened: Tensor, /) -> Tensor:
        """See ``ColumnPrior``."""
        return whitened * torch.exp(0.5 * member.log_var)

    def parameter_groups(self, member: DiagonalColumns, /) -> tuple[list[Tensor], list[Tensor]]:
        """Returns the means, and the log-variances."""
        return [member.mean], [member.log_var]


COLUMN_PRIORS: Mapping[str, type[ColumnPrior]] = {"diagonal": DiagonalColumnPrior}
"""Families by name."""
