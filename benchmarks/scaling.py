"""One meta-step over two processes: what the cost model of docs/scaling.md predicts, and what is measured.

    OMP_NUM_THREADS=1 python benchmarks/scaling.py [--steps 12] [--tasks 8]

Starts two gloo processes on this machine. The first one measures the terms of the model alone while the other waits;
then both measure them at the same time, each for itself, which shows what sharing the machine costs; then both take
steps together. Times are minima over the steps, because other work on the machine can only add to them; medians are
printed beside those of whole steps.
"""

import argparse
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable

import torch

from ibaml import tree
from ibaml.algorithms import Algorithm, make_algorithm
from ibaml.data import ClassImages, EpisodeSampler, SinusoidTasks
from ibaml.likelihoods import make_likelihood
from ibaml.model import Model, build_model
from ibaml.networks import MLP, Conv4
from ibaml.processes import Processes, connect, launch, num_launched
from ibaml.trainer import Trainer, TrainerSettings
from ibaml.types import TaskSampler

IBAML = make_algorithm(
    "ibaml", inner_learning_rate=1e-3, num_inner_steps=5, num_samples=2, num_linear_steps=2, temperature=0.1
)


def mlp(width: int) -> tuple[Model, TaskSampler]:
    network = MLP(1, input_shape=1, hidden_sizes=(width, width), generator=torch.Generator().manual_seed(0))
    return build_model(network, make_likelihood("gaussian", 1)), SinusoidTasks(num_shots=10, num_queries=10)


