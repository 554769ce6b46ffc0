"""Counts: how often something happens, with a logarithmic link."""

import dataclasses
import math
from typing import ClassVar, NamedTuple

import torch

from ibaml.likelihoods.base import TargetKind, check_numbers, require_same_shape, wide
from ibaml.likelihoods.mixture import MixturePrediction, NumberLikelihood
from ibaml.likelihoods.quadrature import expectation, log_expectation
from ibaml.types import Params, Tensor


class PoissonComponents(NamedTuple):
    """Poisson distributions, or their mixtures over rates that are log-normal.

    Attributes:
        log_rate: Logarithms of the means, ``[num_samples, num_examples, num_targets]``.
        log_rate_variance: Variance of the logarithms, where a posterior gives it in closed form, in a shape that
            ``log_rate`` expands. None: 0.
    """

    log_rate: Tensor
    log_rate_variance: Tensor | None = None

    @property
    def is_discrete(self) -> bool:
        """True."""
        return True

    @property
    def mean(self) -> Tensor:
        """The rates, or what is expected of them."""
        return log_normal_moments(self.log_rate, self.log_rate_variance)[0]

    @property
    def aleatoric(self) -> Tensor:
        """The rates: variance and mean of a Poisson distribution are equal."""
        return self.mean

    @property
    def epistemic(self) -> Tensor:
        """The variance of the rates."""
        return log_normal_moments(self.log_rate, self.log_rate_variance)[1]

    def log_prob(self, targets: Tensor) -> Tensor:
        """Returns the log probability of each."""
        if self.log_rate_variance is None:
            return -_nll(targets, self.log_rate)
        return log_expectation(
            lambda log_rate: -_nll(targets, log_rate),
            lambda log_rate: _derivatives(targets, log_rate),
            targets.double().log(),
            self.log_rate,
            self.log_rate_variance,
        ).to(self.log_rate.dtype)

    def cdf(self, values: Tensor) -> Tensor:
        """Returns the distribution function of each in float64, ``Q(floor(value) + 1, rate)``."""
        whole = values.double().floor()

        def at(log_rate: Tensor) -> Tensor:
            # The regularised upper incomplete gamma function is undefined at 0, which a value below 0 would give.
            return torch.special.gammaincc(whole.clamp_min(0) + 1, log_rate.exp())

        found = (
            at(self.log_rate.double())
            if self.log_rate_variance is None
            else expectation(at, self.log_rate, self.log_rate_variance)
        )
        return torch.where(whole < 0, 0.0, found)

    def tempered(self, temperature: float) -> "PoissonComponents":
        """Returns distributions with the spread of the log rates, over samples and their own, times a factor.

        The noise of a count is fixed by its rate.
        """
        return PoissonComponents(*tempered_outputs(temperature, self.log_rate, self.log_rate_variance))

    def rescaled(self, mean: Tensor, scale: Tensor) -> "PoissonComponents":
        """Returns the distributions in float64: counts have no unit, so ``mean`` is 0 and ``scale`` 1."""
        del mean, scale
        return PoissonComponents(*(None if each is None else each.double() for each in self))  # pyright: ignore[reportArgumentType]

    def to(self, device: torch.device) -> "PoissonComponents":
        """Returns the distributions on a device."""
        return PoissonComponents(*(None if each is None else each.to(device) for each in self))  # pyright: ignore[reportArgumentType]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Poisson(NumberLikelihood):
    """Counts: ``p(y | f) = Poisson(y; initial_rate exp(f))``.

    Attributes:
        num_targets: Counts to predict for each example.
        initial_rate: Rate of a network whose output is 0. An output of 1 multiplies the rate by e.

    Examples:
        >>> Poisson(initial_rate=3.0).predict(torch.zeros(1, 1, 1), {}).interval(0.9)
        (tensor([[1.]]), tensor([[6.]]))
    """

    initial_rate: float = 1.0

    name: ClassVar[str] = "poisson"
    target_kind: ClassVar[TargetKind] = "counts"

    def __post_init__(self) -> None:
        """Refuses settings out of range."""
        super().__post_init__()
        self._require_positive("initial_rate")

    def suited_to(self, targets: Tensor) -> "Poisson":
        """Returns the likelihood that starts at the mean of the counts."""
        mean = float(targets.double().mean())
        return dataclasses.replace(self, initial_rate=mean if mean > 0 else 1.0)

    def initial_parameters(self) -> Params:
        """Returns no parameters."""
        return {}

    def nll(self, outputs: Tensor, targets: Tensor, parameters: Params) -> Tensor:
        """Returns ``sum_k rate - y log rate + log y!`` per example.

        Args:
            outputs: Log rates over ``initial_rate``, ``[..., num_examples, num_targets]``.
            targets: Counts of the same shape.
            parameters: Not used.

        Raises:
            ValueError: If the targets have another shape than the outputs.
        """
        del parameters
        require_same_shape(outputs, targets)
        outputs, targets = wide(outputs, targets.to(outputs.dtype))
        return _nll(targets, outputs + math.log(self.initial_rate)).sum(-1)

    def predict(
        self, outputs: Tensor, parameters: Params, *, output_variance: Tensor | None = None
    ) -> MixturePrediction:
        """Returns a mixture of Poisson distributions from outputs ``[num_samples, num_examples, num_targets]``."""
        del parameters
        return MixturePrediction(PoissonComponents(outputs + math.log(self.initial_rate), output_variance))

    def derivatives(self, outputs: Tensor, targets: Tensor, parameters: Params) -> tuple[Tensor, Tensor]:
        """Returns ``rate - y`` and ``rate``; see ``NumberLikelihood``."""
        del parameters
        return _derivatives(targets, outputs + math.log(self.initial_rate))

    def likeliest(self, targets: Tensor) -> Tensor:
        """Returns the logarithms of rates half a count above the targets: finite also where there is none."""
        return torch.log(targets + 0.5) - math.log(self.initial_rate)

    def mean(self, outputs: Tensor) -> Tensor:
        """Returns the rates."""
        return self.initial_rate * torch.exp(outputs)

    def check_targets(self, argument: str, targets: Tensor, num_outputs: int) -> None:
        """Refuses targets that are no counts of shape ``[..., num_examples, num_targets]``.

        Raises:
            ValueError: Naming the argument, what came and what was expected.
        """
        check_numbers(argument, targets, num_outputs)
        if bool(((targets < 0) | (targets != targets.round())).any()):
            raise ValueError(
                f"{argument} has values that are no counts; expected whole numbers of 0 or more. For other numbers use "
                "likelihood='gaussian'."
            )


def _nll(targets: Tensor, log_rate: Tensor) -> Tensor:
    return torch.exp(log_rate) - targets * log_rate + torch.lgamma(targets + 1)


def log_normal_moments(log_mean: Tensor, log_variance: Tensor | None) -> tuple[Tensor, Tensor]:
    """Returns mean and variance of ``exp(f)`` for ``f ~ N(log_mean, log_variance)``; None: of a variance of 0."""
    if log_variance is None:
        return log_mean.exp(), torch.zeros_like(log_mean)
    mean = torch.exp(log_mean + 0.5 * log_variance)
    return mean, mean**2 * torch.expm1(log_variance).expand_as(mean)


def tempered_outputs(temperature: float, outputs: Tensor, variance: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Returns outputs, and their own variance, with their spread around the mean of the samples times a factor."""
    centre = outputs.mean(0)
    return centre + temperature * (outputs - centre), None if variance is None else temperature**2 * variance


def _derivatives(targets: Tensor, log_rate: Tensor) -> tuple[Tensor, Tensor]:
    rate = torch.exp(log_rate)
    return rate - targets, rate
