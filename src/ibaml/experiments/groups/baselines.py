"""What a statistician would do with grouped data: mixed-effects models, boosting, a ridge regression per group.

Each function learns from the rows of the training groups and returns a predictor for a new group: it maps the group's
support rows and query inputs to predictive means and variances, noise included. Gaussian throughout.
"""

import math
import warnings
from collections.abc import Callable, Generator, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ibaml.optional import require

Array = npt.NDArray[np.floating]
Predictor = Callable[[Array, Array, Array], tuple[Array, Array]]
"""``(x_support, y_support, x_query) -> (mean, variance)``."""


class Rows(NamedTuple):
    """Rows of the training groups.

    Attributes:
        x: Features, ``[num_rows, num_features]``, without a constant column.
        y: Targets, ``[num_rows]``.
        groups: The group of each row.
    """

    x: Array
    y: Array
    groups: Sequence[object]


def mixed_effects(rows: Rows, *, num_slopes: int) -> Predictor:
    """Linear mixed model of statsmodels by REML: random intercept and slopes, correlated.

    With ``y = X b + Z u + e``, ``u ~ N(0, G)``, ``e ~ N(0, s2)`` and ``V = Z G Z^T + s2 I`` on the support rows, a new
    group has ``E[u] = G Z^T V^-1 (y - X b)`` (the BLUP) and ``Cov[u] = G - G Z^T V^-1 Z G``; a query row's variance is
    ``z Cov[u] z^T + s2`` plus ``(x - z G Z^T V^-1 X) Cov[b] (...)^T`` for the uncertainty of the fixed effects.

    Args:
        rows: Training groups.
        num_slopes: The first so many features get a random slope.

    Raises:
        ImportError: If statsmodels is not installed.
    """
    model = require("statsmodels.regression.mixed_linear_model", "statsmodels", "experiments").MixedLM
    design = with_constant(rows.x)
    with warnings.catch_warnings():
        # A covariance on the boundary is a valid fit and common with few groups.
        warnings.simplefilter("ignore")
        fit = model(rows.y, design, groups=np.asarray(rows.groups), exog_re=design[:, : num_slopes + 1]).fit(reml=True)
    beta, scale = np.asarray(fit.fe_params), float(fit.scale)
    covariance = np.asarray(fit.cov_re)
    beta_covariance = np.asarray(fit.cov_params())[: len(beta), : len(beta)]
    beta_covariance = np.nan_to_num(beta_covariance, nan=0.0)

    def predict(x_support: Array, y_support: Array, x_query: Array) -> tuple[Array, Array]:
        x, query = with_constant(x_support), with_constant(x_query)
        z, z_query = x[:, : num_slopes + 1], query[:, : num_slopes + 1]
        gain = np.linalg.solve(z @ covariance @ z.T + scale * np.eye(len(x)), z @ covariance).T
        effects = gain @ (y_support - x @ beta)
        posterior = covariance - gain @ z @ covariance
        fixed = query - z_query @ gain @ x
        variance = _quadratic(z_query, posterior) + _quadratic(fixed, beta_covariance) + scale
        return query @ beta + z_query @ effects, variance

    return predict


def per_group_ridge(rows: Rows, *, num_support: int, num_draws: int = 5, seed: int = 0) -> Predictor:
    """Bayesian ridge regression on the support rows alone, with weights ``N(0, tau2 I)`` and noise ``s2``.

    The two variances are the pair of a grid with the highest predictive density on training groups; nothing else is
    shared between groups. The intercept has the prior of the other weights, which suits a standardised target.

    Args:
        rows: Training groups.
        num_support: Support rows that the variances are chosen for.
        num_draws: Random support sets per training group.
        seed: Seed of those.
    """
    generator = np.random.default_rng(seed)
    groups = np.asarray(rows.groups)
    splits = [(known, asked) for _, known, asked in splits_of_groups(groups, num_support, num_draws, generator)]

    def loss(prior: float, noise: float) -> float:
        predict = _ridge(prior, noise)
        total: list[float] = []
        for support, query in splits:
            mean, variance = predict(rows.x[support], rows.y[support], rows.x[query])
            total.append(float(gaussian_nll(mean, variance, rows.y[query]).mean()))
        return float(np.mean(total))

    grid = [(prior, noise) for prior in np.logspace(-2, 1, 7) for noise in np.logspace(-3, 0.5, 8)]
    return _ridge(*min(grid, key=lambda pair: loss(*pair)))