def conv4() -> tuple[Model, TaskSampler]:
    """Random images: only their number and size matter here."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (400, 1, 28, 28), generator=generator).to(torch.uint8)
    names = tuple(f"class {index}" for index in range(20))
    data = ClassImages(images=images, class_start=torch.arange(21) * 20, class_names=names)
    network = Conv4(5, channels=32, downsample="stride", zero_head=True, generator=generator)
    return build_model(network, make_likelihood("categorical", 5)), EpisodeSampler(
        data, num_ways=5, num_shots=5, num_queries=10
    )


CASES: dict[str, tuple[Algorithm, Callable[[], tuple[Model, TaskSampler]]]] = {
    "ibaml, MLP 40-40": (IBAML, lambda: mlp(40)),
    "ibaml, MLP 512-512": (IBAML, lambda: mlp(512)),
    "ibaml, Conv4": (IBAML, conv4),
    # Little to compute and much to send.
    "fomaml, MLP 2048-2048": (
        make_algorithm("fomaml", inner_learning_rate=1e-3, num_inner_steps=1),
        lambda: mlp(2048),
    ),
}


class Timed(Trainer):
    """Keeps the seconds of each step."""

    def _train_step(self, tasks: TaskSampler) -> dict[str, float]:
        start = time.perf_counter()
        row = super()._train_step(tasks)
        self.seconds = [*getattr(self, "seconds", []), time.perf_counter() - start]
        return row


def timed(function: Callable[[], object], repeats: int) -> float:
    """Returns the least seconds of several calls, after one that does not count."""
    function()
    seconds: list[float] = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def steps(case: str, num_steps: int, num_tasks: int, group: Processes | None) -> list[float]:
    algorithm, build = CASES[case]
    model, tasks = build()
    # A plain loop over tasks, whose time is proportional to their number, as the model assumes.
    settings = TrainerSettings(num_steps=num_steps + 2, tasks_per_step=num_tasks, tasks_per_chunk=1)
    trainer = Timed(model, algorithm, settings, processes=group)
    trainer.fit(tasks)
    return trainer.seconds[2:]


def terms(case: str, num_steps: int, num_tasks: int) -> dict[str, float]:
    """Measures the terms of the model in one process, in seconds."""
    algorithm, build = CASES[case]
    model, tasks = build()
    generator = torch.Generator().manual_seed(0)
    meta = tree.map(lambda leaf: leaf.clone(), algorithm.init(model.adapted, model.shared, generator=generator))
    optimizer = torch.optim.Adam(tree.leaves(meta))
    gradient = tree.map(lambda leaf: 1e-3 * torch.randn(leaf.shape, generator=generator), meta)

    def update() -> None:
        clipped = tree.scale((10.0 / tree.norm(gradient)).clamp_max(1.0), tree.scale(1 / num_tasks, gradient))
        for parameter, value in zip(tree.leaves(meta), tree.leaves(clipped), strict=True):
            parameter.grad = value
        optimizer.step()

    found = {
        "parameters": sum(leaf.numel() for leaf in tree.leaves(meta)),
        "sample": timed(lambda: tasks.sample(num_tasks, generator=generator), num_steps) / num_tasks,
        "noise": timed(lambda: algorithm.draw_noise(meta, generator=generator), num_steps),
        "update": timed(update, num_steps),
    }
    found["step"] = min(steps(case, num_steps, num_tasks, None))
    rest = found["step"] - found["update"]
    found["task"] = rest / num_tasks - found["sample"] - found["noise"]
    return found


def sum_seconds(group: Processes, tensors: object, repeats: int) -> float:
    """Least seconds of a sum; the slowest process counts."""
    group.on_first(lambda: None)
    own = timed(lambda: group.sum(tensors), repeats)
    return max(group.gather(lambda: own))


def line_through(sizes: list[int], seconds: list[float]) -> tuple[float, float]:
    """Returns latency a (s) and bandwidth b (bytes/s) of ``2 (P-1) a + 2 (P-1)/P V/b`` for P = 2.

    It is linear in ``(2 a, 1/b)``: weighted least squares, so that relative errors count.
    """
    rows = torch.tensor([[1.0, 4.0 * size] for size in sizes], dtype=torch.float64)
    values = torch.tensor(seconds, dtype=torch.float64)
    weights = 1 / values
    solution = torch.linalg.lstsq(rows * weights[:, None], (values * weights)[:, None]).solution.flatten()
    return float(solution[0]) / 2, 1 / float(solution[1])


def measure(num_steps: int, num_tasks: int, group: Processes) -> None:
    sizes = [100, 10_000, 100_000, 1_000_000, 4_000_000]
    found = [sum_seconds(group, torch.ones(size), 10 * num_steps) for size in sizes]
    latency, bandwidth = line_through(sizes, found)
    lines = [f"all-reduce: latency {latency * 1e6:.0f} us, bandwidth {bandwidth / 1e9:.2f} GB/s"]
    lines += [
        f"    {4 * size:>10,} bytes: {seconds * 1e3:.3f} ms, fitted {1e3 * (2 * latency + 4 * size / bandwidth):.3f} ms"
        for size, seconds in zip(sizes, found, strict=True)
    ]
    header = "| case | n | V (bytes) | sample | noise | task | update | sum | 1 process | 1 beside another |"
    lines += ["", header + " 2 predicted | 2 measured | median | ratio |", "|---" * 14 + "|"]
    for case in CASES:
        # One after the other: the second process waits without computing.
        alone = group.on_first(lambda c=case: terms(c, num_steps, num_tasks))
        both = group.gather(lambda c=case: terms(c, num_steps, num_tasks))
        beside = {name: max(one[name] for one in both) for name in alone}
        own = steps(case, num_steps, num_tasks, group)
        together = [max(column) for column in zip(*group.gather(lambda t=own: t), strict=True)]
        size = int(alone["parameters"]) + 5 * num_tasks + 2
        algorithm, build = CASES[case]
        model, _ = build()
        # Parameter by parameter, as in a step, so that packing them into a vector counts.
        gradient = algorithm.init(model.adapted, model.shared, generator=torch.Generator().manual_seed(0))
        reduce = sum_seconds(group, gradient, 4 * num_steps)
        predicted = beside["update"] + reduce
        predicted += num_tasks * (beside["sample"] + beside["noise"]) + -(-num_tasks // group.size) * beside["task"]
        cells = [
            case,
            f"{int(alone['parameters']):,}",
            f"{4 * size:,}",
            *(f"{1e3 * alone[name]:.3f}" for name in ("sample", "noise", "task", "update")),
            *(f"{1e3 * value:.2f}" for value in (reduce, alone["step"], beside["step"], predicted, min(together))),
            f"{1e3 * statistics.median(together):.2f}",
            f"{min(together) / predicted:.2f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
        if group.is_first:
            print(lines[-1], file=sys.stderr, flush=True)
    if group.is_first:
        print(f"{platform.platform()}, python {platform.python_version()}, torch {torch.__version__}", end="")
        print(f", {os.cpu_count()} cores, load average {os.getloadavg()}; milliseconds\n")
        print("\n".join(lines))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--tasks", type=int, default=8)
    options = parser.parse_args()
    if num_launched() == 1:
        sys.exit(launch([__file__, *sys.argv[1:]], 2))
    with connect() as group:
        torch.set_num_threads(1)
        measure(options.steps, options.tasks, group)


if __name__ == "__main__":
    main()
