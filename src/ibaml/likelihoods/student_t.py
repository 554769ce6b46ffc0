"""Real targets with outliers: noise with the heavy tails of Student's t distribution."""

import dataclasses
import math
from typing import ClassVar, NamedTuple

import torch

from ibaml.likelihoods.base import require_same_shape, wide
from ibaml.likelihoods.mixture import MixturePrediction, NumberLikelihood
from ibaml.types import Params, Tensor

_SUITED_SCALE = 0.3
_NUM_NODES = 96
_TAIL = 32.0  # Nats that the ends of an integral lie below its peak.


class StudentTComponents(NamedTuple):
    """Student t distributions ``location + scale T``, ``T`` with ``degrees`` of freedom.

    With Gaussian locations they are integrated over exactly, but for one dimension: a t distribution is a Gaussian of
    variance ``scale^2 / g`` with ``g ~ Gamma(degrees / 2, degrees / 2)``, and given ``g`` the variances add.

    Attributes:
        location: Means, ``[num_samples, num_examples, num_targets]``.
        scale: Scale of the noise, in a shape that ``location`` expands.
        degrees: Degrees of freedom, above 2, likewise.
        location_variance: Variance of the mean itself, where a posterior gives it in closed form; likewise. None: 0.
    """

    location: Tensor
    scale: Tensor
    degrees: Tensor
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
        """Variance of the noise, ``scale^2 degrees / (degrees - 2)``."""
        return self.scale**2 * self.degrees / (self.degrees - 2)

    @property
    def epistemic(self) -> Tensor:
        """The variance of the locations."""
        return torch.zeros_like(self.scale) if self.location_variance is None else self.location_variance

    def log_prob(self, targets: Tensor) -> Tensor:
        """Returns the log density of each."""
        if self.location_variance is None:
            return -_nll(targets, self.location, self.scale.log(), self.degrees)
        error2 = (targets.double() - self.location.double()) ** 2
        degrees, scale2 = self.degrees.double(), self.scale.double() ** 2
        # An outlier of r scales says of its g that it is near (degrees + 1) / (degrees + r^2).
        likeliest = torch.log((degrees + 1) / (degrees + (error2 / scale2).detach()))
        log_g, log_weight = self._mixture(likeliest.clamp_max(0), degrees + 1)
        variance = self.location_variance.double() + scale2 * torch.exp(-log_g)
        each = -0.5 * (error2 / variance + torch.log(2 * math.pi * variance))
        return torch.logsumexp(log_weight + each, 0).to(self.location.dtype)

    def cdf(self, values: Tensor) -> Tensor:
        """Returns the distribution function of each in float64."""
        # torch has no distribution function of it. Here, so that importing the library does not import scipy.
        from scipy.special import stdtr

        error = values.double() - self.location.double()
        if self.location_variance is None:
            standard = error / self.scale.double()
            degrees = self.degrees.double().expand_as(standard)
            found = stdtr(degrees.cpu().numpy(), standard.cpu().numpy())
            return torch.from_numpy(found).to(self.location.device)
        log_g, log_weight = self._mixture(torch.zeros_like(error), self.degrees.double())
        variance = self.location_variance.double() + self.scale.double() ** 2 * torch.exp(-log_g)
        return (log_weight.exp() * torch.special.ndtr(error / variance.sqrt())).sum(0)

    def tempered(self, temperature: float) -> "StudentTComponents":
        """Returns distributions with all scales, of noise and of means, times a factor."""
        centre = self.location.mean(0)
        return StudentTComponents(
            centre + temperature * (self.location - centre),
            temperature * self.scale,
            self.degrees,
            None if self.location_variance is None else temperature**2 * self.location_variance,
        )

    def rescaled(self, mean: Tensor, scale: Tensor) -> "StudentTComponents":
        """Returns the distributions of ``scale * target + mean``, in float64."""
        return StudentTComponents(
            self.location.double() * scale + mean,
            self.scale.double() * scale,
            self.degrees.double(),
            None if self.location_variance is None else self.location_variance.double() * scale**2,
        )

    def to(self, device: torch.device) -> "StudentTComponents":
        """Returns the distributions on a device."""
        return StudentTComponents(*(None if value is None else value.to(device) for value in self))  # pyright: ignore[reportArgumentType]

    def _mixture(self, likeliest: Tensor, twice_shape: Tensor) -> tuple[Tensor, Tensor]:
        """Returns logarithms of ``g`` and of their weights, by the trapezoidal rule in ``log g``.

        Args:
            likeliest: The least ``log g`` of which much is wanted, at most 0; no derivative.
            twice_shape: The density of ``log g`` below that is at most ``exp(twice_shape / 2 (u - exp u))``, ``u``
                counted from there.
        """
        degrees = self.degrees.double()
        below, above = (2 * _TAIL / each.detach() for each in (twice_shape, degrees))
        low = likeliest - below - torch.sqrt(2 * below)
        high = torch.log1p(above + torch.sqrt(2 * above))
        step = (high - low) / (_NUM_NODES - 1)
        places = torch.arange(_NUM_NODES, dtype=low.dtype, device=low.device).reshape(-1, *(1 for _ in low.shape))
        log_g, half = low + step * places, 0.5 * degrees
        # Gamma(half, half), and the derivative of g in its logarithm, which is g.
        density = half * torch.log(half) - torch.lgamma(half) + half * (log_g - torch.exp(log_g))
        return log_g, density + torch.log(step)


