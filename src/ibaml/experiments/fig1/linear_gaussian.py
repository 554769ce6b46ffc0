"""Bayesian linear regression with everything in closed form: the problem of Fig. 1 and of the theorems."""

from functools import partial

import torch

from ibaml.algorithms import objectives
from ibaml.data.linear_regression import closed_form_posterior
from ibaml.hypergradients import InnerRun, gaussian_implicit_hypergradient, unrolled_hypergradient
from ibaml.priors import DiagonalGaussian, kl_divergence
from ibaml.priors.diagonal import DiagonalGeometry
from ibaml.solvers.inner import GradientDescent, NaturalGradient
from ibaml.solvers.linear import LinearSolver
from ibaml.types import Batch, Episode, Tensor


class LinearGaussianProblem:
    """A batch of linear regression tasks, their losses, and their exact hypergradients.

    Parameters are ``DiagonalGaussian`` with one entry, ``"weights"``; meta-parameters are ``(m, log D)``.

    Args:
        episodes: Tasks with a leading task axis, ``x`` of shape ``[num_tasks, num_examples, num_features]``.
        noise_variance: Variance of the noise on the targets.
        prior_variance: The initial prior is ``N(0, prior_variance I)``.
        relative_learning_rate: Rate of gradient descent times the largest curvature of the inner loss over all tasks.
        preconditioned_learning_rate: Rate of the preconditioned inner solver.
    """

    def __init__(
        self,
        episodes: Episode,
        *,
        noise_variance: float,
        prior_variance: float = 1.0,
        relative_learning_rate: float = 0.35,
        preconditioned_learning_rate: float = 0.5,
    ) -> None:
        """Keeps the tasks and computes what depends on all of them."""
        self.episodes = episodes
        self.noise_variance = noise_variance
        self.preconditioned_learning_rate = preconditioned_learning_rate
        num_shots, num_features = episodes.support.x.shape[1:]
        zeros = episodes.support.x.new_zeros(num_features)
        self.prior = DiagonalGaussian({"weights": zeros}, {"weights": torch.full_like(zeros, prior_variance).log()})
        self.kl_weight = objectives.kl_weight(num_shots)
        curvature = torch.linalg.eigvalsh(self.data_curvature(episodes.support)).max() + self.kl_weight / prior_variance
        self.learning_rate = relative_learning_rate / float(curvature)

    def data_curvature(self, batch: Batch) -> Tensor:
        """Returns the Hessian of the nll in the mean, ``X^T X / (N s2)``: ``[..., num_features, num_features]``."""
        return batch.x.mT @ batch.x / (batch.x.shape[-2] * self.noise_variance)

    def nll(self, posterior: DiagonalGaussian, batch: Batch) -> Tensor:
        """Returns the expected nll under the posterior, without the constant of the noise: no sampling is needed."""
        residual = batch.y.squeeze(-1) - batch.x @ posterior.mean["weights"]
        spread = (batch.x**2).sum(0) @ posterior.log_var["weights"].exp()
        return (residual.dot(residual) + spread) / (2 * self.noise_variance * batch.x.shape[0])

    def inner_loss(self, posterior: DiagonalGaussian, prior: DiagonalGaussian, support: Batch) -> Tensor:
        """Returns the nll of the support set plus the weighted KL divergence."""
        return self.nll(posterior, support) + self.kl_weight * kl_divergence(posterior, prior)

    def solution(self, prior: DiagonalGaussian, support: Batch) -> DiagonalGaussian:
        """Returns the exact solution of the inner problem, differentiable in the prior."""
        mean, variance = closed_form_posterior(
            support.x,
            support.y,
            prior.mean["weights"],
            prior.log_var["weights"].exp(),
            self.noise_variance,
            kl_weight=self.kl_weight,
        )
        return DiagonalGaussian({"weights": mean}, {"weights": variance.log()})

    def exact_hypergradient(self, episode: Episode) -> DiagonalGaussian:
        """Returns the derivative of the outer loss at the exact solution, by autograd through its closed form."""
        return torch.func.grad(lambda prior: self.nll(self.solution(prior, episode.support), episode.query))(self.prior)

    def gradient_descent(self, num_steps: int) -> InnerRun:
        """Returns gradient descent with so many steps."""
        return GradientDescent(num_steps=num_steps, learning_rate=self.learning_rate)

    def preconditioned(self, num_steps: int) -> InnerRun:
        """Returns natural gradient descent: steps scaled by the posterior variances."""
        solver = NaturalGradient(num_steps=num_steps, learning_rate=self.preconditioned_learning_rate)
        return partial(solver, geometry=DiagonalGeometry(self.prior, self.kl_weight))

    def adapt(self, solver: InnerRun, support: Batch) -> DiagonalGaussian:
        """Returns the posterior that an inner solver finds from the prior."""
        return solver(lambda posterior: self.inner_loss(posterior, self.prior, support), self.prior).value

    def unrolled(self, solver: InnerRun, episode: Episode) -> DiagonalGaussian:
        """Returns the unrolled hypergradient of one task."""
        return unrolled_hypergradient(
            lambda posterior, prior: self.inner_loss(posterior, prior, episode.support),
            lambda posterior, prior: self.nll(posterior, episode.query),
            lambda prior: prior,
            self.prior,
            solver,
        )[0]

    def implicit(
        self, solver: InnerRun, linear_solver: LinearSolver, precondition: bool, episode: Episode
    ) -> DiagonalGaussian:
        """Returns the Gaussian implicit hypergradient of one task."""
        return gaussian_implicit_hypergradient(
            lambda posterior: self.nll(posterior, episode.support),
            lambda posterior, prior: self.nll(posterior, episode.query),
            self.adapt(solver, episode.support),
            self.prior,
            self.kl_weight,
            linear_solver,
            precondition=precondition,
        )[0]
