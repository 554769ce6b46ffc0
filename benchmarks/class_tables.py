"""Classification on tables: the default beside prototypes and logistic regressions, and rare classes.

A test task shows its first rows and the last ones are predicted. Logistic regressions have their strength chosen on
validation tasks for each number of known rows; nothing is chosen on test tasks.

    python -m benchmarks.class_tables [PROBLEM ...]
"""

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from sklearn.linear_model import LogisticRegression

from ibaml.experiments.report import markdown_table
from ibaml.learner import MetaLearner
from ibaml.metrics import estimate, paired_difference

Array = npt.NDArray[Any]
Task = tuple[Array, Array]
Method = Callable[[Array, Array, Array], Array]
"""Probabilities of the classes at some rows, given known rows and their labels."""

_NUM_ROWS, _NUM_ASKED = 100, 68
_NUM_KNOWN = (2, 8, 32)
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
}
"""The problems, by name."""

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


def _nll(method: Method, tasks: Sequence[Task], num_known: int) -> tuple[torch.Tensor, float]:
    """Returns the nll of each task, and the mean probability of the last class over its share."""
    nll: list[float] = []
    probability: list[float] = []
    labels: list[Array] = []
    for x, y in tasks:
        asked = y[-_NUM_ASKED:]
        found = method(x[:num_known], y[:num_known], x[-_NUM_ASKED:])
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


def report(name: str) -> str:
    """Returns the table of a problem."""
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
    for num_known in _NUM_KNOWN if scope == "shared" else (15,):
        own, own_ratio = _nll(by(learner), test, num_known)
        alone, strength = _tuned(lambda c: _logistic(c, num_classes), validation, num_known)
        pooled = _logistic(1.0, num_classes, train)
        methods = {
            "default": (own, own_ratio),
            f"logistic regression per task, C = {strength:g}": _nll(alone, test, num_known),
        }
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
    torch.set_num_threads(1)
    for chosen in sys.argv[1:] or PROBLEMS:
        print(report(chosen), end="\n\n", flush=True)
