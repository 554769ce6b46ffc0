"""A prior without training tasks: from the spread of a backbone's features over inputs without labels.

Gaussian classes need the middle ``m`` of the class means, their variance ``tau2`` and the variance ``sigma2`` within a
class. Features are scaled to mean 0 and variance 1 over the inputs, so that ``m = 0``. How their variance divides
between and within classes, inputs without labels do not tell. It is assumed that ``tau2 = 1`` and that ``sigma2`` is
0.3 times the square root of the number of features, which allows for features that depend on each other: on validation
classes of the Tiny-ImageNet stand-in and features of MobileNetV2 that was a little too unsure
(``benchmarks/results/2026-11-28-backbones.md``). Every feature counts the same. Labels of related classes would tell
how much each of them says: that is what training learns.
"""

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import numpy as np

from ibaml.algorithms import make_algorithm
from ibaml.backbones import Extractor
from ibaml.data.prepare import SplitSettings, is_folder
from ibaml.data.preprocessing import Preprocessing
from ibaml.data.sources.image_folder import load_class_folder, load_images
from ibaml.data.standardizer import fit_standardizer
from ibaml.learner.defaults import HEAD_PATTERN, Suited
from ibaml.learner.features import extract, splits_of
from ibaml.likelihoods import Likelihood
from ibaml.networks import MLP
from ibaml.train.progress import say

if TYPE_CHECKING:
    from rich.console import Console

_logger = logging.getLogger(__name__)

_WITHIN = 0.3

_LEAST_INPUTS = 20
"""Fewer say little about the spread of features."""


class Untrained(NamedTuple):
    """What stands in the place of training.

    Attributes:
        suited: Network, algorithm and likelihood.
        preprocessing: The scale of the features.
    """

    suited: Suited
    preprocessing: Preprocessing


def untrained(
    extractor: Extractor, inputs: Any, likelihood: Likelihood, *, num_ways: int, console: "Console | None" = None
) -> Untrained:
    """Returns a prior over classes of each task's own, from inputs without labels; see ``MetaLearner.fit_prior``.

    Args:
        extractor: The backbone on a device.
        inputs: Inputs of the backbone, or a folder of images, or of class folders of images.
        likelihood: Of classes.
        num_ways: Classes of a task where nothing else says how many.
        console: Where progress and the one line on what was done are shown, if anywhere.

    Raises:
        ValueError: If there are too few inputs, or all features are constant.
    """
    if is_folder(inputs):
        inputs = _pixels(Path(inputs).expanduser(), extractor)
    if isinstance(inputs, tuple) and 1 < len(several := cast("tuple[Any, ...]", inputs)) < _LEAST_INPUTS:
        extractor.learn_form([(several, several[0])])
    (features,) = extract(extractor, [("inputs", inputs)], console, of_training=True)
    if len(features) < _LEAST_INPUTS:
        raise ValueError(
            f"inputs has {len(features)} inputs, but the spread of features needs at least {_LEAST_INPUTS}: give more, "
            "of any classes; labels are not needed."
        )
    scale = fit_standardizer([features])
    if scale.is_constant:
        raise ValueError("all inputs have the same features: there is no spread that a prior could come from.")
    num_features = features.shape[1]
    text = (
        f"No tasks were learned from: the prior is the spread of {num_features:,} features over {len(features):,} "
        "inputs, and every feature counts the same. Labelled classes, by fit, would tell which count."
    )
    _logger.info("%s", text)
    say(console, text)
    network = MLP(num_ways, input_shape=num_features, hidden_sizes=(), zero_head=True)
    return Untrained(
        Suited(network, make_algorithm("gaussian_classes", initial_within_variance=_WITHIN), likelihood, HEAD_PATTERN),
        Preprocessing(inputs=scale, input_shape=(num_features,), num_outputs=num_ways, is_vector=False),
    )


def _pixels(folder: Path, extractor: Extractor) -> Any:
    """Returns the images of a folder, or of its class folders if it has any."""
    how = splits_of(extractor, SplitSettings(), folder)
    assert how.image_size is not None
    if folder.is_dir() and any(child.is_dir() and not child.name.startswith(".") for child in folder.iterdir()):
        return load_class_folder(folder, image_size=how.image_size, channels=how.channels).images
    return np.asarray(load_images(folder, image_size=how.image_size, channels=how.channels).pixels)
