"""Likelihoods: how network outputs and targets become a negative log-likelihood per example.

A likelihood may own parameters that are meta-learned for all tasks together (the noise of a regression). They live in
the ``shared`` meta-parameters under names that start with ``likelihood.``.
"""

import math
from typing import Protocol

import torch

from ibaml.prediction import ClassPrediction, RegressionPrediction
from ibaml.types import Params, Tensor


class Likelihood(Protocol):
    """``p(y | f)`` for network outputs ``f``."""

    @property
    def name(self) -> str:
        """Name by which a saved model finds it again."""
        ...

    def initial_parameters(self) -> Params:
        """Returns the likelihood's own meta-parameters, possibly none."""
        ...

    def nll(self, outputs: Tensor, targets: Tensor, parameters: Params) -> Tensor:
        """Returns ``-log p(target | output)`` in nats per example, shape ``[..., num_examples]``."""
        ...

    def predict(self, sample_outputs: Tensor, parameters: Params) -> ClassPrediction | RegressionPrediction:
        """Turns the outputs of several weight samples, leading axis ``num_samples``, into a prediction."""
        ...

    def check_targets(self, argument: str, targets: Tensor, num_outputs: int) -> None:
        """Refuses targets that the likelihood cannot score, with a ValueError that names ``argument``."""
        ...


class Categorical:
    """Class probabilities by softmax: ``p(y | f) = softmax(f)_y``."""

    name = "categorical"

    def initial_parameters(self) -> Params:
        """Returns no parameters."""
        return {}

    def nll(self, outputs: Tensor, targets: Tensor, parameters: Params) -> Tensor:
        """Returns the cross-entropy per example.

        Args:
            outputs: Logits, ``[..., num_examples, num_classes]``.
            targets: Class indices, ``[..., num_examples]``.
            parameters: Not used.
        """
        del parameters
        # At least float32: exponentials of half-precision logits lose the tail that the nll is about.
        log_probs = torch.log_softmax(outputs.to(torch.promote_types(outputs.dtype, torch.float32)), dim=-1)
        # A comparison rather than `one_hot`, which reads its values and so fails under vmap, or `gather`, whose
        # derivative scatters.
        is_target = targets.unsqueeze(-1) == torch.arange(outputs.shape[-1], device=targets.device)
        return -torch.where(is_target, log_probs, 0.0).sum(-1)

    def predict(self, sample_outputs: Tensor, parameters: Params) -> ClassPrediction:
        """Returns class probabilities from logits of shape ``[num_samples, num_examples, num_classes]``."""
        del parameters
        wide = sample_outputs.to(torch.promote_types(sample_outputs.dtype, torch.float32))
        return ClassPrediction(torch.log_softmax(wide, dim=-1))

    def check_targets(self, argument: str, targets: Tensor, num_outputs: int) -> None:
        """Refuses targets that are no class indices in ``[0, num_outputs)``.

        Raises:
            ValueError: Naming the argument, what came and what was expected.
        """
        if targets.is_floating_point() or targets.dtype == torch.bool:
            raise ValueError(
                f"{argument} has dtype {targets.dtype}, but expected class indices (int64); "
                "for real targets use likelihood='gaussian'."
            )
        low, high = int(targets.min()), int(targets.max())
        if low < 0 or high >= num_outputs:
            raise ValueError(
                f"{argument} has labels from {low} to {high}, but the network has {num_outputs} outputs: "
                f"expected labels in 0 .. {num_outputs - 1}. Renumber the classes of each task, or give the network "
                "more outputs."
            )


