"""Predictions of numbers: a mixture over weight samples of one distribution per sample, example and target."""

import abc
import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Protocol

import numpy as np
import torch

from ibaml import metrics
from ibaml.likelihoods.base import Array, Prediction, TargetKind, as_frame, check_numbers, shown, shown_range
from ibaml.metrics import Estimate
from ibaml.types import Params, Tensor

# Each halves the bracket; a double has 53 digits, and the bracket of an extreme quantile is wide.
_NUM_BISECTIONS = 80


class Components(Protocol):
    """The distributions of a mixture, a NamedTuple of tensors ``[num_samples, num_examples, num_targets]``."""

    @property
    def is_discrete(self) -> bool:
        """Whether the targets are whole numbers."""
        ...

    @property
    def mean(self) -> Tensor:
        """Mean of each."""
        ...

    @property
    def aleatoric(self) -> Tensor:
        """Variance of the noise of each, in a shape that ``mean`` expands."""
        ...

    @property
    def epistemic(self) -> Tensor:
        """Variance of the mean that each has by itself, beside that between samples."""
        ...

    def log_prob(self, targets: Tensor) -> Tensor:
        """Returns the log density, or probability, of each at targets ``[num_examples, num_targets]``."""
        ...

    def cdf(self, values: Tensor) -> Tensor:
        """Returns the probability of a value at most ``values`` of each, float64."""
        ...

    def tempered(self, temperature: float) -> "Components":
        """Returns distributions that together are less sure (above 1) or surer by one number."""
        ...

    def rescaled(self, mean: Tensor, scale: Tensor) -> "Components":
        """Returns the distributions of ``scale * target + mean``, in float64."""
        ...

    def to(self, device: torch.device) -> "Components":
        """Returns the distributions with their tensors on a device."""
        ...


