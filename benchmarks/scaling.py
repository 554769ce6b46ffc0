"""One meta-step over two processes: what the cost model of docs/scaling.md predicts, and what is measured.

    OMP_NUM_THREADS=1 python benchmarks/scaling.py [--steps 12] [--tasks 8]
    OMP_NUM_THREADS=1 python benchmarks/scaling.py --memory    # memory and bytes on the wire instead; Linux only

Starts two gloo processes on this machine. The first one measures the small terms of the model, minima over repetitions,
while the other waits. Then the two take pairs of steps: each process one step of all tasks by itself, at the same time,
and the two one step together. The first step of a pair gives the seconds of a task for the prediction of the second, so
that the load of the machine, other work included, is the same for both.
"""

import argparse
import dataclasses
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from ibaml import tree
from ibaml.algorithms import Algorithm, make_algorithm
from ibaml.algorithms.model import Model, build_model
from ibaml.data import ClassImages, EpisodeSampler, SinusoidTasks
from ibaml.likelihoods import make_likelihood
from ibaml.networks import MLP, Conv4
from ibaml.priors import DiagonalPrior
from ibaml.solvers.inner import GradientDescent
from ibaml.solvers.linear import CG
from ibaml.train import Trainer, TrainerSettings
from ibaml.train.processes import Processes, connect, launch, num_launched
from ibaml.types import TaskSampler

IBAML = make_algorithm(
    "ibaml",
    inner=GradientDescent(num_steps=5, learning_rate=1e-3),
    linear=CG(max_steps=2),
    num_samples=2,
    temperature=0.1,
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
        make_algorithm("fomaml", inner=GradientDescent(num_steps=1, learning_rate=1e-3)),
        lambda: mlp(2048),
    ),
}


class Paired(Trainer):
    """Before each step takes one by itself, so that both see the machine in the same state; keeps their seconds."""

    by_itself: Trainer

    def _train_step(self, tasks: TaskSampler) -> dict[str, float]:
        self.processes.on_first(lambda: None)
        start = time.perf_counter()
        self.by_itself._train_step(tasks)
        middle = time.perf_counter()
        self.processes.on_first(lambda: None)
        begin = time.perf_counter()
        row = super()._train_step(tasks)
        self.seconds = [*getattr(self, "seconds", []), (middle - start, time.perf_counter() - begin)]
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


