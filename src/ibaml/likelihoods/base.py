"""What every likelihood and every prediction is."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from ibaml.metrics import Estimate
from ibaml.optional import require
from ibaml.types import Params, Tensor

Array: TypeAlias = npt.NDArray[Any]

TargetKind: TypeAlias = Literal["classes", "real", "counts"]
"""What data a likelihood takes as targets: labels, which are numbered; real numbers, which are scaled to mean zero and
variance one; or counts, which are left as they are."""


class Prediction(Protocol):
    """What is predicted at some inputs, with its uncertainty split into what more data could and could not remove.

    Values are tensors, or numpy arrays with ``as_numpy``, in the terms of the data once ``in_terms_of`` has named them.
    """

    @property
    def total_uncertainty(self) -> Any:
        """Entropy in nats for classes, variance in the target's unit squared for numbers."""
        ...

    @property
    def aleatoric(self) -> Any:
        """The part of ``total_uncertainty`` that more data would not remove."""
        ...

    @property
    def epistemic(self) -> Any:
        """The part of ``total_uncertainty`` that more data would remove."""
        ...

    def samples(self) -> Any:
        """Returns the prediction under each weight sample, leading axis ``num_samples``; noise is not added."""
        ...

    def nll(self, targets: Any) -> Any:
        """Returns ``-log p(target)`` per example in nats."""
        ...

    def log_prob(self, targets: Any) -> Any:
        """Returns ``log p(target)`` per example in nats, ``-nll``."""
        ...

    def tempered(self, temperature: float) -> "Prediction":
        """Returns the prediction made less sure (above 1) or surer (below 1) by one positive number."""
        ...

    def rescaled(self, mean: Tensor, scale: Tensor) -> "Prediction":
        """Returns the prediction of ``scale * target + mean``, in float64."""
        ...

    def to(self, device: torch.device) -> "Prediction":
        """Returns the prediction with its tensors on a device."""
        ...

    def in_terms_of(self, *, labels: Array | None, is_vector: bool, as_numpy: bool) -> "Prediction":
        """Returns the prediction in the terms of the data.

        Args:
            labels: Label of each class; None: their indices. Not used for numbers.
            is_vector: Whether targets have no axis of their own. Not used for classes.
            as_numpy: Whether values are numpy arrays.
        """
        ...

    def scores(self, targets: Tensor) -> dict[str, Tensor]:
        """Returns the scores of one task by name, float64 scalars on the CPU; of a prediction in tensors.

        Args:
            targets: Class indices ``[num_examples]``, or numbers ``[num_examples, num_targets]``.
        """
        ...

    def tensors(self) -> dict[str, Tensor]:
        """Returns what describes the prediction in short, float64 tensors on the CPU by name, for storage."""
        ...

    def columns(self, *, level: float, names: Sequence[str]) -> dict[str, list[Any]]:
        """Returns the columns of a table of answers, one row per example.

        Args:
            level: Probability of the intervals of numbers.
            names: Names of the targets, used where there are several.
        """
        ...

    def to_frame(self, *, level: float = 0.9, names: Sequence[str] | None = None, index: Any = None) -> Any:
        """Returns ``columns`` as a pandas DataFrame.

        Args:
            level: As there.
            names: As there. None: 0, 1, ...
            index: Labels of its rows, such as ``asked.index``. None: 0, 1, ...

        Raises:
            ImportError: If pandas is not installed.
        """
        ...


