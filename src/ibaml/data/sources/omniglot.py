"""Omniglot (Lake, Salakhutdinov, Tenenbaum 2015): 1,623 handwritten characters of 50 alphabets, 20 drawings each."""

import csv
import dataclasses
import io
import os
import re
import zipfile
from pathlib import Path
from typing import ClassVar, Literal, get_args

import numpy as np
import torch

from ibaml.checks import require_positive_int
from ibaml.data.files.cache import cached_images
from ibaml.data.files.locate import find_data_file
from ibaml.data.images import (
    ClassImages,
    check_names,
    class_starts,
    decode_image,
    digest,
    member_stamps,
    open_archive,
    read_member,
    with_rotations,
)
from ibaml.data.preprocessing import Preprocessing, image_preprocessing
from ibaml.data.sources.base import OF_TRAINING_ALONE, ImageSource, Split

Protocol = Literal["vinyals", "official"]

BACKGROUND_ARCHIVE = "images_background.zip"
EVALUATION_ARCHIVE = "images_evaluation.zip"
VINYALS_SPLIT_FILE = "omniglot_vinyals_split.csv"

VALIDATION_ALPHABETS = ("Armenian", "Bengali", "Early_Aramaic", "Hebrew", "Mkhedruli_(Georgian)")
"""Background alphabets that validate in the official protocol, which has no validation split of its own.

They are the ones that validate in the split of Vinyals et al. 2016, so that one choice serves both protocols.
"""

# The split file writes "val"; a file that spells it out is as good.
_CSV_SPLITS: dict[str, Split] = {"train": "train", "val": "validation", "validation": "validation", "test": "test"}
_MEMBER = re.compile(r"(?:.*/)?(?P<alphabet>[^/]+)/(?P<character>character\d+)/(?P<file>[^/]+\.png)")
_DECODING_VERSION = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Omniglot(ImageSource):
    """Handwritten characters of 50 alphabets.

    Attributes:
        protocol: Which split; see ``load_omniglot``.
        rotations: Whether turned training characters count as further classes.
        rotated_tests: Whether turned characters of validation and test do so as well, as in what is published since
            Snell et al. 2017. Tasks are easier then: fewer of their characters are of one alphabet the same way up.

    Raises:
        ValueError: If the protocol is none of the two.
    """

    protocol: Protocol = "vinyals"
    rotations: bool = dataclasses.field(default=True, metadata=OF_TRAINING_ALONE)
    rotated_tests: bool = True
    name: ClassVar[str] = "omniglot"
    num_channels: ClassVar[int] = 1

    def __post_init__(self) -> None:
        """Checks the settings."""
        super().__post_init__()
        _check_protocol(self.protocol)

    def images(self, split: Split, *, data: Path | None = None) -> ClassImages:
        """Loads the characters of a split."""
        return load_omniglot(
            split,
            root=data,
            protocol=self.protocol,
            image_size=self.image_size,
            rotations=self.rotations if split == "train" else self.rotated_tests,
        )

    def preprocessing(self) -> Preprocessing | None:
        """Returns how image files become inputs: dark ink on light paper, as the publisher's drawings are."""
        return image_preprocessing((1, self.image_size, self.image_size), self.num_ways, inverted=True)


def load_omniglot(
    split: Split,
    *,
    root: str | os.PathLike[str] | None = None,
    protocol: Protocol = "vinyals",
    image_size: int = 28,
    rotations: bool = True,
    download: bool = False,
    cache_dir: str | os.PathLike[str] | None = None,
) -> ClassImages:
    """Loads one split of Omniglot from the publisher's archives, read in place.

    The 105 x 105 drawings are averaged over areas (box filter: the exact mean of the source under each pixel, no
    ringing) and inverted, so that ink is 255 on black. The decoded archive is cached, keyed by the names, sizes and
    checksums of its files.

    Args:
        split: ``"train"``, ``"validation"`` or ``"test"``.
        root: Folder with ``images_background.zip`` and ``images_evaluation.zip`` (and, for ``"vinyals"``,
            ``omniglot_vinyals_split.csv``), searched before ``$IBAML_DATA`` and the per-user cache.
        protocol: ``"vinyals"``: the 1028 / 172 / 423 characters of Vinyals et al. 2016. ``"official"``: evaluation
            archive for test (659), background archive without VALIDATION_ALPHABETS for train (792), with only them
            for validation (172).
        image_size: Height and width in pixels.
        rotations: Whether turns by 90, 180 and 270 degrees are further classes, as in most published results.
        download: Whether to fetch absent archives from the publisher (15 MB, checksums verified).
        cache_dir: Folder of the cache; None means ``$IBAML_DATA``, or else the per-user cache.

    Returns:
        Grey images of shape ``[num_images, 1, image_size, image_size]``; classes are named ``alphabet/character``.

    Raises:
        TypeError: If ``image_size`` is not an int.
        ValueError: If an argument is out of range, an archive is damaged or holds no characters, or the split file
            does not fit the archives.
        FileNotFoundError: If an archive or the split file is nowhere to be found.
    """
    if split not in get_args(Split):
        raise ValueError(f"split must be one of {get_args(Split)}, got {split!r}.")
    _check_protocol(protocol)
    require_positive_int("image_size", image_size)

    if protocol == "official":
        archive = EVALUATION_ARCHIVE if split == "test" else BACKGROUND_ARCHIVE
        images = _load_archive(find_data_file(archive, root, download=download), image_size, cache_dir)
        if split != "test":
            is_validation = [name.split("/")[0] in VALIDATION_ALPHABETS for name in images.class_names]
            chosen = [index for index, held_out in enumerate(is_validation) if held_out == (split == "validation")]
            if not chosen:
                raise ValueError(
                    f"{archive} has no alphabet for the {split} split, whose validation alphabets are "
                    f"{', '.join(VALIDATION_ALPHABETS)}; use the publisher's complete archive."
                )
            images = images.select(chosen)
    else:
        split_file = find_data_file(VINYALS_SPLIT_FILE, root)
        wanted = _read_split_file(split_file)[split]
        pieces: list[ClassImages] = []
        for archive in (BACKGROUND_ARCHIVE, EVALUATION_ARCHIVE):
            path = find_data_file(archive, root, download=download)
            loaded = _load_archive(path, image_size, cache_dir)
            if chosen := [index for index, name in enumerate(loaded.class_names) if name in wanted]:
                pieces.append(loaded.select(chosen))
        found = {name for piece in pieces for name in piece.class_names}
        if missing := sorted(wanted - found):
            raise ValueError(
                f"{split_file} lists {len(missing)} {split} characters that the archives lack, first {missing[0]!r}; "
                f"use the publisher's complete {BACKGROUND_ARCHIVE} and {EVALUATION_ARCHIVE}."
            )
        images = _concatenate(pieces)
    return with_rotations(images) if rotations else images


