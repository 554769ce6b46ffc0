"""Scales of features and targets: mean and standard deviation over the rows of training."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from ibaml.types import Tensor

# A standard deviation this far below the mean is rounding, not data.
_ROUNDING = 64 * float(np.finfo(np.float64).eps)


class Standardizer(NamedTuple):
    """An affine map per feature, ``(value - mean) * inverse_scale``, computed in float64.

    Attributes:
        mean: float64, broadcastable to one example.
        inverse_scale: One over the standard deviation, of the same shape; 0 for a feature that is to be ignored.
    """

    mean: Tensor
    inverse_scale: Tensor

    @property
    def scale(self) -> Tensor:
        """Standard deviation, infinite for a feature that is ignored."""
        return 1 / self.inverse_scale

    @property
    def is_identity(self) -> bool:
        """Whether nothing is scaled, as for what is no data of training."""
        return self.mean.numel() == 1 and bool(self.mean == 0) and bool(self.inverse_scale == 1)

    @property
    def is_constant(self) -> bool:
        """Whether every feature is ignored."""
        return not bool((self.inverse_scale != 0).any())

    def transform(self, values: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
        """Scales values, ``[num_examples, *shape]``."""
        with np.errstate(over="ignore"):
            scaled = (values.astype(np.float64) - self.mean.numpy()) * self.inverse_scale.numpy()
        return np.where(self.inverse_scale.numpy() == 0, 0.0, scaled)


IDENTITY = Standardizer(torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64))
"""For data that need no scaling."""


def fit_standardizer(pieces: Sequence[npt.NDArray[Any]], *, keep_constant: bool = False) -> Standardizer:
    """Fits mean and standard deviation over all examples of all pieces together.

    A vector of features gets one scale per feature. Inputs with more axes (images, channel first) get one per entry of
    the first axis. The sums are taken relative to the largest value, so that neither large offsets nor values near the
    limits of float64 spoil them.

    Args:
        pieces: Arrays of shape ``[num_examples, *shape]``, finite.
        keep_constant: What becomes of a constant feature: its scale is 1 (targets, True) or it is ignored (inputs,
            False: a feature without variation in training says nothing about what its variation means).

    Examples:
        >>> fitted = fit_standardizer([np.array([[1e9, 5.0], [1e9 + 2, 5.0]])])
        >>> fitted.transform(np.array([[1e9 + 4, 7.0]]))
        array([[3., 0.]])
    """
    num_axes = pieces[0].ndim
    axes = (0,) if num_axes <= 2 else (0, *range(2, num_axes))

    def reduced(function: Any, values: Any) -> Any:
        return function(values, axis=axes, keepdims=True)[0]

    count = sum(piece.size for piece in pieces) / np.prod(reduced(np.sum, pieces[0][:1]).shape)
    wide = [piece.astype(np.float64) for piece in pieces]
    # A power of two: dividing by it is exact, so that small differences of large values keep their digits.
    peak = np.exp2(np.frexp(np.maximum.reduce([reduced(np.max, np.abs(piece)) for piece in wide]))[1] - 1.0)
    mean = sum(reduced(np.sum, piece / peak) for piece in wide) / count * peak
    spread = _positive(np.maximum.reduce([reduced(np.max, np.abs(piece / peak - mean / peak)) for piece in wide]))
    squares = sum(reduced(np.sum, ((piece / peak - mean / peak) / spread) ** 2) for piece in wide)
    deviation = np.sqrt(squares / count) * spread
    constant = deviation <= _ROUNDING * np.abs(mean / peak)
    with np.errstate(over="ignore", divide="ignore"):
        scale = np.where(constant, 1.0, deviation * peak)
        inverse = 1 / scale
    # A subnormal spread has no finite inverse: nothing that float64 can scale.
    inverse = np.where(np.isfinite(inverse), inverse, 0.0 if not keep_constant else 1.0)
    if not keep_constant:
        inverse = np.where(constant, 0.0, inverse)
    return Standardizer(torch.from_numpy(np.asarray(mean)), torch.from_numpy(np.asarray(inverse)))


def fit_target_standardizer(pieces: Sequence[npt.NDArray[Any]], names: Sequence[str] | None) -> Standardizer:
    """Fits the scale of targets, of each from where it was measured.

    Args:
        pieces: Targets, ``[num_examples, num_targets]``; NaN where one was not measured.
        names: How the targets are called, if they have names.

    Raises:
        ValueError: If one was measured nowhere.
    """
    whole = np.concatenate(pieces)
    measured = ~np.isnan(whole)
    if bool(measured.all()):
        return fit_standardizer(pieces, keep_constant=True)
    for index in np.flatnonzero(~measured.any(0)).tolist():
        name = f"target {index}" if names is None else f"target {names[index]!r}"
        raise ValueError(f"{name} was measured in no row of the training tasks (all are NaN): leave it out.")
    each = [fit_standardizer([whole[rows, index]], keep_constant=True) for index, rows in enumerate(measured.T)]
    return Standardizer(*(torch.stack(part).flatten() for part in zip(*each, strict=True)))


def _positive(values: Any) -> Any:
    return np.where(values > 0, values, 1.0)
