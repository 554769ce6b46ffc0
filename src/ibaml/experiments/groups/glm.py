"""What a statistician would do with grouped classes and counts: generalised linear mixed models, and simpler ones.

Logistic and Poisson regression, ``p(y | eta)`` with ``eta = x.(b + u)``, where a group has effects
``u ~ N(0, diag(s^2))`` in its first features. Each function returns a predictor for a new group: from the group's known
rows and the asked ones to expected values and log-probabilities there.
"""

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, Protocol

import numpy as np

from ibaml.experiments.groups.baselines import Array, Rows, splits_of_groups, with_constant
from ibaml.optional import require


class Predicted(NamedTuple):
    """Predictions of some rows.

    Attributes:
        mean: Expected values: probabilities of the class 1, or rates, ``[num_rows]``.
        log_prob: Log-probabilities of what was observed, in nats, ``[num_rows]``.
    """

    mean: Array
    log_prob: Array


Predictor = Callable[[Array, Array, Array, Array], Predicted]
"""``(x_support, y_support, x_query, y_query) -> predictions``."""


class Family(Protocol):
    """A distribution of targets whose natural parameter is ``eta``."""

    def mean(self, eta: Array, /) -> Array:
        """Returns the expected value, the derivative of what makes probabilities sum to one."""
        ...

    def variance(self, eta: Array, /) -> Array:
        """Returns the variance, its second derivative."""
        ...

    def log_prob(self, y: Array, eta: Array, /) -> Array:
        """Returns ``log p(y | eta)`` in nats."""
        ...

    def link(self, mean: float, /) -> float:
        """Returns the ``eta`` of an expected value."""
        ...


class Bernoulli:
    """Classes 0 and 1."""

    def mean(self, eta: Array) -> Array:
        """See ``Family``."""
        # Here and below, so that the command line, which knows all experiments, does not import scipy.
        from scipy.special import expit

        return expit(eta)

    def variance(self, eta: Array) -> Array:
        """See ``Family``."""
        return self.mean(eta) * self.mean(-eta)

    def log_prob(self, y: Array, eta: Array) -> Array:
        """See ``Family``."""
        return y * eta - np.logaddexp(0, eta)

    def link(self, mean: float) -> float:
        """See ``Family``."""
        return math.log(mean / (1 - mean))


class Poisson:
    """Counts."""

    def mean(self, eta: Array) -> Array:
        """See ``Family``."""
        return np.exp(eta)

    def variance(self, eta: Array) -> Array:
        """See ``Family``."""
        return np.exp(eta)

    def log_prob(self, y: Array, eta: Array) -> Array:
        """See ``Family``."""
        from scipy.special import gammaln

        return y * eta - np.exp(eta) - gammaln(y + 1)

    def link(self, mean: float) -> float:
        """See ``Family``."""
        return math.log(mean)


FAMILIES: Mapping[str, Family] = {"categorical": Bernoulli(), "poisson": Poisson()}
"""By the name of the likelihood."""


def mode(family: Family, x: Array, y: Array, offset: Array, precision: Array) -> tuple[Array, Array]:
    """Returns the weights ``w`` of the greatest ``log p(y | offset + x.w) - w.P.w / 2``, and the precision there.

    Newton's method, whose steps are halved until they lead upwards.

    Args:
        family: Distribution of the targets.
        x: ``[num_rows, num_weights]``.
        y: Targets.
        offset: ``[num_rows]``.
        precision: Diagonal of ``P``.
    """

    def loss(weights: Array) -> float:
        return float(0.5 * weights @ (precision * weights) - family.log_prob(y, offset + x @ weights).sum())

    def curvature(weights: Array) -> Array:
        return x.T @ (family.variance(offset + x @ weights)[:, None] * x) + np.diag(precision)

    weights = np.zeros(x.shape[1])
    for _ in range(100):
        slope = precision * weights - x.T @ (y - family.mean(offset + x @ weights))
        step = np.linalg.solve(curvature(weights), slope)
        size, before = 1.0, loss(weights)
        with np.errstate(over="ignore"):
            while not loss(weights - size * step) <= before and size > 1e-8:
                size /= 2
        weights = weights - size * step
        if np.abs(step).max() < 1e-10:
            break
    return weights, curvature(weights)


class Effects(NamedTuple):
    """A generalised linear mixed model.

    Attributes:
        fixed: ``b``, the constant's first, ``[1 + num_features]``.
        deviations: ``s``, the constant's first, ``[1 + num_slopes]``.
    """

    fixed: Array
    deviations: Array


_NUM_NODES = 15
_MOST_SPLITS = 100
"""Sets of known rows that tell one number."""


def of_effects(effects: Effects, family: Family) -> Predictor:
    """Returns the exact predictions of a mixed model of few effects: the integral over these given the known rows.

    Adaptive Gauss-Hermite quadrature: nodes are those of the Laplace approximation at the mode.
    """
    from scipy.special import logsumexp

    num_effects = len(effects.deviations)
    nodes, weights = np.polynomial.hermite_e.hermegauss(_NUM_NODES)
    grid = np.stack(np.meshgrid(*[nodes] * num_effects, indexing="ij"), -1).reshape(-1, num_effects)
    log_weights = sum(np.meshgrid(*[np.log(weights)] * num_effects, indexing="ij"), np.zeros(())).reshape(-1)

    def predict(x_support: Array, y_support: Array, x_query: Array, y_query: Array) -> Predicted:
        known, asked = with_constant(x_support), with_constant(x_query)
        # Effects in units of their deviations: their prior is standard normal.
        own, own_asked = (part[:, :num_effects] * effects.deviations for part in (known, asked))
        offset = known @ effects.fixed
        middle, precision = mode(family, own, y_support, offset, np.ones(num_effects))
        drawn = middle + np.linalg.solve(np.linalg.cholesky(precision).T, grid.T).T
        log_joint = family.log_prob(y_support, offset + drawn @ own.T).sum(-1) - 0.5 * (drawn**2).sum(-1)
        log_share = log_joint + log_weights + 0.5 * (grid**2).sum(-1)
        log_share = log_share - logsumexp(log_share)
        eta = asked @ effects.fixed + drawn @ own_asked.T
        log_prob = logsumexp(log_share[:, None] + family.log_prob(y_query, eta), axis=0)
        return Predicted(np.exp(log_share) @ family.mean(eta), log_prob)

    return predict


