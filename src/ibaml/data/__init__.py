"""Tasks and the sources they are drawn from.

Loaders of images return ClassImages, which an EpisodeSampler turns into few-shot classification tasks; other tasks have
samplers of their own. Every sampler is a ``ibaml.types.TaskSampler``. ``ibaml.data.sources`` has the records that
recipes hold: which data, in which sizes of tasks.
"""

from ibaml.data.augmentation import UNCHANGED, Augmentation
from ibaml.data.episodes import EpisodeSampler
from ibaml.data.files.locate import find_data_file
from ibaml.data.files.pickles import load_arrays
from ibaml.data.fixed_episodes import FixedEpisodes
from ibaml.data.groups import GroupedTasks
from ibaml.data.images import ClassImages, with_rotations
from ibaml.data.linear_regression import LinearRegressionTasks, closed_form_posterior
from ibaml.data.ragged import RaggedTasks, TaskSplits
from ibaml.data.sources.fsmol import Assays, AssayTasks, hold_out, load_assays
from ibaml.data.sources.glyphs import load_glyphs
from ibaml.data.sources.image_folder import load_class_folder, load_image_folder, load_images
from ibaml.data.sources.mini_imagenet import load_mini_imagenet
from ibaml.data.sources.omniglot import load_omniglot
from ibaml.data.sources.sinusoid import SinusoidTasks
from ibaml.data.sources.tiny_imagenet import load_tiny_imagenet

__all__ = [
    "UNCHANGED",
    "AssayTasks",
    "Assays",
    "Augmentation",
    "ClassImages",
    "EpisodeSampler",
    "FixedEpisodes",
    "GroupedTasks",
    "LinearRegressionTasks",
    "SinusoidTasks",
    "RaggedTasks",
    "TaskSplits",
    "closed_form_posterior",
    "find_data_file",
    "hold_out",
    "load_arrays",
    "load_assays",
    "load_class_folder",
    "load_glyphs",
    "load_image_folder",
    "load_images",
    "load_mini_imagenet",
    "load_omniglot",
    "load_tiny_imagenet",
    "with_rotations",
]
