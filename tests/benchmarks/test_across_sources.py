"""The comparison across sources: folders hold the images they were made from, and the baselines are right by hand."""

import torch
from benchmarks.across_sources import baseline, classify, write_class_folders

from ibaml.data import ClassImages, load_class_folder
from ibaml.types import Batch, Episode


def squares(num_classes=6, per_class=20):
    """Classes of one grey level each, so that any comparison of pixels is right."""
    levels = torch.arange(num_classes * per_class).div(per_class, rounding_mode="floor") * 40
    images = levels.to(torch.uint8).reshape(-1, 1, 1, 1).expand(-1, 1, 28, 28).contiguous()
    return ClassImages(
        images=images,
        class_start=torch.arange(0, num_classes * per_class + 1, per_class),
        class_names=tuple(f"class {index}" for index in range(num_classes)),
    )


def test_folders_hold_the_images(tmp_path):
    made = squares()
    found = load_class_folder(write_class_folders(made, tmp_path / "made"), image_size=28, channels=1)
    assert list(found.class_sizes) == list(made.class_sizes)
    assert torch.equal(found.images, made.images)


def test_baselines_tell_plain_squares_apart(tmp_path):
    folder = write_class_folders(squares(), tmp_path / "made")
    for how in ("nearest neighbour", "nearest class mean"):
        assert baseline(folder, how, 3).mean == 1


def test_neighbours_and_means_by_hand():
    # The mean of class 0 is 5 and of class 1 is 6; the nearest neighbour of 1 is of class 0, that of 10 too.
    support = Batch(torch.tensor([[0.0], [10.0], [6.0], [6.0]]), torch.tensor([0, 0, 1, 1]))
    query = Batch(torch.tensor([[1.0], [10.0]]), torch.tensor([0, 0]))
    assert classify(Episode(support, query), "nearest neighbour") == 1
    assert classify(Episode(support, query), "nearest class mean") == 0.5
