"""Stand-in for miniImageNet: 100 classes of Tiny-ImageNet, 64 x 64, split 64/16/20 for few-shot classification."""

import dataclasses
import os
from pathlib import Path
from typing import ClassVar, get_args

from ibaml.checks import require_positive_int
from ibaml.data.files.cache import cached_images
from ibaml.data.files.locate import find_data_file
from ibaml.data.images import ClassImages, digest, member_stamps, open_archive
from ibaml.data.sources.base import ImageSource, Split
from ibaml.data.sources.image_folder import load_image_folder

ARCHIVE = "tiny_imagenet_fewshot.zip"
NUM_CLASSES: dict[Split, int] = {"train": 64, "validation": 16, "test": 20}
IMAGES_PER_CLASS: dict[Split, int] = {"train": 200, "validation": 100, "test": 100}

_DECODING_VERSION = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class TinyImagenet(ImageSource):
    """The stand-in for miniImageNet, which its results must not be called."""

    image_size: int = 64
    name: ClassVar[str] = "tiny_imagenet"

    def images(self, split: Split, *, data: Path | None = None) -> ClassImages:
        """Loads the images of a split."""
        return load_tiny_imagenet(split, root=data, image_size=self.image_size)


def load_tiny_imagenet(
    split: Split,
    *,
    root: str | os.PathLike[str] | None = None,
    image_size: int = 64,
    cache_dir: str | os.PathLike[str] | None = None,
) -> ClassImages:
    """Loads one split of the Tiny-ImageNet few-shot archive, the stand-in for miniImageNet.

    It is **not** miniImageNet and results on it must not be called so: classes, image size (64 instead of 84 pixels)
    and images per class (200 / 100 / 100 instead of 600) all differ, and so do the accuracies. The images come from
    ImageNet by way of Tiny-ImageNet, for non-commercial research and education only.

    The decoded split is cached, keyed by the names, sizes and checksums of its files.

    Args:
        split: ``"train"`` (64 classes of 200 images), ``"validation"`` (16 of 100) or ``"test"`` (20 of 100).
        root: Folder with ``tiny_imagenet_fewshot.zip``, searched before ``$IBAML_DATA`` and the per-user cache.
        image_size: Height and width in pixels; other sides than 64 are resampled (Lanczos).
        cache_dir: Folder of the cache; None means ``$IBAML_DATA``, or else the per-user cache.

    Returns:
        Colour images of shape ``[num_images, 3, image_size, image_size]``; classes are named by their WordNet ids.

    Raises:
        TypeError: If ``image_size`` is not an int.
        ValueError: If an argument is out of range, or the archive is damaged or does not hold these classes.
        FileNotFoundError: If the archive is nowhere to be found.
    """
    if split not in get_args(Split):
        raise ValueError(f"split must be one of {get_args(Split)}, got {split!r}.")
    require_positive_int("image_size", image_size)
    path = find_data_file(ARCHIVE, root)
    with open_archive(path) as archive:
        key = digest(member_stamps(archive.infolist()))
    name = f"tiny-imagenet-v{_DECODING_VERSION}-{split}-{key}-{image_size}.npz"
    return cached_images(name, lambda: _read(path, split, image_size), cache_dir)


def _read(path: Path, split: Split, image_size: int) -> ClassImages:
    """Decodes a split and checks that it is what it should be."""
    images = load_image_folder(path, split, image_size=image_size)
    sizes = sorted(set(images.class_sizes.tolist()))
    if images.num_classes != NUM_CLASSES[split] or sizes != [IMAGES_PER_CLASS[split]]:
        raise ValueError(
            f"{path} must hold {NUM_CLASSES[split]} {split} classes of {IMAGES_PER_CLASS[split]} images, got "
            f"{images.num_classes} classes of {' or '.join(map(str, sizes))} images; for other images of one's own "
            "there is load_image_folder."
        )
    return images
