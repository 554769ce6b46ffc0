"""Hierarchical regression on grouped tables: schools, growth curves, reaction times, drug concentrations.

Groups are left out fold by fold. All methods learn from the other groups; then a left-out group shows a few of its rows
at random and the rest is predicted. A linear-Gaussian head on the features alone is a mixed-effects model in which
every feature has a random slope; with hidden units it learns further features. The default, ``MetaLearner`` without a
network, chooses among such heads by training groups that it holds out.
"""

import dataclasses
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from ibaml.algorithms import make_algorithm
from ibaml.data import GroupedTasks
from ibaml.data.prepare import SplitSettings
from ibaml.experiments.groups.baselines import (
    Array,
    Predictor,
    Rows,
    gaussian_nll,
    mixed_effects,
    per_group_ridge,
    pooled,
)
from ibaml.experiments.groups.tables import DATASETS, Dataset, folds, load, orthogonalise
from ibaml.experiments.report import require_at_least
from ibaml.learner import MetaLearner
from ibaml.likelihoods import Gaussian
from ibaml.networks import MLP
from ibaml.priors import FullColumnPrior
from ibaml.seeds import task_generator
from ibaml.train import TrainerSettings

METHODS = ("ibaml", "ibaml_linear", "ibaml_mlp", "mixed_effects", "ridge", "pooled")
"""All methods."""

DISPLAY_NAMES: Mapping[str, str] = {
    "ibaml": "iBaML, default",
    "ibaml_linear": "iBaML, linear",
    "ibaml_mlp": "iBaML, MLP",
    "mixed_effects": "mixed effects",
    "ridge": "ridge per group",
    "pooled": "pooled",
}
_NORMAL_95 = 1.6448536269514722
_NUM_QUERY = 20


@dataclasses.dataclass(frozen=True, kw_only=True)
class GroupsSettings:
    """Settings of the experiment.

    Attributes:
        datasets: Names of tables, out of ``DATASETS``.
        methods: Names of methods, out of ``METHODS``.
        num_support: Rows that a new group shows.
        num_folds: Folds of groups; each is left out once.
        num_draws: Random support sets per left-out group.
        num_steps: Meta-steps of ``ibaml_linear`` and ``ibaml_mlp``; ``ibaml`` has its own.
        num_hidden: Hidden units of ``ibaml_mlp``.
        seed: Seed of folds, support sets and training.
    """

    datasets: tuple[str, ...] = tuple(DATASETS)
    methods: tuple[str, ...] = METHODS
    num_support: int = 3
    num_folds: int = 5
    num_draws: int = 5
    num_steps: int = 100
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
        require_at_least(self, 2, "num_folds")
        require_at_least(self, 1, "num_support", "num_draws", "num_steps", "num_hidden")


class Scores(NamedTuple):
    """How one method predicts one data set; vectors over groups, means over support sets.

    Attributes:
        rmse: Root mean squared error, target's unit.
        nll: Nats per query row, for the target in its own unit.
        coverage: Fraction of query rows inside the central 90% interval.
        seconds: CPU seconds that learning took, all folds together.
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
        start = time.process_time()
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
    if method == "ibaml":
        return _default(train, settings)
    learner = _fit(train, num_hidden=0 if method == "ibaml_linear" else settings.num_hidden, settings=settings)

    def predict(x_support: Array, y_support: Array, x_query: Array) -> tuple[Array, Array]:
        posterior = learner.adapt(torch.from_numpy(x_support), torch.from_numpy(y_support)[:, None])
        prediction: Any = posterior.predict(torch.from_numpy(x_query))
        return prediction.mean[:, 0].numpy(), prediction.total_uncertainty[:, 0].numpy()

    return predict


def _default(train: Rows, settings: GroupsSettings) -> Predictor:
    groups = np.asarray(train.groups)
    tasks = {str(name): (train.x[groups == name], train.y[groups == name]) for name in np.unique(groups)}
    large = {name: task for name, task in tasks.items() if len(task[1]) > settings.num_support}
    splits = SplitSettings(num_support=settings.num_support, num_query=_NUM_QUERY, group_duplicates=False)
    learner = MetaLearner(likelihood="gaussian", seed=settings.seed).fit(large, splits=splits)

    def predict(x_support: Array, y_support: Array, x_query: Array) -> tuple[Array, Array]:
        prediction: Any = learner.adapt(x_support, y_support).predict(x_query)
        return prediction.mean, prediction.total_uncertainty

    return predict


def _fit(train: Rows, *, num_hidden: int, settings: GroupsSettings) -> MetaLearner:
    x, y = torch.from_numpy(train.x), torch.from_numpy(train.y)
    network = MLP(
        1,
        input_shape=x.shape[1],
        hidden_sizes=(num_hidden,) if num_hidden else (),
        activation="tanh",
        zero_head=True,
        skip_inputs=num_hidden > 0,
        generator=torch.Generator().manual_seed(settings.seed),
    )
    # As mixed models do: correlated effects, and the marginal likelihood of whole groups. In float64 as the tables are.
    head = make_algorithm("linear_gaussian", prior=FullColumnPrior(), outer="marginal")
    noise = Gaussian(initial_noise_variance=0.1)
    learner = MetaLearner(network.double(), head, noise, "head.*", seed=settings.seed)
    outer_loop = TrainerSettings(
        num_steps=settings.num_steps, tasks_per_step=16, learning_rate=0.1, schedule="cosine", seed=settings.seed
    )
    tasks = GroupedTasks(x, y, train.groups, num_support=settings.num_support, num_queries=_NUM_QUERY)
    return learner.fit(tasks, settings=outer_loop)


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
