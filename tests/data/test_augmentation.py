"""Images that change at every draw: what may change, that the generator decides it, and that training resumes."""

import math

import pytest
import torch
from PIL import Image

from ibaml import MetaLearner, SplitSettings
from ibaml.data import UNCHANGED, Augmentation, ClassImages, EpisodeSampler
from ibaml.data.prepare import prepare
from ibaml.networks import Conv4
from ibaml.train import TrainerSettings


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


IMAGES = torch.rand(40, 3, 8, 8, generator=generator(9))


def applied(seed: int = 0, **settings: float) -> torch.Tensor:
    return Augmentation(**settings).apply(IMAGES, generator=generator(seed))


def test_half_of_the_images_are_mirrored_and_none_changes_otherwise():
    found = applied(flip=True)
    same, mirrored = ((found == other).flatten(1).all(1) for other in (IMAGES, IMAGES.flip(-1)))
    assert bool((same | mirrored).all()) and 10 <= int(mirrored.sum()) <= 30


def test_parts_are_parts():
    """Of a ramp from left to right and one from top to bottom, a part is a ramp of the share of its side."""
    ramp = ((torch.arange(16) + 0.5) / 16).expand(16, 16)
    images = torch.stack([ramp, ramp.mT]).expand(200, 2, 16, 16)
    found = Augmentation(flip=False, crop=0.25).apply(images, generator=generator())
    slopes = 16 * torch.stack([found[:, 0, 8, 9] - found[:, 0, 8, 8], found[:, 1, 9, 8] - found[:, 1, 8, 8]])
    torch.testing.assert_close(slopes[0], slopes[1], rtol=1e-3, atol=1e-4)
    assert 0.5 - 1e-3 <= float(slopes.min()) < 0.53 and 0.97 < float(slopes.max()) <= 1 + 1e-3
    middles = found[:, :, 7:9, 7:9].mean((2, 3))
    assert float(middles.min()) >= 0.25 - 0.02 and float(middles.max()) <= 0.75 + 0.02
    assert float(middles.std(0).min()) > 0.03


def test_colours():
    found = applied(flip=False, colour=0.4)
    assert float(found.min()) >= 0 and float(found.max()) <= 1
    ratio = found.mean((1, 2, 3)) / IMAGES.mean((1, 2, 3))
    assert float(ratio.min()) > 0.55 and float(ratio.max()) < 1.45 and float(ratio.std()) > 0.1
    # Grey images stay grey, and have one channel if they had one.
    grey = Augmentation(flip=False, colour=0.4).apply(IMAGES[:, :1].expand(-1, 3, -1, -1), generator=generator())
    torch.testing.assert_close(grey[:, 0], grey[:, 2])
    assert Augmentation(colour=0.4).apply(IMAGES[:, :1], generator=generator()).shape == (40, 1, 8, 8)


def test_the_generator_alone_decides():
    settings = {"flip": True, "crop": 0.6, "colour": 0.3}
    torch.testing.assert_close(applied(1, **settings), applied(1, **settings), rtol=0, atol=0)
    assert not torch.equal(applied(1, **settings), applied(2, **settings))
    before = IMAGES.clone()
    applied(**settings)
    assert torch.equal(before, IMAGES)


def classes(num_classes: int = 4) -> ClassImages:
    pixels = torch.randint(0, 256, (num_classes * 6, 3, 8, 8), dtype=torch.uint8, generator=generator(3))
    starts = torch.arange(0, len(pixels) + 1, 6)
    return ClassImages(images=pixels, class_start=starts, class_names=tuple(map(str, range(num_classes))))


def sampler(augmentation: Augmentation) -> EpisodeSampler:
    return EpisodeSampler(classes(), num_ways=2, num_shots=2, num_queries=2, augmentation=augmentation)


def test_tasks_are_the_same_but_for_their_images():
    plain, changed = (sampler(how).sample(3, generator=generator()) for how in (UNCHANGED, Augmentation(colour=0.2)))
    assert torch.equal(plain.support.y, changed.support.y) and changed.query.x.shape == plain.query.x.shape
    assert not torch.equal(plain.support.x, changed.support.x) and not torch.equal(plain.query.x, changed.query.x)
    named = EpisodeSampler(classes(), num_ways=2, num_shots=2, num_queries=2)
    assert torch.equal(plain.support.x, named.sample(3, generator=generator()).support.x)
    assert named.augmentation == SplitSettings().augmentation == UNCHANGED
    # As version 0.2.0 stored it.
    assert SplitSettings(augmentation=None).augmentation == UNCHANGED
    with pytest.raises(
        TypeError, match="augmentation must be an ibaml.data.Augmentation, got NoneType; to leave images"
    ):
        sampler(None)
    one, two = (sampler(Augmentation(crop=crop)).content() for crop in (1.0, 0.5))
    assert one[6:] != two[6:]


def test_an_interrupted_training_goes_on_to_the_last_bit(tmp_path):
    def fit(folder, num_steps):
        network = Conv4(2, in_channels=3, image_size=8, channels=2, downsample="stride", generator=generator(1))
        settings = TrainerSettings(num_steps=num_steps, tasks_per_step=2, checkpoint_every=1, schedule="constant")
        learner = MetaLearner(network, "softmax", classes="per_task")
        tasks = sampler(Augmentation(crop=0.5, colour=0.3))
        return learner.fit(tasks, settings=settings, run_folder=folder)

    whole = fit(tmp_path / "whole", 4).meta_parameters
    fit(tmp_path / "parts", 2)
    parts = fit(tmp_path / "parts", 4).meta_parameters
    assert all(torch.equal(value, parts.shared[name]) for name, value in whole.shared.items())


def test_folders_are_changed_in_training_and_not_in_validation(tmp_path, monkeypatch):
    for name in "abcdef":
        (tmp_path / "photos" / name).mkdir(parents=True)
        for number in range(4):
            Image.new("RGB", (8, 8), (40 * number, 0, 0)).save(tmp_path / "photos" / name / f"{number}.png")
    changes = Augmentation(colour=0.1)
    splits = SplitSettings(num_ways=2, num_shots=1, num_query_images=1, augmentation=changes)
    how = {"target_kind": "classes", "classes": "per_task", "seed": 0, "dtype": torch.float32, "columns": {}}
    source = prepare(tmp_path / "photos", 0.4, splits=splits, **how)
    assert source.train.augmentation == changes and source.validation.augmentation == UNCHANGED
    learner = MetaLearner(algorithm="prototypes").fit(tmp_path / "photos", splits=splits, num_steps=1)
    assert MetaLearner.load(learner.save(tmp_path / "model")).splits == splits
    monkeypatch.setenv("IBAML_DATA", str(tmp_path))
    with pytest.raises(ValueError, match="augmentation changes images at every draw, and the features of a backbone"):
        MetaLearner(backbone=torch.nn.Flatten()).fit(sampler(changes), num_steps=1)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"flip": 1}, TypeError, "flip must be True or False, but is 1"),
        ({"crop": 0.0}, ValueError, "crop must be a share of the area above 0 and at most 1, but is 0.0"),
        ({"colour": 1.0}, ValueError, "colour must be at least 0 and below 1, but is 1.0"),
        ({"colour": math.nan}, ValueError, "colour must be at least 0 and below 1, but is nan"),
    ],
)
def test_settings_out_of_range(settings, error, message):
    with pytest.raises(error, match=message):
        Augmentation(**settings)
