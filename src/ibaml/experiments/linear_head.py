"""iBaML in closed form: Bayesian linear regression on learned features, with a diagonal posterior.

The features of a row are a constant, the row itself and, if asked for, a hidden layer of ``tanh`` units shared by all
groups; each group has its own weights on them, with a meta-learned Gaussian prior and noise variance ``s2``. On support
features ``F`` (one row each) and with temperature 1 the inner problem has the solution

    A = F^T F / s2 + diag(1 / D)        mean = A^-1 (m / D + F^T y / s2)        d = 1 / diag(A)

An implicit gradient asks where the inner solver ended, not how it got there: one linear solve takes the place of the
inner steps, and both losses are exact expectations without weight samples.
"""

import math
from functools import partial
from typing import NamedTuple

import torch

from ibaml import tree
from ibaml.hypergradients import gaussian_implicit_hypergradient
from ibaml.priors import DiagonalGaussian
from ibaml.solvers.linear import dense
from ibaml.types import Batch, Episode, HypergradientInfo, Params, TaskSampler, Tensor


class LinearHead(NamedTuple):
    """Meta-parameters.

    Attributes:
        prior: Prior over the ``"weight"`` of each feature, ``[num_features + 1 + num_hidden]``.
        shared: ``"log_noise"``, the log noise variance, and, with a hidden layer, its ``"hidden"`` weights,
            ``[num_hidden, num_features + 1]``.
    """

    prior: DiagonalGaussian
    shared: Params


def init(num_features: int, num_hidden: int = 0, *, generator: torch.Generator) -> LinearHead:
    """Returns meta-parameters to start from, in float64, for standardised inputs and targets.

    Args:
        num_features: Number of inputs.
        num_hidden: Number of hidden units; 0 for a linear model.
        generator: Source of the hidden weights.
    """
    width = num_features + 1 + num_hidden
    log_var = torch.full((width,), -1.0, dtype=torch.float64)
    log_var[num_features + 1 :] -= math.log(max(1, num_hidden))
    shared = {"log_noise": torch.tensor(-1.0, dtype=torch.float64)}
    if num_hidden:
        hidden = torch.randn(num_hidden, num_features + 1, generator=generator, dtype=torch.float64)
        shared["hidden"] = hidden / math.sqrt(num_features + 1)
    return LinearHead(DiagonalGaussian({"weight": torch.zeros_like(log_var)}, {"weight": log_var}), shared)


def features(shared: Params, x: Tensor) -> Tensor:
    """Returns a constant, the inputs and the hidden units, ``[num_rows, num_features + 1 + num_hidden]``."""
    linear = torch.cat([torch.ones_like(x[:, :1]), x], -1)
    return torch.cat([linear, torch.tanh(linear @ shared["hidden"].T)], -1) if "hidden" in shared else linear


def adapt(meta: LinearHead, support: Batch) -> DiagonalGaussian:
    """Solves the inner problem of one group.

    Args:
        meta: Meta-parameters.
        support: Inputs ``[num_rows, num_features]`` and targets ``[num_rows, 1]``.
    """
    design = features(meta.shared, support.x)
    noise, prior = meta.shared["log_noise"].exp(), meta.prior
    precision = (-prior.log_var["weight"]).exp()
    matrix = design.T @ design / noise + torch.diag(precision)
    mean = torch.linalg.solve(matrix, precision * prior.mean["weight"] + design.T @ support.y[:, 0] / noise)
    return DiagonalGaussian({"weight": mean}, {"weight": -torch.diagonal(matrix).log()})


def predict(posterior: DiagonalGaussian, shared: Params, x: Tensor) -> tuple[Tensor, Tensor]:
    """Returns predictive means and variances, noise included, each ``[num_rows]``."""
    design = features(shared, x)
    variance = design**2 @ posterior.log_var["weight"].exp()
    return design @ posterior.mean["weight"], variance + shared["log_noise"].exp()


def hypergradient(meta: LinearHead, episode: Episode) -> tuple[LinearHead, HypergradientInfo]:
    """Implicit gradient of the query set's predictive nll in all meta-parameters, for one group.

    Args:
        meta: Meta-parameters.
        episode: One group's support and query rows.

    Cost:
        Two linear solves, and one Hessian-vector product for each of two numbers per weight.
    """

    def expected_nll(posterior: DiagonalGaussian, shared: Params) -> Tensor:
        design = features(shared, episode.support.x)
        squared = (episode.support.y[:, 0] - design @ posterior.mean["weight"]) ** 2
        expected = squared + design**2 @ posterior.log_var["weight"].exp()
        log_noise = shared["log_noise"]
        return 0.5 * (expected * (-log_noise).exp() + log_noise + math.log(2 * math.pi)).mean()

    def outer_loss(posterior: DiagonalGaussian, prior: DiagonalGaussian, shared: Params) -> Tensor:
        del prior
        mean, variance = predict(posterior, shared, episode.query.x)
        squared = (episode.query.y[:, 0] - mean) ** 2
        return 0.5 * (squared / variance + variance.log() + math.log(2 * math.pi)).mean()

    meta = tree.detach(meta)
    (prior, shared), info = gaussian_implicit_hypergradient(
        expected_nll,
        outer_loss,
        adapt(meta, episode.support),
        meta.prior,
        1 / episode.support.y.shape[0],
        # A few dozen unknowns: all products at once are five times faster than conjugate gradients.
        dense,
        shared=meta.shared,
    )
    return LinearHead(prior, shared), info


def fit(
    tasks: TaskSampler, *, num_hidden: int, num_steps: int, learning_rate: float = 0.1, seed: int = 0
) -> tuple[LinearHead, HypergradientInfo]:
    """Meta-trains on groups with Adam, 16 groups a step, the rate falling to zero along half a cosine.

    Args:
        tasks: Groups to learn from, in float64.
        num_hidden: Number of hidden units; 0 for a linear model.
        num_steps: Number of meta-steps.
        learning_rate: Adam's rate.
        seed: Seed of the tasks and of the hidden weights.

    Returns:
        The meta-parameters, and the diagnostics of the last step, one entry per group.
    """
    generator = torch.Generator().manual_seed(seed)
    meta = init(tasks.input_shape[0], num_hidden, generator=generator)
    parameters = tree.leaves(meta)
    optimizer = torch.optim.Adam(parameters, lr=learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=num_steps)
    info = None
    for _ in range(num_steps):
        episodes = tasks.sample(16, generator=generator)
        gradients, info = torch.func.vmap(partial(hypergradient, meta))(episodes)
        for parameter, gradient in zip(parameters, tree.leaves(gradients), strict=True):
            parameter.grad = gradient.mean(0)
        optimizer.step()
        schedule.step()
    assert info is not None
    return tree.detach(meta), info
