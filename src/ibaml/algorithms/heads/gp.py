"""Gaussian process regression on inputs or learned features, with hyper-parameters that all tasks share.

For each target the model is ``y = f(z) + noise`` with ``f ~ GP(m(z), k(z, z'))`` and noise of variance ``s2``; with
``L L^T = k(Z, Z) + s2 I`` and ``a = (L L^T)^-1 (y - m(Z))`` (Rasmussen and Williams 2006, algorithm 2.1)

    f(z) | y ~ N( m(z) + k(z, Z) a ,  k(z, z) - ||L^-1 k(Z, z)||^2 )

Where a target was not measured its covariances ``k`` are zero, and so is its error: it has noise alone. The linear
kernel alone is ``LinearGaussian``. In one task hyper-parameters overfit; over tasks they are the prior.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal, NamedTuple, get_args

import torch

from ibaml import tree
from ibaml.algorithms.heads.gaussian import GaussianHead, Measured, noise_variance
from ibaml.algorithms.heads.least_squares import cholesky_or_nan, gaussian_nll, inverse_of_factor
from ibaml.priors import DiagonalColumnPrior
from ibaml.types import Batch, Params, Tensor

Mean = Literal["zero", "constant", "linear"]


def squared_exponential(distance2: Tensor) -> Tensor:
    """Returns ``exp(-r^2 / 2)`` of squared distances."""
    return torch.exp(-0.5 * distance2)


def matern52(distance2: Tensor) -> Tensor:
    """Returns ``(1 + u + u^2 / 3) exp(-u)`` with ``u = sqrt(5) r``, of squared distances ``r^2``."""
    # The root has no derivative at zero, where that of the whole by any parameter is zero.
    positive = distance2 > 0
    u = torch.sqrt(5 * torch.where(positive, distance2, 1.0))
    return torch.where(positive, (1 + u + u**2 / 3) * torch.exp(-u), 1.0)


STATIONARY: Mapping[str, Callable[[Tensor], Tensor]] = {
    "squared_exponential": squared_exponential,
    "matern52": matern52,
}
_LINEAR = "linear"


class StationaryKernel(NamedTuple):
    """Parameters of ``variance * correlation(||(z - z') / length_scale||^2)``.

    Attributes:
        log_length_scale: Natural logarithm of a length for each feature, ``[num_kernels, num_features]``.
        log_variance: Natural logarithm of the variance of the functions, ``[num_kernels]``.
    """

    log_length_scale: Tensor
    log_variance: Tensor


class GaussianProcessPrior(NamedTuple):
    """Hyper-parameters; ``num_kernels`` is the number of targets, or 1 if they are tied.

    Attributes:
        mean: Weights of the mean function: of all inputs ``[num_kernels, num_inputs]``, of the constant alone
            ``[num_kernels, 1]``, or no rows for zero.
        kernels: Parameters of each kernel of the sum by its name; of the linear one the log-variances of its weights,
            ``[num_kernels, num_inputs]``.
    """

    mean: Tensor
    kernels: dict[str, Any]


class GaussianProcessPosterior(NamedTuple):
    """The posterior process of each target, float64.

    Attributes:
        prior: The hyper-parameters.
        inputs: Inputs ``z`` of the support set, ``[num_support, num_inputs]``.
        targets: Which targets were measured, and ``y``.
        error: ``y - m(Z)``, zero where not measured, ``[num_targets, num_support]``.
        weights: ``a``, ``[num_targets, num_support]``.
        cholesky: ``L``, ``[num_targets, num_support, num_support]``.
        inverse: ``L^-1``, where predictions are to take products alone; no rows elsewhere.
    """

    prior: GaussianProcessPrior
    inputs: Tensor
    targets: Measured
    error: Tensor
    weights: Tensor
    cholesky: Tensor
    inverse: Tensor

    def cross(self, inputs: Tensor) -> Tensor:
        """Returns ``k(Z, z)``, zero where not measured, ``[num_targets or 1, num_support, num_examples]``."""
        return self.targets.rows(kernel_matrix(self.prior, self.inputs, inputs))

    def explained(self, cross: Tensor) -> Tensor:
        """Returns ``L^-1 k(Z, z)``, ``[num_targets, num_support, num_examples]``."""
        if len(self.inverse):
            return self.inverse @ cross
        return torch.linalg.solve_triangular(self.cholesky, cross, upper=False)


@dataclasses.dataclass(frozen=True, kw_only=True)
class GaussianProcess(GaussianHead):
    """A Gaussian process as head: exact, for supports up to some thousands of examples.

    Attributes:
        kernels: The kernel is the sum of these: ``"linear"`` (``z^T D z'`` with a variance for each input, the
            constant among them), ``"squared_exponential"`` and ``"matern52"`` (twice differentiable functions), which
            have a length-scale for each feature.
        mean_function: ``"zero"``, a learned ``"constant"``, or one that is ``"linear"`` in all inputs.
        tied: Whether all targets have one mean function and kernel; else each has its own. Noise is always its own.
        initial_variance: Variance of the functions at features of unit variance, where training starts; all kernels
            have equal shares.
        initial_bias_variance: Variance of the constant's weight in a linear kernel there.
        initial_length_scale: Length-scales there, in units of ``sqrt(num_features)``: the distance of two examples
            grows like that.

    Raises:
        ValueError: If a setting is out of range.
    """

    kernels: tuple[str, ...] = (_LINEAR, "matern52")
    mean_function: Mean = "linear"
    tied: bool = False
    initial_variance: float = 1.0
    initial_bias_variance: float = 1.0
    initial_length_scale: float = 1.0

    name: ClassVar[str] = "gp"

    def __post_init__(self) -> None:
        """Refuses settings out of range."""
        super().__post_init__()
        known = (_LINEAR, *STATIONARY)
        if not self.kernels or len(set(self.kernels)) < len(self.kernels) or not set(self.kernels) <= set(known):
            raise ValueError(f"kernels must be some of {', '.join(known)}, each once, but are {self.kernels!r}.")
        if self.mean_function not in get_args(Mean):
            raise ValueError(
                f"mean_function must be one of {', '.join(get_args(Mean))}, but is {self.mean_function!r}."
            )
        for name in ("initial_variance", "initial_bias_variance", "initial_length_scale"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be positive and finite, but is {getattr(self, name)}.")

    def describe(self) -> str:
        """Returns how a task is solved."""
        return f"exact Gaussian process, kernel {' + '.join(self.kernels)}, {self.mean_function} mean"

    def init_prior(self, num_inputs: int, num_outputs: int, *, like: Tensor) -> GaussianProcessPrior:
        """Returns the hyper-parameters that training starts from, the mean function zero; see ``Head``."""
        share, num_kernels = self.initial_variance / len(self.kernels), 1 if self.tied else num_outputs
        num_features = num_inputs - 1
        length = self.initial_length_scale * math.sqrt(max(num_features, 1))
        kernels: dict[str, Any] = {
            name: StationaryKernel(
                like.new_full((num_kernels, num_features), math.log(length)),
                like.new_full((num_kernels,), math.log(share)),
            )
            for name in self.kernels
            if name != _LINEAR
        }
        if _LINEAR in self.kernels:
            weights = DiagonalColumnPrior(initial_variance=share, initial_bias_variance=self.initial_bias_variance)
            kernels[_LINEAR] = weights.init(num_inputs, num_kernels, like=like).log_var
        shape = {"zero": (0, 1), "constant": (num_kernels, 1), "linear": (num_kernels, num_inputs)}
        return GaussianProcessPrior(like.new_zeros(shape[self.mean_function]), kernels)

    def parameter_groups(self, prior: GaussianProcessPrior) -> tuple[list[Tensor], list[Tensor]]:
        """Returns the mean function, and the kernels; see ``Head``."""
        return [prior.mean], tree.leaves(prior.kernels)

    def solve(
        self, prior: GaussianProcessPrior, shared: Params, support: Batch, num_outputs: int
    ) -> tuple[GaussianProcessPosterior, Tensor]:
        """Returns the posterior process of each target; see ``Head``.

        Cost:
            ``num_support^2 num_inputs`` operations for each kernel, and a Cholesky factorisation of ``num_support``
            rows for each target.
        """
        del num_outputs
        prior = tree.map(torch.Tensor.double, prior)
        inputs, targets = support.x.double(), Measured.of(support.y)
        total = targets.covariance(kernel_matrix(prior, inputs, inputs), noise_variance(shared, targets.values))
        cholesky = cholesky_or_nan(total)
        error = targets.error(_mean(prior, inputs))
        weights = torch.cholesky_solve(error.unsqueeze(-1), cholesky).squeeze(-1)
        found, wanted = (total.detach() @ weights.detach().unsqueeze(-1)).squeeze(-1), error.detach()
        size = torch.linalg.vector_norm(wanted).clamp_min(torch.finfo(wanted.dtype).tiny)
        residual = torch.linalg.vector_norm(found - wanted) / size
        return GaussianProcessPosterior(prior, inputs, targets, error, weights, cholesky, cholesky[:0]), residual

    @property
    def is_sequential(self) -> bool:
        """Whether nothing but the inputs, which the posterior holds, is needed of earlier examples."""
        return not self.centre

    def extend(
        self, solution: GaussianProcessPosterior, shared: Params, more: Batch, num_outputs: int
    ) -> tuple[GaussianProcessPosterior, Tensor]:
        """Returns the posterior process after further examples; see ``Head``.

        The Cholesky factor gets further rows ``[L21, L22]`` with ``L21 = k(Z2, Z) L^-T`` and
        ``L22 L22^T = k(Z2, Z2) + s2 I - L21 L21^T``.

        Cost:
            ``num_support^2 num_more`` operations for each target, where starting afresh takes ``num_support^3``.
        """
        del num_outputs
        prior, inputs, targets = solution.prior, more.x.double(), Measured.of(more.y)
        own = targets.covariance(kernel_matrix(prior, inputs, inputs), noise_variance(shared, targets.values))
        left = targets.rows(solution.explained(solution.cross(inputs)).mT)
        corner = cholesky_or_nan(own - left @ left.mT)
        nothing = torch.zeros_like(left.mT)
        cholesky = torch.cat([torch.cat([solution.cholesky, nothing], -1), torch.cat([left, corner], -1)], -2)
        error = torch.cat([solution.error, targets.error(_mean(prior, inputs))], -1)
        weights = torch.cholesky_solve(error.unsqueeze(-1), cholesky)
        size = torch.linalg.vector_norm(error).clamp_min(torch.finfo(error.dtype).tiny)
        residual = torch.linalg.vector_norm(cholesky @ (cholesky.mT @ weights) - error.unsqueeze(-1)) / size
        all_inputs = torch.cat([solution.inputs, inputs])
        all_targets = Measured(*(torch.cat(parts, -1) for parts in zip(solution.targets, targets, strict=True)))
        weights = weights.squeeze(-1)
        found = GaussianProcessPosterior(prior, all_inputs, all_targets, error, weights, cholesky, cholesky[:0])
        return found, residual

    def in_products(self, solution: GaussianProcessPosterior) -> GaussianProcessPosterior:
        """Returns the posterior with the inverse of its factor; see ``Head``."""
        return solution._replace(inverse=inverse_of_factor(solution.cholesky))

    def moments(self, solution: GaussianProcessPosterior, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Returns mean and variance of the posterior process; see ``HeadOfFunctions``."""
        inputs = inputs.double()
        cross = solution.cross(inputs)
        known = solution.explained(cross)
        # Rounding may leave a little less than nothing.
        variance = (kernel_diagonal(solution.prior, inputs) - (known**2).sum(-2)).clamp_min(0)
        return _mean(solution.prior, inputs) + (cross.mT @ solution.weights.unsqueeze(-1)).squeeze(-1), variance

    def joint_covariance(self, solution: GaussianProcessPosterior, inputs: Tensor) -> Tensor:
        """Returns the covariance of the posterior process; see ``HeadOfFunctions``."""
        inputs = inputs.double()
        cross = solution.cross(inputs)
        known = solution.explained(cross)
        return kernel_matrix(solution.prior, inputs, inputs) - known.mT @ known

    def support_nll(self, solution: GaussianProcessPosterior) -> tuple[Tensor, int]:
        """Returns minus the log marginal likelihood of the support set; see ``GaussianHead``."""
        squares = (solution.error * solution.weights).sum()
        # Where a target was not measured the factor has the noise alone.
        deviation = torch.diagonal(solution.cholesky, dim1=-2, dim2=-1)
        volume = (solution.targets.present * torch.log(2 * math.pi * deviation**2)).sum()
        return 0.5 * (squares + volume), solution.error.shape[-1]

    def joint_nll(self, solution: GaussianProcessPosterior, noise: Tensor, query: Batch) -> Tensor:
        """Returns minus the joint log density of the query set, in ``num_query`` dimensions; see ``GaussianHead``."""
        mean, _ = self.moments(solution, query.x)
        targets = Measured.of(query.y)
        covariance = targets.covariance(self.joint_covariance(solution, query.x), noise)
        return (gaussian_nll(targets.error(mean), covariance) - targets.nll_of_noise(noise)).sum()


def kernel_matrix(prior: GaussianProcessPrior, left: Tensor, right: Tensor) -> Tensor:
    """Returns ``k(Z, Z')``, ``[num_kernels, num_left, num_right]``, of inputs whose last column is the constant."""
    parts: list[Tensor] = []
    for name, parameters in prior.kernels.items():
        if name == _LINEAR:
            parts.append((left * torch.exp(parameters).unsqueeze(-2)) @ right.mT)
            continue
        scale = torch.exp(-parameters.log_length_scale).unsqueeze(-2)
        one, other = left[:, :-1] * scale, right[:, :-1] * scale
        # In float64 the usual expansion of a square loses nothing that matters, and needs no third axis.
        squares = (one**2).sum(-1).unsqueeze(-1) + (other**2).sum(-1).unsqueeze(-2)
        correlation = STATIONARY[name]((squares - 2 * one @ other.mT).clamp_min(0))
        parts.append(torch.exp(parameters.log_variance)[:, None, None] * correlation)
    return torch.stack(parts).sum(0) if len(parts) > 1 else parts[0]


def kernel_diagonal(prior: GaussianProcessPrior, inputs: Tensor) -> Tensor:
    """Returns ``k(z, z)`` of each input, ``[num_kernels, num_examples]``."""
    parts = [
        torch.exp(parameters) @ (inputs**2).mT
        if name == _LINEAR
        else torch.exp(parameters.log_variance).unsqueeze(-1).expand(-1, inputs.shape[0])
        for name, parameters in prior.kernels.items()
    ]
    return torch.stack(parts).sum(0)


def _mean(prior: GaussianProcessPrior, inputs: Tensor) -> Tensor:
    """Returns the mean function at some inputs, ``[num_kernels, num_examples]``."""
    if not len(prior.mean):
        return inputs.new_zeros(1, inputs.shape[0])
    # The constant is the last input.
    return prior.mean @ inputs[:, -prior.mean.shape[-1] :].mT
