"""Empirical Bayes for heads with a prior over columns, one task at a time: incremental expectation maximisation.

The tasks are one hierarchical model: ``w_t ~ N(m, S)`` for each target, ``y_t = Z_t w_t + noise`` of variance ``s2``.
Expectation maximisation of its marginal likelihood (Dempster, Laird and Rubin 1977; for mixed models Laird and Ware
1982) averages over tasks what the posteriors ``N(m_t, S_t)`` expect:

    m = mean_t m_t      S = mean_t [S_t + (m_t - m) (m_t - m)^T]      s2 = sum_t E|y_t - Z_t w_t|^2 / sum_t N_t

The averages are sufficient, and ``(m, S, s2)`` determine them. So the prior itself remembers all earlier tasks, but for
how many they were, and a new one enters with its weight (Neal and Hinton 1998; Cappe and Moulines 2009). Unlike passes
over tasks that are kept, the posteriors of earlier tasks stay those under the prior of their time.

A target that was not measured is one more unknown of its task, which is expected to be ``s2`` away from its mean.

For counts and outliers the posteriors are Laplace's approximation, as in the penalised quasi-likelihood of generalised
linear mixed models (Breslow and Clayton 1993), and the likelihood's own parameters stay. From binary labels that loses
variance with every task (Breslow and Lin 1995), so that class heads are not observed.
"""

from typing import Any, NamedTuple, TypeAlias

import torch

from ibaml import tree
from ibaml.algorithms.base import MetaParameters, TaskNoise
from ibaml.algorithms.heads.base import HeadPosterior
from ibaml.algorithms.heads.gaussian import Measured, noise_variance
from ibaml.algorithms.heads.generalized_linear import GeneralizedLinear
from ibaml.algorithms.heads.linear_gaussian import LinearGaussian
from ibaml.algorithms.model import Model
from ibaml.likelihoods import Gaussian
from ibaml.types import Batch, Tensor

Observer: TypeAlias = LinearGaussian | GeneralizedLinear
"""Heads whose prior a single task can move."""


class Experience(NamedTuple):
    """How much a prior stands for.

    Attributes:
        num_tasks: Number of tasks.
        num_rows: Number of their examples.
    """

    num_tasks: float
    num_rows: float

    def at_most(self, num_tasks: float) -> "Experience":
        """Returns the experience with all tasks weighing less, so that they are as many as ``num_tasks`` at most."""
        share = min(1.0, num_tasks / self.num_tasks)
        return Experience(share * self.num_tasks, share * self.num_rows)


def observe(
    head: Observer, model: Model, meta: MetaParameters, task: Batch, experience: Experience
) -> tuple[MetaParameters, Experience]:
    """Takes a task into the prior: one incremental step of expectation maximisation; features stay as they are.

    Args:
        head: The head, with Bayes' rule: a full covariance at temperature 1.
        model: Gives the features.
        meta: Prior, and shared parameters with the noise variance, if it is learned.
        task: All examples of the task, at least one.
        experience: What the prior stands for so far.

    Returns:
        The meta-parameters and what they stand for now.

    Raises:
        ValueError: If the head is not at Bayes' rule, has outputs that all tasks share, or a family of priors without a
            closed form.

    Cost:
        That of the posterior, and a Cholesky factorisation of as many rows as there are weights.
    """
    _require_bayes(head, model)
    with torch.no_grad():
        posterior: HeadPosterior[Any] = head.adapt(model, meta, task, TaskNoise({}, {})).value
        inputs = head.inputs(model, meta.shared, posterior, task.x).double()
        identity = torch.eye(inputs.shape[-1], dtype=inputs.dtype, device=inputs.device)
        earlier_prior = tree.map(torch.Tensor.double, meta.prior)
        mean, factor = head.prior.mean(earlier_prior), head.prior.whiten(earlier_prior, identity)
        # Columns that share a prior are so many draws from it: ``[num_draws, num_priors, ...]``.
        shape = (-1, len(mean))
        own_mean = posterior.solution.mean.unflatten(0, shape)
        own_covariance = head.joint_covariance(posterior.solution, identity).unflatten(0, shape)
        weight = 1 / (experience.num_tasks + 1)
        moved = mean + weight * (own_mean.mean(0) - mean) if len(meta.prior.mean) else mean
        earlier, own = factor @ factor.mT + _outer(mean - moved), (own_covariance + _outer(own_mean - moved)).mean(0)
        prior = head.prior.from_moments(moved, (1 - weight) * earlier + weight * own, like=meta.prior)
        if prior is None:
            raise ValueError(
                f"prior={head.prior!r} has no closed form for the moments of the weights, by which a prior is updated: "
                "use DiagonalColumnPrior or FullColumnPrior."
            )
        shared, num_rows = dict(meta.shared), len(task.y)
        if isinstance(head, LinearGaussian) and (log_noise := shared.get(Gaussian.parameter_name)) is not None:
            targets = Measured.of(task.y)
            expected, variance = head.moments(posterior.solution, inputs)
            before = noise_variance(shared, expected)
            away = targets.error(expected) ** 2 + targets.present * variance
            squares = (away + (1 - targets.present) * before.unsqueeze(-1)).sum(-1)
            noise = (experience.num_rows * before + squares) / (experience.num_rows + num_rows)
            shared[Gaussian.parameter_name] = torch.log(noise).to(log_noise.dtype)
    return MetaParameters(prior, shared), Experience(experience.num_tasks + 1, experience.num_rows + num_rows)


def _require_bayes(head: Observer, model: Model) -> None:
    if isinstance(head, LinearGaussian) and (head.covariance != "full" or head.temperature != 1):
        raise ValueError(
            "a prior is updated by the posteriors of Bayes' rule; expected covariance='full' and temperature=1, but "
            f"they are {head.covariance!r} and {head.temperature}."
        )
    if isinstance(head, GeneralizedLinear) and model.likelihood.num_outputs(1) > 1:
        raise ValueError(
            f"the likelihood {model.likelihood!r} has outputs that all tasks share, which a single task has no closed "
            "form for: fit again with all tasks."
        )


def _outer(vectors: Tensor) -> Tensor:
    return vectors.unsqueeze(-1) * vectors.unsqueeze(-2)
