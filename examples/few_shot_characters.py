"""Learns to tell five unknown characters apart from five images of each, and says how sure it is.

The characters are rendered from the fonts that matplotlib ships: no download. Training sees Latin, Cyrillic and others,
the test is on Georgian and Armenian. `ibaml train glyphs_5way_5shot_ibaml` runs the same recipe with more steps. The
picture shows whether the confidences are right: of the predictions made with 80% confidence, 80% should be. About a
minute of one CPU thread.
"""

import argparse
import math

import torch

from ibaml import MetaLearner, metrics, plots
from ibaml.data import EpisodeSampler, load_glyphs
from ibaml.networks import Conv4
from ibaml.recipes import get_recipe
from ibaml.train import TrainerSettings

NUM_WAYS, NUM_SHOTS = 5, 5


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=120, help="meta-steps of training, four tasks each")
    parser.add_argument("--channels", type=int, default=16, help="channels of each of the four convolutions")
    parser.add_argument("--num-tasks", type=int, default=60, help="test tasks")
    parser.add_argument("--out", default="reliability.png", help="where to draw the reliability diagram")
    options = parser.parse_args(arguments)

    def tasks(split: str, num_queries: int) -> EpisodeSampler:
        return EpisodeSampler(load_glyphs(split), num_ways=NUM_WAYS, num_shots=NUM_SHOTS, num_queries=num_queries)

    generator = torch.Generator().manual_seed(0)
    # Strides instead of pooling save half the time; a head of zeros makes all classes equally likely at the start.
    network = Conv4(NUM_WAYS, channels=options.channels, downsample="stride", zero_head=True, generator=generator)
    learner = MetaLearner(network, algorithm=get_recipe("glyphs_5way_5shot_ibaml").algorithm)
    test_tasks = tasks("test", 15)

    settings = TrainerSettings(
        num_steps=options.steps, tasks_per_step=4, learning_rate=3e-3, log_var_learning_rate=2e-2, schedule="cosine"
    )
    learner.fit(tasks("train", 5), settings=settings)
    curves = {}
    print(f"{options.num_tasks} tasks of {NUM_WAYS} Georgian or Armenian characters, {NUM_SHOTS} images of each known:")
    print(f"  (guessing: accuracy {1 / NUM_WAYS:.2f}, nll {math.log(NUM_WAYS):.2f}; ECE: confidence against accuracy)")
    for title in ("as trained", "calibrated"):
        if (
            title == "calibrated"
        ):  # one temperature, fitted on the tasks of a script that is in neither of the two others
            learner.calibrate(tasks("validation", 15), num_tasks=options.num_tasks // 2)
        evaluation = learner.evaluate_in_full(test_tasks, num_tasks=options.num_tasks)
        report = evaluation.report
        print(f"  {title}: accuracy {report['accuracy']}, nll {report['nll']}, ECE {report['ece_pooled']}")
        assert evaluation.log_probs is not None
        curves[title] = metrics.reliability_curve(evaluation.log_probs.exp(), evaluation.targets, num_bins=10)

    # One task by hand: what the report is made of.
    episode = test_tasks.sample(1, generator=generator)
    posterior = learner.adapt(episode.support.x[0], episode.support.y[0])
    prediction = posterior.predict(episode.query.x[0])
    right = prediction.labels == episode.query.y[0]
    print(f"\nOne task: {int(right.sum())} of {len(right)} right; inner gradient norm {posterior.grad_norm:.2g}")
    doubt = prediction.total_uncertainty
    print(f"  entropy of right answers {doubt[right].mean():.2f} nats")
    if not right.all():
        print(f"  entropy of wrong answers {doubt[~right].mean():.2f} nats")

    print(f"\nReliability diagram: {plots.save(plots.reliability_diagram(curves), options.out)}")


if __name__ == "__main__":
    main()