def mixed_effects(rows: Rows, *, likelihood: str, num_slopes: int) -> Predictor:
    """Bayesian generalised linear mixed model of statsmodels by variational Bayes, with its default priors.

    Random intercept and slopes are independent there. A new group is predicted at the means of fixed effects and of the
    logarithms of standard deviations.

    Args:
        rows: Training groups.
        likelihood: ``"categorical"`` (of the classes 0 and 1) or ``"poisson"``.
        num_slopes: The first so many features get a random slope.

    Raises:
        ImportError: If statsmodels is not installed.
    """
    models = require("statsmodels.genmod.bayes_mixed_glm", "statsmodels", "experiments")
    model = models.BinomialBayesMixedGLM if likelihood == "categorical" else models.PoissonBayesMixedGLM
    design, groups = with_constant(rows.x), np.asarray(rows.groups)
    is_of_group = (groups[:, None] == np.unique(groups)).astype(float)
    effects = np.concatenate([is_of_group * design[:, [place]] for place in range(num_slopes + 1)], 1)
    kinds = np.repeat(np.arange(num_slopes + 1), is_of_group.shape[1])
    with warnings.catch_warnings():
        # Its optimiser says where it ends before its gradient is as small as it wants it.
        warnings.simplefilter("ignore")
        fit = model(rows.y, design, effects, kinds).fit_vb()
    return of_effects(Effects(np.asarray(fit.fe_mean), np.exp(np.asarray(fit.vcp_mean))), FAMILIES[likelihood])


def pooled(rows: Rows, *, likelihood: str) -> Predictor:
    """Logistic or Poisson regression on all training rows, blind to groups and to the known rows.

    A penalty that is next to nothing keeps classes that a feature tells apart from making weights infinite.
    """
    family, design = FAMILIES[likelihood], with_constant(rows.x)
    weights, _ = mode(family, design, rows.y, np.zeros(len(design)), np.full(design.shape[1], 1e-4))

    def predict(x_support: Array, y_support: Array, x_query: Array, y_query: Array) -> Predicted:
        del x_support, y_support
        eta = with_constant(x_query) @ weights
        return Predicted(family.mean(eta), family.log_prob(y_query, eta))

    return predict


def per_group_ridge(rows: Rows, *, likelihood: str, num_support: int, num_draws: int = 5, seed: int = 0) -> Predictor:
    """Ridge regression on the known rows alone, around the mean of all training rows.

    The penalty ``|w|^2 / (2 t)`` of all weights, that of the constant about the mean, has the ``t`` of a grid with the
    highest predictive density on training groups.

    Args:
        rows: Training groups.
        likelihood: ``"categorical"`` (of the classes 0 and 1) or ``"poisson"``.
        num_support: Known rows that the penalty is chosen for.
        num_draws: Random sets of known rows per training group.
        seed: Seed of those.
    """
    family, generator = FAMILIES[likelihood], np.random.default_rng(seed)
    middle = family.link(float(rows.y.mean()))
    splits = list(splits_of_groups(np.asarray(rows.groups), num_support, num_draws, generator))
    splits = splits[:: math.ceil(len(splits) / _MOST_SPLITS)]

    def of_variance(variance: float) -> Predictor:
        def predict(x_support: Array, y_support: Array, x_query: Array, y_query: Array) -> Predicted:
            known = with_constant(x_support)
            precision = np.full(known.shape[1], 1 / variance)
            weights, _ = mode(family, known, y_support, np.full(len(known), middle), precision)
            eta = middle + with_constant(x_query) @ weights
            return Predicted(family.mean(eta), family.log_prob(y_query, eta))

        return predict

    def loss(predict: Predictor) -> float:
        parts = ((rows.x[known], rows.y[known], rows.x[asked], rows.y[asked]) for _, known, asked in splits)
        return -float(np.mean([predict(*part).log_prob.mean() for part in parts]))

    return min((of_variance(variance) for variance in np.logspace(-3, 1.5, 10)), key=loss)


def drawn(effects: Effects, likelihood: str, *, num_groups: int, num_rows: int, generator: np.random.Generator) -> Rows:
    """Draws groups of a mixed model, with standard normal features."""
    x = generator.normal(size=(num_groups * num_rows, len(effects.fixed) - 1))
    own = effects.deviations * generator.normal(size=(num_groups, len(effects.deviations)))
    groups: Sequence[int] = np.repeat(np.arange(num_groups), num_rows).tolist()
    design = with_constant(x)
    eta = design @ effects.fixed + (design[:, : own.shape[1]] * own[groups]).sum(1)
    mean = FAMILIES[likelihood].mean(eta)
    y = generator.binomial(1, mean) if likelihood == "categorical" else generator.poisson(mean)
    return Rows(x, y.astype(float), groups)
