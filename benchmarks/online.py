"""A prior that learns on from a stream of tasks (``learner.observe``) beside one that stays and one trained again.

Each task of a stream shows some rows and is judged on the others; then all its rows are known. Training again takes all
tasks so far, those of the first training among them, and is done at intervals. Streams are the unit of the intervals:
the same streams for all methods.

    python -m benchmarks.online [PROBLEM ...]
"""

import copy
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from ibaml.algorithms import make_algorithm
from ibaml.experiments.report import markdown_table
from ibaml.learner import MetaLearner
from ibaml.learner.defaults import SHORT_TRAINER, TABLE_TRAINER
from ibaml.metrics import estimate, paired_difference
from ibaml.networks import MLP
from ibaml.priors import FullColumnPrior

Array = npt.NDArray[Any]
Task = tuple[Array, Array]

_NUM_STREAMS = 10
_NUM_BEFORE, _LENGTH, _EVERY = 15, 120, 20
_NUM_ROWS, _NUM_KNOWN = 20, 5
_FORGETTING = 20


class _Problem(NamedTuple):
    """Tasks before and in the stream, and the sizes of the hidden layers."""

    before: Callable[[np.random.Generator], Task]
    stream: Callable[[np.random.Generator], Task]
    hidden_sizes: tuple[int, ...] = ()


def _lines(generator: np.random.Generator, mean: float = 0.0, scale: float = 1.0) -> Task:
    x = generator.normal(size=(_NUM_ROWS, 3))
    weights = mean + scale * (np.sqrt(0.5) * generator.normal() + np.sqrt(0.5) * generator.normal(size=4))
    return x, weights[0] + x @ weights[1:] + 0.5 * generator.normal(size=_NUM_ROWS)


def _other_lines(generator: np.random.Generator) -> Task:
    return _lines(generator, mean=1.5, scale=0.4)


def _sinusoids(generator: np.random.Generator) -> Task:
    x = generator.uniform(-5, 5, size=(_NUM_ROWS, 1))
    curve = generator.uniform(0.1, 5) * np.sin(x[:, 0] + generator.uniform(0, np.pi))
    return x, curve + 0.3 * generator.normal(size=_NUM_ROWS)


PROBLEMS: Mapping[str, _Problem] = {
    "more of the same": _Problem(_lines, _lines),
    "another population": _Problem(_lines, _other_lines),
    "learned features": _Problem(_sinusoids, _sinusoids, (32, 16)),
}


def _fitted(tasks: list[Task], problem: _Problem) -> MetaLearner:
    generator = torch.Generator().manual_seed(0)
    network = MLP(
        1,
        input_shape=tasks[0][0].shape[1],
        hidden_sizes=problem.hidden_sizes,
        activation="tanh",
        skip_inputs=bool(problem.hidden_sizes),
        zero_head=True,
        generator=generator,
    )
    line = make_algorithm("linear_gaussian", prior=FullColumnPrior(), outer="marginal")
    settings = TABLE_TRAINER if problem.hidden_sizes else SHORT_TRAINER
    return MetaLearner(network, line, "gaussian").fit(tasks, settings=settings)


def _nll(learner: MetaLearner, task: Task) -> float:
    x, y = task
    return float(learner.adapt(x[:_NUM_KNOWN], y[:_NUM_KNOWN]).predict(x[_NUM_KNOWN:]).nll(y[_NUM_KNOWN:]).mean())


def _stream(problem: _Problem, seed: int, seconds: dict[str, float]) -> dict[str, list[float]]:
    """Returns the nll of each task of a stream by each method."""
    generator = np.random.default_rng(seed)
    seen = [problem.before(generator) for _ in range(_NUM_BEFORE)]
    frozen = _fitted(seen, problem)
    learners = {name: copy.copy(frozen) for name in ("frozen", "observe", "observe, forgetting", "trained again")}
    found: dict[str, list[float]] = {name: [] for name in learners}
    for index in range(_LENGTH):
        task = problem.stream(generator)
        if index and index % _EVERY == 0:
            started = time.process_time()
            learners["trained again"] = _fitted(seen, problem)
            seconds["trained again"] += time.process_time() - started
        for name, learner in learners.items():
            found[name].append(_nll(learner, task))
        started = time.process_time()
        learners["observe"].observe(*task)
        seconds["observe"] += time.process_time() - started
        learners["observe, forgetting"].observe(*task, most_tasks=_FORGETTING)
        seen.append(task)
    return found


def main(names: list[str]) -> None:
    """Prints a section for each problem."""
    torch.set_num_threads(1)
    for name in names or PROBLEMS:
        seconds = {"observe": 0.0, "trained again": 0.0}
        streams = [_stream(PROBLEMS[name], seed, seconds) for seed in range(_NUM_STREAMS)]
        by_method = {method: torch.tensor([each[method] for each in streams]) for method in streams[0]}
        again = by_method["trained again"]
        half = _LENGTH // 2
        rows = [
            (
                method,
                str(estimate(values.mean(1))),
                "" if method == "frozen" else str(paired_difference(values.mean(1), by_method["frozen"].mean(1))),
                "" if values is again else str(paired_difference(values.mean(1), again.mean(1))),
                "" if values is again else str(paired_difference(values[:, half:].mean(1), again[:, half:].mean(1))),
            )
            for method, values in by_method.items()
        ]
        num = _NUM_STREAMS * _LENGTH
        print(
            f"## {name}\n\nCPU: {1e3 * seconds['observe'] / num:.1f} ms to observe a task; "
            f"{1e3 * seconds['trained again'] / (_NUM_STREAMS * ((_LENGTH - 1) // _EVERY)):.0f} ms to train again.\n"
        )
        header = ("method", "nll", "minus frozen", "minus trained again", "minus trained again, second half")
        print("\n".join(markdown_table(header, rows)) + "\n", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
