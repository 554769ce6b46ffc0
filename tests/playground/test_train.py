"""What ships with the playground: small, made by its own script, and as accurate as the recipe says."""

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from ibaml import MetaLearner
from ibaml.data import load_glyphs
from ibaml.playground import train
from ibaml.playground.none_of_these import Thresholds, find_thresholds
from ibaml.playground.train import CURVES, DRAWINGS, FIELDS, MODELS, curves_for_training, fields, train_curves
from ibaml.recipes import get_recipe


@pytest.fixture(scope="module")
def drawings():
    return MetaLearner.load(MODELS / DRAWINGS)


def test_the_models_are_small():
    files = [path for path in MODELS.rglob("*") if path.is_file()]
    assert len(files) == 5
    assert sum(path.stat().st_size for path in files) < 500_000


def test_the_model_of_drawings_is_accurate_on_characters_of_validation(drawings):
    """30 tasks of five Greek letters, five examples each."""
    glyphs, generator = load_glyphs("validation"), torch.Generator().manual_seed(3)
    images = glyphs.images.unflatten(0, (-1, 20))
    shares = []
    for _ in range(30):
        chosen = images[torch.randperm(len(images), generator=generator)[:5]]
        labels = np.arange(5)
        posterior = drawings.adapt(chosen[:, :5].flatten(0, 1).numpy(), labels.repeat(5))
        shares.append(posterior.predict(chosen[:, 5:15].flatten(0, 1).numpy()).labels == labels.repeat(10))
    assert np.mean(shares) > 0.97


def test_thresholds_lie_between_those_that_were_found():
    found = Thresholds(0.1, (2, 4), (1, 5), ((0.0, 4.0), (2.0, 6.0)), ((0.5, 0.5), (0.5, 0.5)))
    assert found.at(2, 1) == 0 and found.at(4, 5) == 6
    assert found.at(3, 2) == pytest.approx(2.0)
    assert found.at(10, 9) == 6


def test_thresholds_let_the_share_through_that_they_promise(drawings, tmp_path):
    few = {"ways": (3,), "shots": (2,)}
    glyphs = load_glyphs("validation")
    found = find_thresholds(drawings, glyphs, **few, false_alarms=0.3, num_tasks=5)
    stricter = find_thresholds(drawings, glyphs, **few, false_alarms=0.1, num_tasks=5)
    assert found.scores[0][0] < stricter.scores[0][0]
    assert found.detected[0][0] >= stricter.detected[0][0] > 0.5
    found.save(tmp_path)
    assert Thresholds.load(tmp_path).at(3, 2) == found.scores[0][0]


def test_shipped_thresholds_are_of_this_model(drawings):
    shipped = Thresholds.load(MODELS / DRAWINGS)
    assert shipped.false_alarms == 0.1
    found = find_thresholds(drawings, load_glyphs("validation"), ways=(5,), shots=(3,), num_tasks=15, seed=1)
    assert found.scores[0][0] == pytest.approx(shipped.at(5, 3), abs=0.6)
    assert np.mean(shipped.detected) > 0.8


def test_the_model_of_curves_is_what_the_script_makes(tmp_path):
    made, shipped = train_curves(tmp_path), MetaLearner.load(MODELS / CURVES)
    x, y = curves_for_training(1, seed=5)[0]
    grid = np.linspace(-5, 5, 7)[:, None]
    ours, theirs = (learner.adapt(x[:4], y[:4]).predict(grid) for learner in (made, shipped))
    np.testing.assert_allclose(ours.mean, theirs.mean, atol=0.02)
    np.testing.assert_allclose(ours.standard_deviation, theirs.standard_deviation, rtol=0.02)


def test_the_script_makes_what_ships(tmp_path, monkeypatch):
    """With three steps of training and thresholds for one size of tasks."""
    short = get_recipe(train.RECIPE).replace(
        {"trainer.num_steps": 3, "trainer.validate_every": 3, "trainer.num_validation_tasks": 2}
    )
    few = partial(find_thresholds, ways=(2,), shots=(1,), num_tasks=2)
    monkeypatch.setattr(train, "get_recipe", lambda name: short)
    monkeypatch.setattr(train, "find_thresholds", few)
    monkeypatch.setattr(train, "FIELDS", tmp_path / "fields.csv")
    train.main(tmp_path)
    made, shipped = (
        {path.relative_to(root) for path in root.rglob("*") if path.is_file()} for root in (tmp_path, MODELS)
    )
    assert made - {Path("fields.csv")} == shipped
    assert (tmp_path / "fields.csv").read_bytes() == FIELDS.read_bytes()
    learner = MetaLearner.load(tmp_path / DRAWINGS)
    assert learner.preprocessing.image_size == (28, 28)
    assert learner.network.input_shape == MetaLearner.load(MODELS / DRAWINGS).network.input_shape


def test_the_example_table_is_what_the_script_makes():
    assert FIELDS.read_text() == fields()
