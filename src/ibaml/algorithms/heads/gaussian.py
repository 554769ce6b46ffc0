"""What heads for numbers share: Gaussian posteriors over functions, and for Gaussian noise exact losses."""

import abc
import dataclasses
import math
from typing import Any, ClassVar, Literal, NamedTuple, get_args

import torch

from ibaml.algorithms.base import MetaParameters, Network
from ibaml.algorithms.heads.base import Head, HeadPosterior
from ibaml.algorithms.nll import Nll
from ibaml.likelihoods import Gaussian, Likelihood, UnitGaussian
from ibaml.types import Batch, Episode, Params, Tensor

GaussianOuterLoss = Literal["predictive_nll", "expected_nll", "marginal"]
"""Minus the log density of each query example; the nll expected under the posterior; or minus the log marginal
likelihood of support and query set together, per example of both: empirical Bayes, what mixed models maximise."""


MOST_JOINTLY = 2_000
"""Rows whose joint covariance is computed: 32 MB for each target."""
_JITTER = 1e-9
"""Relative to the variance: a standard deviation of 3e-5 of that of the function."""


def solves(likelihood: Likelihood) -> bool:
    """Whether Gaussian heads are exact: for Gaussian noise with one variance for each target."""
    return isinstance(likelihood, UnitGaussian) or (isinstance(likelihood, Gaussian) and not likelihood.heteroscedastic)


class Measured(NamedTuple):
    """Targets of which some were not measured, in the layout of heads. float64.

    A row of zeros with the target zero has noise alone and says nothing of a function: so rows where a target was not
    measured are left out without being removed, and all targets have as many rows.

    Attributes:
        values: Targets, zero where not measured, ``[num_targets, num_examples]``.
        present: 1 where measured, else 0, ``[num_targets, num_examples]``.
    """

    values: Tensor
    present: Tensor

    @classmethod
    def of(cls, targets: Tensor) -> "Measured":
        """Returns targets ``[num_examples, num_targets]``, NaN where not measured."""
        values = targets.double().mT
        is_missing = values.isnan()
        return cls(torch.where(is_missing, 0.0, values), (~is_missing).to(values))

    @property
    def num_examples(self) -> Tensor:
        """Measured examples of each target, ``[num_targets]``."""
        return self.present.sum(-1)

    def error(self, mean: Tensor) -> Tensor:
        """Returns by how much targets exceed a mean ``[num_targets or 1, num_examples]``, zero where not measured."""
        return self.present * (self.values - mean)

    def rows(self, inputs: Tensor) -> Tensor:
        """Returns inputs ``[num_targets or 1, num_examples, rank]`` of each target, zeros where it was not measured.

        A single target is measured in every row.
        """
        return inputs if len(self.present) == 1 else self.present.unsqueeze(-1) * inputs

    def covariance(self, matrix: Tensor, noise: Tensor) -> Tensor:
        """Returns the covariance of targets: of functions, zero where not measured, plus ``s2 I``.

        Args:
            matrix: Covariance of the functions, ``[num_targets or 1, num_examples, num_examples]``.
            noise: ``s2``, ``[num_targets]``.
        """
        identity = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
        return self.rows(self.rows(matrix).mT) + noise[:, None, None] * identity

    def nll_of_noise(self, noise: Tensor) -> Tensor:
        """Returns ``-log N(0; 0, s2)`` for each example where a target was not measured, summed, ``[num_targets]``.

        It is what rows of zeros add to a marginal likelihood, and is to be subtracted.

        Args:
            noise: ``s2``, ``[num_targets]``.
        """
        return 0.5 * (1 - self.present).sum(-1) * torch.log(2 * math.pi * noise)


