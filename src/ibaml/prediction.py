"""Predictions of an adapted model, with their uncertainty split into what more data could and could not remove."""

import dataclasses
import math
from statistics import NormalDist

import torch

from ibaml.types import Tensor

# Each halves the bracket; a double has 53 digits.
_NUM_BISECTIONS = 64


@dataclasses.dataclass(frozen=True)
class ClassPrediction:
    """Class probabilities at some inputs.

    Attributes:
        sample_log_probs: Log-probabilities under each weight sample, ``[num_samples, num_examples, num_classes]``.
        temperature: Divides the log of the averaged probabilities; positive, above 1 less sure, below 1 surer.
    """

    sample_log_probs: Tensor
    temperature: float = 1.0

    @property
    def log_probs(self) -> Tensor:
        """Log of the averaged and tempered probabilities, ``[num_examples, num_classes]``."""
        averaged = self._averaged_log_probs
        return averaged if self.temperature == 1 else torch.log_softmax(averaged / self.temperature, dim=-1)

    @property
    def probs(self) -> Tensor:
        """Probabilities averaged over weight samples and tempered, ``[num_examples, num_classes]``."""
        return self.log_probs.exp()

    @property
    def labels(self) -> Tensor:
        """Most probable class, its index, ``[num_examples]``."""
        return self.log_probs.argmax(-1)

    @property
    def total_uncertainty(self) -> Tensor:
        """Entropy of ``probs`` in nats, ``[num_examples]``."""
        return _entropy(self.log_probs)

    @property
    def aleatoric(self) -> Tensor:
        """What more data would not remove, in nats, ``[num_examples]``: the mean entropy of the samples' probabilities.

        With a temperature: the same share of the total as without.
        """
        return (self.total_uncertainty - self.epistemic).clamp_min(0)

    @property
    def epistemic(self) -> Tensor:
        """Mutual information of label and weights in nats, ``[num_examples]``, at least 0.

        With a temperature: the same share of the total as without.
        """
        before = _entropy(self._averaged_log_probs)
        information = (before - _entropy(self.sample_log_probs).mean(0)).clamp_min(0)
        if self.temperature == 1:
            return information
        return information * self.total_uncertainty / torch.where(before > 0, before, torch.ones_like(before))

    def samples(self) -> Tensor:
        """Returns the untempered probabilities under each sample, ``[num_samples, num_examples, num_classes]``."""
        return self.sample_log_probs.exp()

    @property
    def _averaged_log_probs(self) -> Tensor:
        return torch.logsumexp(self.sample_log_probs, dim=0) - math.log(self.sample_log_probs.shape[0])

    def nll(self, targets: Tensor) -> Tensor:
        """Returns ``-log p(target)`` per example in nats."""
        return -self.log_probs.gather(-1, targets.unsqueeze(-1)).squeeze(-1)

    def tempered(self, temperature: float) -> "ClassPrediction":
        """Returns the prediction with the logits of its probabilities divided by a temperature (Guo et al. 2017).

        Those are the probabilities averaged over weight samples: dividing each sample's logits would hardly change
        what is unsure because the samples disagree.

        Args:
            temperature: Positive; above 1 it makes the prediction less sure.
        """
        return dataclasses.replace(self, temperature=self.temperature * temperature)


