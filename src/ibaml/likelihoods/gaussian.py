"""Real targets with Gaussian noise: of one learned variance, of a variance that depends on the input, or of one."""

import dataclasses
import math
from typing import ClassVar, NamedTuple

import torch

from ibaml.likelihoods.base import require_same_shape, wide
from ibaml.likelihoods.mixture import MixturePrediction, NumberLikelihood
from ibaml.types import Params, Tensor

# Beyond a factor of exp(+-10) a variance says nothing that float32 could fit.
_LARGEST_LOG_FACTOR = 10.0
# Of targets with variance one, as scaled ones have.
_SUITED_NOISE_VARIANCE = 0.1


class GaussianComponents(NamedTuple):
    """Gaussians ``N(location, noise_variance + location_variance)``.

    Attributes:
        location: Means, ``[num_samples, num_examples, num_targets]``.
        noise_variance: Variance of the observation noise, in a shape that ``location`` expands.
        location_variance: Variance of the mean itself, where a posterior gives it in closed form; likewise. None: 0.
    """

    location: Tensor
    noise_variance: Tensor
    location_variance: Tensor | None = None

    @property
    def is_discrete(self) -> bool:
        """False."""
        return False

    @property
    def mean(self) -> Tensor:
        """The locations."""
        return self.location

    @property
    def aleatoric(self) -> Tensor:
        """The noise variance."""
        return self.noise_variance

    @property
    def epistemic(self) -> Tensor:
        """The variance of the locations."""
        return torch.zeros_like(self.noise_variance) if self.location_variance is None else self.location_variance

    def log_prob(self, targets: Tensor) -> Tensor:
        """Returns the log density of each."""
        variance = self._variance
        return -0.5 * ((targets - self.location) ** 2 / variance + torch.log(2 * math.pi * variance))

    def cdf(self, values: Tensor) -> Tensor:
        """Returns the distribution function of each in float64."""
        deviation = self._variance.double().sqrt()
        return torch.special.ndtr((values.double() - self.location.double()) / deviation)

    def tempered(self, temperature: float) -> "GaussianComponents":
        """Returns Gaussians with all standard deviations, of noise and of means, times a factor."""
        centre = self.location.mean(0)
        return GaussianComponents(
            centre + temperature * (self.location - centre),
            temperature**2 * self.noise_variance,
            None if self.location_variance is None else temperature**2 * self.location_variance,
        )

    def rescaled(self, mean: Tensor, scale: Tensor) -> "GaussianComponents":
        """Returns the distributions of ``scale * target + mean``, in float64."""
        return GaussianComponents(
            self.location.double() * scale + mean,
            self.noise_variance.double() * scale**2,
            None if self.location_variance is None else self.location_variance.double() * scale**2,
        )

    def to(self, device: torch.device) -> "GaussianComponents":
        """Returns the Gaussians on a device."""
        return GaussianComponents(*(None if value is None else value.to(device) for value in self))  # pyright: ignore[reportArgumentType]

    @property
    def _variance(self) -> Tensor:
        return self.noise_variance if self.location_variance is None else self.noise_variance + self.location_variance


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gaussian(NumberLikelihood):
    """Gaussian noise: ``p(y | f) = N(y; f, noise_variance)``.

    Attributes:
        num_targets: Numbers to predict for each example.
        initial_noise_variance: Where the learned noise variance starts, in the target's unit squared.
        heteroscedastic: Whether the variance depends on the input. The network then has two outputs for each target,
            first those for the means, then as many ``g`` for the variances ``initial_noise_variance exp(g)``, where
            ``g`` is bounded smoothly to ``[-10, 10]``; there is nothing else to learn.

    Examples:
        >>> Gaussian(heteroscedastic=True).num_outputs(3)
        6
    """

    initial_noise_variance: float = 1.0
    heteroscedastic: bool = False

    name: ClassVar[str] = "gaussian"
    parameter_name: ClassVar[str] = "likelihood.log_noise_variance"

    def __post_init__(self) -> None:
        """Refuses settings out of range."""
        super().__post_init__()
        self._require_positive("initial_noise_variance")

    def suited_to(self, targets: Tensor) -> "Gaussian":
        """Returns the likelihood with a noise variance of a tenth: scaled targets have variance one."""
        del targets
        return dataclasses.replace(self, initial_noise_variance=_SUITED_NOISE_VARIANCE)

    def initial_parameters(self) -> Params:
        """Returns the logarithm of the noise variance, ``[num_targets]``; nothing if it depends on the input."""
        if self.heteroscedastic:
            return {}
        return {self.parameter_name: torch.full((self.num_targets,), math.log(self.initial_noise_variance))}

    def nll(self, outputs: Tensor, targets: Tensor, parameters: Params) -> Tensor:
        """Returns ``sum_k ((y - f)^2 / s2 + log s2 + log 2 pi) / 2`` per example.

        Args:
            outputs: Network outputs, ``[..., num_examples, num_outputs]``.
            targets: Targets, ``[..., num_examples, num_targets]``.
            parameters: Holds ``likelihood.log_noise_variance``.

        Raises:
            ValueError: If the targets have another shape than the predicted means.
        """
        require_same_shape(self.mean(outputs), targets)
        outputs, targets = wide(outputs, targets)
        log_variance = self._log_variance(outputs, parameters)
        squared = (targets - self.mean(outputs)) ** 2 * torch.exp(-log_variance)
        return 0.5 * (squared + log_variance + math.log(2 * math.pi)).sum(-1)

    def predict(
        self, outputs: Tensor, parameters: Params, *, output_variance: Tensor | None = None
    ) -> MixturePrediction:
        """Returns a mixture of Gaussians from outputs of shape ``[num_samples, num_examples, num_outputs]``.

        A heteroscedastic likelihood takes the variance of its means in and ignores that of its log-variances.
        """
        location_variance = None if output_variance is None else self.mean(output_variance)
        noise_variance = torch.exp(self._log_variance(outputs, parameters))
        return MixturePrediction(GaussianComponents(self.mean(outputs), noise_variance, location_variance))

    def derivatives(self, outputs: Tensor, targets: Tensor, parameters: Params) -> tuple[Tensor, Tensor]:
        """Returns ``(f - y) / s2`` and ``1 / s2``; see ``NumberLikelihood``."""
        precision = torch.exp(-self._log_variance(outputs, parameters)).expand_as(targets)
        return (self.mean(outputs) - targets) * precision, precision

    def mean(self, outputs: Tensor) -> Tensor:
        """Returns the outputs for the means."""
        return outputs.chunk(2, -1)[0] if self.heteroscedastic else outputs

    @property
    def _outputs_per_target(self) -> int:
        return 2 if self.heteroscedastic else 1

    def _log_variance(self, outputs: Tensor, parameters: Params) -> Tensor:
        if not self.heteroscedastic:
            return parameters[self.parameter_name]
        factor = _LARGEST_LOG_FACTOR * torch.tanh(outputs.chunk(2, -1)[1] / _LARGEST_LOG_FACTOR)
        return factor + math.log(self.initial_noise_variance)


