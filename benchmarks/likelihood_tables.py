"""Counts and outliers on tables of tasks: the default beside gradient steps, as it was before, and simple methods.

A test task shows its first rows and the last ones are predicted. Penalties are chosen on validation tasks for each
number of known rows; nothing is chosen on test tasks. The scores are nlls of whole predictive distributions.

    python -m benchmarks.likelihood_tables [PROBLEM ...]
"""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from scipy import stats
from sklearn.linear_model import PoissonRegressor, Ridge

from benchmarks.named import print_reports
from ibaml.experiments.report import markdown_table
from ibaml.learner import MetaLearner
from ibaml.metrics import estimate, paired_difference
from ibaml.train import TrainingDivergedError

Array = npt.NDArray[Any]
Task = tuple[Array, Array]
Nll = Callable[[Array, Array, Array, Array], Array]
"""Nll of some values at some rows, given known rows and their values."""

_NUM_ROWS, _NUM_ASKED = 60, 40
_NUM_KNOWN = (2, 5, 20)
_PENALTIES = tuple(10.0**exponent for exponent in range(-3, 3))


def _slopes(generator: np.random.Generator) -> Task:
    x = generator.normal(size=(_NUM_ROWS, 3))
    log_rate = 1 + 0.6 * generator.normal() + x @ (np.array([0.5, -0.3, 0.0]) + 0.3 * generator.normal(size=3))
    return x, generator.poisson(np.exp(log_rate)).astype(float)


def _bursts(generator: np.random.Generator) -> Task:
    x, rate = _slopes(generator)
    return x, generator.poisson((rate + 0.1) * generator.gamma(2.0, 0.5, len(x))).astype(float)


def _seasons(generator: np.random.Generator) -> Task:
    x = generator.uniform(-3, 3, (_NUM_ROWS, 1))
    log_rate = 1 + generator.normal() + generator.uniform(0.3, 1.5) * np.sin(2 * x[:, 0] + generator.uniform(0, 1))
    return x, generator.poisson(np.exp(log_rate)).astype(float)


def _outliers(generator: np.random.Generator) -> Task:
    x = generator.normal(size=(_NUM_ROWS, 3))
    y = generator.normal() + x @ (np.array([1.0, -1.0, 0.0]) + 0.5 * generator.normal(size=3))
    noise = np.where(generator.random(len(x)) < 0.1, 5.0, 0.3) * generator.normal(size=len(x))
    return x, y + noise


def _heavy(generator: np.random.Generator) -> Task:
    x = generator.uniform(-3, 3, (_NUM_ROWS, 1))
    y = generator.normal() + generator.uniform(0.5, 2) * np.sin(2 * x[:, 0] + generator.uniform(0, 1))
    return x, y + 0.3 * generator.standard_t(2.5, len(x))


class Problem(NamedTuple):
    """Tasks of one kind.

    Attributes:
        title: For a reader.
        make: Makes one task.
        likelihood: Of the targets.
        others: Further likelihoods of the default to compare with.
    """

    title: str
    make: Callable[[np.random.Generator], Task]
    likelihood: str
    others: tuple[str, ...]


PROBLEMS: Mapping[str, Problem] = {
    "slopes": Problem("counts whose logarithm is a line of a task's own", _slopes, "poisson", ("negative_binomial",)),
    "bursts": Problem("the same, overdispersed", _bursts, "negative_binomial", ("poisson",)),
    "seasons": Problem("counts whose logarithm is a sine of a task's own", _seasons, "poisson", ("negative_binomial",)),
    "outliers": Problem("lines with a tenth of measurements wrong", _outliers, "student_t", ("gaussian",)),
    "heavy": Problem("sines with noise of heavy tails", _heavy, "student_t", ("gaussian",)),
}
"""The problems, by name."""


def _of_learner(learner: MetaLearner) -> Nll:
    def nll(x: Array, y: Array, asked: Array, values: Array) -> Array:
        return np.asarray(learner.adapt(x, y).predict(asked).nll(values))

    return nll


