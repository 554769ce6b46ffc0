import numpy as np
import pytest
from scipy.stats import norm

from ibaml.experiments.groups.baselines import Rows, boosting, gaussian_nll, mixed_effects, per_group_ridge, pooled


@pytest.fixture(scope="module")
def made():
    """150 groups of ten rows with known intercepts and slopes, correlated."""
    generator = np.random.default_rng(0)
    covariance = np.array([[0.5, 0.2], [0.2, 0.3]])
    effects = generator.multivariate_normal([1.0, -2.0], covariance, size=150)
    x = generator.normal(size=(150, 10))
    y = effects[:, :1] + effects[:, 1:] * x + 0.4 * generator.normal(size=x.shape)
    return Rows(x.reshape(-1, 1), y.reshape(-1), np.repeat(np.arange(150), 10).tolist()), covariance


def test_the_mixed_model_predicts_like_exact_bayes_with_the_true_covariance(made):
    rows, covariance = made
    predict = mixed_effects(rows, num_slopes=1)
    x, y, query = np.array([[-1.0], [0.5], [2.0]]), np.array([3.0, 0.5, -4.0]), np.linspace(-2, 2, 9)[:, None]
    mean, variance = predict(x, y, query)

    design, wanted = np.column_stack([np.ones(3), x]), np.column_stack([np.ones(9), query])
    precision = np.linalg.inv(covariance) + design.T @ design / 0.16
    expected = np.linalg.solve(precision, np.linalg.solve(covariance, [1.0, -2.0]) + design.T @ y / 0.16)
    assert np.abs(mean - wanted @ expected).max() < 0.1
    exact = np.einsum("ij,jk,ik->i", wanted, np.linalg.inv(precision), wanted) + 0.16
    # Estimated from 150 groups, and the fixed effects' own uncertainty on top.
    assert np.abs(variance / exact - 1).max() < 0.15


def test_intervals_of_the_mixed_model_cover_what_they_claim_and_the_others_predict_worse(made):
    rows, covariance = made
    generator = np.random.default_rng(1)
    effects = generator.multivariate_normal([1.0, -2.0], covariance, size=400)
    x = generator.normal(size=(400, 13))
    y = effects[:, :1] + effects[:, 1:] * x + 0.4 * generator.normal(size=x.shape)
    losses = {}
    for name, predict in {
        "mixed": mixed_effects(rows, num_slopes=1),
        "ridge": per_group_ridge(rows, num_support=3),
        "pooled": pooled(rows),
    }.items():
        inside, loss = [], []
        for group in range(400):
            mean, variance = predict(x[group, :3, None], y[group, :3], x[group, 3:, None])
            inside.append((np.abs(y[group, 3:] - mean) < 1.6449 * np.sqrt(variance)).mean())
            loss.append(gaussian_nll(mean, variance, y[group, 3:]).mean())
        losses[name] = np.mean(loss)
        # The other two are misspecified: one variance for all weights, and rows of a group taken as independent.
        if name == "mixed":
            assert abs(np.mean(inside) - 0.9) < 0.02
    assert losses["mixed"] < losses["ridge"] < losses["pooled"]


def test_boosting_uses_what_the_support_says_of_its_group(made):
    rows, covariance = made
    predict = boosting(rows, num_support=3)
    generator = np.random.default_rng(2)
    effects = generator.multivariate_normal([1.0, -2.0], covariance, size=200)
    x = generator.normal(size=(200, 13))
    y = effects[:, :1] + effects[:, 1:] * x + 0.4 * generator.normal(size=x.shape)
    population = pooled(rows)
    errors, inside = {"boosting": [], "pooled": []}, []
    for group in range(200):
        parts = x[group, :3, None], y[group, :3], x[group, 3:, None]
        mean, variance = predict(*parts)
        inside.append((np.abs(y[group, 3:] - mean) < 1.6449 * np.sqrt(variance)).mean())
        errors["boosting"].append(((y[group, 3:] - mean) ** 2).mean())
        errors["pooled"].append(((y[group, 3:] - population(*parts)[0]) ** 2).mean())
    assert np.mean(errors["boosting"]) < 0.75 * np.mean(errors["pooled"])
    assert 0.85 < np.mean(inside) < 0.95


def test_the_pooled_fit_is_least_squares(made):
    rows, _ = made
    mean, variance = pooled(rows)(rows.x[:3], rows.y[:3], np.array([[0.3]]))
    slope, intercept = np.polyfit(rows.x[:, 0], rows.y, 1)
    assert np.isclose(mean[0], intercept + 0.3 * slope, rtol=1e-10)
    residual = rows.y - intercept - slope * rows.x[:, 0]
    assert np.isclose(variance[0], residual.var(ddof=2), rtol=1e-2)


def test_the_density_is_that_of_scipy():
    mean, variance, y = np.array([0.0, 1.0]), np.array([0.5, 2.0]), np.array([1.0, -1.0])
    assert np.allclose(gaussian_nll(mean, variance, y), -norm.logpdf(y, mean, np.sqrt(variance)), rtol=1e-12)
