"""Counts: how often something happens, with a logarithmic link."""

import dataclasses
import math
from typing import ClassVar, NamedTuple

import torch

from ibaml.likelihoods.base import TargetKind, check_numbers, require_same_shape, wide
from ibaml.likelihoods.mixture import MixturePrediction, NumberLikelihood
from ibaml.types import Params, Tensor


class PoissonComponents(NamedTuple):
    """Poisson distributions.

    Attributes:
        log_rate: Logarithms of the means, ``[num_samples, num_examples, num_targets]``.
    """

    log_rate: Tensor

    @property
    def is_discrete(self) -> bool:
        """True."""
        return True

    @property
    def mean(self) -> Tensor:
        """The rates."""
        return self.log_rate.exp()

    @property
    def aleatoric(self) -> Tensor:
        """The rates: variance and mean of a Poisson distribution are equal."""
        return self.log_rate.exp()

    @property
    def epistemic(self) -> Tensor:
        """Zero: the rates are known."""
        return torch.zeros_like(self.log_rate)

    def log_prob(self, targets: Tensor) -> Tensor:
        """Returns the log probability of each."""
        return -_nll(targets, self.log_rate)

    def cdf(self, values: Tensor) -> Tensor:
        """Returns the distribution function of each in float64, ``Q(floor(value) + 1, rate)``."""
        whole = values.double().floor()
        # The regularised upper incomplete gamma function is undefined at 0, which a value below 0 would give.
        found = torch.special.gammaincc(whole.clamp_min(0) + 1, self.log_rate.double().exp())
        return torch.where(whole < 0, 0.0, found)

    def tempered(self, temperature: float) -> "PoissonComponents":
        """Returns distributions with the spread of the log rates over samples times a factor.

        The noise of a count is fixed by its rate.
        """
        centre = self.log_rate.mean(0)
        return PoissonComponents(centre + temperature * (self.log_rate - centre))

    def rescaled(self, mean: Tensor, scale: Tensor) -> "PoissonComponents":
        """Returns the distributions in float64: counts have no unit, so ``mean`` is 0 and ``scale`` 1."""
        del mean, scale
        return PoissonComponents(self.log_rate.double())

    def to(self, device: torch.device) -> "PoissonComponents":
        """Returns the distributions on a device."""
        return PoissonComponents(self.log_rate.to(device))


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
        """Returns a mixture of Poisson distributions from outputs ``[num_samples, num_examples, num_targets]``.

        Raises:
            ValueError: If a variance is given: a Poisson distribution of log-normal rate has no closed form.
        """
        del parameters
        if output_variance is not None:
            raise ValueError("output_variance: the poisson likelihood takes samples of outputs, not their variance.")
        return MixturePrediction(PoissonComponents(outputs + math.log(self.initial_rate)))

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
