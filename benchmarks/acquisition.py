"""Rows that ``posterior.acquisition`` chooses beside rows taken at random: the error after so many known rows.

Each test task has a pool of rows that could be measured and others that are predicted. Both ways start without a known
row, with the same learner, on the same tasks.

    python -m benchmarks.acquisition [PROBLEM ...]
"""

import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ibaml.experiments.report import markdown_table
from ibaml.learner import MetaLearner
from ibaml.metrics import estimate, paired_difference

Array = npt.NDArray[Any]
Task = tuple[Array, Array]

_NUM_ROWS, _NUM_POOL = 100, 50
_NUM_KNOWN = (1, 2, 4, 8, 16)
_NUM_TASKS = 200


def _slopes(generator: np.random.Generator) -> Task:
    x = generator.normal(size=(_NUM_ROWS, 3))
    weights = np.sqrt(0.5) * generator.normal() + np.sqrt(0.5) * generator.normal(size=4)
    return x, weights[0] + x @ weights[1:] + 0.5 * generator.normal(size=_NUM_ROWS)


def _sinusoids(generator: np.random.Generator) -> Task:
    x = generator.uniform(-5, 5, size=(_NUM_ROWS, 1))
    curve = generator.uniform(0.1, 5) * np.sin(x[:, 0] + generator.uniform(0, np.pi))
    return x, curve + 0.3 * generator.normal(size=_NUM_ROWS)


def _saturation(generator: np.random.Generator) -> Task:
    x = generator.uniform(0, 10, size=(_NUM_ROWS, 1))
    curve = generator.uniform(5, 15) * (1 - np.exp(-x[:, 0] / generator.uniform(0.5, 5)))
    return x, curve + 0.5 * generator.normal(size=_NUM_ROWS)


def _boundaries(generator: np.random.Generator) -> Task:
    x = generator.normal(size=(_NUM_ROWS, 4))
    logits = x @ (3 * generator.normal(size=4)) + generator.normal()
    return x, (generator.random(_NUM_ROWS) < 1 / (1 + np.exp(-logits))).astype(int)


PROBLEMS: Mapping[str, tuple[str, Callable[[np.random.Generator], Task]]] = {
    "random slopes": ("gaussian", _slopes),
    "sinusoids": ("gaussian", _sinusoids),
    "curves with saturation": ("gaussian", _saturation),
    "boundaries": ("categorical", _boundaries),
}


def _chosen(learner: MetaLearner, task: Task) -> list[int]:
    """Returns rows of the pool in the order in which they are measured; labels are taken in one after the other."""
    x, y = task
    posterior = learner.adapt(x[:0], y[:0])
    if learner.likelihood.target_kind == "real":
        return posterior.acquisition(x[:_NUM_POOL], max(_NUM_KNOWN), of=x[_NUM_POOL:]).positions.tolist()
    found: list[int] = []
    for _ in range(max(_NUM_KNOWN)):
        scores = posterior.acquisition(x[:_NUM_POOL]).scores
        scores[found] = -1
        found.append(int(scores.argmax()))
        posterior = posterior.update(x[found[-1:]], y[found[-1:]])
    return found


def _errors(learner: MetaLearner, task: Task, rows: list[int]) -> list[tuple[float, float]]:
    """Returns root mean squared error (classes: share of wrong labels) and nll for each number of known rows."""
    x, y = task
    errors: list[tuple[float, float]] = []
    for num in _NUM_KNOWN:
        prediction = learner.adapt(x[rows[:num]], y[rows[:num]]).predict(x[_NUM_POOL:])
        asked = y[_NUM_POOL:]
        wrong = (
            np.sqrt(np.mean((prediction.mean - asked) ** 2))
            if learner.likelihood.target_kind == "real"
            else np.mean(prediction.labels != asked)
        )
        errors.append((float(wrong), float(prediction.nll(asked).mean())))
    return errors


def main(names: list[str]) -> None:
    """Prints a section for each problem."""
    torch.set_num_threads(1)
    for name in names or PROBLEMS:
        likelihood, draw = PROBLEMS[name]
        generator = np.random.default_rng(0)
        learner = MetaLearner(likelihood=likelihood).fit([draw(generator) for _ in range(60)], 0.2)
        tasks = [draw(generator) for _ in range(_NUM_TASKS)]
        started = time.process_time()
        chosen = [_chosen(learner, task) for task in tasks]
        seconds = time.process_time() - started
        of_chosen = torch.tensor([_errors(learner, task, rows) for task, rows in zip(tasks, chosen, strict=True)])
        # Rows of a task come in no order.
        of_random = torch.tensor([_errors(learner, task, list(range(_NUM_POOL))) for task in tasks])
        print(f"## {name}\n\n{learner.choice}; {1e3 * seconds / _NUM_TASKS:.1f} ms of CPU a task to choose.\n")
        measure = "RMSE" if likelihood == "gaussian" else "share of wrong labels"
        header = ("known rows", f"{measure}, at random", "chosen", "chosen minus random", "nll, chosen minus random")
        rows = [
            (
                str(num),
                str(estimate(of_random[:, index, 0])),
                str(estimate(of_chosen[:, index, 0])),
                str(paired_difference(of_chosen[:, index, 0], of_random[:, index, 0])),
                str(paired_difference(of_chosen[:, index, 1], of_random[:, index, 1])),
            )
            for index, num in enumerate(_NUM_KNOWN)
        ]
        print("\n".join(markdown_table(header, rows)), flush=True)
        print()


if __name__ == "__main__":
    main(sys.argv[1:])
