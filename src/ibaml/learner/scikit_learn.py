"""Estimators of scikit-learn for tables with a group column: cross-validation, searches, pipelines.

An estimator of scikit-learn is fitted to rows and predicts rows, while a learner is fitted to groups and adapts to a
new one. Between the two: the rows that an estimator was fitted on are what it knows of their groups. Rows of these
groups are predicted from them, rows of other groups by the prior, as ``lme4`` does with ``allow.new.levels``. So
``KFold`` scores further rows of known groups, and ``GroupKFold`` groups of which nothing is known. For groups of which
some rows are known there is ``MetaLearner.learning_curve``.
"""

import warnings
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from ibaml.data.prepare import SplitSettings
from ibaml.learner.learner import MetaLearner
from ibaml.likelihoods import ClassPrediction, MixturePrediction
from ibaml.optional import require
from ibaml.types import ColumnName

Array = npt.NDArray[Any]
_sklearn: Any = require("sklearn.base", "scikit-learn", "sklearn")
_TARGET = "target of the estimator"


class _GroupedEstimator(_sklearn.BaseEstimator):
    """What both estimators share; arguments are kept as given, as scikit-learn's conventions ask."""

    group: ColumnName
    learner_: MetaLearner

    def _fit(self, X: Any, y: Any, learner: MetaLearner, splits: SplitSettings | None) -> Self:
        table = self._table(X)
        values = np.asarray(y)
        if values.ndim != 1 or len(values) != len(table):
            raise ValueError(
                f"y has shape {list(values.shape)}; expected one target for each of the {len(table)} rows of X."
            )
        if self.group not in table.columns:
            raise ValueError(
                f"group is {self.group!r}, but X has the columns {', '.join(map(str, table.columns))}: name the column "
                "that says to which group a row belongs (a number, if X is an array)."
            )
        known = table.assign(**{_TARGET: values})
        self.n_features_in_ = table.shape[1]
        if all(isinstance(name, str) for name in table.columns):
            self.feature_names_in_ = table.columns.to_numpy(dtype=object)
        self.learner_ = learner.fit(known, task=self.group, target=_TARGET, splits=splits)
        self._known = known
        return self

    def _predict(self, X: Any) -> Any:
        _sklearn_validation().check_is_fitted(self)
        with warnings.catch_warnings():
            # That all groups are new is what a split by groups means.
            warnings.filterwarnings("ignore", message="no group of asked", category=RuntimeWarning)
            return self.learner_.predict_new(self._known, self._table(X), task=self.group)

    def _table(self, X: Any) -> Any:
        pandas = require("pandas", "pandas", "sklearn")
        return X.reset_index(drop=True) if isinstance(X, pandas.DataFrame) else pandas.DataFrame(np.asarray(X))


def _sklearn_validation() -> Any:
    return require("sklearn.utils.validation", "scikit-learn", "sklearn")


class MetaLearnerRegressor(_sklearn.RegressorMixin, _GroupedEstimator):
    """Regression on rows of groups, as an estimator of scikit-learn.

    Args:
        group: Column of ``X`` that says to which group a row belongs: its name, or its number if ``X`` is an array.
        likelihood: As of ``MetaLearner``.
        algorithm: As of ``MetaLearner``.
        num_support: Rows that a new group will show. None: any number.
        seed: Seed of training.

    Attributes:
        learner_: The fitted ``MetaLearner``, for what an estimator has no words for.
        n_features_in_: Columns of ``X``, the group among them.
        feature_names_in_: Their names, if they are text.

    Examples:
        >>> import pandas as pd
        >>> rng = np.random.default_rng(0)
        >>> X = pd.DataFrame({"school": np.repeat(np.arange(12), 6), "hours": rng.uniform(0, 10, 72)})
        >>> y = 30 + 4 * X["hours"] + rng.normal(size=12)[X["school"]] + 0.1 * rng.normal(size=72)
        >>> bool(MetaLearnerRegressor(group="school").fit(X, y).score(X, y) > 0.99)
        True
    """

    def __init__(
        self,
        group: ColumnName = "group",
        *,
        likelihood: Any = "gaussian",
        algorithm: Any = "head",
        num_support: int | None = None,
        seed: int = 0,
    ) -> None:
        self.group = group
        self.likelihood = likelihood
        self.algorithm = algorithm
        self.num_support = num_support
        self.seed = seed

    def fit(self, X: Any, y: Any) -> Self:
        """Learns what groups have in common, and remembers their rows.

        Args:
            X: DataFrame, or an array of numbers, with the column of the groups.
            y: Targets, ``[num_rows]``.

        Raises:
            TypeError, ValueError: If the rows do not fit, as in ``MetaLearner.fit``; if there is no column of groups.
        """
        learner = MetaLearner(likelihood=self.likelihood, algorithm=self.algorithm, seed=self.seed)
        return self._fit(X, y, learner, SplitSettings(num_support=self.num_support))

    def predict(self, X: Any, return_std: bool = False) -> Any:
        """Returns predictive means, ``[num_rows]``, and standard deviations beside them if asked for.

        Args:
            X: As in ``fit``.
            return_std: Whether to return the standard deviations, noise included.

        Raises:
            sklearn.exceptions.NotFittedError: Before ``fit``.
            TypeError, ValueError: If the rows do not fit the model.
        """
        prediction = self._predict(X)
        assert isinstance(prediction, MixturePrediction)
        mean = np.asarray(prediction.mean)
        return (mean, np.sqrt(np.asarray(prediction.total_uncertainty))) if return_std else mean


class MetaLearnerClassifier(_sklearn.ClassifierMixin, _GroupedEstimator):
    """Classification on rows of groups, as an estimator of scikit-learn; classes mean the same in all groups.

    Args:
        group: As of ``MetaLearnerRegressor``.
        algorithm: As of ``MetaLearner``.
        num_support: As of ``MetaLearnerRegressor``.
        seed: Seed of training.

    Attributes:
        learner_: The fitted ``MetaLearner``.
        classes_: The classes, sorted.
        n_features_in_: Columns of ``X``, the group among them.
        feature_names_in_: Their names, if they are text.
    """

    def __init__(
        self, group: ColumnName = "group", *, algorithm: Any = "head", num_support: int | None = None, seed: int = 0
    ) -> None:
        self.group = group
        self.algorithm = algorithm
        self.num_support = num_support
        self.seed = seed

    def fit(self, X: Any, y: Any) -> Self:
        """Learns what groups have in common, and remembers their rows.

        Args:
            X: As in ``MetaLearnerRegressor.fit``.
            y: Labels, ``[num_rows]``.

        Raises:
            TypeError, ValueError: As there.
        """
        self.classes_ = np.unique(np.asarray(y))
        learner = MetaLearner(algorithm=self.algorithm, seed=self.seed)
        return self._fit(X, y, learner, SplitSettings(num_support=self.num_support))

    def predict_proba(self, X: Any) -> Array:
        """Returns the probability of each class, ``[num_rows, num_classes]``, in the order of ``classes_``.

        Args:
            X: As in ``fit``.

        Raises:
            sklearn.exceptions.NotFittedError: Before ``fit``.
            TypeError, ValueError: If the rows do not fit the model.
        """
        prediction = self._predict(X)
        assert isinstance(prediction, ClassPrediction)
        probabilities = np.asarray(prediction.probs, dtype=np.float64)
        return probabilities / probabilities.sum(1, keepdims=True)

    def predict(self, X: Any) -> Array:
        """Returns the most probable class of each row; arguments and errors are those of ``predict_proba``."""
        return self.classes_[self.predict_proba(X).argmax(1)]
