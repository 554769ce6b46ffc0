"""Is a learned prior of softmax heads too wide for classes that training has not seen?

    python -m benchmarks.prior_scale RUN --data FOLDER

RUN was trained by a recipe of images with a softmax head. The variances of its prior are multiplied by some factors,
the output temperature is fitted anew for each on validation tasks, which also say which factor is best. Nearest means
of the same features stand beside them. Test tasks are used once, and differences are paired.
"""

import argparse
import math
from pathlib import Path

import torch

from benchmarks.backbones import Logits, cosine, euclidean
from ibaml import MetaLearner
from ibaml.likelihoods import Categorical
from ibaml.metrics import paired_difference
from ibaml.recipes.runs import read_recipe
from ibaml.train.evaluate import Evaluation, draw_task, summarise
from ibaml.train.temperature import fit_temperature
from ibaml.types import Batch, Episode, TaskSampler, Tensor

FACTORS = (1.0, 0.3, 0.1, 0.03, 0.01)


def in_features(learner: MetaLearner, tasks: TaskSampler, num_tasks: int) -> list[Episode]:
    """Returns tasks with what the head sees, without its constant, in the place of images."""
    model, shared = learner.fitted_model.model, learner.meta_parameters.shared

    def features(batch: Batch) -> Batch:
        with torch.no_grad():
            return Batch(model.features(shared, batch.x), batch.y)

    drawn = (draw_task(tasks, index, seed=0) for index in range(num_tasks))
    return [Episode(features(one.support), features(one.query)) for one in drawn]


def softmax(learner: MetaLearner, factor: float) -> Logits:
    """Returns the head with all variances of its prior times a factor, and logits of samples of its posterior."""
    head, prior = learner.algorithm, learner.meta_parameters.prior
    prior = prior._replace(log_var=prior.log_var + math.log(factor))

    def logits(support: Batch, query: Tensor) -> Tensor:
        known, asked = (torch.cat([x, torch.ones(len(x), 1)], 1) for x in (support.x, query))
        with torch.no_grad():
            solution, _ = head.solve(prior, {}, Batch(known, support.y), int(support.y.max()) + 1)
            return head.predict(solution, {}, asked, {})["outputs"]

    return logits


def judge(method: Logits, tasks: list[Episode], temperature: float | None) -> tuple[Evaluation, float]:
    """Evaluates at the temperature that is best on these tasks if none is given."""
    likelihood, predictions = Categorical(), []
    for one in tasks:
        outputs = method(one.support, one.query.x)
        predictions.append(likelihood.predict(outputs if outputs.ndim == 3 else outputs.unsqueeze(0), {}))
    targets = [one.query.y for one in tasks]
    temperature = fit_temperature(predictions, targets) if temperature is None else temperature
    return summarise(likelihood, [one.tempered(temperature) for one in predictions], targets), temperature


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, help="folder of a run")
    parser.add_argument("--data", type=Path, help="folder with the data files")
    parser.add_argument("--tasks", type=int, default=80, help="validation tasks, and test tasks")
    arguments = parser.parse_args()
    learner = MetaLearner.load(arguments.run)
    data = read_recipe(arguments.run).data
    tasks = {
        split: in_features(learner, data.sampler(split, data=arguments.data), arguments.tasks)
        for split in ("validation", "test")
    }
    methods = {f"softmax, variances times {factor:g}": softmax(learner, factor) for factor in FACTORS}
    methods |= {"nearest mean, Euclidean": euclidean, "nearest mean, cosine": cosine}
    print("| | temperature | validation nll | accuracy | nll | pooled ECE | nll minus that of the first |")
    print("|---|---|---|---|---|---|---|")
    first = None
    for name, method in methods.items():
        held_out, temperature = judge(method, tasks["validation"], None)
        found, _ = judge(method, tasks["test"], temperature)
        first = first or found
        ahead = paired_difference(found.per_task["nll"], first.per_task["nll"])
        scores = " | ".join(f"{found.report[key]}" for key in ("accuracy", "nll", "ece_pooled"))
        text = f"| {name} | {temperature:.2f} | {held_out.report['nll']} | {scores} "
        print(text + f"| {ahead.mean:+.4f} +- {ahead.half_width:.4f} |", flush=True)


if __name__ == "__main__":
    main()
