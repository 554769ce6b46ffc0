"""Learns to tell five unknown characters apart from five images of each, and says how sure it is.

The characters are rendered from the fonts that matplotlib ships: no download. Training sees Latin and Cyrillic, Greek
tells how sure to be, and the test is on Georgian and Armenian. `ibaml train glyphs_5way_5shot` runs the same recipe
with more steps. The picture shows whether the confidences are right: of the answers given with 80% confidence, 80%
should be.
"""

import argparse
import dataclasses
import math

import torch

from ibaml import MetaLearner, metrics, plots
from ibaml.data import EpisodeSampler, load_glyphs
from ibaml.networks import Conv4
from ibaml.recipes import get_recipe

NUM_WAYS, NUM_SHOTS = 5, 5


def tasks(split: str, num_queries: int = 5) -> EpisodeSampler:
    """Tasks of five characters of some scripts: five images of each are known, some others are asked for."""
    return EpisodeSampler(load_glyphs(split), num_ways=NUM_WAYS, num_shots=NUM_SHOTS, num_queries=num_queries)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=300, help="meta-steps of training")
    parser.add_argument("--channels", type=int, default=32, help="channels of each of the four convolutions")
    parser.add_argument("--num-tasks", type=int, default=100, help="test tasks")
    parser.add_argument("--out", default="reliability.png", help="where to draw the reliability diagram")
    options = parser.parse_args(arguments)

    recipe = get_recipe("glyphs_5way_5shot")  # settings that suit these tasks
    network = Conv4(NUM_WAYS, channels=options.channels, downsample="stride", norm="running")
    learner = MetaLearner(network, recipe.algorithm, seed=0)
    validation = min(recipe.trainer.num_validation_tasks, options.num_tasks)
    settings = dataclasses.replace(
        recipe.trainer, num_steps=options.steps, validate_every=options.steps, num_validation_tasks=validation
    )
    learner.fit(tasks("train"), tasks("validation"), settings=settings)

    evaluation = learner.evaluate_in_full(tasks("test", 15), num_tasks=options.num_tasks)
    report = evaluation.report
    print(f"{options.num_tasks} tasks of {NUM_WAYS} Georgian or Armenian characters, {NUM_SHOTS} images of each known:")
    print(f"  accuracy {report['accuracy']}, nll {report['nll']}, ECE of all answers {report['ece_pooled']}")
    print(f"  (guessing: accuracy {1 / NUM_WAYS:.2f}, nll {math.log(NUM_WAYS):.2f})")

    # One task by hand: what the report is made of.
    episode = tasks("test", 15).sample(1, generator=torch.Generator().manual_seed(0))
    prediction = learner.adapt(episode.support.x[0], episode.support.y[0]).predict(episode.query.x[0])
    right = prediction.labels == episode.query.y[0]
    doubt = prediction.total_uncertainty
    print(f"\nOne task: {int(right.sum())} of {len(right)} right")
    for name, which in (("right", right), ("wrong", ~right)):
        if which.any():
            print(f"  entropy of {name} answers {doubt[which].mean():.2f} nats")

    assert evaluation.log_probs is not None
    curve = metrics.reliability_curve(evaluation.log_probs.exp(), evaluation.targets)
    picture = plots.save(plots.reliability_diagram({"new characters": curve}), options.out)
    print(f"\nReliability diagram: {picture}")


if __name__ == "__main__":
    main()