def steps(case: str, num_steps: int, num_tasks: int, group: Processes) -> list[tuple[float, float]]:
    """Returns the seconds of steps of this process by itself and of all together; the slowest process counts."""
    algorithm, build = CASES[case]
    model, tasks = build()
    # A plain loop over tasks, whose time is proportional to their number, as the model assumes.
    settings = TrainerSettings(num_steps=num_steps + 2, tasks_per_step=num_tasks, tasks_per_chunk=1)
    trainer = Paired(model, algorithm, settings, processes=group)
    trainer.by_itself = Trainer(model, algorithm, dataclasses.replace(settings, num_steps=1))
    trainer.by_itself.fit(tasks)
    trainer.fit(tasks)
    by_rank = group.gather(lambda: trainer.seconds[2:])
    return [tuple(map(max, zip(*pair, strict=True))) for pair in zip(*by_rank, strict=True)]


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

    return {
        "parameters": sum(leaf.numel() for leaf in tree.leaves(meta)),
        "sample": timed(lambda: tasks.sample(num_tasks, generator=generator), num_steps) / num_tasks,
        "noise": timed(lambda: algorithm.draw_noise(meta, generator=generator), num_steps),
        "update": timed(update, num_steps),
    }


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
    header = "| case | n | V (bytes) | sample | noise | update | sum | 1 process | 2, predicted | 2, measured | "
    lines += ["", header + "measured / predicted: median, quartiles |", "|---" * 11 + "|"]
    for case in CASES:
        # One after the other: the second process waits without computing.
        alone = group.on_first(lambda c=case: terms(c, num_steps, num_tasks))
        algorithm, build = CASES[case]
        model, _ = build()
        # Parameter by parameter, as in a step, so that packing them into a vector counts.
        gradient = algorithm.init(model.adapted, model.shared, generator=torch.Generator().manual_seed(0))
        reduce = sum_seconds(group, gradient, 4 * num_steps)
        fixed = alone["update"] + num_tasks * (alone["sample"] + alone["noise"])
        pairs = steps(case, num_steps, num_tasks, group)
        predicted = [fixed + reduce + (one - fixed) / num_tasks * -(-num_tasks // group.size) for one, _ in pairs]
        ratios = [two / value for (_, two), value in zip(pairs, predicted, strict=True)]
        lower, median, upper = statistics.quantiles(ratios, n=4)
        cells = [
            case,
            f"{int(alone['parameters']):,}",
            f"{4 * (int(alone['parameters']) + 5 * num_tasks + 2):,}",
            *(f"{1e3 * alone[name]:.3f}" for name in ("sample", "noise", "update")),
            f"{1e3 * reduce:.2f}",
            *(
                f"{1e3 * statistics.median(values):.1f}"
                for values in ([one for one, _ in pairs], predicted, [two for _, two in pairs])
            ),
            f"{median:.2f}, {lower:.2f} to {upper:.2f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
        if group.is_first:
            print(lines[-1], file=sys.stderr, flush=True)
    if group.is_first:
        print(f"{platform.platform()}, python {platform.python_version()}, torch {torch.__version__}", end="")
        print(f", {os.cpu_count()} cores, load average {os.getloadavg()}; milliseconds\n")
        print("\n".join(lines))


def measure_memory(group: Processes) -> None:
    """Peak memory of steps of 2 tasks a process, in units of the meta-parameters' bytes, and the bytes of a sum."""
    # A network so wide diverges with the step size of the others.
    small_steps = dataclasses.replace(
        IBAML,
        inner=GradientDescent(num_steps=5, learning_rate=1e-6),
        prior=DiagonalPrior(initial_log_var=(-12.0, -12.0)),
    )
    for name, algorithm in (("fomaml", CASES["fomaml, MLP 2048-2048"][0]), ("ibaml", small_steps)):
        model, tasks = mlp(2048)
        status = Path("/proc/self/status")
        Path("/proc/self/clear_refs").write_text("5")  # the peak is counted anew from here
        before = kilobytes(status, "VmHWM")
        settings = TrainerSettings(num_steps=3, tasks_per_step=2 * group.size, tasks_per_chunk=1)
        trainer = Trainer(model, algorithm, settings, processes=group)
        trainer.fit(tasks)
        peak = kilobytes(status, "VmHWM") - before
        num_meta = sum(leaf.numel() for leaf in tree.leaves(trainer._meta))
        print(f"{name}: process {group.rank}: n = {num_meta:,}, peak {1024 * peak / (4 * num_meta):.1f} n floats")
        del trainer
    vector = torch.ones(1_000_000)
    group.on_first(lambda: None)
    before = loopback_bytes()
    for _ in range(20):
        group.sum(vector)
    group.on_first(lambda: None)
    if group.is_first:
        each = (loopback_bytes() - before) / 20 / group.size
        print(f"sum of 4,000,000 bytes: each process sent {each:,.0f} (all traffic of the loopback device)")


def kilobytes(status: Path, field: str) -> int:
    return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith(field))


def loopback_bytes() -> int:
    return next(int(line.split()[1]) for line in Path("/proc/net/dev").read_text().splitlines() if "lo:" in line)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--tasks", type=int, default=8)
    parser.add_argument("--memory", action="store_true")
    options = parser.parse_args()
    if num_launched() == 1:
        sys.exit(launch([__file__, *sys.argv[1:]], 2))
    with connect() as group:
        torch.set_num_threads(1)
        if options.memory:
            measure_memory(group)
        else:
            measure(options.steps, options.tasks, group)


if __name__ == "__main__":
    main()