class JointMoments(NamedTuple):
    """The functions of a posterior at some inputs, which are jointly Gaussian; targets are independent. float64.

    Attributes:
        mean: ``[num_targets, num_examples]``.
        covariance: Of the functions, without noise, ``[num_targets, num_examples, num_examples]``.
        noise: Variance of the noise, ``[num_targets]``.
    """

    mean: Tensor
    covariance: Tensor
    noise: Tensor

    def rescaled(self, mean: Tensor, scale: Tensor) -> "JointMoments":
        """Returns the moments of ``scale * target + mean``, for each target."""
        return JointMoments(
            scale.unsqueeze(-1) * self.mean + mean.unsqueeze(-1),
            scale[:, None, None] ** 2 * self.covariance,
            scale**2 * self.noise,
        )

    def tempered(self, temperature: float) -> "JointMoments":
        """Returns the moments with all standard deviations times a factor."""
        return JointMoments(self.mean, temperature**2 * self.covariance, temperature**2 * self.noise)


@dataclasses.dataclass(frozen=True, kw_only=True)
class HeadOfFunctions(Head):
    """A head whose posterior over functions is Gaussian: one function for each target.

    Targets are independent given the features. Subclasses give the distribution of the functions in float64, whatever
    the features are; the likelihood adds the noise.

    Attributes:
        outer: Outer loss.
    """

    outer: GaussianOuterLoss = "predictive_nll"

    def __post_init__(self) -> None:
        """Refuses settings out of range."""
        known = get_args(GaussianOuterLoss)
        if self.outer not in known:
            raise ValueError(f"outer must be one of {', '.join(known)}, but is {self.outer!r}.")

    @property
    def serves_any_number_of_outputs(self) -> bool:
        """False: each target has its noise."""
        return False

    @abc.abstractmethod
    def moments(self, solution: Any, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Returns mean and variance of the functions, without noise, each ``[num_targets, num_examples]``.

        Args:
            solution: From ``solve``.
            inputs: ``z``, ``[num_examples, num_inputs]``.
        """

    @abc.abstractmethod
    def joint_covariance(self, solution: Any, inputs: Tensor) -> Tensor:
        """Returns the joint covariance of a function's values, ``[num_targets, num_examples, num_examples]``, float64.

        Args:
            solution: From ``solve``.
            inputs: ``z``, ``[num_examples, num_inputs]``.
        """

    def predict(self, solution: Any, shared: Params, inputs: Tensor, noise: Params) -> dict[str, Tensor]:
        """Returns mean and variance of the functions, exact, with one sample; see ``Head``."""
        del shared, noise
        mean, variance = self.moments(solution, inputs)
        return {
            "outputs": mean.mT.to(inputs.dtype).unsqueeze(0),
            "output_variance": variance.mT.to(inputs.dtype).unsqueeze(0),
        }

    def draw(self, solution: Any, inputs: Tensor, num_samples: int, *, generator: torch.Generator) -> Tensor:
        """Returns values of functions drawn from the posterior; see ``Head``.

        Raises:
            ValueError: If there are too many examples for their joint covariance.
        """
        if len(inputs) > MOST_JOINTLY:
            raise ValueError(
                f"samples at {len(inputs)} inputs take their joint covariance; expected at most {MOST_JOINTLY}: ask "
                "for fewer at a time, or for mean and interval."
            )
        mean, _ = self.moments(solution, inputs)
        covariance = self.joint_covariance(solution, inputs)
        # Values at near inputs are all but the same: without so much the factor need not exist in float64.
        size = torch.diagonal(covariance, dim1=-2, dim2=-1).mean(-1)[:, None, None]
        size = size.clamp_min(torch.finfo(size.dtype).tiny)
        identity = torch.eye(len(inputs), dtype=covariance.dtype, device=covariance.device)
        factor = torch.linalg.cholesky_ex(covariance + _JITTER * size * identity)[0]
        noise = torch.randn(num_samples, *mean.shape, 1, dtype=mean.dtype, generator=generator).to(mean.device)
        return (mean + (factor @ noise).squeeze(-1)).mT.to(inputs.dtype)

    def mean(self, solution: Any, inputs: Tensor) -> Tensor:
        """Returns the mean; see ``Head``."""
        return self.moments(solution, inputs)[0].mT.to(inputs.dtype)


@dataclasses.dataclass(frozen=True, kw_only=True)
class GaussianHead(HeadOfFunctions):
    """A head whose posterior over functions is exact, for ``Gaussian`` noise of one variance for each target.

    Predictions and outer losses are exact, without samples. Targets that are NaN were not measured: targets are
    independent given the features, so that each has the posterior, and the losses, of the examples where it was.
    """

    serves_unmeasured_targets: ClassVar[bool] = True

    def joint_moments(self, network: Network, shared: Params, posterior: HeadPosterior[Any], x: Tensor) -> JointMoments:
        """Returns the joint distribution of the functions at some inputs, differentiable in them; see ``outputs``.

        Args:
            network: The network.
            shared: Shared parameters.
            posterior: What ``adapt`` returned.
            x: Inputs of interest.
        """
        inputs = self.inputs(network, shared, posterior, x)
        mean, _ = self.moments(posterior.solution, inputs)
        covariance = self.joint_covariance(posterior.solution, inputs)
        return JointMoments(mean, covariance, noise_variance(shared, mean))

    @abc.abstractmethod
    def support_nll(self, solution: Any) -> tuple[Tensor, Tensor | int]:
        """Returns minus the log marginal likelihood of the support set, summed over targets, a scalar, and its size."""

    @abc.abstractmethod
    def joint_nll(self, solution: Any, noise: Tensor, query: Batch) -> Tensor:
        """Returns minus the joint log density of all query examples, summed over targets, a scalar.

        Args:
            solution: From ``solve``.
            noise: Variance of the noise, ``[num_targets]``.
            query: Inputs ``z`` and targets.
        """

    def check_task(self, nll: Nll, meta: MetaParameters, episode: Episode) -> None:
        """Refuses noise that is not Gaussian with one variance for each target; see ``Algorithm``.

        Raises:
            ValueError: If it is another.
        """
        likelihood = getattr(nll, "likelihood", None)
        if likelihood is not None and not solves(likelihood):
            raise ValueError(
                f"algorithm {self.name!r} is exact for Gaussian noise of one variance for each target, but the "
                f"likelihood is {likelihood!r}: use likelihood='gaussian', or an algorithm for any likelihood such as "
                "'ibaml'."
            )
        super().check_task(nll, meta, episode)

    def outer_loss(self, solution: Any, shared: Params, query: Batch) -> Tensor:
        """Returns the outer loss, summed over targets, mean over examples; see ``Head`` and ``outer``.

        With ``f`` and ``v`` the moments of a query example and ``s2`` the noise variance, ``predictive_nll`` is
        ``-log N(y; f, v + s2)`` and ``expected_nll`` is ``-log N(y; f, s2) + v / (2 s2)``. ``marginal`` adds the nll
        of the support set and the joint one of the query set given it, and divides by the number of examples of both.
        An example counts with the targets that were measured.
        """
        targets = Measured.of(query.y)
        noise = noise_variance(shared, targets.values)
        if self.outer == "marginal":
            support_nll, num_support = self.support_nll(solution)
            loss = (support_nll + self.joint_nll(solution, noise, query)) / (num_support + len(query.y))
        else:
            mean, variance = self.moments(solution, query.x)
            noise, error = noise.unsqueeze(-1), targets.error(mean)
            if self.outer == "predictive_nll":
                total = variance + noise
                each = error**2 / total + torch.log(2 * math.pi * total)
            else:
                each = (error**2 + variance) / noise + torch.log(2 * math.pi * noise)
            loss = 0.5 * (targets.present * each).sum(0).mean()
        return loss.to(query.x.dtype)


def noise_variance(shared: Params, targets: Tensor) -> Tensor:
    """Returns the variance of each target's noise, ``[num_targets]``, float64; 1 where none is learned.

    Args:
        shared: Holds the parameters of ``Gaussian``; ``UnitGaussian`` has none.
        targets: ``[num_targets, num_examples]``.
    """
    log_variance = shared.get(Gaussian.parameter_name)
    return targets.new_ones(targets.shape[0]) if log_variance is None else torch.exp(log_variance.double())
