"""Tasks for a small Conv4 in float64 whose inner problems are solved to the end: a reference for meta-gradients."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import nn

from benchmarks.settings import AccuracySettings
from ibaml import tree
from ibaml.algorithms import IBAML, MetaParameters, TaskNoise, objectives
from ibaml.algorithms.model import Model, build_model
from ibaml.hypergradients import gaussian_implicit_hypergradient
from ibaml.likelihoods import Categorical
from ibaml.networks import Conv4
from ibaml.priors import DiagonalGaussian, DiagonalPrior
from ibaml.solvers.curvature import value_gradient_and_hvp
from ibaml.solvers.inner import InnerSolver
from ibaml.solvers.linear import CG, LinearSolver, cg
from ibaml.types import Batch, Episode, HypergradientInfo, PyTree, Tensor

_MAX_LBFGS_STEPS = 400
_NUM_NEWTON_STEPS = 2


class ConvProblem(NamedTuple):
    """A small Conv4 with tasks and their converged meta-gradients.

    Attributes:
        model: The network.
        algorithm: iBaML with all settings but the inner solver's.
        meta: Meta-parameters.
        episodes: One per task.
        noises: One per task.
        exact: Converged meta-gradients.
        largest_curvature: Of the inner loss, over all tasks, in (mean, log-variance).
        inner_grad_norm: Largest relative gradient norm that is left in the reference solutions.
        linear_residual: Largest relative residual that is left in the reference systems.
    """

    model: Model
    algorithm: IBAML
    meta: MetaParameters
    episodes: list[Episode]
    noises: list[TaskNoise]
    exact: list[PyTree]
    largest_curvature: float
    inner_grad_norm: float
    linear_residual: float

    def estimate(
        self, inner: InnerSolver, linear: LinearSolver, tasks: Sequence[int], *, precondition: bool = False
    ) -> list[PyTree]:
        """Returns the hypergradients of some tasks at some cost."""
        algorithm = dataclasses.replace(self.algorithm, inner=inner, linear=linear, precondition=precondition)
        return [
            algorithm.hypergradient(self.model, self.meta, self.episodes[task], self.noises[task])[0].prior
            for task in tasks
        ]


def build_conv_problem(settings: AccuracySettings, prior_log_var: tuple[float, float]) -> ConvProblem:
    """Builds network and tasks and solves every inner problem to the end."""
    generator = torch.Generator().manual_seed(settings.seed)
    size = settings.image_size
    network = Conv4(5, image_size=size, channels=settings.num_channels, downsample="stride", generator=generator)
    for index, module in enumerate(network.features):
        if isinstance(module, nn.ReLU):
            # Without kinks there is a solution at which the gradient vanishes and the Hessian exists.
            network.features[index] = nn.SiLU()
    model = build_model(network.double(), Categorical())
    algorithm = IBAML(
        num_samples=settings.num_samples,
        temperature=settings.temperature,
        prior=DiagonalPrior(initial_log_var=prior_log_var),
    )
    meta = algorithm.init(model.adapted, model.shared, generator=generator)

    def batch(prototypes: Tensor) -> Batch:
        labels = torch.arange(5).repeat_interleave(5)
        noise = torch.randn((25, 1, size, size), generator=generator, dtype=torch.float64)
        return Batch(prototypes[labels] + noise, labels)

    episodes: list[Episode] = []
    for _ in range(settings.num_tuning_tasks + settings.num_tasks):
        prototypes = torch.randn((5, 1, size, size), generator=generator, dtype=torch.float64)
        episodes.append(Episode(batch(prototypes), batch(prototypes)))
    noises = [algorithm.draw_noise(meta, generator=generator) for _ in episodes]
    unsolved = ConvProblem(model, algorithm, meta, episodes, noises, [], 0.0, 0.0, 0.0)
    return _solve(unsolved)


def _solve(problem: ConvProblem) -> ConvProblem:
    """Adds reference solutions and the largest curvature."""
    exact: list[PyTree] = []
    grad_norms: list[float] = []
    residuals: list[float] = []
    curvatures: list[float] = []
    for episode, noise in zip(problem.episodes, problem.noises, strict=True):
        weight = objectives.kl_weight(len(episode.support.y), problem.algorithm.temperature)
        loss = partial(inner_loss, problem, episode, noise, weight)
        curvatures.append(_largest_curvature(loss, problem.meta.prior))
        solution = _minimise(loss, problem.meta.prior, weight)
        gradient, info = gradient_at(problem, episode, noise, solution, CG(max_steps=3000, rtol=1e-10))
        exact.append(gradient)
        grad_norms.append(float(info.inner_grad_norm / tree.norm(torch.func.grad(loss)(problem.meta.prior))))
        residuals.append(float(info.linear_residual))
    return problem._replace(
        exact=exact,
        largest_curvature=max(curvatures),
        inner_grad_norm=max(grad_norms),
        linear_residual=max(residuals),
    )


def _expected_nll(problem: ConvProblem, posterior: PyTree, noise: PyTree, batch: Batch) -> Tensor:
    return objectives.expected_nll(lambda w, b: problem.model.per_example(w, {}, b), posterior, noise, batch)


def inner_loss(problem: ConvProblem, episode: Episode, noise: TaskNoise, weight: float, posterior: PyTree) -> Tensor:
    """Returns the negative ELBO of the support set; ``weight`` is the KL weight."""
    expected = _expected_nll(problem, posterior, noise.inner, episode.support)
    return objectives.negative_elbo(expected, posterior, problem.meta.prior, weight)


def _minimise(loss: Callable[[PyTree], Tensor], prior: DiagonalGaussian, weight: float) -> PyTree:
    """L-BFGS in coordinates in which the Hessian of the KL term is one at the prior, then Newton steps."""
    scale = DiagonalGaussian(
        tree.map(lambda log_var: torch.exp(0.5 * log_var) / math.sqrt(weight), prior.log_var),
        tree.map(lambda log_var: torch.full_like(log_var, math.sqrt(2 / weight)), prior.log_var),
    )
    zeros, unravel = tree.ravel(tree.zeros_like(prior))
    white = zeros.clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [white], max_iter=_MAX_LBFGS_STEPS, history_size=50, tolerance_grad=1e-10, line_search_fn="strong_wolfe"
    )

    def place(vector: Tensor) -> PyTree:
        return tree.add(prior, tree.mul(scale, unravel(vector)))

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss(place(white))
        value.backward()
        return value

    optimizer.step(closure)
    solution = tree.detach(place(white))
    for _ in range(_NUM_NEWTON_STEPS):
        _, gradient, product = value_gradient_and_hvp(loss, solution)
        step = cg(
            product, gradient, max_steps=1000, rtol=1e-6, preconditioner=partial(tree.mul, tree.mul(scale, scale))
        )
        solution = tree.sub(solution, step.value)
    return solution


def gradient_at(
    problem: ConvProblem, episode: Episode, noise: TaskNoise, solution: PyTree, linear_solver: LinearSolver
) -> tuple[PyTree, HypergradientInfo]:
    """Returns the implicit meta-gradient at an adapted posterior, preconditioned."""
    return gaussian_implicit_hypergradient(
        lambda posterior: _expected_nll(problem, posterior, noise.inner, episode.support),
        lambda posterior, prior: _expected_nll(problem, posterior, noise.outer, episode.query),
        solution,
        problem.meta.prior,
        objectives.kl_weight(len(episode.support.y), problem.algorithm.temperature),
        linear_solver,
    )


def _largest_curvature(loss: Callable[[PyTree], Tensor], point: PyTree) -> float:
    """Returns the largest absolute eigenvalue of the Hessian, by power iteration."""
    product = value_gradient_and_hvp(loss, point)[2]
    vector, size = tree.map(torch.ones_like, point), 0.0
    for _ in range(30):
        vector = product(tree.scale(1 / tree.norm(vector), vector))
        size = float(tree.norm(vector))
    return size
