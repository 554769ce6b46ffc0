"""The cost model of docs/scaling.md as code; prints the tables of that page.

python benchmarks/scaling_model.py
"""

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class Workload:
    """What one meta-step costs, in seconds and numbers of float32 values.

    Attributes:
        name: Name in the table.
        num_meta: Meta-parameters n.
        task: Seconds to compute one task's meta-gradient on one accelerator.
        sample: Seconds to draw one task on one CPU core.
        noise: Seconds to draw one task's noise on one CPU core.
        update: Seconds of clipping and Adam.
        memory: Peak memory, in n values, with one task at a time.
    """

    name: str
    num_meta: float
    task: float
    sample: float
    noise: float
    update: float
    memory: float


def sum_seconds(num_bytes: float, num_processes: int, *, latency: float, bandwidth: float) -> float:
    """Ring all-reduce: ``2 (P - 1) a + 2 (P - 1) / P V / b``."""
    return 2 * (num_processes - 1) * (latency + num_bytes / num_processes / bandwidth)


def step_seconds(
    work: Workload, num_processes: int, num_tasks: int, *, per_task: bool, latency: float, bandwidth: float
) -> float:
    """Draws, then tasks, then the sum, then the update; nothing overlaps, as in the trainer."""
    share = -(-num_tasks // num_processes)
    drawn = share if per_task else num_tasks
    # Five numbers for each task and two wishes to stop travel with the gradient.
    num_bytes = 4 * (work.num_meta + 5 * num_tasks + 2)
    exchange = sum_seconds(num_bytes, num_processes, latency=latency, bandwidth=bandwidth)
    return drawn * (work.sample + work.noise) + share * work.task + exchange + work.update


# A ring over 8 devices of one machine, and over machines with one 400 Gbit/s port for each device.
LINKS = {8: (5e-6, 200e9), 64: (1e-5, 40e9), 256: (1e-5, 40e9), 1024: (1e-5, 40e9)}

NORMALS_PER_SECOND = 1e8  # torch.randn on one core, as measured
WORKLOADS = (
    # Conv4-32, 5-way 5-shot of 84 x 84 images, 15 queries a class; 5 weight samples, drawn twice (inner and outer).
    Workload(
        name="Conv4-32, iBaML",
        num_meta=2 * 32_901,
        task=20e-3,
        sample=3.2e-3,
        noise=10 * 32_901 / NORMALS_PER_SECOND,
        update=0.2e-3,
        memory=48,
    ),
    # A billion weights, each with mean and log-variance; 1 weight sample; 375 gradients of sequences of 128 tokens at
    # 6e9 operations a token, 100e12 operations a second.
    Workload(
        name="1e9 weights, iBaML",
        num_meta=2e9,
        task=375 * 128 * 6e9 / 100e12,
        sample=1e-3,
        noise=2 * 1e9 / NORMALS_PER_SECOND,
        update=20 * 2e9 * 4 / 2e12,
        memory=48,
    ),
    # The same network, of which one weight in a thousand is adapted and all others are frozen.
    Workload(
        name="1e9 weights, 1e6 adapted, iBaML",
        num_meta=2e6,
        task=375 * 128 * 4e9 / 100e12,
        sample=1e-3,
        noise=2 * 1e6 / NORMALS_PER_SECOND,
        update=1e-3,
        memory=48,
    ),
)

# Heads, whose tasks are solved exactly on features; no noise. The first two and the last as measured on one CPU core
# (softmax, 16 tasks at once, 5 ways, 5 shots and 15 queries; a step of the Omniglot recipe in bfloat16), the third with
# an accelerator's assumed 15 ms: 360 images of 28 x 28 forth and back, and some 300 small kernels of Newton's method.
HEADS = (
    Workload(
        name="head on 64 kept features", num_meta=65, task=1.0e-3, sample=0.07e-3, noise=0, update=0.2e-3, memory=4
    ),
    Workload(
        name="head on 1,280 kept features", num_meta=1281, task=3.3e-3, sample=0.22e-3, noise=0, update=0.2e-3, memory=4
    ),
    Workload(
        name="Conv4-64 and head, accelerator",
        num_meta=112_000,
        task=15e-3,
        sample=0.7e-3,
        noise=0,
        update=0.3e-3,
        memory=4,
    ),
    Workload(
        name="Conv4-64 and head, CPU core", num_meta=112_000, task=0.24, sample=0.7e-3, noise=0, update=0.3e-3, memory=4
    ),
)
TASKS_PER_PROCESS = 16
BILLION = 1e9


def billion_tasks() -> list[str]:
    """Returns rows of what training a head on a billion tasks takes, in hours of all processes together."""
    rows = []
    for work in HEADS:
        for num_processes, (latency, bandwidth) in LINKS.items():
            num_tasks = TASKS_PER_PROCESS * num_processes
            seconds = step_seconds(work, num_processes, num_tasks, per_task=True, latency=latency, bandwidth=bandwidth)
            exchange = sum_seconds(
                4 * (work.num_meta + 5 * num_tasks + 2), num_processes, latency=latency, bandwidth=bandwidth
            )
            hours = BILLION / num_tasks * seconds / 3600
            share = TASKS_PER_PROCESS * work.task / seconds
            rows.append(
                f"| {work.name} | {num_processes:,} | {1e3 * exchange:.2f} | {1e3 * seconds:,.1f} | {hours:,.1f} "
                f"| {100 * share:.0f}% |"
            )
    return rows


def main() -> None:
    print("| workload | P | MB sent | sum, s | step, s | efficiency |", end="")
    print(" step, s, `per_task` | efficiency |")
    print("|---" * 8 + "|")
    for work in WORKLOADS:
        alone = step_seconds(work, 1, 1, per_task=True, latency=0, bandwidth=1)
        for num_processes, (latency, bandwidth) in LINKS.items():
            num_bytes = 4 * (work.num_meta + 5 * num_processes + 2)
            cells = [
                work.name,
                f"{num_processes:,}",
                f"{2 * (num_processes - 1) / num_processes * num_bytes / 1e6:,.2f}",
                f"{sum_seconds(num_bytes, num_processes, latency=latency, bandwidth=bandwidth):.5f}",
            ]
            for per_task in (False, True):
                seconds = step_seconds(
                    work, num_processes, num_processes, per_task=per_task, latency=latency, bandwidth=bandwidth
                )
                cells += [f"{seconds:,.3f}", f"{100 * alone / seconds:.2g}%".replace("1e+02", "100")]
            print("| " + " | ".join(cells) + " |")
    print()
    for work in WORKLOADS:
        print(f"{work.name}: {4 * work.num_meta * work.memory / 1e9:.3g} GB a process for meta-parameters and one task")
    print("\n| workload | P | sum, ms | step, ms | hours for 1e9 tasks | computing |\n|" + "---|" * 6)
    print("\n".join(billion_tasks()))


if __name__ == "__main__":
    main()