@dataclasses.dataclass(frozen=True, kw_only=True)
class StudentT(NumberLikelihood):
    """Student t noise of a learned scale and learned degrees of freedom: ``y = f + scale T``.

    An outlier costs the logarithm of its distance, not the square: a few wrong measurements in a support set do not
    drag the prediction with them. With many degrees of freedom it is Gaussian. They are kept above 2, where the
    variance is finite: ``degrees = 2 + exp(parameter)``.

    Attributes:
        num_targets: Numbers to predict for each example.
        initial_scale: Where the scale starts, in the target's unit.
        initial_degrees: Where the degrees of freedom start, above 2.
    """

    initial_scale: float = 1.0
    initial_degrees: float = 5.0

    name: ClassVar[str] = "student_t"
    scale_name: ClassVar[str] = "likelihood.log_scale"
    degrees_name: ClassVar[str] = "likelihood.log_degrees_above_two"

    def __post_init__(self) -> None:
        """Refuses settings out of range."""
        super().__post_init__()
        self._require_positive("initial_scale")
        if not 2 < self.initial_degrees < math.inf:
            raise ValueError(f"initial_degrees must be above 2 and finite, but is {self.initial_degrees}.")

    def suited_to(self, targets: Tensor) -> "StudentT":
        """Returns the likelihood with a scale of 0.3: scaled targets have variance one."""
        del targets
        return dataclasses.replace(self, initial_scale=_SUITED_SCALE)

    def initial_parameters(self) -> Params:
        """Returns the logarithms of the scale and of the degrees of freedom above two, each ``[num_targets]``."""
        return {
            self.scale_name: torch.full((self.num_targets,), math.log(self.initial_scale)),
            self.degrees_name: torch.full((self.num_targets,), math.log(self.initial_degrees - 2)),
        }

    def nll(self, outputs: Tensor, targets: Tensor, parameters: Params) -> Tensor:
        """Returns the negative log density per example, summed over targets.

        With ``v`` degrees of freedom, scale ``s`` and ``r = (y - f) / s``: ``log G(v / 2) - log G((v + 1) / 2) + log s
        + log(v pi) / 2 + (v + 1) / 2 log(1 + r^2 / v)``.

        Args:
            outputs: Predictive means, ``[..., num_examples, num_targets]``.
            targets: Targets of the same shape.
            parameters: Holds the likelihood's own.

        Raises:
            ValueError: If the targets have another shape than the outputs.
        """
        require_same_shape(outputs, targets)
        outputs, targets = wide(outputs, targets)
        return _nll(targets, outputs, parameters[self.scale_name], self._degrees(parameters)).sum(-1)

    def derivatives(self, outputs: Tensor, targets: Tensor, parameters: Params) -> tuple[Tensor, Tensor]:
        """Returns ``(v + 1) e / (v s^2 + e^2)`` with ``e = f - y``, and its derivative; see ``NumberLikelihood``."""
        degrees, error = self._degrees(parameters), outputs - targets
        width = degrees * torch.exp(2 * parameters[self.scale_name])
        weight = (degrees + 1) / (width + error**2)
        return weight * error, weight * (width - error**2) / (width + error**2)

    def predict(
        self, outputs: Tensor, parameters: Params, *, output_variance: Tensor | None = None
    ) -> MixturePrediction:
        """Returns a mixture of t distributions from means of shape ``[num_samples, num_examples, num_targets]``."""
        scale = torch.exp(parameters[self.scale_name])
        return MixturePrediction(StudentTComponents(outputs, scale, self._degrees(parameters), output_variance))

    def _degrees(self, parameters: Params) -> Tensor:
        return 2 + torch.exp(parameters[self.degrees_name])


def _nll(targets: Tensor, location: Tensor, log_scale: Tensor, degrees: Tensor) -> Tensor:
    squared = ((targets - location) * torch.exp(-log_scale)) ** 2
    normalisation = torch.lgamma(degrees / 2) - torch.lgamma((degrees + 1) / 2) + 0.5 * torch.log(degrees * math.pi)
    return normalisation + log_scale + (degrees + 1) / 2 * torch.log1p(squared / degrees)
