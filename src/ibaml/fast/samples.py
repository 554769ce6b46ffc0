"""The mean of a loss over weight samples, with the derivatives of the sampling written out."""

from collections.abc import Iterable, Sequence
from functools import partial

import torch

from ibaml.fast.derivatives import Leaves, Point, TracedLoss
from ibaml.types import Tensor


class SampledLoss:
    """The mean of a loss over samples ``mean + exp(log_var / 2) * noise`` of its first leaf.

    Leaves are ``(mean, log_var, *other, noise, *constants)``, of which those before the noise are the point. With
    ``g_s`` and ``H_s`` for gradient and Hessian of the loss at sample ``s``, ``a = exp(log_var / 2) / 2`` and averages
    over samples, the gradient is ``(avg g_s, a avg(noise_s g_s))``, and its change along ``(u, t)``

        (avg h_s, a avg(noise_s h_s) + t a avg(noise_s g_s) / 2),    h_s = H_s (u + a t noise_s):

    three operations on vectors a sample, where differentiating the sampling step by step needs about ten.

    Args:
        loss: The loss of one sample.
        at_once: Pass all samples through the network at once.
    """

    def __init__(self, loss: TracedLoss, *, at_once: bool) -> None:
        self.num_point = loss.num_point + 1
        self._loss = loss
        self._at_once = at_once
        self._mapped: dict[int, SampledLoss] = {}

    def mapped(self, size: int) -> "SampledLoss":
        """See ``TwiceDifferentiable``."""
        if size not in self._mapped:
            self._mapped[size] = SampledLoss(self._loss.mapped(size), at_once=self._at_once)
        return self._mapped[size]

    def gradient(self, leaves: Sequence[Tensor]) -> list[Tensor]:
        """See ``TwiceDifferentiable``."""
        half_deviation = _half_deviation(leaves[1])
        results = (
            self._member(noise).gradient(self._leaves_of(leaves, half_deviation, noise))
            for noise in self._noises(leaves)
        )
        return self._averaged(results, leaves, half_deviation, position=1)

    def linearize(self, point: Point, leaves: Sequence[Tensor]) -> list[Tensor]:
        """See ``TwiceDifferentiable``."""
        half_deviation = _half_deviation(leaves[1])
        noises = self._noises(leaves)
        point.samples = [Point() for _ in noises]
        results = (
            self._member(noise).linearize(sample, self._leaves_of(leaves, half_deviation, noise))
            for noise, sample in zip(noises, point.samples, strict=True)
        )
        value_and_gradient = self._averaged(results, leaves, half_deviation, position=1)
        point.owner, point.residuals = self, [half_deviation, 0.5 * value_and_gradient[2]]
        return value_and_gradient

    def product(self, point: Point, leaves: Leaves, direction: Sequence[Tensor]) -> list[Tensor]:
        """See ``TwiceDifferentiable``."""
        at = leaves()
        if point.residuals is None or point.owner is not self:
            self.linearize(point, at)
        assert point.residuals is not None
        half_deviation, half_gradient = point.residuals
        along_mean, along_log_var, *along_others = direction
        scaled = half_deviation * along_log_var
        results = (
            self._member(noise).product(
                sample,
                partial(self._leaves_of, at, half_deviation, noise),
                [torch.addcmul(along_mean, scaled, noise), *self._each(noise, along_others)],
            )
            for noise, sample in zip(self._noises(at), point.samples, strict=True)
        )
        mean, log_var, *others = self._averaged(results, at, half_deviation, position=0)
        return [mean, torch.addcmul(log_var, half_gradient, along_log_var), *others]

    def _noises(self, leaves: Sequence[Tensor]) -> list[Tensor]:
        """Returns the noise of each pass through the network: of one sample, or with a leading axis of samples."""
        noise = leaves[self.num_point]
        return [noise.movedim(-2, 0)] if self._at_once else list(noise.unbind(-2))

    def _member(self, noise: Tensor) -> TracedLoss:
        return self._loss.mapped(len(noise)) if self._at_once else self._loss

    def _leaves_of(self, leaves: Sequence[Tensor], half_deviation: Tensor, noise: Tensor) -> list[Tensor]:
        sample = torch.addcmul(leaves[0], half_deviation, noise, value=2)
        others = [*leaves[2 : self.num_point], *leaves[self.num_point + 1 :]]
        return [sample, *self._each(noise, others)]

    def _each(self, noise: Tensor, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Returns the tensors as every sample has them."""
        return [each.expand(len(noise), *each.shape) for each in tensors] if self._at_once else list(tensors)

    def _averaged(
        self, results: Iterable[Sequence[Tensor]], leaves: Sequence[Tensor], half_deviation: Tensor, *, position: int
    ) -> list[Tensor]:
        """Averages over samples, one after the other, so that no more than one sample's results are alive.

        Args:
            results: What the passes through the network returned.
            leaves: Where they were made.
            half_deviation: ``a``.
            position: Of the gradient in the sample, behind which its average times ``a noise_s`` is put.
        """
        num_samples = leaves[self.num_point].shape[-2]
        averages: list[Tensor] = []
        with_noise = torch.zeros_like(half_deviation)
        for noise, result in zip(self._noises(leaves), results, strict=True):
            if self._at_once:
                averages = [each.mean(0) for each in result]
                with_noise = (noise * result[position]).sum(0)
            else:
                with_noise.addcmul_(noise, result[position])
                averages = averages or [torch.zeros_like(each) for each in result]
                for average, each in zip(averages, result, strict=True):
                    average.add_(each, alpha=1 / num_samples)
        with_noise.mul_(half_deviation).div_(num_samples)
        return [*averages[: position + 1], with_noise, *averages[position + 1 :]]


def _half_deviation(log_var: Tensor) -> Tensor:
    return log_var.mul(0.5).exp_().mul_(0.5)
