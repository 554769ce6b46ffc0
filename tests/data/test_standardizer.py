"""Scaling against numpy's own mean and standard deviation, at ordinary and at extreme scales."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ibaml.data.preprocessing import fit_preprocessing
from ibaml.data.standardizer import fit_standardizer
from ibaml.data.tables import read_tasks

RNG = np.random.default_rng(0)


def test_against_numpy_over_several_pieces():
    pieces = [RNG.normal(3, 2, size=(n, 4)) for n in (1, 7, 20)]
    fitted = fit_standardizer(pieces)
    together = np.concatenate(pieces)
    np.testing.assert_allclose(fitted.mean.numpy(), together.mean(0), rtol=1e-13)
    np.testing.assert_allclose(fitted.scale.numpy(), together.std(0), rtol=1e-13)
    scaled = fitted.transform(together)
    np.testing.assert_allclose(scaled.mean(0), 0, atol=1e-13)
    np.testing.assert_allclose(scaled.std(0), 1, rtol=1e-12)


def test_images_have_one_scale_per_channel():
    images = RNG.integers(0, 256, size=(5, 3, 4, 4), dtype=np.uint8)
    fitted = fit_standardizer([images[:2], images[2:]])
    assert fitted.mean.shape == (3, 1, 1)
    np.testing.assert_allclose(fitted.mean.numpy().ravel(), images.mean((0, 2, 3)), rtol=1e-13)
    np.testing.assert_allclose(fitted.scale.numpy().ravel(), images.std((0, 2, 3)), rtol=1e-13)


def test_constant_features_are_ignored_and_constant_targets_only_shifted():
    values = np.array([[0.1, 1.0], [0.1, 2.0]])
    fitted = fit_standardizer([values])
    assert fitted.transform(np.array([[77.0, 1.5]])).tolist() == [[0.0, 0.0]]
    assert not fitted.is_constant and fit_standardizer([values[:, :1]]).is_constant
    assert fit_standardizer([values], keep_constant=True).transform(np.array([[1.1, 1.5]])).tolist() == [[1.0, 0.0]]


@pytest.mark.parametrize("scale", [1e-200, 1e-3, 1e9, 1e150, 1e300])
def test_any_scale(scale):
    values = RNG.normal(size=(50, 2)) * scale
    fitted = fit_standardizer([values])
    expected = (values / scale - (values / scale).mean(0)) / (values / scale).std(0)
    np.testing.assert_allclose(fitted.transform(values), expected, rtol=1e-9)


def test_small_differences_of_large_values():
    fitted = fit_standardizer([np.array([[1e9], [1e9 + 2]])])
    assert fitted.transform(np.array([[1e9 + 4]])).tolist() == [[3.0]]


@given(st.integers(1, 5), st.integers(0, 2**31))
def test_pieces_do_not_matter(num_pieces, seed):
    values = np.random.default_rng(seed).normal(size=(12, 3))
    whole, split = fit_standardizer([values]), fit_standardizer(np.array_split(values, num_pieces))
    np.testing.assert_allclose(split.mean.numpy(), whole.mean.numpy(), atol=1e-12)
    np.testing.assert_allclose(split.inverse_scale.numpy(), whole.inverse_scale.numpy(), rtol=1e-12)


def test_targets_have_the_scale_of_all_tasks_and_classes_the_number_of_the_smallest():
    tasks = [(RNG.normal(size=(n, 2)), RNG.normal(3, 2, size=n)) for n in (5, 9)]
    fitted = fit_preprocessing(read_tasks(tasks), target_kind="real", classes="shared", num_ways=None)
    together = np.concatenate([y for _, y in tasks])
    assert float(fitted.targets.mean) == pytest.approx(together.mean(), rel=1e-12)
    assert float(fitted.targets.scale) == pytest.approx(together.std(), rel=1e-12)
    classes = [(RNG.normal(size=(12, 2)), np.arange(12) % ways) for ways in (4, 2, 3)]
    fitted = fit_preprocessing(read_tasks(classes), target_kind="classes", classes="per_task", num_ways=None)
    assert fitted.num_outputs == 2
