"""Hierarchical regression on grouped tables: schools, growth curves, reaction times, drug concentrations.

Groups are left out fold by fold. All methods learn from the other groups; then a left-out group shows a few of its rows
at random and the rest is predicted. A linear-Gaussian head on the features alone is a mixed-effects model in which
every feature has a random slope; with hidden units it learns further features. The default, ``MetaLearner`` without a
network, chooses among hierarchical models of lines and curves by predicting each training group from the others. Tables
of classes and counts have rivals of their own (``ibaml.experiments.groups.discrete``).
"""

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch

from ibaml.algorithms import make_algorithm
from ibaml.data import GroupedTasks
from ibaml.data.prepare import SplitSettings
from ibaml.experiments.groups import discrete
from ibaml.experiments.groups.baselines import (
    Array,
    Predictor,
    Rows,
    boosting,
    gaussian_nll,
    mixed_effects,
    per_group_ridge,
    pooled,
)
from ibaml.experiments.groups.discrete import DiscreteScores
from ibaml.experiments.groups.tables import DATASETS, Dataset, folds, load, orthogonalise
from ibaml.experiments.report import require_at_least
from ibaml.learner import MetaLearner
from ibaml.likelihoods import Gaussian
from ibaml.networks import MLP
from ibaml.optional import require
from ibaml.priors import FullColumnPrior
from ibaml.seeds import task_generator
from ibaml.train import TrainerSettings

METHODS = ("ibaml", "ibaml_linear", "ibaml_mlp", "ibaml_gp", "alpaca", "mixed_effects", "boosting", "ridge", "pooled")
"""All methods for numbers."""

DISPLAY_NAMES: Mapping[str, str] = {
    "ibaml": "iBaML, default",
    "ibaml_linear": "iBaML, linear",
    "ibaml_mlp": "iBaML, MLP",
    "ibaml_gp": "iBaML, GP",
    "ibaml_negative_binomial": "iBaML, negative binomial",
    "alpaca": "ALPaCA",
    "mixed_effects": "mixed effects",
    "boosting": "boosting",
    "ridge": "ridge per group",
    "pooled": "pooled",
    "optimum": "the true model",
}
_ALL_DATASETS = (*DATASETS, *discrete.DATASETS)
_ALL_METHODS = tuple(dict.fromkeys([*METHODS, *discrete.METHODS]))
AnyScores = TypeVar("AnyScores")
_NORMAL_95 = 1.6448536269514722
_NUM_QUERY = 20
_NUM_TIMED = 200
_ALPACA_HIDDEN, _ALPACA_RATE = (32, 32), 0.02


