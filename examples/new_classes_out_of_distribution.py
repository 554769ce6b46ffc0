"""What does a model say about a character that is none of the five it was shown? It should doubt.

Each test task has ten characters. The learner adapts to five of them and is then asked about images of all ten. Its
doubt serves twice: it tells known from unknown characters (area under the ROC curve: 0.5 is chance, 1 is perfect), and
among known ones it tells which answers to trust (accuracy on the surer half). About a minute on one
CPU thread.
"""

import argparse

import torch

from ibaml import MetaLearner, metrics
from ibaml.data import EpisodeSampler, load_glyphs
from ibaml.likelihoods import ClassPrediction
from ibaml.networks import Conv4
from ibaml.recipes import get_recipe
from ibaml.train import TrainerSettings
from ibaml.types import Episode

NUM_WAYS, NUM_SHOTS = 5, 5


def fit(num_steps: int, channels: int) -> MetaLearner:
    """Trains on Latin, Cyrillic and other scripts; examples/few_shot_characters.py explains the settings."""
    network = Conv4(
        NUM_WAYS,
        channels=channels,
        # Each query is normalised alone: with batch statistics the unknown characters would change the known ones.
        norm="group",
        downsample="stride",
        zero_head=True,
        generator=torch.Generator().manual_seed(0),
    )
    learner = MetaLearner(network, algorithm=get_recipe("glyphs_5way_5shot_ibaml").algorithm)
    settings = TrainerSettings(
        num_steps=num_steps, tasks_per_step=4, learning_rate=3e-3, log_var_learning_rate=2e-2, schedule="cosine"
    )
    tasks = EpisodeSampler(load_glyphs("train"), num_ways=NUM_WAYS, num_shots=NUM_SHOTS, num_queries=5)
    return learner.fit(tasks, settings=settings)


def ask(learner: MetaLearner, task: Episode) -> tuple[ClassPrediction, ClassPrediction, torch.Tensor]:
    """Adapts to the first five classes; predicts queries of those and of the others. Also the labels of the former."""
    known, asked_known = task.support.y < NUM_WAYS, task.query.y < NUM_WAYS
    posterior = learner.adapt(task.support.x[known], task.support.y[known])
    inside, outside = posterior.predict(task.query.x[asked_known]), posterior.predict(task.query.x[~asked_known])
    assert isinstance(inside, ClassPrediction) and isinstance(outside, ClassPrediction)
    return inside, outside, task.query.y[asked_known]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=120, help="meta-steps of training, four tasks each")
    parser.add_argument("--channels", type=int, default=16, help="channels of each of the four convolutions")
    parser.add_argument("--num-tasks", type=int, default=60, help="test tasks")
    options = parser.parse_args(arguments)
    learner = fit(options.steps, options.channels)

    sampler = EpisodeSampler(load_glyphs("test"), num_ways=2 * NUM_WAYS, num_shots=NUM_SHOTS, num_queries=10)
    episodes = sampler.sample(options.num_tasks, generator=torch.Generator().manual_seed(1))
    answers = [
        ask(learner, Episode(*[type(batch)(batch.x[task], batch.y[task]) for batch in episodes]))
        for task in range(options.num_tasks)
    ]

    print(f"{options.num_tasks} tasks, {NUM_WAYS} known and {NUM_WAYS} unknown Georgian or Armenian characters each\n")
    print("doubt, mean in nats    known   unknown   AUROC with its 95% interval")
    for name, meaning in (
        ("total_uncertainty", "total"),
        ("epistemic", "epistemic"),
        ("aleatoric", "aleatoric"),
    ):
        inside = torch.stack([getattr(answer[0], name) for answer in answers])
        outside = torch.stack([getattr(answer[1], name) for answer in answers])
        area = metrics.ood_auroc(inside, outside)
        print(f"  {meaning:18} {inside.mean():7.3f} {outside.mean():9.3f}   {area}")
    print("Total is epistemic (more examples would remove it) plus aleatoric (they would not).\n")

    right = torch.cat([(prediction.labels == labels) for prediction, _, labels in answers]).double()
    doubt = torch.cat([prediction.total_uncertainty for prediction, _, _ in answers])
    order = doubt.argsort()
    print("accuracy on known characters, answering only the surest share of the queries")
    for share in (1.0, 0.75, 0.5):
        answered = right[order[: int(share * len(order))]]
        print(f"  {share:4.0%}  {answered.mean():.3f}")


if __name__ == "__main__":
    main()