class Likelihood(Protocol):
    """``p(y | f)`` for network outputs ``f``: a frozen dataclass with its settings.

    Attributes:
        name: Name for reports.
        target_kind: What data are taken as targets.
        step_score_name: Name of ``step_score``.
    """

    name: ClassVar[str]
    target_kind: ClassVar[TargetKind]
    step_score_name: ClassVar[str]

    def num_outputs(self, num_targets: int) -> int:
        """Returns how many outputs a network needs for so many classes or targets of an example."""
        ...

    def with_outputs(self, num_outputs: int) -> "Likelihood":
        """Returns the likelihood for a network of so many outputs.

        Raises:
            ValueError: If they cannot be shared out among targets.
        """
        ...

    def suited_to(self, targets: Tensor) -> "Likelihood":
        """Returns the likelihood with parameters that start well for such targets, for default networks.

        Args:
            targets: Some encoded targets of training: class indices, or ``[num_examples, num_targets]``.
        """
        ...

    def initial_parameters(self) -> Params:
        """Returns the likelihood's own meta-parameters, possibly none."""
        ...

    def nll(self, outputs: Tensor, targets: Tensor, parameters: Params) -> Tensor:
        """Returns ``-log p(target | output)`` in nats per example, shape ``[..., num_examples]``."""
        ...

    def predict(self, outputs: Tensor, parameters: Params, *, output_variance: Tensor | None = None) -> Prediction:
        """Turns the outputs of several weight samples into a prediction.

        Args:
            outputs: Network outputs, ``[num_samples, num_examples, num_outputs]``.
            parameters: Holds the likelihood's own.
            output_variance: Variance of the outputs beyond what the samples show, of the same shape, from a posterior
                whose outputs are known in closed form. None: there is none.

        Raises:
            ValueError: If a variance is given that the likelihood cannot take in.
        """
        ...

    def check_targets(self, argument: str, targets: Tensor, num_outputs: int) -> None:
        """Refuses targets that the likelihood cannot score, with a ValueError that names ``argument``."""
        ...

    def step_score(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Returns one score of a query set, for display at every training step; works under ``torch.func.vmap``."""
        ...

    def pooled_scores(self, predictions: Sequence[Prediction], targets: Sequence[Tensor]) -> Mapping[str, Estimate]:
        """Returns scores that only all tasks together have, by name; none for most likelihoods."""
        ...


def wide(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Returns tensors in float32 or wider: half precision loses the tails and overflows in squares."""
    return tuple(tensor.to(torch.promote_types(tensor.dtype, torch.float32)) for tensor in tensors)


def shown(value: Tensor, *, as_numpy: bool) -> Any:
    """Returns a tensor, or the numpy array with its values."""
    return np.asarray(value.cpu().numpy()) if as_numpy else value


def as_frame(columns: Mapping[str, Sequence[Any]], index: Any) -> Any:
    """Returns columns as a pandas DataFrame.

    Raises:
        ImportError: If pandas is not installed.
    """
    return require("pandas", "pandas", "tables").DataFrame(dict(columns), index=index)


def shown_range(values: Tensor) -> str:
    """Returns the least and the largest of some values in three digits, for messages."""
    low, high = (f"{float(end):.3g}" for end in values.double().aminmax())
    return low if low == high else f"{low} to {high}"


def check_numbers(argument: str, targets: Tensor, num_targets: int) -> None:
    """Refuses targets that are not finite numbers of shape ``[..., num_examples, num_targets]``.

    Raises:
        ValueError: Naming the argument, what came and what was expected.
    """
    if targets.ndim < 2 or targets.shape[-1] != num_targets:
        raise ValueError(
            f"{argument} has shape {tuple(targets.shape)}, but expected [..., num_examples, {num_targets}], one column "
            "for each target that the network predicts."
        )
    if not bool(torch.isfinite(targets).all()):
        raise ValueError(f"{argument} has NaN or infinite values: drop or impute those examples.")


def require_same_shape(location: Tensor, targets: Tensor) -> None:
    """Refuses targets whose shape is not that of the predicted numbers, which would be broadcast.

    Raises:
        ValueError: With both shapes.
    """
    if location.shape != targets.shape:
        raise ValueError(
            f"targets have shape {tuple(targets.shape)}, but the network predicts {tuple(location.shape)}: "
            "expected the same, one column per target (for a single one, y.unsqueeze(-1))."
        )