@dataclasses.dataclass(frozen=True, eq=False)
class MixturePrediction:
    """Predictive distribution of numbers: a mixture with one component, of the same weight, per weight sample.

    Values have the shape ``[num_examples, num_targets]``, or ``[num_examples]`` with ``is_vector``.

    Attributes:
        components: The distributions that are mixed.
        is_vector: Whether there is one target per example, without an axis of its own.
        as_numpy: Whether values are numpy arrays.
        draw: Draws means of whole functions where the components come from a posterior in closed form. None: the
            components are those of weight samples.
        joint: Covariance between the targets at all examples, ``[num_targets, num_examples, num_examples]``, if it was
            asked for.
        row_index: Labels of the rows of the table that was asked of, for ``to_frame``; None: 0, 1, ...
    """

    components: Components
    is_vector: bool = False
    as_numpy: bool = False
    draw: Callable[[], Tensor] | None = None
    joint: Tensor | None = None
    row_index: Any = None

    def __repr__(self) -> str:
        """Shows how many rows there are, where the means lie, and how wide the 90% intervals are."""
        num_rows = self._mean.shape[0]
        if not num_rows:
            return "MixturePrediction(0 rows)"
        low, high = dataclasses.replace(self, is_vector=False, as_numpy=False).interval(0.9)
        widths = shown_range(high - low)
        return f"MixturePrediction({num_rows} rows: mean {shown_range(self._mean)}; 90% intervals {widths} wide)"

    @property
    def mean(self) -> Any:
        """Predictive mean."""
        return self._shown(self._mean)

    @property
    def standard_deviation(self) -> Any:
        """Square root of the predictive variance."""
        return self._shown(self._variance.sqrt())

    @property
    def total_uncertainty(self) -> Any:
        """Predictive variance, aleatoric plus epistemic, target's unit squared."""
        return self._shown(self._variance)

    @property
    def aleatoric(self) -> Any:
        """Variance of the noise, target's unit squared: what more data would not remove."""
        return self._shown(self._aleatoric)

    @property
    def epistemic(self) -> Any:
        """Variance of the mean under the posterior, target's unit squared: what more data would remove."""
        return self._shown(self._epistemic)

    @property
    def covariance(self) -> Any:
        """Covariance between the targets of rows, noise on its diagonal, target's unit squared.

        ``[num_examples, num_examples]`` with ``is_vector``, else such a matrix for each target; these are independent.

        Raises:
            ValueError: If it was not asked for.
        """
        if self.joint is None:
            raise ValueError("covariance between rows was not asked for: get it by posterior.predict(x, joint=True).")
        return shown(self.joint[0] if self.is_vector else self.joint, as_numpy=self.as_numpy)

    def samples(self) -> Any:
        """Returns the means under each weight sample, with a leading axis ``num_samples``; noise is not added.

        Of a posterior in closed form they are drawn at each call, those of one sample together.

        Raises:
            ValueError: If the posterior is in closed form and not at hand, as in an evaluation.
        """
        if self.draw is not None:
            return self._shown(self.draw())
        if bool((self.components.epistemic > 0).any()):
            raise ValueError(
                "this prediction holds the moments of its posterior and no samples: get it from posterior.predict, "
                "with the posterior from learner.adapt."
            )
        return self._shown(self.components.mean)

    def nll(self, targets: Any) -> Any:
        """Returns ``-log p(target)`` of the mixture per example, ``[num_examples]``, in nats.

        The density is joint over the targets of an example, which are independent given the weights only. Targets that
        are NaN were not measured, and are left out; without any the result is NaN.

        Args:
            targets: One value for each prediction, in the shape of ``mean``.

        Raises:
            ValueError: If the shape is another.
        """
        values = self._values(targets)
        is_missing = values.isnan()
        each = self.components.log_prob(values.masked_fill(is_missing, 0))
        joint = each.masked_fill(is_missing, 0).sum(-1)
        nll = math.log(joint.shape[0]) - torch.logsumexp(joint, dim=0)
        return shown(nll.masked_fill(is_missing.all(-1), math.nan), as_numpy=self.as_numpy)

    def log_prob(self, targets: Any) -> Any:
        """Returns ``log p(target)`` per example in nats; arguments and errors as of ``nll``."""
        return -self.nll(targets)

    def cdf(self, targets: Any) -> Any:
        """Returns the predictive probability of a value at most ``targets``, for each target by itself, in float64.

        Args:
            targets: One value for each prediction, in the shape of ``mean``.

        Raises:
            ValueError: If the shape is another.

        Examples:
            >>> from ibaml.likelihoods import GaussianComponents
            >>> prediction = MixturePrediction(GaussianComponents(torch.zeros(1, 1, 1), torch.ones(1)))
            >>> round(float(prediction.cdf(torch.tensor([[1.96]]))), 3)
            0.975
        """
        return self._shown(self._cdf(self._values(targets)))

    def quantile(self, probability: float) -> Any:
        """Returns a quantile of the mixture for each target: the smallest value whose ``cdf`` reaches a probability.

        It is found by bisection, to the last digits of float64, or exactly for counts. By Cantelli's inequality the
        quantile at ``p`` lies between ``mean - sqrt(variance (1 - p) / p)`` and ``mean + sqrt(variance p / (1 - p))``.

        Args:
            probability: Strictly between 0 and 1.

        Raises:
            ValueError: If the probability is not.

        Examples:
            >>> from ibaml.likelihoods import GaussianComponents
            >>> prediction = MixturePrediction(GaussianComponents(torch.zeros(1, 1, 1), torch.ones(1)))
            >>> round(float(prediction.quantile(0.975)), 3)
            1.96
        """
        if not 0 < probability < 1:
            raise ValueError(f"probability is {probability}; expected a number strictly between 0 and 1, such as 0.95.")
        odds = probability / (1 - probability)
        # A hundredth wider, for the rounding of moments in float32.
        mean, deviation = self._mean.double(), 1.01 * self._variance.double().sqrt()
        slack = 1e-6 * (mean.abs() + deviation)
        low, high = mean - deviation / math.sqrt(odds) - slack, mean + deviation * math.sqrt(odds) + slack
        if self.components.is_discrete:
            low, high = (low.floor() - 1).clamp_min(-1), high.ceil()
        for _ in range(_NUM_BISECTIONS):
            middle = (low + high) / 2
            if self.components.is_discrete:
                middle = middle.floor()
                if bool((high - low <= 1).all()):
                    break
            below = self._cdf(middle) < probability
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        found = high if self.components.is_discrete else (low + high) / 2
        return self._shown(found.to(self._mean.dtype))

    def interval(self, level: float = 0.9) -> tuple[Any, Any]:
        """Returns the ends of the central interval that holds a target with probability ``level`` (counts: at least).

        Args:
            level: Strictly between 0 and 1.

        Returns:
            The quantiles at ``(1 - level) / 2`` and ``(1 + level) / 2``.

        Raises:
            ValueError: If the level is out of range.
        """
        if not 0 < level < 1:
            raise ValueError(f"level is {level}; expected a probability strictly between 0 and 1, such as 0.9.")
        return self.quantile((1 - level) / 2), self.quantile((1 + level) / 2)

    def tempered(self, temperature: float) -> "MixturePrediction":
        """Returns the prediction made less sure (above 1) or surer by one positive number; see the likelihood."""
        return dataclasses.replace(self, components=self.components.tempered(temperature), draw=None)

    def rescaled(self, mean: Tensor, scale: Tensor) -> "MixturePrediction":
        """Returns the prediction of ``scale * target + mean``, in float64.

        Args:
            mean: Offset per target.
            scale: Positive factor per target.
        """
        return dataclasses.replace(self, components=self.components.rescaled(mean, scale), draw=None)

    def to(self, device: torch.device) -> "MixturePrediction":
        """Returns the prediction with its tensors on a device."""
        return dataclasses.replace(self, components=self.components.to(device))

    def in_terms_of(self, *, labels: Array | None, is_vector: bool, as_numpy: bool) -> "MixturePrediction":
        """Returns the prediction in the shape of the data's targets, as tensors or numpy arrays."""
        del labels
        return dataclasses.replace(self, is_vector=is_vector, as_numpy=as_numpy)

    def scores(self, targets: Tensor) -> dict[str, Tensor]:
        """Returns the scores of one task by name; ``ibaml.metrics`` defines them.

        Targets that are NaN were not measured. ``nll`` is the mean over examples, of each with its measured targets;
        all others are of the measured targets of all examples.

        Counts have no ``quantile_calibration_error``, and their ``coverage_90`` is 0.9 or more when all is well: the
        distribution function of a whole number jumps.
        """
        is_measured = ~targets.isnan()

        def measured(values: Tensor) -> Tensor:
            return values[is_measured].unsqueeze(0)

        y = measured(targets.double())
        found = {
            "mse": metrics.mse(measured(self._mean.double()), y)[0],
            "nll": self.nll(targets).double().mean().cpu(),
        }
        if self.components.is_discrete:
            low, high = (measured(end.double()) for end in self.interval(0.9))
            return found | {"coverage_90": metrics.coverage(low, high, y)[0]}
        cdf = measured(self._cdf(targets))
        return found | {
            "coverage_90": metrics.central_coverage(cdf, level=0.9)[0],
            "quantile_calibration_error": metrics.quantile_calibration_error(cdf)[0],
        }

    def tensors(self) -> dict[str, Tensor]:
        """Returns ``mean`` and ``variance`` in float64."""
        return {"mean": self._mean.double().cpu(), "variance": self._variance.double().cpu()}

    def columns(self, *, level: float, names: Sequence[str]) -> dict[str, list[Any]]:
        """Returns mean, interval and the standard deviations of noise and mean; for each target, if there are several.

        Raises:
            ValueError: If the level is out of range.
        """
        low, high = self.interval(level)
        columns = {
            "predicted": self.mean,
            f"lower_{100 * level:g}": low,
            f"upper_{100 * level:g}": high,
            "noise_std": self.aleatoric**0.5,
            "epistemic_std": self.epistemic**0.5,
        }
        if self.is_vector:
            return {name: values.tolist() for name, values in columns.items()}
        return {
            f"{name}_{target}": values[:, index].tolist()
            for index, target in enumerate(names)
            for name, values in columns.items()
        }

    def to_frame(self, *, level: float = 0.9, names: Sequence[str] | None = None, index: Any = None) -> Any:
        """Returns ``columns`` as a pandas DataFrame; see ``Prediction``."""
        names = [str(number) for number in range(self._mean.shape[-1])] if names is None else names
        return as_frame(self.columns(level=level, names=names), self.row_index if index is None else index)

    @property
    def _mean(self) -> Tensor:
        return self.components.mean.mean(0)

    @property
    def _aleatoric(self) -> Tensor:
        return self.components.aleatoric.expand_as(self.components.mean).mean(0)

    @property
    def _epistemic(self) -> Tensor:
        # Law of total variance: that between the samples and what each has by itself.
        between = self.components.mean.var(0, correction=0)
        return between + self.components.epistemic.expand_as(self.components.mean).mean(0)

    @property
    def _variance(self) -> Tensor:
        return self._aleatoric + self._epistemic

    def _cdf(self, values: Tensor) -> Tensor:
        return self.components.cdf(values).mean(0)

    def _values(self, targets: Any) -> Tensor:
        # A copy: a column of a DataFrame is read-only, which torch warns of.
        values = targets if isinstance(targets, torch.Tensor) else torch.from_numpy(np.array(targets))
        expected = self._mean.shape[:-1] if self.is_vector else self._mean.shape
        if values.shape != expected:
            raise ValueError(f"targets has shape {tuple(values.shape)}; expected {tuple(expected)}, as mean has.")
        values = values.to(self._mean.device)
        return values.unsqueeze(-1) if self.is_vector else values

    def _shown(self, value: Tensor) -> Any:
        return shown(value.squeeze(-1) if self.is_vector else value, as_numpy=self.as_numpy)


