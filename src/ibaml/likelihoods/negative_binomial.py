"""Counts that vary more than a Poisson distribution allows, with a logarithmic link."""

import dataclasses
import math
from typing import ClassVar, NamedTuple

import torch

from ibaml.likelihoods.base import TargetKind, require_same_shape, wide
from ibaml.likelihoods.mixture import MixturePrediction
from ibaml.likelihoods.poisson import Poisson
from ibaml.types import Params, Tensor


class NegativeBinomialComponents(NamedTuple):
    """Negative binomial distributions of mean ``m`` and size ``r``, with variance ``m + m^2 / r``.

    Attributes:
        log_mean: Logarithms of the means, ``[num_samples, num_examples, num_targets]``.
        size: Sizes, positive, in a shape that ``log_mean`` expands; large ones make the distribution Poisson's.
    """

    log_mean: Tensor
    size: Tensor

    @property
    def is_discrete(self) -> bool:
        """True."""
        return True

    @property
    def mean(self) -> Tensor:
        """The means."""
        return self.log_mean.exp()

    @property
    def aleatoric(self) -> Tensor:
        """The variances, ``m + m^2 / r``."""
        return self.mean + self.mean**2 / self.size

    @property
    def epistemic(self) -> Tensor:
        """Zero: the means are known."""
        return torch.zeros_like(self.log_mean)

    def log_prob(self, targets: Tensor) -> Tensor:
        """Returns the log probability of each."""
        return -_nll(targets, self.log_mean, self.size.log())

    def cdf(self, values: Tensor) -> Tensor:
        """Returns the distribution function of each in float64, ``I_p(r, floor(v) + 1)``, ``p = r / (r + m)``."""
        # torch has no incomplete beta function. Here, so that importing the library does not import scipy.
        from scipy.special import betainc

        whole = values.double().floor()
        mean, whole = torch.broadcast_tensors(self.mean.double(), whole)
        size = self.size.double().expand_as(mean)
        found = betainc(*(each.cpu().numpy() for each in (size, whole.clamp_min(0) + 1, size / (size + mean))))
        return torch.where(whole < 0, 0.0, torch.from_numpy(found).to(self.log_mean.device))

    def tempered(self, temperature: float) -> "NegativeBinomialComponents":
        """Returns distributions with the spread of the log means over samples times a factor.

        The noise of a count is fixed by its mean and the size.
        """
        centre = self.log_mean.mean(0)
        return self._replace(log_mean=centre + temperature * (self.log_mean - centre))

    def rescaled(self, mean: Tensor, scale: Tensor) -> "NegativeBinomialComponents":
        """Returns the distributions in float64: counts have no unit, so ``mean`` is 0 and ``scale`` 1."""
        del mean, scale
        return NegativeBinomialComponents(self.log_mean.double(), self.size.double())

    def to(self, device: torch.device) -> "NegativeBinomialComponents":
        """Returns the distributions on a device."""
        return NegativeBinomialComponents(self.log_mean.to(device), self.size.to(device))


@dataclasses.dataclass(frozen=True, kw_only=True)
class NegativeBinomial(Poisson):
    """Overdispersed counts: a Poisson distribution whose rate is Gamma distributed around ``initial_rate exp(f)``.

    Its size ``r`` is learned; the variance is ``m + m^2 / r``.

    Attributes:
        num_targets: Counts to predict for each example.
        initial_rate: Mean of a network whose output is 0. An output of 1 multiplies the mean by e.
        initial_size: Where the size starts.
    """

    initial_size: float = 5.0

    name: ClassVar[str] = "negative_binomial"
    target_kind: ClassVar[TargetKind] = "counts"
    size_name: ClassVar[str] = "likelihood.log_size"

    def __post_init__(self) -> None:
        """Refuses settings out of range."""
        super().__post_init__()
        self._require_positive("initial_size")

    def initial_parameters(self) -> Params:
        """Returns the logarithm of the size, ``[num_targets]``."""
        return {self.size_name: torch.full((self.num_targets,), math.log(self.initial_size))}

    def nll(self, outputs: Tensor, targets: Tensor, parameters: Params) -> Tensor:
        """Returns the negative log probability per example, summed over targets.

        With mean ``m`` and size ``r``: ``log G(r) + log y! - log G(y + r) + r log(1 + m / r) + y log(1 + r / m)``.

        Args:
            outputs: Log means over ``initial_rate``, ``[..., num_examples, num_targets]``.
            targets: Counts of the same shape.
            parameters: Holds the likelihood's own.

        Raises:
            ValueError: If the targets have another shape than the outputs.
        """
        require_same_shape(outputs, targets)
        outputs, targets = wide(outputs, targets.to(outputs.dtype))
        return _nll(targets, outputs + math.log(self.initial_rate), parameters[self.size_name]).sum(-1)

    def predict(
        self, outputs: Tensor, parameters: Params, *, output_variance: Tensor | None = None
    ) -> MixturePrediction:
        """Returns a mixture of such distributions from outputs ``[num_samples, num_examples, num_targets]``.

        Raises:
            ValueError: If a variance is given: the mixture over a log-normal mean has no closed form.
        """
        if output_variance is not None:
            raise ValueError(
                "output_variance: the negative_binomial likelihood takes samples of outputs, not their variance."
            )
        size = torch.exp(parameters[self.size_name])
        return MixturePrediction(NegativeBinomialComponents(outputs + math.log(self.initial_rate), size))


def _nll(targets: Tensor, log_mean: Tensor, log_size: Tensor) -> Tensor:
    size = torch.exp(log_size)
    # log(1 + m / r) and log(1 + r / m) without a quotient that overflows.
    excess = size * torch.nn.functional.softplus(log_mean - log_size)
    of_count = targets * torch.nn.functional.softplus(log_size - log_mean)
    return torch.lgamma(size) + torch.lgamma(targets + 1) - torch.lgamma(targets + size) + excess + of_count
