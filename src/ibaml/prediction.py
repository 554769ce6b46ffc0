"""Predictions of an adapted model, with their uncertainty split into what more data could and could not remove."""

import dataclasses
import math

import torch

from ibaml.types import Tensor


@dataclasses.dataclass(frozen=True)
class ClassPrediction:
    """Class probabilities at some inputs.

    Attributes:
        sample_log_probs: Log-probabilities under each weight sample, ``[num_samples, num_examples, num_classes]``.
    """

    sample_log_probs: Tensor

    @property
    def log_probs(self) -> Tensor:
        """Log of the averaged probabilities, ``[num_examples, num_classes]``."""
        return torch.logsumexp(self.sample_log_probs, dim=0) - math.log(self.sample_log_probs.shape[0])

    @property
    def probs(self) -> Tensor:
        """Probabilities averaged over weight samples, ``[num_examples, num_classes]``."""
        return self.log_probs.exp()

    @property
    def total_uncertainty(self) -> Tensor:
        """Entropy of the averaged probabilities in nats, ``[num_examples]``."""
        return _entropy(self.log_probs)

    @property
    def aleatoric(self) -> Tensor:
        """Mean entropy of the samples' probabilities in nats, ``[num_examples]``: what more data would not remove."""
        return _entropy(self.sample_log_probs).mean(0)

    @property
    def epistemic(self) -> Tensor:
        """Mutual information of label and weights in nats, ``[num_examples]``: total minus aleatoric, at least 0."""
        return (self.total_uncertainty - self.aleatoric).clamp_min(0)

    def samples(self) -> Tensor:
        """Returns the probabilities under each weight sample, ``[num_samples, num_examples, num_classes]``."""
        return self.sample_log_probs.exp()

    def nll(self, targets: Tensor) -> Tensor:
        """Returns ``-log p(target)`` per example in nats."""
        return -self.log_probs.gather(-1, targets.unsqueeze(-1)).squeeze(-1)


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

    def nll(self, targets: Tensor) -> Tensor:
        """Returns ``-log p(target)`` of the mixture per example, summed over outputs' joint density, in nats."""
        squared = (targets - self.sample_means) ** 2 / self.noise_variance
        log_density = -0.5 * (squared + torch.log(2 * math.pi * self.noise_variance)).sum(-1)
        return -(torch.logsumexp(log_density, dim=0) - math.log(self.sample_means.shape[0]))


def _entropy(log_probs: Tensor) -> Tensor:
    """Returns the entropy over the last axis; a probability of zero counts as zero."""
    return -torch.where(log_probs > -math.inf, log_probs.exp() * log_probs, 0.0).sum(-1)
