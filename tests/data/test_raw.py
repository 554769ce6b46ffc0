"""Tensors that a learner takes as they are: what is refused, and how it is said."""

import re
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ibaml import Batch, Episode, MetaLearner
from ibaml.algorithms import make_algorithm
from ibaml.data.preprocessing import image_preprocessing
from ibaml.data.raw import RawInputs, check_raw, raw_inputs_of
from ibaml.networks import Conv4
from ibaml.types import Tensor

LABELS = torch.arange(6) % 2
PIXELS = RawInputs((1, 8, 8), True, 0.0, 1.0)


def task(x: Tensor) -> Episode:
    return Episode(Batch(x, LABELS), Batch(x, LABELS))


def pixels(*shape: int) -> Tensor:
    return torch.rand(6, *shape, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def learner() -> MetaLearner:
    network = Conv4(2, channels=2, image_size=8, downsample="stride")
    return MetaLearner(network, make_algorithm("prototypes"), classes="per_task").fit(
        [task(pixels(1, 8, 8))], num_steps=1
    )


def test_what_training_had_is_known_and_stored(learner: MetaLearner, tmp_path: Path) -> None:
    x = pixels(1, 8, 8)
    known = raw_inputs_of(task(x))
    assert known == RawInputs((1, 8, 8), True, float(x.min()), float(x.max())) and known.are_pixels
    assert learner.fitted_model.raw_inputs == known
    assert MetaLearner.load(learner.save(tmp_path)).fitted_model.raw_inputs == known


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (
            np.zeros((6, 1, 8, 8), np.uint8),
            TypeError,
            "x_support has dtype uint8 and shape [6, 1, 8, 8], but the model takes tensors as it was trained on, "
            "floating-point numbers from",
        ),
        (torch.zeros(6, 1, 8, 8, dtype=torch.uint8), TypeError, "pass torch.as_tensor(x).float() / 255"),
        (
            np.zeros((6, 8, 8, 1), np.uint8),
            TypeError,
            "pass torch.as_tensor(x).permute(0, 3, 1, 2).float() / 255 (of an inverted model 1 minus that). "
            "ibaml.recipes.load_learner(folder) reads images of 0..255",
        ),
        (np.zeros((6, 8, 8, 1)), ValueError, "pass torch.as_tensor(x).permute(0, 3, 1, 2)."),
        (np.zeros((6, 8, 8)), ValueError, "of shape [num_examples, 1, 8, 8]: reshape or turn the axes."),
        ("photos", TypeError, "x_support is the path 'photos'; expected an array: ibaml.data.load_class_folder"),
    ],
)
def test_other_inputs_are_refused(learner: MetaLearner, x: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        learner.adapt(x, LABELS if isinstance(x, torch.Tensor) else LABELS.numpy())
    posterior = learner.adapt(pixels(1, 8, 8), LABELS)
    with pytest.raises(error, match=re.escape(message.replace("x_support", "x_query"))):
        posterior.predict(x)


def test_pixels_that_are_not_divided_are_warned_of(learner: MetaLearner) -> None:
    with pytest.warns(RuntimeWarning, match="values from .* to 25.*scales nothing: divide pixels of 0..255 by 255"):
        learner.adapt(255 * pixels(1, 8, 8), LABELS)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        learner.adapt(2 * pixels(1, 8, 8), LABELS)
        check_raw("x", pixels(1, 8, 8), RawInputs((1, 8, 8), True, 0.0, 0.0))
    with pytest.warns(RuntimeWarning, match="check its units and scale"):
        check_raw("x", torch.full((2, 3), 90.0), RawInputs((3,), True, -2.0, 2.0))


def test_tokens_stay_whole() -> None:
    tokens = RawInputs((4,), False, 0.0, 9.0)
    check_raw("x", torch.zeros(2, 5, dtype=torch.int64), tokens)  # sequences may differ in length
    with pytest.raises(TypeError, match=r"whole numbers from 0 to 9 .*pass torch.as_tensor\(x\).long\(\)"):
        check_raw("x", torch.zeros(2, 4), tokens)


@pytest.mark.parametrize("algorithm", ["prototypes", "maml"])
def test_training_on_whole_numbers_says_what_to_do(algorithm: str) -> None:
    network = Conv4(2, channels=2, image_size=8, downsample="stride")
    with pytest.raises(ValueError, match=r"dtype torch.uint8: .* Give images of 0..255 as x.float\(\) / 255"):
        MetaLearner(network, algorithm, classes="per_task").fit(
            [task((255 * pixels(1, 8, 8)).to(torch.uint8))], num_steps=1
        )


def test_images_of_a_model_that_scales_them() -> None:
    images = image_preprocessing((1, 8, 8), 2)
    assert images.encode_inputs("x", np.full((2, 1, 8, 8), 255, np.uint8)).max() == 1
    with pytest.raises(ValueError, match=r"channels come first: move the last axis .*numpy.moveaxis\(x, -1, 1\)"):
        images.encode_inputs("x", np.zeros((2, 8, 8, 1), np.uint8))
    with pytest.raises(ValueError, match="images of that size, channels first"):
        images.encode_inputs("x", np.zeros((2, 1, 9, 9), np.uint8))
    with pytest.raises(ValueError, match="numbers up to 0.5, but the model takes images of 0..255: pass the pixels"):
        images.encode_inputs("x", np.full((2, 1, 8, 8), 0.5))
    assert images.encode_inputs("x", np.zeros((2, 1, 8, 8), np.uint8)).max() == 0
