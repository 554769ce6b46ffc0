"""Predictions in the terms of the data: its class labels, the units of its targets, the kind of its arrays."""

import dataclasses
from typing import Any, Literal, TypeAlias

import numpy as np
import torch

from ibaml.data.tables import Array
from ibaml.prediction import ClassPrediction, RegressionPrediction
from ibaml.types import Tensor

ArrayKind: TypeAlias = Literal["numpy", "torch"]
"""Kind of the arrays that a prediction returns: that of the query inputs (numpy for DataFrames and lists)."""


@dataclasses.dataclass(frozen=True, eq=False)
class LabelledPrediction:
    """Class probabilities at some inputs, with the labels of the data.

    Attributes:
        classes: Label of each column of ``probs``.
        prediction: The same as tensors with class indices.
        kind: Kind of the arrays returned.
    """

    classes: Array
    prediction: ClassPrediction
    kind: ArrayKind

    @property
    def probs(self) -> Any:
        """Probabilities averaged over weight samples, ``[num_examples, num_classes]``."""
        return _convert(self.prediction.probs, self.kind)

    @property
    def log_probs(self) -> Any:
        """Their logarithms."""
        return _convert(self.prediction.log_probs, self.kind)

    @property
    def labels(self) -> Any:
        """Most probable label, ``[num_examples]``; a numpy array where labels are strings."""
        chosen = self.classes[self.prediction.labels.cpu().numpy()]
        return torch.from_numpy(chosen) if self.kind == "torch" and chosen.dtype.kind in "biuf" else chosen

    @property
    def total_uncertainty(self) -> Any:
        """Entropy of the averaged probabilities in nats, ``[num_examples]``."""
        return _convert(self.prediction.total_uncertainty, self.kind)

    @property
    def aleatoric(self) -> Any:
        """The part of the entropy that more data would not remove, ``[num_examples]``."""
        return _convert(self.prediction.aleatoric, self.kind)

    @property
    def epistemic(self) -> Any:
        """The part of the entropy that more data would remove, ``[num_examples]``."""
        return _convert(self.prediction.epistemic, self.kind)

    def samples(self) -> Any:
        """Returns the probabilities under each weight sample, ``[num_samples, num_examples, num_classes]``."""
        return _convert(self.prediction.samples(), self.kind)


@dataclasses.dataclass(frozen=True, eq=False)
class TargetPrediction:
    """Predictive distribution of real targets in their own units.

    Arrays have the shape of the training targets: ``[num_examples]`` or ``[num_examples, num_outputs]``.

    Attributes:
        prediction: The same as tensors of shape ``[num_examples, num_outputs]``.
        is_vector: Whether there is one target per example, without an axis of its own.
        kind: Kind of the arrays returned.
    """

    prediction: RegressionPrediction
    is_vector: bool
    kind: ArrayKind

    @property
    def mean(self) -> Any:
        """Predictive mean."""
        return self._of(self.prediction.mean)

    @property
    def standard_deviation(self) -> Any:
        """Square root of the total predictive variance."""
        return self._of(self.prediction.total_uncertainty.sqrt())

    @property
    def total_uncertainty(self) -> Any:
        """Predictive variance, aleatoric plus epistemic, target's unit squared."""
        return self._of(self.prediction.total_uncertainty)

    @property
    def aleatoric(self) -> Any:
        """Noise variance, target's unit squared: what more data would not remove."""
        return self._of(self.prediction.aleatoric)

    @property
    def epistemic(self) -> Any:
        """Variance of the mean over weight samples, target's unit squared: what more data would remove."""
        return self._of(self.prediction.epistemic)

    def samples(self) -> Any:
        """Returns the means under each weight sample, with a leading axis ``num_samples``; noise is not added."""
        return self._of(self.prediction.samples())

    def cdf(self, targets: Any) -> Any:
        """Returns the predictive probability of a value at most each target, in the shape of the targets.

        Args:
            targets: One value for each prediction, in the shape of ``mean``.

        Raises:
            ValueError: If the shape is another.
        """
        values = torch.as_tensor(np.asarray(targets) if self.kind == "numpy" else targets)
        if values.shape != self.mean.shape:
            raise ValueError(
                f"targets has shape {tuple(values.shape)}; expected {tuple(self.mean.shape)}, as mean has."
            )
        values = values.to(self.prediction.mean.device)
        return self._of(self.prediction.cdf(values.unsqueeze(-1) if self.is_vector else values))

    def quantile(self, probability: float) -> Any:
        """Returns a quantile of the predictive distribution, exact for the mixture over weight samples.

        Raises:
            ValueError: If the probability is not strictly between 0 and 1.
        """
        return self._of(self.prediction.quantile(probability))

    def interval(self, level: float = 0.9) -> tuple[Any, Any]:
        """Returns the ends of the central interval that holds a target with probability ``level``.

        Raises:
            ValueError: If the level is not strictly between 0 and 1.
        """
        low, high = self.prediction.interval(level)
        return self._of(low), self._of(high)

    def _of(self, value: Tensor) -> Any:
        return _convert(value.squeeze(-1) if self.is_vector else value, self.kind)


def array_kind(value: object) -> ArrayKind:
    """Returns the kind of array in which to answer an input."""
    return "torch" if isinstance(value, torch.Tensor) else "numpy"


def _convert(value: Tensor, kind: ArrayKind) -> Any:
    return value if kind == "torch" else np.asarray(value.cpu().numpy())
