"""Sources of tasks: one file each, with the loader and a record of its settings.

A source of one's own is a frozen dataclass that satisfies ``TaskSource`` (for images: an ``ImageSource``) and one line
in ``SOURCES``.
"""

from collections.abc import Mapping

from ibaml.data.sources.base import OF_TRAINING_ALONE, ImageSource, Split, TaskSource, settings_of_tests
from ibaml.data.sources.fsmol import FSMol
from ibaml.data.sources.glyphs import Glyphs
from ibaml.data.sources.image_folder import ImageFolder
from ibaml.data.sources.mini_imagenet import MiniImagenet
from ibaml.data.sources.mixtures import Mixtures
from ibaml.data.sources.omniglot import Omniglot
from ibaml.data.sources.random_slopes import RandomSlopes
from ibaml.data.sources.sinusoid import Sinusoid
from ibaml.data.sources.tiny_imagenet import TinyImagenet

__all__ = [
    "OF_TRAINING_ALONE",
    "SOURCES",
    "FSMol",
    "Glyphs",
    "ImageFolder",
    "ImageSource",
    "MiniImagenet",
    "Mixtures",
    "Omniglot",
    "RandomSlopes",
    "Sinusoid",
    "Split",
    "TaskSource",
    "TinyImagenet",
    "settings_of_tests",
]

SOURCES: Mapping[str, type[TaskSource]] = {
    Glyphs.name: Glyphs,
    Omniglot.name: Omniglot,
    MiniImagenet.name: MiniImagenet,
    TinyImagenet.name: TinyImagenet,
    ImageFolder.name: ImageFolder,
    Sinusoid.name: Sinusoid,
    Mixtures.name: Mixtures,
    RandomSlopes.name: RandomSlopes,
    FSMol.name: FSMol,
}
"""All sources by name."""
