"""Grouped classes and counts: the rivals against integrals and optimisers, and all methods on a small table."""

import numpy as np
import pytest
from scipy import integrate, optimize, stats
from scipy.special import expit

from ibaml.experiments.groups import discrete, glm
from ibaml.experiments.groups import run as groups
from ibaml.experiments.groups.baselines import Rows
from ibaml.experiments.groups.glm import Effects
from ibaml.experiments.groups.report import discrete_rows, summary
from ibaml.experiments.groups.run import GroupsSettings
from ibaml.experiments.groups.tables import folds

X, QUERY = np.array([[-1.0], [0.5], [2.0]]), np.array([[0.3], [-2.0]])
TARGETS = {
    "categorical": (np.array([0.0, 1.0, 1.0]), np.array([1.0, 0.0])),
    "poisson": (np.array([0.0, 7.0, 30.0]), np.array([4.0, 1.0])),
}
LIKELIHOODS = pytest.mark.parametrize("likelihood", TARGETS)


def log_prob(likelihood, y, eta):
    return (
        stats.bernoulli.logpmf(y, expit(eta)) if likelihood == "categorical" else stats.poisson.logpmf(y, np.exp(eta))
    )


@LIKELIHOODS
def test_families_are_those_of_scipy(likelihood):
    family, eta, y = glm.FAMILIES[likelihood], np.linspace(-2, 2, 5), np.array([0.0, 1.0, 1.0, 0.0, 1.0])
    np.testing.assert_allclose(family.log_prob(y, eta), log_prob(likelihood, y, eta), rtol=1e-12)
    slope = (family.log_prob(y, eta + 1e-6) - family.log_prob(y, eta - 1e-6)) / 2e-6
    np.testing.assert_allclose(y - family.mean(eta), slope, rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(
        family.variance(eta), (family.mean(eta + 1e-6) - family.mean(eta - 1e-6)) / 2e-6, rtol=1e-6
    )
    assert family.mean(np.array(family.link(0.3))) == pytest.approx(0.3)


@LIKELIHOODS
def test_the_mode_is_that_of_an_optimiser(likelihood):
    design, precision = np.column_stack([np.ones(3), X]), np.array([0.5, 2.0])
    y, offset = TARGETS[likelihood][0], np.array([0.2, -0.1, 0.4])

    def loss(weights):
        return 0.5 * (precision * weights**2).sum() - log_prob(likelihood, y, offset + design @ weights).sum()

    expected = optimize.minimize(loss, np.zeros(2), method="BFGS", options={"gtol": 1e-9}).x
    found, curvature = glm.mode(glm.FAMILIES[likelihood], design, y, offset, precision)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    np.testing.assert_allclose(
        curvature,
        optimize.approx_fprime(found, lambda w: optimize.approx_fprime(w, loss, 1e-5), 1e-5),
        atol=1e-2 * curvature.max(),
    )


@LIKELIHOODS
def test_a_mixed_model_predicts_by_the_integral_over_its_effects(likelihood):
    effects = Effects(np.array([0.3, 0.8]), np.array([0.7]))
    y, y_query = TARGETS[likelihood]
    found = glm.of_effects(effects, glm.FAMILIES[likelihood])(X, y, QUERY, y_query)

    def joint(u, row=None):
        eta = 0.3 + u + 0.8 * X[:, 0]
        value = np.exp(stats.norm.logpdf(u, scale=0.7) + log_prob(likelihood, y, eta).sum())
        return (
            value if row is None else value * np.exp(log_prob(likelihood, y_query[row], 0.3 + u + 0.8 * QUERY[row, 0]))
        )

    def integral(function):
        return integrate.quad(function, -5, 5, epsabs=0, epsrel=1e-10, points=[0, 1])[0]

    for row in range(2):
        expected = integral(lambda u, row=row: joint(u, row)) / integral(joint)
        assert found.log_prob[row] == pytest.approx(np.log(expected), abs=2e-4)
        mean = integral(lambda u, row=row: joint(u) * glm.FAMILIES[likelihood].mean(0.3 + u + 0.8 * QUERY[row, 0]))
        assert found.mean[row] == pytest.approx(mean / integral(joint), rel=2e-4)


def test_the_mixed_model_of_statsmodels_finds_what_was_drawn():
    truth = Effects(np.array([0.5, -0.4]), np.array([0.8, 0.5]))
    rows = glm.drawn(truth, "poisson", num_groups=40, num_rows=15, generator=np.random.default_rng(0))
    y, y_query = TARGETS["poisson"]
    found = glm.mixed_effects(rows, likelihood="poisson", num_slopes=1)(X, y, QUERY, y_query)
    best = glm.of_effects(truth, glm.FAMILIES["poisson"])(X, y, QUERY, y_query)
    np.testing.assert_allclose(found.log_prob, best.log_prob, atol=0.35)


def test_pooled_and_ridge_fits():
    generator = np.random.default_rng(0)
    rows = glm.drawn(
        Effects(np.array([0.2, 1.0]), np.array([0.0])), "categorical", num_groups=30, num_rows=20, generator=generator
    )
    y, y_query = TARGETS["categorical"]
    pooled = glm.pooled(rows, likelihood="categorical")(X, y, QUERY, y_query)
    # All groups are alike: what is best is the truth.
    np.testing.assert_allclose(pooled.mean, expit(0.2 + QUERY[:, 0]), atol=0.06)
    ridge = glm.per_group_ridge(rows, likelihood="categorical", num_support=3)(X, y, QUERY, y_query)
    assert ridge.mean[0] > rows.y.mean() > ridge.mean[1]


def test_methods_of_a_table():
    of_people, of_drawn = discrete.DATASETS["verbagg"], discrete.DATASETS["simulated_counts"]
    assert discrete.methods_of(of_people, discrete.METHODS) == ("ibaml", "mixed_effects", "ridge", "pooled")
    assert discrete.methods_of(of_drawn, ("optimum", "boosting", "ridge")) == ("ridge", "optimum")


@pytest.mark.parametrize("name", discrete.DATASETS)
def test_tables_have_targets_of_their_kind_and_groups_with_rows_to_ask_for(name):
    dataset = discrete.DATASETS[name]
    rows = discrete.rows_of(dataset)
    sizes = np.unique(np.asarray(rows.groups), return_counts=True)[1]
    assert len(sizes) >= 40 and np.median(sizes) > 3
    assert np.isfinite(rows.x).all() and rows.x.shape[1] >= dataset.num_slopes
    values = set(np.unique(rows.y))
    assert values == {0.0, 1.0} if dataset.likelihood == "categorical" else values >= {0.0, 1.0, 2.0, 3.0}
    assert len(folds(rows.groups, 5, seed=0)) == 5


def test_the_experiment_compares_them(monkeypatch):
    small = discrete.Simulated(
        title="counts",
        likelihood="poisson",
        truth=Effects(np.array([1.0, 0.5]), np.array([0.8])),
        num_groups=16,
        num_rows=8,
    )
    monkeypatch.setitem(discrete.DATASETS, "simulated_counts", small)
    methods = ("mixed_effects", "ridge", "pooled", "optimum", "boosting")
    settings = GroupsSettings(datasets=("simulated_counts",), methods=methods, num_folds=2, num_draws=2)
    result = groups.run(settings)
    scores = result.discrete["simulated_counts"]
    assert result.scores == {} and result.sizes == {"simulated_counts": (16, 128)}
    assert list(scores) == ["mixed_effects", "ridge", "pooled", "optimum"]
    assert {len(one.nll) for one in scores.values()} == {16}
    nll = {name: float(one.nll.mean()) for name, one in scores.items()}
    assert nll["optimum"] < nll["ridge"] and nll["mixed_effects"] < nll["pooled"] - 0.1
    text = summary(result)
    assert "16 groups, 128 rows (simulated)." in text and "| the true model |" in text
    assert discrete_rows(result)[0]["nll_minus_mixed_effects"] == 0


@pytest.mark.parametrize("likelihood", ["categorical", "poisson"])
def test_the_default_is_asked_as_users_ask_it(likelihood):
    generator = np.random.default_rng(0)
    rows = glm.drawn(
        Effects(np.array([0.0, 1.0]), np.array([1.0])), likelihood, num_groups=6, num_rows=8, generator=generator
    )
    rows = Rows(rows.x, rows.y, rows.groups)
    learner = discrete.default_learner(rows, likelihood, num_support=3, seed=0, num_steps=2)
    y, y_query = TARGETS[likelihood]
    found = discrete.predictor_of(learner)(X, y, QUERY, y_query)
    prediction = learner.adapt(X, y.astype(int)).predict(QUERY)
    np.testing.assert_allclose(found.log_prob, -prediction.nll(y_query.astype(int)), rtol=1e-6)
    expected = prediction.probs[:, 1] if likelihood == "categorical" else prediction.mean
    np.testing.assert_allclose(found.mean, expected)
