"""Three classes of your own from five photos each, on features of a pretrained network; and what is none of these.

`--backbone module:name` names any `nn.Module` that turns images into features, such as `timm.create_model("resnet50",
pretrained=True, num_classes=0)` in a file `my_backbones.py`; `--photos` a folder with class folders to learn from and
to try on, `train/CLASS/*.jpg` and `new/CLASS/*.jpg`. Without them the photos are made-up textures, and a random
convolution stands for the pretrained network, so that the example runs without a download.
"""

import argparse
import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn

from ibaml import MetaLearner, SplitSettings
from ibaml.backbones import Backbone, import_backbone
from ibaml.data import load_image_folder

NUM_WAYS, NUM_KNOWN, SIZE = 3, 5, 32


def make_textures(folder: Path, num_classes: int, rng: np.random.Generator) -> None:
    """Class folders of stripes: each class has its colour, direction and width."""
    y, x = np.mgrid[:SIZE, :SIZE]
    for number in range(num_classes):
        angle, width, colour = rng.uniform(0, np.pi), rng.uniform(0.3, 1.2), rng.uniform(40, 255, 3)
        (folder / f"class{number}").mkdir(parents=True)
        for photo in range(20):
            wave = 0.5 + 0.5 * np.sin(width * (x * np.cos(angle) + y * np.sin(angle)) + rng.uniform(0, 6))
            pixels = wave[..., None] * colour + rng.normal(0, 25, (SIZE, SIZE, 3))
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / f"class{number}" / f"{photo}.png")


def stand_in() -> Backbone:
    """A random convolution: what a pretrained network would be."""
    torch.manual_seed(0)  # an example's own: the library draws from a generator
    module = nn.Sequential(nn.Conv2d(3, 64, 5, stride=2), nn.ReLU())
    return Backbone(module=module, image_size=SIZE, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25), cache=False)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--photos", type=Path, help="folder with train/CLASS/*.jpg and new/CLASS/*.jpg")
    parser.add_argument("--backbone", help="module:name of an nn.Module or ibaml.backbones.Backbone")
    parser.add_argument("--steps", type=int, help="meta-steps of training (default: the library's)")
    options = parser.parse_args(arguments)
    backbone = import_backbone(options.backbone) if options.backbone else stand_in()
    with tempfile.TemporaryDirectory() as temporary:
        photos = options.photos or Path(temporary)
        if options.photos is None:
            rng = np.random.default_rng(0)
            make_textures(photos / "train", 24, rng)
            make_textures(photos / "new", NUM_WAYS + 1, rng)

        # All classes of train/ make tasks; none of them is asked for later.
        splits = SplitSettings(num_ways=NUM_WAYS, num_shots=NUM_KNOWN, num_query_images=5)
        learner = MetaLearner(backbone=backbone, seed=0)
        learner.fit(photos / "train", 0.3, splits=splits, num_steps=options.steps)

        size = learner.backbone.size if learner.backbone is not None else None
        new = load_image_folder(photos, "new", image_size=size[0] if size else SIZE)
    names = np.repeat(new.class_names, new.class_sizes.numpy())
    position = np.concatenate([np.arange(size) for size in new.class_sizes.tolist()])
    own = np.isin(names, new.class_names[:NUM_WAYS])
    known, asked, foreign = own & (position < NUM_KNOWN), own & (position >= NUM_KNOWN), ~own

    posterior = learner.adapt(new.images[known], names[known])
    answers, strangers = posterior.predict(new.images[asked]), posterior.predict(new.images[foreign])
    right = answers.labels == names[asked]
    print(
        f"{NUM_WAYS} new classes, {NUM_KNOWN} photos of each known: {right.mean():.0%} of {len(right)} others are right"
    )
    print(f"mean confidence {answers.confidence.mean():.2f}")
    print(f"like none of these (higher is stranger): {answers.out_of_task.mean():.1f} on average;")
    print(f"photos of a class that was not shown: {strangers.out_of_task.mean():.1f}")


if __name__ == "__main__":
    main()
