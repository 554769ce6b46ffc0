"""Real targets with outliers: noise with the heavy tails of Student's t distribution."""

import dataclasses
import math
from typing import ClassVar, NamedTuple

import torch

from ibaml.likelihoods.base import require_same_shape, wide
from ibaml.likelihoods.mixture import MixturePrediction, NumberLikelihood
from ibaml.types import Params, Tensor

_SUITED_SCALE = 0.3


class StudentTComponents(NamedTuple):
    """Student t distributions ``location + scale T``, ``T`` with ``degrees`` of freedom.

    Attributes:
        location: Means, ``[num_samples, num_examples, num_targets]``.
        scale: Scale of the noise, in a shape that ``location`` expands.
        degrees: Degrees of freedom, above 2, likewise.
    """

    location: Tensor
    scale: Tensor
    degrees: Tensor

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
        """Zero: the locations are known."""
        return torch.zeros_like(self.scale)

    def log_prob(self, targets: Tensor) -> Tensor:
        """Returns the log density of each."""
        return -_nll(targets, self.location, self.scale.log(), self.degrees)

    def cdf(self, values: Tensor) -> Tensor:
        """Returns the distribution function of each in float64."""
        # torch has no distribution function of it. Here, so that importing the library does not import scipy.
        from scipy.special import stdtr

        standard = (values.double() - self.location.double()) / self.scale.double()
        degrees = self.degrees.double().expand_as(standard)
        found = stdtr(degrees.cpu().numpy(), standard.cpu().numpy())
        return torch.from_numpy(found).to(self.location.device)

    def tempered(self, temperature: float) -> "StudentTComponents":
        """Returns distributions with all scales, of noise and of means, times a factor."""
        centre = self.location.mean(0)
        return StudentTComponents(
            centre + temperature * (self.location - centre), temperature * self.scale, self.degrees
        )

    def rescaled(self, mean: Tensor, scale: Tensor) -> "StudentTComponents":
        """Returns the distributions of ``scale * target + mean``, in float64."""
        return StudentTComponents(
            self.location.double() * scale + mean, self.scale.double() * scale, self.degrees.double()
        )

    def to(self, device: torch.device) -> "StudentTComponents":
        """Returns the distributions on a device."""
        return StudentTComponents(*(value.to(device) for value in self))


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

    def predict(
        self, outputs: Tensor, parameters: Params, *, output_variance: Tensor | None = None
    ) -> MixturePrediction:
        """Returns a mixture of t distributions from means of shape ``[num_samples, num_examples, num_targets]``.

        Raises:
            ValueError: If a variance is given: a sum of a Gaussian and a t distribution has no closed form.
        """
        if output_variance is not None:
            raise ValueError("output_variance: the student_t likelihood takes samples of outputs, not their variance.")
        scale = torch.exp(parameters[self.scale_name])
        return MixturePrediction(StudentTComponents(outputs, scale, self._degrees(parameters)))

    def _degrees(self, parameters: Params) -> Tensor:
        return 2 + torch.exp(parameters[self.degrees_name])


def _nll(targets: Tensor, location: Tensor, log_scale: Tensor, degrees: Tensor) -> Tensor:
    squared = ((targets - location) * torch.exp(-log_scale)) ** 2
    normalisation = torch.lgamma(degrees / 2) - torch.lgamma((degrees + 1) / 2) + 0.5 * torch.log(degrees * math.pi)
    return normalisation + log_scale + (degrees + 1) / 2 * torch.log1p(squared / degrees)
