"""Implicit Bayesian meta-learning: a learned prior over the weights of any PyTorch network.

Examples:
    >>> import torch, ibaml
    >>> prior = ibaml.DiagonalGaussian({"w": torch.zeros(2)}, {"w": torch.zeros(2)})
    >>> ibaml.kl_divergence(prior, prior)
    tensor(0.)
"""

from importlib.metadata import version

__version__ = version("ibaml")

from ibaml.algorithms import (  # noqa: E402 - the version must exist before the modules that store it
    Algorithm,
    MetaParameters,
    abml,
    fomaml,
    ibaml,
    imaml,
    make_algorithm,
    maml,
    vampire,
)
from ibaml.data.prepare import SplitSettings  # noqa: E402
from ibaml.hypergradients import (  # noqa: E402
    first_order_hypergradient,
    gaussian_implicit_hypergradient,
    implicit_hypergradient,
    unrolled_hypergradient,
)
from ibaml.learner import MetaLearner, NotFittedError, TaskPosterior  # noqa: E402
from ibaml.priors.diagonal import DiagonalGaussian, kl_divergence  # noqa: E402
from ibaml.solvers.curvature import gauss_newton_vp, hvp  # noqa: E402
from ibaml.solvers.inner import adam, gradient_descent, preconditioned_gradient_descent  # noqa: E402
from ibaml.solvers.linear import cg, dense, minres, neumann  # noqa: E402
from ibaml.train import Trainer, TrainerSettings, TrainingDivergedError  # noqa: E402
from ibaml.types import (  # noqa: E402
    Batch,
    Episode,
    HypergradientInfo,
    InnerSolution,
    LinearSolution,
    TaskSampler,
)

__all__ = [
    "Algorithm",
    "Batch",
    "DiagonalGaussian",
    "Episode",
    "HypergradientInfo",
    "InnerSolution",
    "LinearSolution",
    "MetaLearner",
    "MetaParameters",
    "NotFittedError",
    "SplitSettings",
    "TaskPosterior",
    "TaskSampler",
    "Trainer",
    "TrainerSettings",
    "TrainingDivergedError",
    "abml",
    "adam",
    "cg",
    "dense",
    "first_order_hypergradient",
    "fomaml",
    "gauss_newton_vp",
    "gaussian_implicit_hypergradient",
    "gradient_descent",
    "hvp",
    "ibaml",
    "imaml",
    "implicit_hypergradient",
    "kl_divergence",
    "make_algorithm",
    "maml",
    "minres",
    "neumann",
    "preconditioned_gradient_descent",
    "unrolled_hypergradient",
    "vampire",
]