def _of_counts(penalty: float, others: Sequence[Task] = ()) -> Nll:
    """Poisson regression on the known rows of a task, or on those of other tasks if there are any."""

    def fit(x: Array, y: Array) -> Any:
        return PoissonRegressor(alpha=penalty, max_iter=500).fit(x, y)

    pooled = fit(*map(np.concatenate, zip(*others, strict=True))) if others else None

    def nll(x: Array, y: Array, asked: Array, values: Array) -> Array:
        # Of no event at all a rate of zero would follow: half an event at the middle.
        known = np.concatenate([x, np.zeros((1, x.shape[1]))]), np.append(y, 0.5)
        rate = (fit(*known) if pooled is None else pooled).predict(asked)
        return -stats.poisson.logpmf(values, np.maximum(rate, 1e-6))

    return nll


def _of_numbers(penalty: float, others: Sequence[Task] = ()) -> Nll:
    """Ridge regression, with Student noise fitted to what it leaves of the rows of all training tasks."""
    pooled = Ridge(alpha=penalty).fit(*map(np.concatenate, zip(*others, strict=True)))
    degrees, _, scale = stats.t.fit(np.concatenate([y - pooled.predict(x) for x, y in others]), floc=0)

    def nll(x: Array, y: Array, asked: Array, values: Array) -> Array:
        own = Ridge(alpha=penalty).fit(x, y - pooled.predict(x))
        return -stats.t.logpdf(values, degrees, pooled.predict(asked) + own.predict(asked), scale)

    return nll


def _scores(method: Nll, tasks: Sequence[Task], num_known: int) -> torch.Tensor:
    """Returns the mean nll of the asked rows of each task."""
    found = [float(np.mean(method(x[:num_known], y[:num_known], x[-_NUM_ASKED:], y[-_NUM_ASKED:]))) for x, y in tasks]
    return torch.tensor(found, dtype=torch.float64)


def _tuned(make: Callable[[float], Nll], validation: Sequence[Task], num_known: int) -> tuple[str, Nll]:
    """Returns the method with the lowest validation nll, and how its penalty reads."""
    losses = {penalty: float(_scores(make(penalty), validation, num_known).mean()) for penalty in _PENALTIES}
    best = min(losses, key=losses.__getitem__)
    return f"penalty {best:g}", make(best)


def report(name: str) -> str:
    """Returns the table of a problem."""
    problem, generator = PROBLEMS[name], np.random.default_rng(0)
    train, validation, test = ([problem.make(generator) for _ in range(size)] for size in (60, 20, 100))
    lines = [f"## {name}: {problem.title}", ""]
    learners: dict[str, MetaLearner] = {}
    settings = {
        f"default, {likelihood}": {"likelihood": likelihood} for likelihood in (problem.likelihood, *problem.others)
    }
    settings[f"gradient steps, {problem.likelihood}"] = {"likelihood": problem.likelihood, "algorithm": "ibaml"}
    for title, arguments in settings.items():
        start = time.process_time()
        try:
            learners[title] = MetaLearner(**arguments).fit(train, validation)
        except TrainingDivergedError as error:
            lines.append(f"- {title}: training diverged ({str(error).split('(')[0].strip()}).")
            continue
        choice = "" if learners[title].choice is None else f" ({learners[title].choice})"
        lines.append(f"- {title}: learned in {time.process_time() - start:.1f} CPU s{choice}.")
    start, (x, y) = time.process_time(), test[0]
    for _ in range(20):
        learners[f"default, {problem.likelihood}"].adapt(x[:5], y[:5]).predict(x)
    lines += [f"- adapt and predict of the default: {(time.process_time() - start) / 20 * 1e3:.1f} CPU ms.", ""]
    rows: list[list[str]] = []
    for num_known in _NUM_KNOWN:
        methods = {title: _of_learner(learner) for title, learner in learners.items()}
        if problem.likelihood == "student_t":
            chosen, alone = _tuned(lambda penalty: _of_numbers(penalty, train), validation, num_known)
            methods[f"ridge on what a pooled one leaves, Student noise, {chosen}"] = alone
        else:
            chosen, alone = _tuned(_of_counts, validation, num_known)
            methods[f"Poisson regression per task, {chosen}"] = alone
            methods["Poisson regression on all training rows"] = _of_counts(1e-3, train)
        found = {title: _scores(method, test, num_known) for title, method in methods.items()}
        own = next(iter(found.values()))
        for title, nll in found.items():
            difference = "" if nll is own else str(paired_difference(nll, own))
            rows.append([str(num_known), title, str(estimate(nll)), difference])
    return "\n".join([*lines, *markdown_table(["known rows", "", "nll", "minus the first default's"], rows)])


if __name__ == "__main__":
    print_reports(report, PROBLEMS, about=__doc__)
