"""The contract of likelihoods accepts a foreign one and finds what is wrong with a broken one."""

import dataclasses
import math
from typing import Any, ClassVar, NamedTuple

import pytest
import torch
from torch.nn.functional import softplus

from ibaml.likelihoods import Categorical, Gaussian, MixturePrediction, Poisson
from ibaml.likelihoods.base import require_same_shape, wide
from ibaml.likelihoods.mixture import NumberLikelihood
from ibaml.testing import LikelihoodContract, failures
from ibaml.types import Params, Tensor


class LogisticComponents(NamedTuple):
    location: Tensor
    scale: Tensor

    @property
    def is_discrete(self) -> bool:
        return False

    @property
    def mean(self) -> Tensor:
        return self.location

    @property
    def aleatoric(self) -> Tensor:
        return self.scale**2 * math.pi**2 / 3

    @property
    def epistemic(self) -> Tensor:
        return torch.zeros_like(self.scale)

    def log_prob(self, targets: Tensor) -> Tensor:
        z = (targets - self.location) / self.scale
        return -z - 2 * softplus(-z) - torch.log(self.scale)

    def cdf(self, values: Tensor) -> Tensor:
        return torch.sigmoid((values.double() - self.location) / self.scale)

    def tempered(self, temperature: float) -> "LogisticComponents":
        centre = self.location.mean(0)
        return LogisticComponents(centre + temperature * (self.location - centre), temperature * self.scale)

    def rescaled(self, mean: Tensor, scale: Tensor) -> "LogisticComponents":
        return LogisticComponents(self.location.double() * scale + mean, self.scale.double() * scale)

    def to(self, device: torch.device) -> "LogisticComponents":
        return LogisticComponents(self.location.to(device), self.scale.to(device))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Logistic(NumberLikelihood):
    """A likelihood of one's own: logistic noise of a learned scale."""

    name: ClassVar[str] = "logistic"

    def suited_to(self, targets: Tensor) -> "Logistic":
        return self

    def initial_parameters(self) -> Params:
        return {"likelihood.log_scale": torch.zeros(self.num_targets)}

    def nll(self, outputs: Tensor, targets: Tensor, parameters: Params) -> Tensor:
        require_same_shape(outputs, targets)
        outputs, targets = wide(outputs, targets)
        return -LogisticComponents(outputs, parameters["likelihood.log_scale"].exp()).log_prob(targets).sum(-1)

    def predict(self, outputs: Tensor, parameters: Params, *, output_variance: Tensor | None = None) -> Any:
        if output_variance is not None:
            raise ValueError("output_variance: the logistic likelihood takes samples of outputs, not their variance.")
        return MixturePrediction(LogisticComponents(outputs, parameters["likelihood.log_scale"].exp()))


def test_likelihood_of_ones_own() -> None:
    class Mine(LikelihoodContract):
        make = Logistic

    assert failures(Mine) == {}


class SquaredError(Gaussian):
    """A loss that is no log density: half the squared error."""

    def nll(self, outputs: Tensor, targets: Tensor, parameters: Params) -> Tensor:
        return 0.5 * ((outputs - targets) ** 2).sum(-1)


class WrongWay(Categorical):
    """Divides where it ought to multiply."""

    def predict(self, outputs: Tensor, parameters: Params, **options: Any) -> Any:
        prediction = super().predict(outputs, parameters, **options)

        class Reversed(type(prediction)):
            def tempered(self, temperature: float) -> Any:
                return super().tempered(1 / temperature)

        return Reversed(prediction.sample_log_probs)


class Narrow(Categorical):
    """Computes in the precision of the outputs."""

    def nll(self, outputs: Tensor, targets: Tensor, parameters: Params) -> Tensor:
        return -torch.log_softmax(outputs, -1)[torch.arange(len(targets)), targets]


class Careless(Poisson):
    """Accepts whatever comes."""

    def check_targets(self, argument: str, targets: Tensor, num_outputs: int) -> None:
        pass


class Overconfident(Gaussian):
    """Predicts with half the noise that it was trained with."""

    def predict(self, outputs: Tensor, parameters: Params, **options: Any) -> Any:
        halved = {name: value - math.log(2) for name, value in parameters.items()}
        return super().predict(outputs, halved, **options)


@pytest.mark.parametrize(
    ("likelihood", "test"),
    [
        (SquaredError, "test_probabilities_sum_to_one"),
        (SquaredError, "test_nll_is_that_of_a_prediction_of_one_sample"),
        (Overconfident, "test_nll_is_that_of_a_prediction_of_one_sample"),
        (WrongWay, "test_temperature_makes_less_sure_or_surer"),
        (Narrow, "test_half_precision_is_computed_in_float32"),
        (Careless, "test_targets_that_cannot_be_scored_are_refused_by_name"),
    ],
)
def test_broken_likelihood_is_found(likelihood: Any, test: str) -> None:
    class Broken(LikelihoodContract):
        make = likelihood

    assert failures(Broken, only=test)