@dataclasses.dataclass(frozen=True, kw_only=True)
class GroupsSettings:
    """Settings of the experiment.

    Attributes:
        datasets: Names of tables, out of ``DATASETS`` and ``discrete.DATASETS``.
        methods: Names of methods, out of ``METHODS`` and ``discrete.METHODS``; each table takes those that suit it.
        num_support: Rows that a new group shows.
        num_folds: Folds of groups; each is left out once.
        num_draws: Random support sets per left-out group.
        num_steps: Meta-steps of ``ibaml_linear``, ``ibaml_mlp`` and ``ibaml_gp``, and half of those of ``alpaca``;
            ``ibaml`` takes none.
        num_hidden: Hidden units of ``ibaml_mlp``.
        seed: Seed of folds, support sets and training.
    """

    datasets: tuple[str, ...] = _ALL_DATASETS
    methods: tuple[str, ...] = _ALL_METHODS
    num_support: int = 3
    num_folds: int = 5
    num_draws: int = 5
    num_steps: int = 100
    num_hidden: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuses unknown names and values out of range."""
        for field, known in (("datasets", _ALL_DATASETS), ("methods", _ALL_METHODS)):
            value = getattr(self, field)
            unknown = [name for name in value if name not in known]
            if unknown or not value:
                named = f"names {', '.join(unknown)}" if value else "is empty"
                raise ValueError(f"{field} {named}; there are {', '.join(known)}.")
        require_at_least(self, 2, "num_folds")
        require_at_least(self, 1, "num_support", "num_draws", "num_steps", "num_hidden")


class Scores(NamedTuple):
    """How one method predicts one data set; vectors over groups, means over support sets.

    Attributes:
        rmse: Root mean squared error, target's unit.
        nll: Nats per query row, for the target in its own unit.
        coverage: Fraction of query rows inside the central 90% interval.
        seconds: CPU seconds that learning took, all folds together.
        milliseconds: CPU milliseconds that the prediction of a group took, mean over groups; of ``ibaml`` by
            ``predict_new``, which takes many at once.
        choices: Which model ``ibaml`` chose in each fold.
    """

    rmse: torch.Tensor
    nll: torch.Tensor
    coverage: torch.Tensor
    seconds: float
    milliseconds: float
    choices: tuple[str, ...] = ()


class GroupsResult(NamedTuple):
    """The experiment's outcome: data set to method to scores, the same groups and support sets for every method.

    Attributes:
        settings: What was asked for.
        scores: Of tables of numbers.
        sizes: Numbers of groups and of rows.
        discrete: Scores of tables of classes and counts.
    """

    settings: GroupsSettings
    scores: Mapping[str, Mapping[str, Scores]]
    sizes: Mapping[str, tuple[int, int]]
    discrete: Mapping[str, Mapping[str, DiscreteScores]]


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
    if "mixed_effects" in settings.methods:
        # The import of the package is no part of the first fit.
        require("statsmodels.regression.mixed_linear_model", "statsmodels", "experiments")
    scores: dict[str, dict[str, Scores]] = {}
    of_discrete: dict[str, dict[str, DiscreteScores]] = {}
    sizes: dict[str, tuple[int, int]] = {}
    num_done, num_all = 0, len(settings.datasets) * settings.num_folds

    def each_fold(rows: Rows, predict: Callable[[set[object]], Mapping[str, AnyScores]]) -> dict[str, list[AnyScores]]:
        nonlocal num_done
        parts: dict[str, list[AnyScores]] = {}
        for held_out in folds(rows.groups, settings.num_folds, seed=settings.seed):
            for method, value in predict(held_out).items():
                parts.setdefault(method, []).append(value)
            num_done += 1
            if on_progress is not None:
                on_progress(num_done, num_all)
        return parts

    for name in settings.datasets:
        if name in DATASETS:
            rows = load(DATASETS[name])
            parts = each_fold(rows, functools.partial(_fold, rows, dataset=DATASETS[name], settings=settings))
            scores[name] = {method: _concatenate(values) for method, values in parts.items()}
        else:
            dataset = discrete.DATASETS[name]
            rows, methods = discrete.rows_of(dataset), discrete.methods_of(dataset, settings.methods)
            how = {"num_support": settings.num_support, "num_draws": settings.num_draws, "seed": settings.seed}
            predict = functools.partial(discrete.predict_fold, rows, dataset=dataset, methods=methods, **how)
            of_discrete[name] = {method: discrete.joined(values) for method, values in each_fold(rows, predict).items()}
        sizes[name] = (len(set(rows.groups)), len(rows.y))
    return GroupsResult(settings, scores, sizes, of_discrete)


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
    for method in (name for name in METHODS if name in settings.methods):
        start = time.process_time()
        if method == "ibaml":
            learner = _default(train, settings)
            seconds = time.process_time() - start
            scores = _score(_predictor(learner), test, float(y_std), settings, seconds)
            chosen = "the only one" if learner.choice is None else learner.choice.name
            found[method] = scores._replace(milliseconds=_predict_new_ms(learner, test), choices=(chosen,))
            continue
        predict = _learn(method, train, dataset, settings)
        found[method] = _score(predict, test, float(y_std), settings, time.process_time() - start)
    return found


def _learn(method: str, train: Rows, dataset: Dataset, settings: GroupsSettings) -> Predictor:
    if method == "mixed_effects":
        return mixed_effects(train, num_slopes=dataset.num_slopes)
    if method == "ridge":
        return per_group_ridge(train, num_support=settings.num_support, seed=settings.seed)
    if method == "pooled":
        return pooled(train)
    if method == "boosting":
        return boosting(train, num_support=settings.num_support, seed=settings.seed)
    learner = _fit(method, train, settings)

    def predict(x_support: Array, y_support: Array, x_query: Array) -> tuple[Array, Array]:
        posterior = learner.adapt(torch.from_numpy(x_support), torch.from_numpy(y_support)[:, None])
        prediction: Any = posterior.predict(torch.from_numpy(x_query))
        return prediction.mean[:, 0].numpy(), prediction.total_uncertainty[:, 0].numpy()

    return predict


def _default(train: Rows, settings: GroupsSettings) -> MetaLearner:
    """Fits as users do: a table in, no settings but the number of rows that a new group will show."""
    table = _table(train.x, train.groups, y=train.y)
    large = table[table.groupby("group")["y"].transform("size") > settings.num_support]
    splits = SplitSettings(num_support=settings.num_support, num_query=_NUM_QUERY, group_duplicates=False)
    learner = MetaLearner(likelihood="gaussian", seed=settings.seed)
    return learner.fit(large, task="group", target="y", splits=splits)


def _table(x: Array, groups: Sequence[object], **columns: Array) -> Any:
    pandas = require("pandas", "pandas", "experiments")
    table = pandas.DataFrame(x, columns=[f"x{place}" for place in range(x.shape[1])])
    return table.assign(group=[str(group) for group in groups], **columns)


def _predictor(learner: MetaLearner) -> Predictor:
    def predict(x_support: Array, y_support: Array, x_query: Array) -> tuple[Array, Array]:
        prediction: Any = learner.adapt(x_support, y_support).predict(x_query)
        return prediction.mean, prediction.total_uncertainty

    return predict


def _predict_new_ms(learner: MetaLearner, test: GroupedTasks) -> float:
    """Times ``predict_new`` of so many groups that its fixed cost is shared, the left-out ones over and over."""
    known: list[Any] = []
    asked: list[Any] = []
    for place in range(_NUM_TIMED):
        support, query = test.episode(place % len(test), generator=task_generator(0, place))
        known.append(_table(support.x.numpy(), [place] * len(support.y), y=support.y[:, 0].numpy()))
        asked.append(_table(query.x.numpy(), [place] * len(query.y)))
    join = require("pandas", "pandas", "experiments").concat
    known_rows, asked_rows = join(known, ignore_index=True), join(asked, ignore_index=True)
    start = time.process_time()
    learner.predict_new(known_rows, asked_rows)
    return 1000 * (time.process_time() - start) / _NUM_TIMED


def _fit(method: str, train: Rows, settings: GroupsSettings) -> MetaLearner:
    is_alpaca = method == "alpaca"
    hidden_sizes = {"ibaml_mlp": (settings.num_hidden,), "alpaca": _ALPACA_HIDDEN}.get(method, ())
    x, y = torch.from_numpy(train.x), torch.from_numpy(train.y)
    network = MLP(
        1,
        input_shape=x.shape[1],
        hidden_sizes=hidden_sizes,
        activation="tanh",
        zero_head=True,
        skip_inputs=method == "ibaml_mlp",
        generator=torch.Generator().manual_seed(settings.seed),
    )
    # As mixed models do: correlated effects, and the marginal likelihood of whole groups. In float64 as the tables are.
    # ALPaCA (Harrison et al. 2018) is the same head on the features of a network alone, by the posterior predictive
    # density of the query.
    outer = "predictive_nll" if is_alpaca else "marginal"
    head = make_algorithm("linear_gaussian", prior=FullColumnPrior(), outer=outer)
    if method == "ibaml_gp":
        head = make_algorithm("gp", outer=outer)
    noise = Gaussian(initial_noise_variance=0.1)
    learner = MetaLearner(network.double(), head, noise, "head.*", seed=settings.seed)
    outer_loop = TrainerSettings(
        num_steps=settings.num_steps * (2 if is_alpaca else 1),
        tasks_per_step=16,
        learning_rate=_ALPACA_RATE if is_alpaca else 0.1,
        schedule="cosine",
        seed=settings.seed,
    )
    tasks = GroupedTasks(x, y, train.groups, num_support=settings.num_support, num_queries=_NUM_QUERY)
    return learner.fit(tasks, settings=outer_loop)


def _score(predict: Predictor, test: GroupedTasks, y_std: float, settings: GroupsSettings, seconds: float) -> Scores:
    values: list[list[float]] = []
    spent = 0.0
    for index in range(len(test)):
        draws: list[tuple[float, float, float]] = []
        for draw in range(settings.num_draws):
            support, query = test.episode(index, generator=task_generator(settings.seed + draw, index))
            start = time.process_time()
            mean, variance = predict(support.x.numpy(), support.y[:, 0].numpy(), query.x.numpy())
            spent += time.process_time() - start
            error = query.y[:, 0].numpy() - mean
            inside = np.abs(error) <= _NORMAL_95 * np.sqrt(variance)
            nll = gaussian_nll(mean, variance, query.y[:, 0].numpy()).mean() + math.log(y_std)
            draws.append((y_std * math.sqrt((error**2).mean()), float(nll), float(inside.mean())))
        values.append(np.mean(draws, axis=0).tolist())
    milliseconds = 1000 * spent / (len(test) * settings.num_draws)
    return Scores(*torch.tensor(values, dtype=torch.float64).T, seconds=seconds, milliseconds=milliseconds)


def _concatenate(values: Sequence[Scores]) -> Scores:
    stacked = [torch.cat(vectors) for vectors in zip(*(value[:3] for value in values), strict=True)]
    milliseconds = sum(value.milliseconds * len(value.nll) for value in values) / len(stacked[0])
    choices = tuple(choice for value in values for choice in value.choices)
    return Scores(*stacked, seconds=sum(value.seconds for value in values), milliseconds=milliseconds, choices=choices)
