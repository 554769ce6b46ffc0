"""Counts that vary more than a Poisson distribution allows, with a logarithmic link."""

import dataclasses
import math
from typing import ClassVar, NamedTuple

import torch

from ibaml.likelihoods.base import TargetKind, require_same_shape, wide
from ibaml.likelihoods.mixture import MixturePrediction
from ibaml.likelihoods.poisson import Poisson, log_normal_moments, tempered_outputs
from ibaml.likelihoods.quadrature import expectation, log_expectation
from ibaml.types import Params, Tensor


class NegativeBinomialComponents(NamedTuple):
    """Negative binomial distributions of mean ``m`` and size ``r``, with variance ``m + m^2 / r``.

    Attributes:
        log_mean: Logarithms of the means, ``[num_samples, num_examples, num_targets]``.
        size: Sizes, positive, in a shape that ``log_mean`` expands; large ones make the distribution Poisson's.
        log_mean_variance: Variance of the logarithms, where a posterior gives it in closed form, likewise. None: 0.
    """

    log_mean: Tensor
    size: Tensor
    log_mean_variance: Tensor | None = None

    @property
    def is_discrete(self) -> bool:
        """True."""
        return True

    @property
    def mean(self) -> Tensor:
        """The means, or what is expected of them."""
        return log_normal_moments(self.log_mean, self.log_mean_variance)[0]

    @property
    def aleatoric(self) -> Tensor:
        """The variances, ``m + m^2 / r``, or what is expected of them."""
        mean, variance = log_normal_moments(self.log_mean, self.log_mean_variance)
        return mean + (mean**2 + variance) / self.size

    @property
    def epistemic(self) -> Tensor:
        """The variance of the means."""
        return log_normal_moments(self.log_mean, self.log_mean_variance)[1]

    def log_prob(self, targets: Tensor) -> Tensor:
        """Returns the log probability of each."""
        log_size = self.size.log()
        if self.log_mean_variance is None:
            return -_nll(targets, self.log_mean, log_size)
        log_size = log_size.double()
        return log_expectation(
            lambda log_mean: -_nll(targets, log_mean, log_size),
            lambda log_mean: _derivatives(targets, log_mean, log_size.detach()),
            targets.double().log(),
            self.log_mean,
            self.log_mean_variance,
        ).to(self.log_mean.dtype)

    def cdf(self, values: Tensor) -> Tensor:
        """Returns the distribution function of each in float64, ``I_p(r, floor(v) + 1)``, ``p = r / (r + m)``."""
        # torch has no incomplete beta function. Here, so that importing the library does not import scipy.
        from scipy.special import betainc

        whole = values.double().floor()

        def at(log_mean: Tensor) -> Tensor:
            mean, above = torch.broadcast_tensors(log_mean.exp(), whole.clamp_min(0) + 1)
            size = self.size.double().expand_as(mean)
            found = betainc(*(each.cpu().numpy() for each in (size, above, size / (size + mean))))
            return torch.from_numpy(found).to(self.log_mean.device)

        found = (
            at(self.log_mean.double())
            if self.log_mean_variance is None
            else expectation(at, self.log_mean, self.log_mean_variance)
        )
        return torch.where(whole < 0, 0.0, found)

    def tempered(self, temperature: float) -> "NegativeBinomialComponents":
        """Returns distributions with the spread of the log means, over samples and their own, times a factor.

        The noise of a count is fixed by its mean and the size.
        """
        log_mean, variance = tempered_outputs(temperature, self.log_mean, self.log_mean_variance)
        return NegativeBinomialComponents(log_mean, self.size, variance)

    def rescaled(self, mean: Tensor, scale: Tensor) -> "NegativeBinomialComponents":
        """Returns the distributions in float64: counts have no unit, so ``mean`` is 0 and ``scale`` 1."""
        del mean, scale
        return NegativeBinomialComponents(*(None if each is None else each.double() for each in self))  # pyright: ignore[reportArgumentType]

    def to(self, device: torch.device) -> "NegativeBinomialComponents":
        """Returns the distributions on a device."""
        return NegativeBinomialComponents(*(None if each is None else each.to(device) for each in self))  # pyright: ignore[reportArgumentType]


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

    def derivatives(self, outputs: Tensor, targets: Tensor, parameters: Params) -> tuple[Tensor, Tensor]:
        """Returns ``(r + y) p - y`` and ``(r + y) p (1 - p)`` with ``p = m / (m + r)``; see ``NumberLikelihood``."""
        return _derivatives(targets, outputs + math.log(self.initial_rate), parameters[self.size_name])

    def predict(
        self, outputs: Tensor, parameters: Params, *, output_variance: Tensor | None = None
    ) -> MixturePrediction:
        """Returns a mixture of such distributions from outputs ``[num_samples, num_examples, num_targets]``."""
        size = torch.exp(parameters[self.size_name])
        return MixturePrediction(
            NegativeBinomialComponents(outputs + math.log(self.initial_rate), size, output_variance)
        )


def _nll(targets: Tensor, log_mean: Tensor, log_size: Tensor) -> Tensor:
    size = torch.exp(log_size)
    # log(1 + m / r) and log(1 + r / m) without a quotient that overflows.
    excess = size * torch.nn.functional.softplus(log_mean - log_size)
    of_count = targets * torch.nn.functional.softplus(log_size - log_mean)
    return torch.lgamma(size) + torch.lgamma(targets + 1) - torch.lgamma(targets + size) + excess + of_count


def _derivatives(targets: Tensor, log_mean: Tensor, log_size: Tensor) -> tuple[Tensor, Tensor]:
    size = torch.exp(log_size)
    above, below = torch.sigmoid(log_mean - log_size), torch.sigmoid(log_size - log_mean)
    return size * above - targets * below, (size + targets) * above * below
