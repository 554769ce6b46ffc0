"""Models with settings that somebody wrote on purpose, with checksums that are right."""

import json
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from ibaml import MetaLearner
from ibaml.learner.folder import MODEL, SETTINGS
from ibaml.networks import MLP
from ibaml.train.checkpoint import load_tensors, save_tensors


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    tasks = [(x, x.sum(1)) for x in np.random.default_rng(0).normal(size=(2, 8, 3))]
    network = MLP(1, input_shape=3, hidden_sizes=(4,), norm="none")
    MetaLearner(network, "maml", likelihood="gaussian").fit(tasks, num_steps=1).save(folder)
    return load_tensors(folder / MODEL)


def deep(depth: int = 500) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


CRAFTED: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "no temperature": (lambda made: made.pop("calibration_temperature"), "calibration_temperature"),
    "temperature of zero": (lambda made: made.update(calibration_temperature=0), "is 0, and no positive number"),
    "negative temperature": (lambda made: made.update(calibration_temperature=-1), "is -1, and no positive number"),
    "temperature of nan": (
        lambda made: made.update(calibration_temperature=math.nan),
        "is nan, and no positive number",
    ),
    "temperature in words": (lambda made: made.update(calibration_temperature="hot"), "not supported between"),
    "no seed": (lambda made: made.pop("seed"), "'seed'"),
    "nested": (lambda made: made.update(learner=deep()), "nested too deeply"),
    "another record": (lambda made: made.update(learner=made["splits"]), "something else than a learner"),
    "a setting too many": (lambda made: made["learner"].update(speed=3), "LearnerSettings has no setting 'speed'"),
    "a number in words": (lambda made: made["learner"]["algorithm"]["inner"].update(num_steps="5"), "of another kind"),
    "a huge network": (
        lambda made: made["learner"]["network"]["arguments"].update(hidden_sizes=[10**6, 10**6]),
        r"the network has 1,000,006,000,001 weights, which the file does not hold",
    ),
    "another network": (
        lambda made: made["learner"]["network"]["arguments"].update(hidden_sizes="x"),
        "hidden_sizes must be an int",
    ),
}


@pytest.mark.parametrize("name", CRAFTED)
def test_settings_that_cannot_be_used_are_refused_by_name(saved, tmp_path, name):
    change, message = CRAFTED[name]
    tensors, metadata = saved
    made = json.loads(json.dumps(metadata))
    change(made)
    save_tensors(tmp_path / MODEL, tensors, made)
    (tmp_path / SETTINGS).write_text(json.dumps(made, indent=2, sort_keys=True) + "\n")
    with pytest.raises(ValueError, match=rf"{MODEL} holds settings that this version .* cannot use \(.*{message}"):
        MetaLearner.load(tmp_path)
