import numpy as np
import pandas as pd
import pytest
from sklearn.base import clone
from sklearn.compose import ColumnTransformer
from sklearn.exceptions import NotFittedError
from sklearn.linear_model import LinearRegression
from sklearn.model_selection import GridSearchCV, GroupKFold, KFold, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from ibaml.learner.scikit_learn import MetaLearnerClassifier, MetaLearnerRegressor


@pytest.fixture(scope="module")
def table():
    """Schools with an intercept and a slope of their own."""
    rng = np.random.default_rng(0)
    school = np.repeat(np.arange(20), 8)
    X = pd.DataFrame({"school": [f"s{number}" for number in school], "hours": rng.uniform(0, 10, 160)})
    own = np.column_stack([5 * rng.normal(size=20), 4 + 1.5 * rng.normal(size=20)])[school]
    return X, 30 + own[:, 0] + own[:, 1] * X["hours"].to_numpy() + rng.normal(size=160)


def test_rows_of_known_groups_are_predicted_from_their_rows_and_others_by_the_prior(table):
    X, y = table
    rows = np.arange(160) % 4 > 0
    model = MetaLearnerRegressor(group="school").fit(X[rows], y[rows])
    expected = model.learner_.adapt(X[rows][:6], y[rows][:6]).predict(X[~rows][:2])
    mean, deviation = model.predict(X[~rows], return_std=True)
    np.testing.assert_allclose(mean[:2], expected.mean, rtol=1e-5)
    np.testing.assert_allclose(deviation[:2] ** 2, expected.total_uncertainty, rtol=1e-4)
    new = pd.DataFrame({"school": ["other"], "hours": [5.0]})
    unknown = model.learner_.adapt(X[:0], y[:0]).predict(new)
    mean, deviation = model.predict(new, return_std=True)
    np.testing.assert_allclose([mean, deviation**2], [unknown.mean, unknown.total_uncertainty], rtol=1e-5)


def test_cross_validation_by_rows_and_by_groups(table):
    X, y = table
    model = MetaLearnerRegressor(group="school")
    of_known = cross_val_score(model, X, y, cv=KFold(3, shuffle=True, random_state=0))
    of_new = cross_val_score(model, X, y, cv=GroupKFold(3), groups=X["school"])
    pooled = cross_val_score(LinearRegression(), X[["hours"]], y, cv=GroupKFold(3), groups=X["school"])
    assert of_known.mean() > 0.95
    # Of a new school nothing is known but the population, which a pooled line knows as well.
    assert abs(of_new.mean() - pooled.mean()) < 0.05 and of_new.mean() < of_known.mean() - 0.1


def test_clones_searches_and_pipelines(table):
    X, y = table
    model = MetaLearnerRegressor(group="school", seed=3)
    assert clone(model).get_params() == model.get_params() and clone(model) is not model
    assert "group='school'" in repr(model)
    search = GridSearchCV(model, {"num_support": [2, 4]}, cv=GroupKFold(2)).fit(X, y, groups=X["school"])
    assert search.best_params_["num_support"] in (2, 4) and search.predict(X).shape == (160,)
    scaled = ColumnTransformer(
        [("numbers", StandardScaler(), ["hours"])], remainder="passthrough", verbose_feature_names_out=False
    )
    pipeline = make_pipeline(scaled, MetaLearnerRegressor(group="school")).set_output(transform="pandas")
    assert pipeline.fit(X, y).score(X, y) > 0.95
    assert list(pipeline[-1].feature_names_in_) == ["hours", "school"]


def test_arrays_name_the_group_by_its_number(table):
    X, y = table
    numbers = np.column_stack([X["hours"], X["school"].str[1:].astype(float)])
    model = MetaLearnerRegressor(group=1).fit(numbers, y)
    assert model.n_features_in_ == 2 and model.score(numbers, y) > 0.95


def test_classes(table):
    X, y = table
    rng = np.random.default_rng(1)
    labels = np.where(X["hours"] + rng.normal(size=160) > 5, "pass", "fail")
    model = MetaLearnerClassifier(group="school").fit(X, labels)
    probabilities = model.predict_proba(X)
    assert model.classes_.tolist() == ["fail", "pass"] and model.score(X, labels) > 0.75
    np.testing.assert_allclose(probabilities.sum(1), 1, atol=1e-12)
    np.testing.assert_array_equal(model.predict(X), model.classes_[probabilities.argmax(1)])


def test_misuse_is_named(table):
    X, y = table
    with pytest.raises(NotFittedError):
        MetaLearnerRegressor(group="school").predict(X)
    with pytest.raises(ValueError, match="group is 'group', but X has the columns school, hours: name the column"):
        MetaLearnerRegressor().fit(X, y)
    with pytest.raises(ValueError, match="y has shape .159.; expected one target for each of the 160 rows of X"):
        MetaLearnerRegressor(group="school").fit(X, y[1:])
