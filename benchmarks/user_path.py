"""What a user waits for: importing, a first step, a task, many groups, an evaluation.

    python -m benchmarks.user_path [--output FILE]

CPU seconds of one thread, which are those of the clock on a quiet machine; medians. What is compared takes turns in one
process; what happens once in a process has processes of its own.
"""

import argparse
import dataclasses
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import nn

from ibaml import MetaLearner, __version__
from ibaml.backbones.samplers import FeatureEpisodes
from ibaml.data import ClassImages, EpisodeSampler
from ibaml.experiments.report import describe_device
from ibaml.recipes import get_recipe
from ibaml.train import TrainerSettings
from ibaml.train.evaluate import draw_task

_RESULTS = Path(__file__).resolve().parent / "results"
_INPUTS = ["a", "b", "c"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes:
    """How much is measured.

    Attributes:
        rounds: Times of each measurement.
        processes: Processes of each kind, and evaluations.
        groups: Groups that are predicted in one call.
        tasks: Image tasks of an evaluation.
        steps: Meta-steps that are timed, and those before the evaluation, which decide nothing about its time.
    """

    rounds: int = 30
    processes: int = 5
    groups: int = 1000
    tasks: int = 600
    steps: int = 20


def table(num_groups: int, *, seed: int, rows: int = 25) -> pd.DataFrame:
    """Returns groups with lines of their own: column ``g``, inputs ``a``, ``b`` and ``c``, target ``y``."""
    rng = np.random.default_rng(seed)
    group = np.repeat(np.arange(num_groups), rows)
    weights, x = rng.normal(size=(num_groups, 4)), rng.normal(size=(len(group), 3))
    y = (x * weights[group, :3]).sum(1) + weights[group, 3] + 0.3 * rng.normal(size=len(group))
    return pd.DataFrame({"g": group, **dict(zip(_INPUTS, x.T, strict=True)), "y": y})


def of_tables(sizes: Sizes) -> list[str]:
    """Returns rows on a default learner for numbers on three columns."""
    learner = MetaLearner(likelihood="gaussian").fit(table(60, seed=0), task="g", target="y")
    new = table(1, seed=1)
    known, asked = new.iloc[:5], new.iloc[5:]
    x, y, x_asked = known[_INPUTS].to_numpy(), known["y"].to_numpy(), asked[_INPUTS].to_numpy()
    groups = table(sizes.groups, seed=2)
    known_rows = groups.groupby("g").head(5)
    asked_rows = groups.drop(known_rows.index)
    seconds = medians(
        {
            "arrays": lambda: learner.adapt(x, y).predict(x_asked),
            "frames": lambda: learner.adapt(known[_INPUTS], known["y"]).predict(asked[_INPUTS]),
            "groups": lambda: learner.predict_new(known_rows, asked_rows),
        },
        sizes.rounds,
    )
    return [
        row("`adapt` and `predict`, 5 known and 20 asked rows, arrays", 1e3 * seconds["arrays"], "ms", 1.0),
        row("the same, data frames", 1e3 * seconds["frames"], "ms", None),
        row(f"`predict_new` of {sizes.groups} groups", 1e3 * seconds["groups"], "ms", 50.0),
    ]


def of_images(sizes: Sizes) -> list[str]:
    """Returns a row on an evaluation beside the bare passes of the images of its tasks, one task after another."""
    recipe = get_recipe("glyphs_5way_5shot")
    tasks, test = (recipe.data.sampler(split) for split in ("train", "test"))
    learner = recipe.learner().fit(tasks, settings=dataclasses.replace(recipe.trainer, num_steps=sizes.steps))
    fitted = learner.fitted_model
    drawn = [draw_task(test, index, seed=0) for index in range(sizes.tasks)]

    def bare() -> None:
        with torch.no_grad():
            for task in drawn:
                for batch in task:
                    fitted.model.features(fitted.meta.shared, batch.x)

    seconds = medians(
        {"evaluate": lambda: learner.evaluate(test, num_tasks=sizes.tasks), "bare": bare}, sizes.processes
    )
    what = f"`evaluate` of {sizes.tasks} image tasks, over bare passes ({seconds['bare']:.1f} s)"
    return [row(what, seconds["evaluate"] / seconds["bare"], "times", 1.2)]


def of_features(sizes: Sizes) -> list[str]:
    """Returns rows on training a head on features that are kept: 16 tasks a step, 5 ways, 5 shots, 15 queries."""
    images = ClassImages(
        images=torch.zeros(6400, 1, 1, 1, dtype=torch.uint8),
        class_start=torch.arange(65) * 100,
        class_names=tuple(f"class {index}" for index in range(64)),
    )
    sampler = EpisodeSampler(images, num_ways=5, num_shots=5, num_queries=15)
    few, many = 5, 5 + sizes.steps
    rows: list[str] = []
    for num_features in (64, 1280):
        centres = torch.randn(64, num_features, generator=torch.Generator().manual_seed(0)).repeat_interleave(100, 0)
        noise = torch.randn(6400, num_features, generator=torch.Generator().manual_seed(1))
        tasks = FeatureEpisodes(sampler, centres + noise)

        def train(num_steps: int, tasks: FeatureEpisodes = tasks) -> None:
            learner = MetaLearner(nn.Linear(*tasks.input_shape, 5), algorithm="softmax")
            learner.fit(tasks, settings=TrainerSettings(num_steps=num_steps, tasks_per_step=16))

        seconds = medians({"few": lambda: train(few), "many": lambda: train(many)}, sizes.processes)
        each = (seconds["many"] - seconds["few"]) / (many - few) / 16
        rows.append(row(f"training a head on {num_features} kept features, a task", 1e3 * each, "ms", None))
    return rows


def of_processes(sizes: Sizes) -> list[str]:
    """Returns rows on what happens once in a process."""
    learn = (
        "import numpy as np, time; from ibaml import MetaLearner; {before}"
        "tasks = [(np.ones((9, 2)) * np.arange(9)[:, None], np.arange(9) % 2) for _ in range(20)]; "
        "start = time.process_time(); MetaLearner(algorithm='softmax').fit(tasks, num_steps=1); "
        "print(time.process_time() - start)"
    )
    optimiser = "import torch; torch.optim.Adam([torch.zeros(1, requires_grad=True)]); "
    commands: dict[str, list[str]] = {
        "torch": ["-c", "import torch"],
        "ibaml": ["-c", "import ibaml"],
        "help": ["-c", "from ibaml.cli import main; main(['--help'])"],
        "first": ["-c", learn.format(before="")],
        "later": ["-c", learn.format(before=optimiser)],
    }
    turns = [{name: _process(arguments) for name, arguments in commands.items()} for _ in range(sizes.processes)]
    whole = {name: statistics.median(turn[name][0] for turn in turns) for name in commands}
    printed = {name: statistics.median(float(turn[name][1]) for turn in turns) for name in ("first", "later")}
    return [
        row(f"`import ibaml` above `import torch` ({whole['torch']:.1f} s)", whole["ibaml"] - whole["torch"], "s", 0.3),
        row("`ibaml --help` above `import torch`", whole["help"] - whole["torch"], "s", 1.0),
        row("first meta-step after `fit` is called", printed["first"], "s", 0.5),
        row("the same where an optimiser of torch was made before", printed["later"], "s", 0.5),
    ]


def row(what: str, value: float, unit: str, aim: float | None) -> str:
    """Returns a row of the table."""
    return f"| {what} | {value:.2f} {unit} | {'' if aim is None else f'at most {aim:g}'} |"


def medians(functions: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Returns the median CPU seconds of functions that take turns, the first turn not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for index in range(rounds + 1):
        for name, function in functions.items():
            start = time.process_time()
            function()
            if index:
                seconds[name].append(time.process_time() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def _process(arguments: list[str]) -> tuple[float, str]:
    """Returns the CPU seconds of a process of this interpreter and what it prints."""

    def spent() -> float:
        usage = resource.getrusage(resource.RUSAGE_CHILDREN)
        return usage.ru_utime + usage.ru_stime

    start = spent()
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=True)
    return spent() - start, done.stdout


def report(sizes: Sizes) -> str:
    """Measures all and returns the page."""
    lines = [
        "# What a user waits for",
        "",
        f"`python -m benchmarks.user_path`, {date.today():%d %B %Y}, {describe_device(torch.device('cpu'))}, Python "
        f"{platform.python_version()}, torch {torch.__version__}, ibaml {__version__}. CPU seconds, medians.",
        "",
        "| | measured | aim |",
        "|---|---|---|",
        *of_processes(sizes),
        *of_tables(sizes),
        *of_features(sizes),
        *of_images(sizes),
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = _RESULTS / f"{date.today():%Y-%m-%d}-user-path.md"
    parser.add_argument("--output", type=Path, default=default, help="where the table goes (%(default)s)")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    text = report(Sizes())
    arguments.output.write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