@dataclasses.dataclass(frozen=True)
class RegressionPrediction:
    """Predictive distribution of real targets: a mixture of one Gaussian per weight sample.

    Attributes:
        sample_means: Network outputs under each weight sample, ``[num_samples, num_examples, num_outputs]``.
        noise_variance: Variance of the observation noise, ``[num_outputs]``, target's unit squared.
    """

    sample_means: Tensor
    noise_variance: Tensor

    @property
    def mean(self) -> Tensor:
        """Predictive mean, ``[num_examples, num_outputs]``."""
        return self.sample_means.mean(0)

    @property
    def aleatoric(self) -> Tensor:
        """Noise variance, ``[num_examples, num_outputs]``, target's unit squared."""
        return self.noise_variance.expand_as(self.mean)

    @property
    def epistemic(self) -> Tensor:
        """Variance of the mean over weight samples, ``[num_examples, num_outputs]``, target's unit squared."""
        return self.sample_means.var(0, correction=0)

    @property
    def total_uncertainty(self) -> Tensor:
        """Predictive variance, aleatoric plus epistemic, ``[num_examples, num_outputs]``."""
        return self.aleatoric + self.epistemic

    def samples(self) -> Tensor:
        """Returns the means under each weight sample, ``[num_samples, num_examples, num_outputs]``."""
        return self.sample_means

    def cdf(self, targets: Tensor) -> Tensor:
        """Returns the predictive probability of a value at most ``targets``, ``[num_examples, num_outputs]``.

        For each output by itself, in float64; the inverse of ``quantile``.

        Args:
            targets: Values, ``[num_examples, num_outputs]``.

        Examples:
            >>> prediction = RegressionPrediction(torch.zeros(1, 1, 1), torch.ones(1))
            >>> round(float(prediction.cdf(torch.tensor([[1.96]]))), 3)
            0.975
        """
        deviation = self.noise_variance.double().sqrt()
        return torch.special.ndtr((targets.double() - self.sample_means.double()) / deviation).mean(0)

    def quantile(self, probability: float) -> Tensor:
        """Returns a quantile of the predictive mixture for each output, ``[num_examples, num_outputs]``.

        It solves ``mean_s Phi((q - mean_s) / noise) = probability`` by bisection, to the last digits of float64. The
        quantile of a mixture lies between the smallest and the largest quantile of its parts, which brackets it.

        Args:
            probability: Strictly between 0 and 1.

        Raises:
            ValueError: If the probability is not.

        Examples:
            >>> prediction = RegressionPrediction(torch.zeros(1, 1, 1), torch.ones(1))
            >>> round(float(prediction.quantile(0.975)), 3)
            1.96
        """
        if not 0 < probability < 1:
            raise ValueError(f"probability is {probability}; expected a number strictly between 0 and 1, such as 0.95.")
        means = self.sample_means.double()
        deviation = self.noise_variance.double().sqrt()
        offset = NormalDist().inv_cdf(probability) * deviation
        low, high = means.amin(0) + offset, means.amax(0) + offset
        for _ in range(_NUM_BISECTIONS):
            middle = (low + high) / 2
            below = torch.special.ndtr((middle - means) / deviation).mean(0) < probability
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        return ((low + high) / 2).to(self.sample_means.dtype)

    def interval(self, level: float = 0.9) -> tuple[Tensor, Tensor]:
        """Returns the ends of the central interval that holds a target with probability ``level``.

        Args:
            level: Strictly between 0 and 1.

        Returns:
            The quantiles at ``(1 - level) / 2`` and ``(1 + level) / 2``, each ``[num_examples, num_outputs]``.

        Raises:
            ValueError: If the level is out of range.
        """
        if not 0 < level < 1:
            raise ValueError(f"level is {level}; expected a probability strictly between 0 and 1, such as 0.9.")
        return self.quantile((1 - level) / 2), self.quantile((1 + level) / 2)

    def tempered(self, temperature: float) -> "RegressionPrediction":
        """Returns the prediction with all standard deviations, of noise and of means, times a factor.

        Args:
            temperature: The factor, positive; above 1 it makes the prediction less sure.
        """
        centre = self.sample_means.mean(0)
        return RegressionPrediction(
            centre + temperature * (self.sample_means - centre), temperature**2 * self.noise_variance
        )

    def rescaled(self, mean: Tensor, scale: Tensor) -> "RegressionPrediction":
        """Returns the prediction of ``scale * target + mean``, in float64.

        Args:
            mean: Offset per output.
            scale: Positive factor per output.
        """
        return RegressionPrediction(self.sample_means.double() * scale + mean, self.noise_variance.double() * scale**2)

    def nll(self, targets: Tensor) -> Tensor:
        """Returns ``-log p(target)`` of the mixture per example, summed over outputs' joint density, in nats."""
        squared = (targets - self.sample_means) ** 2 / self.noise_variance
        log_density = -0.5 * (squared + torch.log(2 * math.pi * self.noise_variance)).sum(-1)
        return -(torch.logsumexp(log_density, dim=0) - math.log(self.sample_means.shape[0]))


def _entropy(log_probs: Tensor) -> Tensor:
    """Returns the entropy over the last axis; a probability of zero counts as zero."""
    return -torch.where(log_probs > -math.inf, log_probs.exp() * log_probs, 0.0).sum(-1)