@dataclasses.dataclass(frozen=True, kw_only=True)
class UnitGaussian(NumberLikelihood):
    """Gaussian noise of variance one, not learned: the nll is half the squared error plus a constant.

    For methods whose learning rates are published for the squared error: a learned noise variance rescales the inner
    loss while training goes on.

    Attributes:
        num_targets: Numbers to predict for each example.

    Examples:
        >>> UnitGaussian().nll(torch.tensor([[1.0]]), torch.tensor([[3.0]]), {})
        tensor([2.9189])
    """

    name: ClassVar[str] = "unit_gaussian"

    def suited_to(self, targets: Tensor) -> "UnitGaussian":
        """Returns itself: there is nothing to start."""
        del targets
        return self

    def initial_parameters(self) -> Params:
        """Returns no parameters."""
        return {}

    def nll(self, outputs: Tensor, targets: Tensor, parameters: Params) -> Tensor:
        """Returns ``sum_k ((y - f)^2 + log 2 pi) / 2`` per example; see ``Gaussian.nll``.

        Raises:
            ValueError: If the targets have another shape than the outputs.
        """
        del parameters
        require_same_shape(outputs, targets)
        outputs, targets = wide(outputs, targets)
        return 0.5 * ((targets - outputs) ** 2 + math.log(2 * math.pi)).sum(-1)

    def predict(
        self, outputs: Tensor, parameters: Params, *, output_variance: Tensor | None = None
    ) -> MixturePrediction:
        """Returns a mixture of unit Gaussians from means of shape ``[num_samples, num_examples, num_outputs]``."""
        del parameters
        return MixturePrediction(GaussianComponents(outputs, outputs.new_ones(self.num_targets), output_variance))
