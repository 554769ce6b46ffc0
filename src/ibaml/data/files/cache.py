"""A cache of decoded or rendered images: one ``.npz`` file for each ClassImages, read without pickle."""

import os
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from ibaml.atomic import atomic_write
from ibaml.data.files.locate import cache_folders
from ibaml.data.files.npz import load_npz
from ibaml.data.images import ClassImages


def cached_images(name: str, make: Callable[[], ClassImages], cache_dir: str | os.PathLike[str] | None) -> ClassImages:
    """Returns the images of a cached file, or else makes and keeps them.

    Args:
        name: File name, which must spell out everything that the contents depend on.
        make: Makes them.
        cache_dir: Folder of the cache; None means ``$IBAML_DATA``, or else the per-user cache.
    """
    folders = cache_folders(cache_dir)
    if (cached := read_class_images(folders, name)) is not None:
        return cached
    images = make()
    write_class_images(folders, name, images)
    return images


def read_class_images(folders: Sequence[Path], name: str) -> ClassImages | None:
    """Returns the first intact copy of a cached file.

    A damaged file (truncated, flipped bits: every member of a ``.npz`` has a checksum; wrong contents) counts as
    absent, since whatever it held can be made again.

    Args:
        folders: Folders to look in, in order.
        name: File name, which must spell out everything that the contents depend on.

    Returns:
        The images, or None if no folder has an intact file of that name.
    """
    for folder in folders:
        try:
            arrays = load_npz(folder / name, ("images", "class_start", "class_names"))
            return ClassImages(
                images=torch.from_numpy(arrays["images"]),
                class_start=torch.from_numpy(arrays["class_start"]),
                class_names=tuple(str(class_name) for class_name in arrays["class_names"]),
            )
        # TypeError: values of another kind than images have.
        except (OSError, ValueError, TypeError):
            continue
    return None


def write_class_images(folders: Sequence[Path], name: str, images: ClassImages) -> Path | None:
    """Writes images to the first folder that can be written to.

    The file is written under a temporary name and then renamed, so that no other process sees half a file. When no
    folder is writable a RuntimeWarning says so: the caller's result is fine, it will only be made again next time.

    Args:
        folders: Folders to try, in order; created if absent.
        name: File name.
        images: What to keep.

    Returns:
        The path of the file, or None if nothing could be written.
    """
    failures: list[str] = []
    for folder in folders:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with atomic_write(folder / name) as temporary, temporary.open("xb") as file:
                np.savez_compressed(
                    file,
                    images=images.images.cpu().numpy(),
                    class_start=images.class_start.cpu().numpy(),
                    class_names=np.array(images.class_names),
                )
        except OSError as error:
            failures.append(f"{folder} ({error.strerror or error})")
            continue
        return folder / name
    warnings.warn(
        f"cannot write the cache file {name} to {' or '.join(failures) or 'any folder'}: it is made anew each time. "
        "Set IBAML_DATA to a writable folder to avoid that.",
        RuntimeWarning,
        stacklevel=3,
    )
    return None