def boosting(rows: Rows, *, num_support: int, num_draws: int = 5, seed: int = 0) -> Predictor:
    """Gradient-boosted trees of scikit-learn with the group as features: what its support rows say of it.

    These are mean and standard deviation of the support's targets, and their mean error under the pooled fit. Trees are
    trained on random support sets of the training groups. The variance is that of the errors for groups that a second
    fit has not seen.

    Args:
        rows: Training groups.
        num_support: Support rows.
        num_draws: Random support sets per training group.
        seed: Seed of those.

    Raises:
        ImportError: If scikit-learn is not installed.
    """
    regressor = require("sklearn.ensemble", "scikit-learn", "experiments").HistGradientBoostingRegressor
    generator = np.random.default_rng(seed)
    groups, population = np.asarray(rows.groups), pooled(rows)

    def inputs(x_support: Array, y_support: Array, x_query: Array) -> Array:
        error = y_support - population(x_support, y_support, x_support)[0]
        of_group = np.array([y_support.mean(), y_support.std(), error.mean()])
        return np.column_stack([x_query, np.broadcast_to(of_group, (len(x_query), 3))])

    x: list[Array] = []
    y: list[Array] = []
    names: list[npt.NDArray[np.object_]] = []
    for group, known, asked in splits_of_groups(groups, num_support, num_draws, generator):
        x.append(inputs(rows.x[known], rows.y[known], rows.x[asked]))
        y.append(rows.y[asked])
        names.append(np.full(len(asked), group, dtype=object))
    all_x, all_y, all_names = np.concatenate(x), np.concatenate(y), np.concatenate(names)
    distinct = generator.permutation(np.unique(groups))
    first = np.isin(all_names, distinct[: len(distinct) // 2])
    errors = [
        all_y[~part] - regressor(random_state=seed).fit(all_x[part], all_y[part]).predict(all_x[~part])
        for part in (first, ~first)
    ]
    variance = float((np.concatenate(errors) ** 2).mean())
    trees = regressor(random_state=seed).fit(all_x, all_y)

    def predict(x_support: Array, y_support: Array, x_query: Array) -> tuple[Array, Array]:
        mean = np.asarray(trees.predict(inputs(x_support, y_support, x_query)))
        return mean, np.full_like(mean, variance)

    return predict


def pooled(rows: Rows) -> Predictor:
    """Ordinary least squares on all training rows, blind to groups and to the support set."""
    design = with_constant(rows.x)
    gram = np.linalg.pinv(design.T @ design)
    beta = gram @ design.T @ rows.y
    scale = float(((rows.y - design @ beta) ** 2).sum() / max(1, len(rows.y) - design.shape[1]))

    def predict(x_support: Array, y_support: Array, x_query: Array) -> tuple[Array, Array]:
        del x_support, y_support
        query = with_constant(x_query)
        return query @ beta, scale * (1 + _quadratic(query, gram))

    return predict


def gaussian_nll(mean: Array, variance: Array, y: Array) -> Array:
    """Negative log-density of ``N(mean, variance)`` at each target, in nats."""
    return 0.5 * ((y - mean) ** 2 / variance + np.log(2 * math.pi * variance))


def _ridge(prior: float, noise: float) -> Predictor:
    def predict(x_support: Array, y_support: Array, x_query: Array) -> tuple[Array, Array]:
        x, query = with_constant(x_support), with_constant(x_query)
        covariance = np.linalg.inv(x.T @ x / noise + np.eye(x.shape[1]) / prior)
        mean = query @ (covariance @ (x.T @ y_support / noise))
        return mean, _quadratic(query, covariance) + noise

    return predict


def splits_of_groups(
    groups: npt.NDArray[Any], num_support: int, num_draws: int, generator: np.random.Generator
) -> Generator[tuple[Any, npt.NDArray[np.int64], npt.NDArray[np.int64]]]:
    """Splits the rows of each group at random, several times: its name, the known rows and the others."""
    for group in np.unique(groups):
        members = np.flatnonzero(groups == group)
        if len(members) <= num_support:
            continue
        for _ in range(num_draws):
            order = generator.permutation(members)
            yield group, order[:num_support], order[num_support:]


def with_constant(x: Array) -> Array:
    """Returns features after a column of ones."""
    return np.column_stack([np.ones(len(x)), x])


def _quadratic(rows: Array, matrix: Array) -> Array:
    """Returns ``r M r^T`` for each row ``r``."""
    return np.einsum("ij,jk,ik->i", rows, matrix, rows)