class GaussianNoise:
    """Gaussian noise of one learned variance per output: ``p(y | f) = N(y; f, noise_variance)``.

    Args:
        num_outputs: Number of target dimensions.
        initial_noise_variance: Where the learned noise variance starts, in the target's unit squared.
    """

    name = "gaussian"
    parameter_name = "likelihood.log_noise_variance"

    def __init__(self, num_outputs: int = 1, initial_noise_variance: float = 1.0) -> None:
        if not 0 < initial_noise_variance < math.inf:
            raise ValueError(f"initial_noise_variance must be positive and finite, but is {initial_noise_variance}.")
        if num_outputs < 1:
            raise ValueError(f"num_outputs must be at least 1, but is {num_outputs}.")
        self.num_outputs = num_outputs
        self.initial_noise_variance = initial_noise_variance

    def initial_parameters(self) -> Params:
        """Returns the logarithm of the noise variance, shape ``[num_outputs]``."""
        return {self.parameter_name: torch.full((self.num_outputs,), math.log(self.initial_noise_variance))}

    def nll(self, outputs: Tensor, targets: Tensor, parameters: Params) -> Tensor:
        """Returns ``sum_k ((y - f)^2 / s2 + log s2 + log 2 pi) / 2`` per example.

        Args:
            outputs: Predictive means, ``[..., num_examples, num_outputs]``.
            targets: Targets of the same shape.
            parameters: Holds ``likelihood.log_noise_variance``.
        """
        if outputs.shape != targets.shape:
            raise ValueError(
                f"targets have shape {tuple(targets.shape)}, but the network's outputs {tuple(outputs.shape)}: "
                "expected the same, one column per output (for a single output, y.unsqueeze(-1))."
            )
        log_variance = parameters[self.parameter_name]
        # Squares of half-precision differences overflow.
        wide = torch.promote_types(outputs.dtype, torch.float32)
        outputs, targets = outputs.to(wide), targets.to(wide)
        squared = (targets - outputs) ** 2 * torch.exp(-log_variance)
        return 0.5 * (squared + log_variance + math.log(2 * math.pi)).sum(-1)

    def predict(self, sample_outputs: Tensor, parameters: Params) -> RegressionPrediction:
        """Returns a mixture of Gaussians from means of shape ``[num_samples, num_examples, num_outputs]``."""
        return RegressionPrediction(sample_outputs, torch.exp(parameters[self.parameter_name]))

    def check_targets(self, argument: str, targets: Tensor, num_outputs: int) -> None:
        """Refuses targets that are not finite numbers of shape ``[..., num_examples, num_outputs]``.

        Raises:
            ValueError: Naming the argument, what came and what was expected.
        """
        if not targets.is_floating_point():
            raise ValueError(
                f"{argument} has dtype {targets.dtype}, but expected real targets; "
                "convert them with .float(), or use likelihood='categorical' for class indices."
            )
        if targets.ndim < 2 or targets.shape[-1] != num_outputs:
            raise ValueError(
                f"{argument} has shape {tuple(targets.shape)}, but expected [..., num_examples, {num_outputs}], one "
                "column per network output."
            )
        if not bool(torch.isfinite(targets).all()):
            raise ValueError(f"{argument} has NaN or infinite values: drop or impute those examples.")


class UnitGaussianNoise(GaussianNoise):
    """Gaussian noise of variance one, not learned: the nll is half the squared error plus a constant.

    For methods whose learning rates are published for the squared error: a learned noise variance rescales the inner
    loss while training goes on.

    Args:
        num_outputs: Number of target dimensions.

    Examples:
        >>> likelihood = UnitGaussianNoise()
        >>> likelihood.nll(torch.tensor([[1.0]]), torch.tensor([[3.0]]), likelihood.initial_parameters())
        tensor([2.9189])
    """

    name = "unit_gaussian"

    def __init__(self, num_outputs: int = 1) -> None:
        super().__init__(num_outputs)

    def initial_parameters(self) -> Params:
        """Returns nothing: there is nothing to learn."""
        return {}

    def nll(self, outputs: Tensor, targets: Tensor, parameters: Params) -> Tensor:
        """Returns ``sum_k ((y - f)^2 + log 2 pi) / 2`` per example; see ``GaussianNoise.nll``."""
        return super().nll(outputs, targets, self._unit_noise(outputs))

    def predict(self, sample_outputs: Tensor, parameters: Params) -> RegressionPrediction:
        """Returns a mixture of unit Gaussians from means of shape ``[num_samples, num_examples, num_outputs]``."""
        return super().predict(sample_outputs, self._unit_noise(sample_outputs))

    def _unit_noise(self, like: Tensor) -> Params:
        return {self.parameter_name: like.new_zeros(self.num_outputs)}


def make_likelihood(name: str, num_outputs: int) -> Likelihood:
    """Builds a likelihood by name.

    Args:
        name: ``"categorical"``, ``"gaussian"`` (learned noise variance) or ``"unit_gaussian"``.
        num_outputs: Number of network outputs.

    Raises:
        ValueError: If the name is unknown.
    """
    if name == Categorical.name:
        return Categorical()
    if name == GaussianNoise.name:
        return GaussianNoise(num_outputs)
    if name == UnitGaussianNoise.name:
        return UnitGaussianNoise(num_outputs)
    raise ValueError(f"likelihood must be 'categorical', 'gaussian' or 'unit_gaussian', but is {name!r}.")