@dataclasses.dataclass(frozen=True, kw_only=True)
class NumberLikelihood(abc.ABC):
    """What all likelihoods of numbers share.

    Attributes:
        num_targets: Numbers to predict for each example.
    """

    num_targets: int = 1

    target_kind: ClassVar[TargetKind] = "real"
    step_score_name: ClassVar[str] = "mse"

    def __post_init__(self) -> None:
        """Refuses settings out of range."""
        if self.num_targets < 1:
            raise ValueError(f"num_targets must be at least 1, but is {self.num_targets}.")

    def num_outputs(self, num_targets: int) -> int:
        """Returns how many outputs a network needs for so many targets."""
        return num_targets * self._outputs_per_target

    def with_outputs(self, num_outputs: int) -> Any:
        """Returns the likelihood for a network of so many outputs.

        Raises:
            ValueError: If they cannot be shared out among targets.
        """
        if num_outputs % self._outputs_per_target:
            raise ValueError(
                f"the network has {num_outputs} outputs, but {self} needs {self._outputs_per_target} for each target."
            )
        return dataclasses.replace(self, num_targets=num_outputs // self._outputs_per_target)

    def step_score(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Returns the mean squared error of the predicted means, over targets that were measured."""
        return ((self.mean(outputs) - targets) ** 2).nanmean()

    def mean(self, outputs: Tensor) -> Tensor:
        """Returns the mean that network outputs stand for, ``[..., num_examples, num_targets]``."""
        return outputs

    def derivatives(self, outputs: Tensor, targets: Tensor, parameters: Params) -> tuple[Tensor, Tensor]:
        """Returns first and second derivative of the nll in the first output of each target, shaped as the targets.

        Args:
            outputs: ``[..., num_examples, num_outputs]``.
            targets: ``[..., num_examples, num_targets]``.
            parameters: Holds the likelihood's own.
        """

        def slope(at: Tensor) -> Tensor:
            found = torch.func.grad(lambda each: self.nll(each, targets, parameters).sum())(at)
            return found[..., : targets.shape[-1]]

        # Each of these outputs is in one term of the sum: their Hessian is diagonal.
        curvature = torch.func.grad(lambda at: slope(at).sum())(outputs)
        return slope(outputs), curvature[..., : targets.shape[-1]]

    def likeliest(self, targets: Tensor) -> Tensor:
        """Returns values of the first outputs near those at which targets are likeliest, of the same shape."""
        return targets

    @abc.abstractmethod
    def initial_parameters(self) -> Params:
        """See ``Likelihood``."""

    @abc.abstractmethod
    def nll(self, outputs: Tensor, targets: Tensor, parameters: Params) -> Tensor:
        """See ``Likelihood``."""

    @abc.abstractmethod
    def predict(self, outputs: Tensor, parameters: Params, *, output_variance: Tensor | None = None) -> Any:
        """See ``Likelihood``."""

    def check_targets(self, argument: str, targets: Tensor, num_outputs: int) -> None:
        """Refuses targets that are not finite real numbers of shape ``[..., num_examples, num_targets]``.

        Raises:
            ValueError: Naming the argument, what came and what was expected.
        """
        if not targets.is_floating_point():
            raise ValueError(
                f"{argument} has dtype {targets.dtype}, but expected real targets; "
                "convert them with .float(), or use likelihood='categorical' for class indices."
            )
        check_numbers(argument, targets, num_outputs // self._outputs_per_target)

    def pooled_scores(self, predictions: Sequence[Prediction], targets: Sequence[Tensor]) -> Mapping[str, Estimate]:
        """Returns nothing: all scores are means over tasks."""
        del predictions, targets
        return {}

    @property
    def _outputs_per_target(self) -> int:
        return 1

    def _require_positive(self, *names: str) -> None:
        for name in names:
            value = getattr(self, name)
            if not 0 < value < math.inf:
                raise ValueError(f"{name} must be positive and finite, but is {value}.")
