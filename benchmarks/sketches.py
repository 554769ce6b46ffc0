"""Drawings that the playground has never seen: how often it names them, and notices what is of no class.

``python -m benchmarks.sketches``. Sketches are those that its tests draw (``pen.py``): twelve figures as a
hand draws them, with wobble, tilt, size and place of their own. A task takes some figures and a few examples of each;
one more sketch of each is judged, and one of a figure that is not in the task.
"""

import argparse

import numpy as np
import torch

from benchmarks.pen import FIGURES, sketch
from ibaml.metrics import Estimate, estimate
from ibaml.playground.draw import NONE_OF_THESE, judge
from ibaml.playground.strokes import draw

TASKS = ((5, 1), (5, 2), (5, 3), (5, 5), (10, 3), (2, 3))
"""Numbers of classes, and of examples of each."""


def measure(num_ways: int, num_shots: int, *, num_tasks: int, seed: int = 0) -> dict[str, Estimate]:
    """Shares over tasks, with 95% intervals: right labels, sketches turned away, and foreign ones noticed."""
    rng = np.random.default_rng(seed)
    rows: dict[str, list[float]] = {"right": [], "turned away": [], "noticed": []}
    for _ in range(num_tasks):
        *chosen, foreign = rng.choice(list(FIGURES), num_ways + 1, replace=False).tolist()
        labels = [name for name in chosen for _ in range(num_shots)]
        examples = np.stack([draw(sketch(name, rng)) for name in labels])
        verdicts = [judge(examples, labels, draw(sketch(name, rng))) for name in chosen]
        named = [one.labels[int(np.argmax(one.probabilities))] for one in verdicts]
        rows["right"].append(float(np.mean([one == name for one, name in zip(named, chosen, strict=True)])))
        rows["turned away"].append(float(np.mean([one.says == NONE_OF_THESE for one in verdicts])))
        noticed = judge(examples, labels, draw(sketch(foreign, rng))).says == NONE_OF_THESE
        rows["noticed"].append(float(noticed))
    return {name: estimate(100 * torch.tensor(values)) for name, values in rows.items()}


def main() -> None:
    """Prints a table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--num-tasks", type=int, default=60, help="tasks of each size [default: 60]")
    num_tasks = parser.parse_args().num_tasks
    print(
        "| classes | examples of each | right, % | turned away, % | foreign ones noticed, % |\n|---|---|---:|---:|---:|"
    )
    for num_ways, num_shots in TASKS:
        found = measure(num_ways, num_shots, num_tasks=num_tasks)
        cells = " | ".join(f"{one.mean:.1f} +- {one.half_width:.1f}" for one in found.values())
        print(f"| {num_ways} | {num_shots} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
