"""The learned prior's curve beside a plain Gaussian process, whose formulas have their own oracle."""

import numpy as np
import pytest
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import RBF, ConstantKernel

from ibaml.playground.curve import Hyperparameters, answer, fit_plain, plain_band

X = np.array([-3.0, -1.0, 0.5, 2.0, 3.5])
KERNEL = Hyperparameters(1.2, 2.0, 0.3)


def wave(x):
    return 3.2 * np.sin(x - 1.1)


def test_the_plain_process_is_that_of_scikit_learn():
    grid = np.linspace(-5, 5, 11)
    kernel = ConstantKernel(KERNEL.signal**2) * RBF(KERNEL.length_scale)
    oracle = GaussianProcessRegressor(kernel, alpha=KERNEL.noise**2, optimizer=None).fit(X[:, None], wave(X))
    mean, deviation = oracle.predict(grid[:, None], return_std=True)
    band = plain_band(X, wave(X), grid, KERNEL)
    np.testing.assert_allclose(band.mean, mean, atol=1e-8)
    half = 1.6448536 * np.sqrt(deviation**2 + KERNEL.noise**2)
    np.testing.assert_allclose(band.upper, mean + half, atol=1e-6)
    np.testing.assert_allclose(band.lower, mean - half, atol=1e-6)


def test_functions_of_the_plain_process_have_its_moments():
    """At a point far from all others they have mean zero and the signal's spread; at a known one they hardly vary."""
    grid = np.array([-5.0, 3.5])
    functions = np.array(plain_band(X[-1:], wave(X[-1:]), grid, KERNEL._replace(noise=1e-3)).functions)
    np.testing.assert_allclose(functions[:, 1], wave(3.5), atol=0.02)
    assert np.ptp(functions[:, 0]) > 0.1


def test_hyper_parameters_follow_the_points():
    x = np.linspace(-5, 5, 40)
    noise = np.random.default_rng(0).normal(size=40)
    slow, fast = (fit_plain(x, np.sin(rate * x) + 0.05 * noise) for rate in (0.8, 3.0))
    assert slow.length_scale > 2 * fast.length_scale
    assert fit_plain(x, 3 * np.sin(x) + noise).noise > 3 * slow.noise
    assert fit_plain(np.empty(0), np.empty(0)) == (1.5, 2.5, 0.2)


def test_three_points_fix_a_wave_for_the_learned_prior_alone():
    points = [[x, wave(x)] for x in (-4.0, -2.2, 0.4)]
    told = answer({"points": points})
    x, truth = np.array(told["x"]), wave(np.array(told["x"]))
    errors = {name: np.abs(np.array(told[name]["mean"]) - truth)[x > 1].mean() for name in ("learned", "plain")}
    assert errors["learned"] < 0.7 < 1.5 < errors["plain"]
    assert told["learned"]["width"] < 0.6 * told["plain"]["width"]
    covered = (np.array(told["learned"]["lower"]) < truth) & (truth < told["learned"]["upper"])
    assert covered.mean() > 0.8
    assert np.array(told["learned"]["functions"]).shape == (3, 101)


def test_without_points_it_is_the_prior():
    told = answer({"points": []})
    assert told["points"] == [] and told["learned"]["width"] > 4
    np.testing.assert_allclose(told["plain"]["mean"], 0)


def test_a_point_narrows_the_band_around_it():
    before, after = (answer({"points": points})["learned"] for points in ([], [[1.0, 2.0]]))
    at = 60  # x = 1
    assert after["upper"][at] - after["lower"][at] < 0.5 * (before["upper"][at] - before["lower"][at])
    assert abs(after["mean"][at] - 2) < 0.3


@pytest.mark.parametrize(
    ("points", "message"),
    [
        ([[1, 2], [6, 0]], "point 2 has x = 6; expected a number from -5 to 5"),
        ([[1, -9]], "point 1 has y = -9; expected a number from -7 to 7"),
        ([[1, None]], r"point 1 is \[1, None\]; expected two finite numbers"),
        ([[1, float("inf")]], "expected two finite numbers"),
        ([3], "point 1 is 3; expected two"),
        ([[0, 0]] * 61, "there are 61 points; expected at most 60"),
        ("abc", "points is 'abc'; expected a list"),
    ],
)
def test_refused_points(points, message):
    with pytest.raises(ValueError, match=message):
        answer({"points": points})
