"""What a recipe of a head reaches on its test tasks, seed by seed, and what it costs beside plain passes.

    python -m benchmarks.heads glyphs_5way_5shot --seeds 0 1 2 3 4
    python -m benchmarks.heads omniglot_20way_1shot --also omniglot_5way_1shot --precision bfloat16
    python -m benchmarks.heads glyphs_5way_5shot --cost

The first prints a table of scores; seconds are those of training, validations included. The second has a row for the
test tasks of another recipe as well, by the same training with the temperature of that recipe's validation tasks. The
third prints ratios of medians, measured in turns in one process: a training step beside a forward and backward pass of
the same network on the same images, adaptation on given features, and adaptation with prediction, of a task and in an
evaluation, beside the bare forward passes.
"""

import argparse
import dataclasses
import itertools
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from ibaml import tree
from ibaml.recipes import Recipe, get_recipe
from ibaml.train.draw import draw_step
from ibaml.train.evaluate import evaluate
from ibaml.train.step import HypergradientStep
from ibaml.types import Batch

_SCORES = ("accuracy", "nll", "ece_pooled")
_ROUNDS = 30
_TESTED = 20
"""Tasks of an evaluation."""


def scores(recipe: Recipe, seeds: list[int], *, also: list[Recipe], data: Path | None) -> None:
    """Trains and evaluates a recipe for some seeds and prints a row for each and for their means."""
    samplers = {split: recipe.data.sampler(split, data=data) for split in ("train", "validation")}
    print("| tasks | seed | seconds | " + " | ".join(_SCORES) + " |\n|" + "---|" * (3 + len(_SCORES)))
    rows: dict[str, list[list[float]]] = {}
    for seed in seeds:
        seeded = dataclasses.replace(recipe, trainer=dataclasses.replace(recipe.trainer, seed=seed))
        learner = seeded.learner()
        start = time.perf_counter()
        learner.fit(samplers["train"], samplers["validation"], settings=seeded.trainer)
        seconds = time.perf_counter() - start
        for tested in [recipe, *also]:
            if tested is not recipe:
                learner.calibrate(tested.data.sampler("validation", data=data), num_tasks=200)
            report = learner.evaluate(tested.data.sampler("test", data=data), num_tasks=tested.num_test_tasks)
            values = " | ".join(f"{report[name]}" for name in _SCORES)
            print(f"| {tested.name} | {seed} | {seconds:.0f} | {values} |", flush=True)
            rows.setdefault(tested.name, []).append([seconds, *(report[name].mean for name in _SCORES)])
    for name, values in rows.items():
        means = [statistics.mean(column) for column in zip(*values, strict=True)]
        print(f"| {name} | mean | {means[0]:.0f} | " + " | ".join(f"{value:.4f}" for value in means[1:]) + " |")


def cost(recipe: Recipe, *, data: Path | None) -> None:
    """Prints what a step, an adaptation and a prediction cost beside plain passes."""
    learner = recipe.learner()
    tasks = recipe.data.sampler("train", data=data)
    learner.fit(tasks, settings=dataclasses.replace(recipe.trainer, num_steps=2))
    model, meta = learner.model, learner.meta_parameters
    drawn = draw_step(
        tasks,
        learner.algorithm,
        meta,
        recipe.trainer,
        range(recipe.trainer.tasks_per_step),
        generator=torch.Generator().manual_seed(0),
    )
    step = HypergradientStep(model, learner.algorithm)
    network = recipe.network.build(generator=torch.Generator().manual_seed(0)).train()
    batches = [Batch(*(leaf.flatten(0, 1) for leaf in part)) for part in drawn.episodes]
    images, labels = torch.cat([part.x for part in batches]), torch.cat([part.y for part in batches])
    # As the step does: convolutions on a CPU like channels last.
    network, images = (
        network.to(memory_format=torch.channels_last),
        images.contiguous(memory_format=torch.channels_last),
    )
    network.head = nn.Linear(network.head.in_features, int(labels.max()) + 1)

    def plain() -> None:
        loss = nn.functional.cross_entropy(network(images), labels)
        torch.autograd.grad(loss, list(network.parameters()))

    test = recipe.data.sampler("test", data=data).sample(1, generator=torch.Generator().manual_seed(0))
    support, query = tree.map(lambda leaf: leaf[0], test)
    fitted = learner.fitted_model
    with torch.no_grad():
        features = model.features(meta.shared, support.x)
    tail, shared = model.on_features, model.with_features(meta.shared, features)
    noise = learner.algorithm.draw_noise(meta, generator=torch.Generator())

    def adapt_features() -> None:
        positions = Batch(torch.arange(len(support.y)), support.y)
        learner.algorithm.adapt(tail, meta._replace(shared=shared), positions, noise)

    def forward() -> None:
        with torch.no_grad():
            fitted.model.outputs(fitted.model.adapted, meta.shared, support.x)
            fitted.model.outputs(fitted.model.adapted, meta.shared, query.x)

    drawn_tests = recipe.data.sampler("test", data=data).sample(_TESTED, generator=torch.Generator().manual_seed(1))
    episodes = [tree.map(lambda leaf, place=place: leaf[place], drawn_tests) for place in range(_TESTED)]

    def forward_of_all() -> None:
        with torch.no_grad():
            for batch in itertools.chain(*episodes):
                fitted.model.outputs(fitted.model.adapted, meta.shared, batch.x)

    timed = _medians(
        {
            "step": lambda: step(meta, drawn.episodes, drawn.noises, with_scores=False),
            "plain": plain,
            "adapt on features": adapt_features,
            "adapt and predict": lambda: learner.adapt(*support).predict(query.x),
            "bare passes": forward,
            "evaluation": lambda: evaluate(fitted, episodes, seed=0),
            "bare passes of an evaluation": forward_of_all,
        }
    )
    for name, seconds in timed.items():
        print(f"{name}: {1e3 * seconds:.2f} ms")
    print(f"step / plain: {timed['step'] / timed['plain']:.2f}")
    print(f"adapt and predict / bare passes: {timed['adapt and predict'] / timed['bare passes']:.2f}")
    print(f"evaluation / bare passes: {timed['evaluation'] / timed['bare passes of an evaluation']:.2f}")


def _medians(functions: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Returns the median CPU seconds of functions that take turns on one thread: other work beside costs no time."""
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for index in range(_ROUNDS + 3):
        for name, function in functions.items():
            start = time.thread_time()
            function()
            if index >= 3:  # The first calls start things.
                seconds[name].append(time.thread_time() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--also", nargs="+", default=[], metavar="RECIPE")
    parser.add_argument("--precision", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--cost", action="store_true")
    parser.add_argument("--data", type=Path, default=None)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    recipe = get_recipe(arguments.recipe).replace({"trainer.precision": arguments.precision})
    if arguments.cost:
        cost(recipe, data=arguments.data)
    else:
        also = [get_recipe(name) for name in arguments.also]
        scores(recipe, arguments.seeds, also=also, data=arguments.data)


if __name__ == "__main__":
    main()
