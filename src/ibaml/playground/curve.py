"""The tab *Curve*: a prior learned from sinusoids beside a Gaussian process that knows these points alone."""

import functools
import math
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from scipy.linalg import cho_factor, cho_solve
from scipy.optimize import minimize

from ibaml.learner import MetaLearner
from ibaml.likelihoods import MixturePrediction
from ibaml.playground.requests import Answered, Asked, field
from ibaml.playground.train import CURVES, MODELS

Floats = npt.NDArray[np.float64]

X_RANGE, Y_RANGE = (-5.0, 5.0), (-7.0, 7.0)
LEVEL = 0.9
MOST_POINTS = 60
_NUM_GRID = 101
_NUM_DRAWN = 3
_NORMAL_95 = 1.6448536269514722
"""Standard deviations from the mean of a Gaussian to the ends of its interval of 90%."""


class Band(NamedTuple):
    """A predicted curve at the points of the grid.

    Attributes:
        mean: Expected target.
        lower: Lower end of the interval of 90% for a further measurement.
        upper: Upper end.
        width: Mean width of the interval.
        functions: Some functions drawn from the posterior.
    """

    mean: list[float]
    lower: list[float]
    upper: list[float]
    width: float
    functions: list[list[float]]


class Hyperparameters(NamedTuple):
    """Of a Gaussian process with squared exponential kernel, mean zero.

    Attributes:
        length_scale: In units of x.
        signal: Standard deviation of the functions.
        noise: Standard deviation of measurements.
    """

    length_scale: float
    signal: float
    noise: float


_TYPICAL = Hyperparameters(1.5, 2.5, 0.2)
_SPREAD = Hyperparameters(1.0, 1.0, 0.5)
"""Medians, and standard deviations of the logarithms, of what a careful user would put in without training tasks."""


@functools.cache
def _learner() -> MetaLearner:
    return MetaLearner.load(MODELS / CURVES)


def answer(asked: Asked) -> Answered:
    """Predicts the curve through the points in both ways.

    Args:
        asked: ``points``, a list of ``[x, y]``.

    Returns:
        ``x``: the grid; ``learned`` and ``plain``: a ``Band`` each; ``kernel``: what the plain process found.

    Raises:
        ValueError: If points are none, out of range or too many.
    """
    points = _read_points(field(asked, "points", list))
    grid = np.linspace(*X_RANGE, _NUM_GRID)
    kernel = fit_plain(points[:, 0], points[:, 1])
    return {
        "x": grid.tolist(),
        "points": points.tolist(),
        "learned": learned_band(points[:, 0], points[:, 1], grid)._asdict(),
        "plain": plain_band(points[:, 0], points[:, 1], grid, kernel)._asdict(),
        "kernel": kernel._asdict(),
    }


def learned_band(x: Floats, y: Floats, grid: Floats) -> Band:
    """Returns the posterior of the learned prior of sinusoids.

    Args:
        x: Inputs of the points, ``[num_points]``; there may be none.
        y: Their targets.
        grid: Inputs to predict.
    """
    prediction = _learner().adapt(x[:, None], y).predict(grid[:, None])
    assert isinstance(prediction, MixturePrediction)
    lower, upper = prediction.interval(LEVEL)
    return _band(prediction.mean, lower, upper, prediction.samples()[:_NUM_DRAWN])


def fit_plain(x: Floats, y: Floats) -> Hyperparameters:
    """Returns the likeliest hyper-parameters of the points alone, with log-normal priors around usual values.

    With ``K = signal^2 exp(-(x - x')^2 / (2 length_scale^2)) + noise^2 I`` it minimises
    ``1/2 y^T K^-1 y + 1/2 log |K|`` (Rasmussen and Williams 2006, eq. 5.8) and the priors' squares.

    Args:
        x: Inputs, ``[num_points]``.
        y: Targets, ``[num_points]``.
    """
    centre, spread = np.log(_TYPICAL), np.array(_SPREAD)

    def loss(logs: Floats) -> float:
        factor = cho_factor(_covariance(x, x, Hyperparameters(*np.exp(logs)), with_noise=True), lower=True)
        log_determinant = 2 * float(np.log(np.diag(factor[0])).sum())
        fit = float(y @ cho_solve(factor, y))
        return 0.5 * (fit + log_determinant + float((((logs - centre) / spread) ** 2).sum()))

    if not len(x):
        return _TYPICAL
    bounds = [(middle - 4 * width, middle + 4 * width) for middle, width in zip(centre, spread, strict=True)]
    found = minimize(loss, centre, method="L-BFGS-B", bounds=bounds)
    return Hyperparameters(*(float(value) for value in np.exp(found.x)))


def plain_band(x: Floats, y: Floats, grid: Floats, kernel: Hyperparameters) -> Band:
    """Returns the posterior of a Gaussian process.

    Args:
        x: Inputs of the points, ``[num_points]``; there may be none.
        y: Their targets.
        grid: Inputs to predict.
        kernel: Its hyper-parameters.
    """
    mean, covariance = np.zeros(len(grid)), _covariance(grid, grid, kernel)
    if len(x):
        across = _covariance(x, grid, kernel)
        factor = cho_factor(_covariance(x, x, kernel, with_noise=True), lower=True)
        mean = across.T @ cho_solve(factor, y)
        covariance = covariance - across.T @ cho_solve(factor, across)
    half = _NORMAL_95 * np.sqrt(np.diag(covariance).clip(0) + kernel.noise**2)
    values, vectors = np.linalg.eigh(covariance)
    noise = np.random.default_rng(0).normal(size=(_NUM_DRAWN, len(grid)))
    functions = mean + noise @ (vectors * np.sqrt(values.clip(0))).T
    return _band(mean, mean - half, mean + half, functions)


def _covariance(a: Floats, b: Floats, kernel: Hyperparameters, *, with_noise: bool = False) -> Floats:
    distance = (a[:, None] - b[None]) / kernel.length_scale
    covariance = kernel.signal**2 * np.exp(-0.5 * distance**2)
    return covariance + kernel.noise**2 * np.eye(len(a)) if with_noise else covariance


def _band(mean: Any, lower: Any, upper: Any, functions: Any) -> Band:
    width = float(np.mean(np.asarray(upper) - np.asarray(lower)))
    mean, lower, upper, functions = (np.asarray(value).tolist() for value in (mean, lower, upper, functions))
    return Band(mean, lower, upper, width, functions)


def _read_points(points: list[Any]) -> Floats:
    if len(points) > MOST_POINTS:
        raise ValueError(f"there are {len(points)} points; expected at most {MOST_POINTS}: remove some.")
    for number, point in enumerate(points, 1):
        numbers = isinstance(point, list) and len(point) == 2 and all(isinstance(value, int | float) for value in point)
        if not numbers or not all(math.isfinite(value) for value in point):
            raise ValueError(f"point {number} is {point!r}; expected two finite numbers, x and y.")
        for name, value, (low, high) in (("x", point[0], X_RANGE), ("y", point[1], Y_RANGE)):
            if not low <= value <= high:
                raise ValueError(f"point {number} has {name} = {value:g}; expected a number from {low:g} to {high:g}.")
    return np.array(points, dtype=np.float64).reshape(-1, 2)
