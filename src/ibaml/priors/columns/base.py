"""Gaussian priors over the columns of a linear head, one column of weights for each output.

A column has one weight for each feature and a last one for the constant. Its prior is ``N(mean, C C^T)``. Heads see it
through features alone: with ``w = mean + C e`` the outputs are ``Z mean + (Z C) e`` with standard normal ``e``, so a
prior is its mean and the product ``Z C``. Columns may share one prior (``tied``), as those of exchangeable classes do.
"""

import dataclasses
import math
from typing import Any, ClassVar, Protocol

from ibaml.types import Tensor


class ColumnPrior(Protocol):
    """A family of priors over columns: a record of settings, whose members are pytrees of tensors.

    Attributes:
        is_diagonal: Whether the weights of a column are independent: ``C`` is a diagonal matrix.
    """

    is_diagonal: ClassVar[bool]

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

    def from_moments(self, mean: Tensor, covariance: Tensor, /, *, like: Any) -> Any:
        """Returns the member of the greatest likelihood for columns with some moments; None without a closed form.

        Args:
            mean: ``[num_priors, num_inputs]``; zero if the family learns none.
            covariance: ``[num_priors, num_inputs, num_inputs]``, positive definite, float64.
            like: A member, which gives the dtypes.
        """
        ...

    def parameter_groups(self, member: Any, /) -> tuple[list[Tensor], list[Tensor]]:
        """Returns the tensors that say where a member is, and those that say how wide it is, on a log scale."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class ColumnSettings:
    """What the priors of this folder have in common.

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

    def initial_mean(self, num_inputs: int, num_columns: int, *, like: Tensor) -> Tensor:
        """Returns zeros, ``[num_priors, num_inputs]``, or no rows if the mean is not learned."""
        num_priors = 1 if self.tied else num_columns
        return like.new_zeros(num_priors if self.learn_mean else 0, num_inputs)

    def as_learned(self, mean: Tensor, *, like: Tensor) -> Tensor:
        """Returns a mean as members hold it: in the dtype of another, without rows if it is not learned."""
        return mean.to(like.dtype) if self.learn_mean else like.clone()

    def initial_log_var(self, num_inputs: int, num_columns: int, *, like: Tensor) -> Tensor:
        """Returns the natural logarithm of the variance of each weight, ``[num_priors, num_inputs]``."""
        num_priors = 1 if self.tied else num_columns
        log_var = like.new_full((num_priors, num_inputs), math.log(self.initial_variance / max(num_inputs - 1, 1)))
        log_var[:, -1] = math.log(self.initial_bias_variance)
        return log_var