def _check_protocol(protocol: str) -> None:
    if protocol not in get_args(Protocol):
        raise ValueError(f"protocol must be one of {get_args(Protocol)}, got {protocol!r}.")


def _load_archive(path: Path, image_size: int, cache_dir: str | os.PathLike[str] | None) -> ClassImages:
    """Decodes every character of an archive, or takes it from the cache."""
    with open_archive(path) as archive:
        stamps = member_stamps(info for info in archive.infolist() if _MEMBER.fullmatch(info.filename))
        name = f"omniglot-v{_DECODING_VERSION}-{path.stem}-{digest(stamps)}-{image_size}.npz"
        return cached_images(name, lambda: _decode(archive, list(stamps), image_size, path), cache_dir)


def _decode(archive: zipfile.ZipFile, members: list[str], image_size: int, path: Path) -> ClassImages:
    """Decodes the members, which are sorted by name and so by class."""
    from PIL import Image, ImageOps

    if not members:
        raise ValueError(
            f"{path} has no file named like images_background/Alphabet/character01/0001_01.png; "
            "it is not the Omniglot archive that its publisher ships."
        )
    check_names(archive)
    images = np.empty((len(members), image_size, image_size), dtype=np.uint8)
    names: list[str] = []
    starts: list[int] = []
    for index, member in enumerate(members):
        match = _MEMBER.fullmatch(member)
        assert match is not None  # members were chosen by this pattern
        name = f"{match['alphabet']}/{match['character']}"
        if not names or names[-1] != name:
            names.append(name)
            starts.append(index)
        drawing = decode_image(read_member(archive, member), f"{member} of {path}", channels=1)
        # The publisher's images are ink 0 on paper 1.
        ink = ImageOps.invert(drawing)
        images[index] = np.asarray(ink.resize((image_size, image_size), Image.Resampling.BOX))
    return ClassImages(
        images=torch.from_numpy(images).unsqueeze(1),
        class_start=torch.tensor([*starts, len(members)]),
        class_names=tuple(names),
    )


def _read_split_file(path: Path) -> dict[Split, set[str]]:
    """Reads which characters, as ``alphabet/character``, belong to which split."""
    wanted: dict[Split, set[str]] = {"train": set(), "validation": set(), "test": set()}
    try:
        reader = csv.DictReader(io.StringIO(path.read_text(encoding="utf-8"), newline=""))
        if reader.fieldnames is None or not {"alphabet", "character", "split"} <= set(reader.fieldnames):
            raise ValueError(
                f"{path} must have the columns alphabet,character,split, got {reader.fieldnames}; fix its first line."
            )
        for row in reader:
            if row["split"] not in _CSV_SPLITS:
                raise ValueError(
                    f"{path}, line {reader.line_num}: split must be train, val or test, got {row['split']!r}."
                )
            wanted[_CSV_SPLITS[row["split"]]].add(f"{row['alphabet']}/{row['character']}")
    except (csv.Error, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no text with commas ({error}); get the file again.") from error
    if empty := [split for split, names in wanted.items() if not names]:
        raise ValueError(f"{path} lists no character for the splits {', '.join(empty)}; use the complete file.")
    return wanted


def _concatenate(pieces: list[ClassImages]) -> ClassImages:
    """Joins classes of several archives, in order."""
    sizes = [size for piece in pieces for size in piece.class_sizes.tolist()]
    return ClassImages(
        images=torch.cat([piece.images for piece in pieces]),
        class_start=class_starts(sizes),
        class_names=tuple(name for piece in pieces for name in piece.class_names),
    )
