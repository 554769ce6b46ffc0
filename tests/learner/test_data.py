"""MetaLearner on data: arrays, tables and image folders in, predictions in the data's own terms out."""

import dataclasses
import json
import os
import re

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from sklearn.base import clone

from ibaml import MetaLearner, NotFittedError, SplitSettings, metrics, tree
from ibaml.data import SinusoidTasks
from ibaml.data.prepare import prepare
from ibaml.learner import defaults
from ibaml.learner.defaults import convex_algorithm
from ibaml.learner.folder import MODEL, SETTINGS, read_metadata, read_model
from ibaml.learner.held_out import held_out_tasks
from ibaml.likelihoods import ClassPrediction, MixturePrediction
from ibaml.networks import MLP
from ibaml.seeds import task_seed
from ibaml.solvers.inner import RelativeAdam
from ibaml.train import TrainerSettings
from ibaml.train.checkpoint import save_tensors

STEPS = 3


def pairs(num_tasks: int = 6, *, regression: bool = False, seed: int = 0, labels=("inactive", "active")):
    rng = np.random.default_rng(seed)
    tasks = []
    for _ in range(num_tasks):
        x = rng.normal(size=(int(rng.integers(8, 20)), 2)) * [1.0, 1e9] + [5.0, 3e9]
        score = (x[:, 0] - 5) * rng.normal(1, 0.5) + (x[:, 1] - 3e9) / 1e9
        y = 100 * score + 1000 + rng.normal(size=len(x)) if regression else np.array(labels)[(score > 0).astype(int)]
        tasks.append((x, y))
    return tasks


def long_table(num_tasks: int = 5, **arguments) -> pd.DataFrame:
    parts = [
        pd.DataFrame({"school": f"s{index}", "age": x[:, 0], "income": x[:, 1], "score": y})
        for index, (x, y) in enumerate(pairs(num_tasks, **arguments))
    ]
    return pd.concat(parts, ignore_index=True)


@pytest.fixture(autouse=True)
def few_validation_tasks(monkeypatch):
    """The usual forty take longer than all steps of such short training."""
    monkeypatch.setattr(defaults, "TABLE_TRAINER", dataclasses.replace(defaults.TABLE_TRAINER, num_validation_tasks=3))


@pytest.fixture(scope="module")
def classifier() -> MetaLearner:
    return MetaLearner().fit(pairs(), num_steps=STEPS)


@pytest.fixture(scope="module")
def regressor() -> MetaLearner:
    return MetaLearner(likelihood="gaussian").fit(pairs(regression=True), num_steps=STEPS)


# Arrays in, arrays out


def test_classes_by_name(classifier):
    (x, y), *_ = pairs(seed=1)
    prediction = classifier.adapt(x[:5], y[:5]).predict(x[5:])
    assert isinstance(prediction, ClassPrediction)
    assert prediction.classes.tolist() == ["active", "inactive"]
    assert all(isinstance(value, np.ndarray) for value in (prediction.probs, prediction.labels, prediction.epistemic))
    np.testing.assert_allclose(prediction.probs.sum(1), 1, rtol=1e-5)
    np.testing.assert_allclose(prediction.log_probs, np.log(prediction.probs), rtol=1e-4)
    assert (prediction.labels == prediction.classes[prediction.probs.argmax(1)]).all()
    np.testing.assert_allclose(
        prediction.total_uncertainty, prediction.aleatoric + prediction.epistemic, rtol=1e-4, atol=1e-6
    )
    assert prediction.samples().shape == (64, len(x) - 5, 2)


def test_tensors_give_tensors_and_the_same_numbers(classifier, regressor):
    (x, y), *_ = pairs(seed=1)
    arrays = classifier.adapt(x[:5], y[:5]).predict(x[5:])
    tensors = classifier.adapt(torch.tensor(x[:5]), y[:5]).predict(torch.tensor(x[5:]))
    assert isinstance(tensors.probs, torch.Tensor) and isinstance(tensors.labels, np.ndarray)
    np.testing.assert_array_equal(tensors.probs.numpy(), arrays.probs)
    (x, y), *_ = pairs(seed=1, regression=True)
    tensors = regressor.adapt(torch.tensor(x), torch.tensor(y)).predict(torch.tensor(x))
    assert isinstance(tensors.mean, torch.Tensor) and isinstance(tensors.interval()[0], torch.Tensor)


def test_regression_is_in_the_units_of_the_targets(regressor):
    (x, y), *_ = pairs(seed=1, regression=True)
    prediction = regressor.adapt(x[:5], y[:5]).predict(x[5:])
    assert isinstance(prediction, MixturePrediction)
    assert prediction.mean.shape == y[5:].shape and prediction.mean.dtype == np.float64
    assert abs(prediction.mean.mean() - 1000) < 500
    np.testing.assert_allclose(prediction.total_uncertainty, prediction.aleatoric + prediction.epistemic)
    np.testing.assert_allclose(prediction.standard_deviation**2, prediction.total_uncertainty)
    low, high = prediction.interval(0.8)
    assert (low < prediction.mean).all() and (prediction.mean < high).all()
    np.testing.assert_array_equal(prediction.quantile(0.9), high)
    assert prediction.cdf(y[5:]).shape == y[5:].shape
    np.testing.assert_allclose(prediction.cdf(high), np.full(len(x) - 5, 0.9), rtol=1e-6)
    with pytest.raises(ValueError, match=r"targets has shape \(1,\); expected \(\d+,\), as mean has"):
        prediction.cdf(y[:1])
    # Drawn from a posterior in closed form, the same every time.
    curves = prediction.samples()
    assert curves.shape == (64, len(x) - 5)
    np.testing.assert_array_equal(curves, prediction.samples())
    deviation = (prediction.epistemic / 64) ** 0.5
    assert (np.abs(curves.mean(0) - prediction.mean) < 5 * deviation).all()
    # The same numbers by hand: scale, predict, scale back.
    targets = regressor.preprocessing.targets
    noise = regressor.meta_parameters.shared["likelihood.log_noise_variance"].double().exp() * targets.scale**2
    np.testing.assert_allclose(prediction.aleatoric, np.full(len(x) - 5, float(noise)))


def test_units_do_not_matter():
    """A change of units in training and use changes predictions by the same units and nothing else."""
    plain = pairs(regression=True)
    other = [(x * [1e-3, 1e-9] + [7.0, 0.0], 0.01 * y - 3) for x, y in plain]
    (x, y), (u, v) = plain[0], other[0]
    predictions = [
        MetaLearner(likelihood="gaussian").fit(tasks).adapt(a[:4], b[:4]).predict(a[4:])
        for tasks, a, b in ((plain, x, y), (other, u, v))
    ]
    # Estimation ends within a hundredth of a nat of the optimum, from where rounding does not lead to the same point.
    np.testing.assert_allclose(predictions[1].mean, 0.01 * predictions[0].mean - 3, rtol=2e-2)
    np.testing.assert_allclose(predictions[1].standard_deviation, 0.01 * predictions[0].standard_deviation, rtol=2e-2)


def test_several_targets():
    tasks = [(x, np.stack([y, -y], 1)) for x, y in pairs(regression=True)]
    learner = MetaLearner(likelihood="gaussian").fit(tasks, num_steps=2)
    prediction = learner.adapt(*tasks[0]).predict(tasks[0][0])
    assert prediction.mean.shape == (len(tasks[0][0]), 2)
    np.testing.assert_allclose(prediction.cdf(prediction.quantile(0.3)), 0.3, rtol=1e-6)
    with pytest.raises(ValueError, match="y_support has 1 columns, but the model was trained on 2 targets"):
        learner.adapt(tasks[0][0], tasks[0][1][:, 0])


def test_three_classes_and_classes_of_each_task():
    rng = np.random.default_rng(0)
    tasks = []
    for index in range(5):
        y = np.arange(18) % 3
        tasks.append((rng.normal(size=(18, 2)) + y[:, None], np.array([f"{index}{name}" for name in "abc"])[y]))
    with pytest.raises(
        ValueError, match=r"y_support has the label '9a' .*for classes that differ from task to task use"
    ):
        MetaLearner().fit(tasks, num_steps=1).adapt(tasks[0][0][:3], ["9a", "9b", "9c"])
    learner = MetaLearner(classes="per_task").fit(tasks, num_steps=2)
    prediction = learner.adapt(tasks[0][0][:6], ["9a", "9b", "9c"] * 2).predict(tasks[0][0])
    assert prediction.classes.tolist() == ["9a", "9b", "9c"] and prediction.probs.shape == (18, 3)
    # A head with one prior for all classes serves any number of them, weights of a network do not.
    fewer = learner.adapt(tasks[0][0][:2], ["x", "y"]).predict(tasks[0][0])
    assert fewer.classes.tolist() == ["x", "y"] and fewer.probs.shape == (18, 2)
    more = learner.adapt(tasks[0][0][:8], [*"pqrspqrs"]).predict(tasks[0][0])
    assert more.probs.shape == (18, 4) and np.allclose(more.probs.sum(1), 1)
    fixed = MetaLearner(algorithm="maml", classes="per_task").fit(tasks, num_steps=1)
    with pytest.raises(ValueError, match="y_support has 2 classes .'x', 'y'., but the model tells 3 apart"):
        fixed.adapt(tasks[0][0][:2], ["x", "y"])
    assert learner.evaluate(tasks[:3]).keys() >= {"accuracy", "nll", "ece"}
    with pytest.raises(ValueError, match="task '0' has a single class, and classes='per_task' needs at least 2"):
        MetaLearner(classes="per_task").fit([(tasks[0][0], ["a"] * 18)], num_steps=1)


def predictions_of_half(learner, tasks):
    """What ``evaluate`` scores, through the public functions: the same splits and seed, in the terms of the data."""
    episodes = held_out_tasks(learner.fitted_model, tasks, learner._splits, seed=0)
    for index, (task, episode) in enumerate(zip(tasks, episodes, strict=True)):
        seed = task_seed(0, index)
        support, query = (
            [int(np.flatnonzero((np.abs(encoded - row) < 1e-5).all(1))[0]) for row in batch.x.numpy()]
            for encoded in [learner.fitted_model.encode("x", task[0]).numpy()]
            for batch in episode
        )
        posterior = learner.adapt(task[0][support], task[1][support], seed=seed)
        yield posterior.predict(task[0][query], seed=seed), task[1][query]


def test_evaluation_of_classes_is_that_of_the_predictions(classifier):
    tasks = pairs(5, seed=7)
    report = classifier.evaluate(tasks)
    names = ("accuracy", "nll", "brier", "ece", "mce", "selective_area", "ece_pooled", "mce_pooled")
    assert report.keys() == {*names}
    areas, probs, labels = [], [], []
    for prediction, y in predictions_of_half(classifier, tasks):
        hits = (prediction.labels == y)[np.argsort(prediction.total_uncertainty, kind="stable")]
        areas.append(np.mean(np.cumsum(hits) / np.arange(1, len(hits) + 1)))
        probs.append(prediction.probs)
        labels.append(np.searchsorted(prediction.classes, y))
    assert len({len(p) for p in probs}) > 1
    assert report["selective_area"].mean == pytest.approx(np.mean(areas), abs=1e-6)
    everything = torch.tensor(np.concatenate(probs))[None], torch.tensor(np.concatenate(labels))[None]
    assert report["ece_pooled"].mean == pytest.approx(float(metrics.ece(*everything)), abs=1e-5)
    assert report["mce_pooled"].mean == pytest.approx(float(metrics.mce(*everything)), abs=1e-5)
    assert report["ece_pooled"].num_tasks == 5 and report == classifier.evaluate(tasks)


def test_evaluation_of_targets_is_that_of_the_predictions(regressor):
    tasks = pairs(5, regression=True, seed=7)
    report = regressor.evaluate(tasks)
    covered, errors = [], []
    for prediction, y in predictions_of_half(regressor, tasks):
        low, high = prediction.interval(0.9)
        covered.append(np.mean((low <= y) & (y <= high)))
        # The quantile below which a share of the targets lies, at the middle of 2000 levels.
        levels = (np.arange(2000) + 0.5) / 2000
        below = (prediction.cdf(y)[:, None] <= levels).mean(0)
        errors.append(np.abs(below - levels).mean())
    assert report["coverage_90"].mean == pytest.approx(np.mean(covered), abs=1e-9)
    assert report["quantile_calibration_error"].mean == pytest.approx(np.mean(errors), abs=1e-3)


def test_a_long_table_from_end_to_end(tmp_path):
    table = long_table(regression=True)
    learner = MetaLearner(likelihood="gaussian").fit(table, 0.2, task="school", target="score", num_steps=STEPS)
    new = long_table(2, regression=True, seed=3)
    report = learner.evaluate(new)
    assert report.keys() == {"mse", "nll", "coverage_90", "quantile_calibration_error"}
    assert report["mse"].num_tasks == 2
    own = new[new.school == "s0"]
    shuffled = own[["score", "income", "age", "school"]]
    posterior = learner.adapt(own.iloc[:4], own.score.iloc[:4])
    first, second = posterior.predict(own.iloc[4:]), posterior.predict(shuffled.iloc[4:])
    np.testing.assert_array_equal(first.mean, second.mean)
    with pytest.raises(ValueError, match="x_query has no column income; its columns are school, age"):
        posterior.predict(own[["school", "age"]])


def test_held_out_tasks_do_not_reach_the_scales():
    tasks = pairs(8)
    learner = MetaLearner().fit(tasks, 0.25, num_steps=1)
    means = [
        np.concatenate([x for index, (x, _) in enumerate(tasks) if index not in held_out]).mean(0)
        for held_out in [(i, j) for i in range(8) for j in range(i)]
    ]
    found = learner.preprocessing.inputs.mean.numpy()
    assert sum(np.allclose(found, mean, rtol=1e-12) for mean in means) == 1
    again = MetaLearner().fit(tasks, 0.25, num_steps=1).preprocessing.inputs.mean
    assert torch.equal(again, learner.preprocessing.inputs.mean)
    for share, message in ((1.5, "must be between 0 and 1"), (0.99, "leaves none for training")):
        with pytest.raises(ValueError, match=message):
            MetaLearner().fit(tasks, share, num_steps=1)


def test_validation_tasks_of_unequal_size():
    learner = MetaLearner().fit(pairs(), pairs(8, seed=9), num_steps=2)
    assert learner.training_result.best_step == 2


# Warm adaptation


def test_an_update_is_adaptation_to_all_data():
    """Bayesian linear regression: at once or in parts, the converged posterior is the closed form of all data."""
    tasks = pairs(regression=True)
    algorithm = dataclasses.replace(
        convex_algorithm("ibaml", 6, is_regression=True),
        num_samples=60,
        inner=RelativeAdam(num_steps=120, learning_rate=0.06),
    )
    network = MLP(1, input_shape=2, hidden_sizes=()).double()
    learner = MetaLearner(network, algorithm, "gaussian").fit(
        tasks, num_steps=1, settings=TrainerSettings(tasks_per_step=1)
    )
    x, y = tasks[0]
    design = learner.preprocessing.encode_inputs("x", x, dtype=torch.float64)
    design = torch.cat([design, torch.ones(len(x), 1).double()], 1)
    target = learner.preprocessing.encode_targets("y", y, dtype=torch.float64)[:, 0]
    prior, shared = learner.meta_parameters
    precision = torch.cat([-prior.log_var["head.weight"][0], -prior.log_var["head.bias"]]).exp()
    mean = torch.cat([prior.mean["head.weight"][0], prior.mean["head.bias"]])
    noise = shared["likelihood.log_noise_variance"].exp()
    full = design.T @ design / noise + precision.diag()
    expected = torch.linalg.solve(full, precision * mean + design.T @ target / noise)

    early = learner.adapt(x[:3], y[:3])
    at_once, late = learner.adapt(x, y), early.update(x[3:], y[3:])
    assert early.num_support == 3 and late.num_support == at_once.num_support == len(x)
    for posterior in (at_once, late):
        found = torch.cat([posterior.value.mean["head.weight"][0], posterior.value.mean["head.bias"]])
        variance = torch.cat([posterior.value.log_var["head.weight"][0], posterior.value.log_var["head.bias"]]).exp()
        torch.testing.assert_close(found, expected, rtol=0, atol=0.02)
        # Up to the Monte Carlo error of 60 samples, correlated over weights.
        torch.testing.assert_close(variance, 1 / full.diagonal(), rtol=0.4, atol=0)
    assert (early.value.mean["head.weight"] - at_once.value.mean["head.weight"]).abs().max() > 0.05


def test_an_update_starts_where_the_posterior_was(classifier):
    x, y = pairs(seed=2)[0]
    posterior = classifier.adapt(x[:6], y[:6])
    before = tree.ravel(posterior.value)[0].clone()
    again = posterior.update(x[6:], y[6:])
    assert torch.equal(tree.ravel(posterior.value)[0], before)
    # The inner problem of a head has one solution, wherever one starts.
    assert tree.ravel(again.value)[0].equal(tree.ravel(classifier.adapt(x, y).value)[0])
    by_steps = MetaLearner(algorithm="ibaml").fit(pairs(), num_steps=2)
    assert by_steps.adapt(x[:6], y[:6]).update(x[6:], y[6:]).grad_norm < by_steps.adapt(x, y).grad_norm
    with pytest.raises(ValueError, match="y_support has the label 'other'"):
        posterior.update(x[:1], ["other"])


# Calibration


def test_calibration_lowers_the_nll_of_its_tasks_and_is_saved(tmp_path, regressor):
    # Steps so few that predictions are too unsure.
    learner = MetaLearner(algorithm="linear_gaussian", likelihood="gaussian")
    learner.fit(pairs(regression=True), num_steps=STEPS)
    # And of smaller differences than in training.
    held_out = [(x, 1000 + 0.2 * (y - 1000)) for x, y in pairs(12, regression=True, seed=5)]
    before = learner.evaluate(held_out)["nll"].mean
    assert learner.calibrate(held_out) is learner and learner.calibration_temperature != 1, learner.recalibration
    after = learner.evaluate(held_out)["nll"].mean
    assert after < before - 0.01
    learner.save(tmp_path)
    loaded = MetaLearner.load(tmp_path)
    assert loaded.calibration_temperature == learner.calibration_temperature
    assert loaded.evaluate(held_out)["nll"].mean == after
    # Fitted again from the untempered predictions, not on top of the last temperature.
    temperature = learner.calibration_temperature
    assert learner.calibrate(held_out).calibration_temperature == temperature
    assert learner.fit(pairs(regression=True), num_steps=1).calibration_temperature == 1


def test_calibration_on_a_sampler():
    tasks = SinusoidTasks(num_shots=4, num_queries=5)
    learner = MetaLearner(MLP(1, input_shape=1, hidden_sizes=(5,)), likelihood="gaussian").fit(tasks, num_steps=1)
    before = learner.evaluate(tasks, num_tasks=80, seed=3)["nll"].mean
    learner.calibrate(tasks, num_tasks=80, seed=3)
    assert learner.evaluate(tasks, num_tasks=80, seed=3)["nll"].mean < before
    with pytest.warns(RuntimeWarning, match="3 tasks, with 4 known examples; needed are 10 to know"):
        assert learner.calibrate(tasks, num_tasks=3, seed=3).calibration_temperature == 1
    with pytest.raises(TypeError, match="the model was fitted on tensors, but tasks is a list"):
        learner.calibrate(pairs())


def test_abstaining_after_calibration(tmp_path):
    learner = MetaLearner().fit(pairs(), num_steps=40)
    x, y = pairs(seed=3)[0]
    with pytest.raises(
        ValueError, match=r"max_error needs to know how often confident predictions .*or call learner\.calibrate"
    ):
        learner.adapt(x[:6], y[:6]).predict(x[6:], max_error=0.1)
    learner.calibrate(pairs(40, seed=5))
    curve = learner.fitted_model.abstention
    assert curve is not None and float(curve.coverage[0]) == 1
    learner.save(tmp_path)
    loaded = MetaLearner.load(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(loaded.fitted_model.abstention, curve, strict=True))
    max_error = float(curve.error_bound.min()) + 0.01
    prediction = loaded.adapt(x[:6], y[:6]).predict(x[6:], max_error=max_error)
    assert isinstance(prediction.abstains, np.ndarray) and prediction.abstains.dtype == bool
    least = curve.min_confidence(max_error)
    np.testing.assert_array_equal(prediction.abstains, prediction.probs.max(1).astype(np.float64) < least)
    assert not loaded.adapt(x[:6], y[:6]).predict(x[6:]).abstains.any()
    as_tensors = loaded.adapt(x[:6], y[:6]).predict(torch.tensor(x[6:]), max_error=max_error)
    assert as_tensors.abstains.tolist() == prediction.abstains.tolist()
    with pytest.warns(RuntimeWarning, match="no confidence keeps the error below max_error=1e-06: the model abstains"):
        assert learner.adapt(x[:6], y[:6]).predict(x[6:], max_error=1e-6).abstains.all()
    for share in (0, 1, 1.5):
        with pytest.raises(ValueError, match=f"max_error is {share}; expected a share strictly between 0 and 1"):
            learner.adapt(x[:6], y[:6]).predict(x[6:], max_error=share)
    # A fit, and another way to adapt, make other predictions.
    other = dataclasses.replace(learner.algorithm, posterior_temperature=0.5)
    assert learner.adapting_with(other).fitted_model.abstention is None
    assert learner.fit(pairs(), num_steps=1).fitted_model.abstention is None


def test_training_with_validation_tasks_is_enough_to_abstain(tmp_path):
    settings = TrainerSettings(num_steps=4, tasks_per_step=2, validate_every=2, num_validation_tasks=20)
    learner = MetaLearner().fit(pairs(), pairs(20, seed=5), settings=settings, run_folder=tmp_path)
    curve = learner.fitted_model.abstention
    assert curve is not None
    # Stored with the model, and with the checkpoint that a finished run is resumed from.
    resumed = MetaLearner().fit(pairs(), pairs(20, seed=5), settings=settings, run_folder=tmp_path)
    for other in (MetaLearner.load(tmp_path), resumed):
        assert all(torch.equal(a, b) for a, b in zip(other.fitted_model.abstention, curve, strict=True))
    x, y = pairs(seed=3)[0]
    assert learner.adapt(x[:6], y[:6]).predict(x[6:], max_error=0.99).abstains.dtype == bool


def test_numbers_are_not_abstained_from(regressor):
    x, y = pairs(regression=True, seed=2)[0]
    with pytest.raises(ValueError, match="max_error is a share of wrong labels, but the likelihood 'gaussian'"):
        regressor.adapt(x[:6], y[:6]).predict(x[6:], max_error=0.1)


# scikit-learn's conventions


def test_clone_keeps_the_settings_and_forgets_the_fit(classifier):
    network = MLP(2, input_shape=2, hidden_sizes=(4,))
    for learner in (classifier, MetaLearner(network, "maml", adapt=["head.*"], freeze=("features.*",), seed=3)):
        copied = clone(learner)
        parameters = copied.get_params()
        assert parameters.keys() == learner.get_params().keys()
        assert {k: v for k, v in parameters.items() if k != "network"} == {
            k: v for k, v in learner.get_params().items() if k != "network"
        }
        with pytest.raises(NotFittedError):
            copied.adapt([[0.0, 1.0]], ["active"])


def test_a_clone_fits_to_the_same_bits(classifier):
    again = clone(classifier).fit(pairs(), num_steps=STEPS)
    assert torch.equal(tree.ravel(again.meta_parameters)[0], tree.ravel(classifier.meta_parameters)[0])


def test_set_params():
    learner = MetaLearner().fit(pairs(), num_steps=1).set_params(likelihood="gaussian", seed=4)
    assert learner.seed == 4 and learner.get_params()["likelihood"] == "gaussian"
    with pytest.raises(NotFittedError, match="has not been fitted"):
        _ = learner.model
    with pytest.raises(ValueError, match="MetaLearner has no parameter sed; there are network, algorithm"):
        learner.set_params(sed=1)
    with pytest.raises(ValueError, match="classes must be 'shared' or 'per_task', but is 'own'"):
        learner.set_params(classes="own")


# Images


@pytest.fixture(scope="module")
def image_folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for split, names in (("train", "abcd"), ("new", "xy"), ("query", [""])):
        for index, name in enumerate(names):
            (root / split / name).mkdir(parents=True, exist_ok=True)
            for number in range(4):
                pixels = (rng.integers(0, 100, (16, 16)) + 40 * index).astype(np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{number}.png")
    return root


def test_a_folder_of_class_folders(image_folder, tmp_path):
    splits = SplitSettings(num_ways=2, num_shots=1, num_query_images=2, channels=1)
    learner = MetaLearner(algorithm="maml").fit(str(image_folder / "train"), splits=splits, num_steps=1)
    assert learner.preprocessing.input_shape == (1, 16, 16)
    assert learner.evaluate(image_folder / "new", num_tasks=2).keys() >= {"accuracy", "ece_pooled"}
    x = np.zeros((4, 1, 16, 16), np.uint8)
    prediction = learner.adapt(x, ["x", "y", "x", "y"]).predict(x)
    assert prediction.classes.tolist() == ["x", "y"]
    learner.save(tmp_path)
    again = MetaLearner.load(tmp_path).adapt(x, ["x", "y", "x", "y"]).predict(x)
    np.testing.assert_array_equal(again.probs, prediction.probs)
    settings = TrainerSettings(num_steps=1, num_validation_tasks=3)
    held_out = MetaLearner(algorithm="maml").fit(image_folder / "train", 0.5, splits=splits, settings=settings)
    assert held_out.training_result.best_step == 1
    with pytest.raises(ValueError, match="a folder of class folders holds classes: use likelihood='categorical'"):
        MetaLearner(likelihood="gaussian").fit(image_folder / "train", num_steps=1)


def test_a_folder_for_a_model_of_tables(classifier, tmp_path):
    with pytest.raises(ValueError, match="is the folder .*, but the model was not trained on images"):
        classifier.evaluate(tmp_path)


# Saved models


@pytest.mark.parametrize("regression", [False, True])
def test_a_saved_model_predicts_the_same(tmp_path, regression, classifier, regressor):
    learner = regressor if regression else classifier
    learner.save(tmp_path)
    (x, y), *_ = pairs(seed=4, regression=regression)
    first, second = (one.adapt(x[:5], y[:5]).predict(x) for one in (learner, MetaLearner.load(tmp_path)))
    np.testing.assert_array_equal(first.samples(), second.samples())
    if not regression:
        assert second.classes.tolist() == ["active", "inactive"]


def test_the_settings_are_there_to_read(tmp_path, classifier):
    classifier.save(tmp_path)
    settings = json.loads((tmp_path / SETTINGS).read_text())
    assert settings["versions"].keys() == {"ibaml", "torch", "numpy", "safetensors"}
    assert len(settings["tensors_sha256"]) == 64
    assert settings["preprocessing"]["class_labels"] == ["active", "inactive"]


@pytest.mark.parametrize("name", [MODEL, SETTINGS])
def test_every_changed_byte_is_noticed(tmp_path, classifier, name):
    classifier.save(tmp_path)
    content = (tmp_path / name).read_bytes()
    for position in {*range(0, len(content), 97), 0, len(content) - 1}:
        changed = bytearray(content)
        changed[position] ^= 1
        (tmp_path / name).write_bytes(changed)
        with pytest.raises(ValueError, match="damaged|truncated|newer|was changed|no saved"):
            read_model(tmp_path)
    (tmp_path / name).write_bytes(content)
    read_model(tmp_path)


def test_incomplete_newer_and_foreign_models(tmp_path, classifier):
    classifier.save(tmp_path)
    tensors, settings = read_model(tmp_path).tensors, read_metadata(tmp_path)
    (tmp_path / SETTINGS).unlink()
    with pytest.raises(FileNotFoundError, match=r"has no model\.json, which belongs to model\.safetensors"):
        MetaLearner.load(tmp_path)
    save_tensors(tmp_path / MODEL, tensors, {**settings, "model_format": 99, "versions": {"ibaml": "9.9"}})
    with pytest.raises(
        ValueError, match=r"has model format 99, but this version .* written by ibaml 9\.9; use that version"
    ):
        MetaLearner.load(tmp_path)


# Bad input: what works and what is refused


def good(n: int = 8) -> tuple[np.ndarray, np.ndarray]:
    x = np.random.default_rng(n).normal(size=(n, 2))
    return x, np.array(["n", "y"])[np.arange(n) % 2]


def read_only(x: np.ndarray) -> np.ndarray:
    x.setflags(write=False)
    return x


X, Y = good()
BAD_INPUT = [
    # what, tasks beside a good one, and the message; None: it works
    ("a task with a single class", (X, ["y"] * 8), None),
    ("duplicate rows", (np.concatenate([X, X]), np.concatenate([Y, Y])), None),
    ("one task on a scale of 1e9", (X * 1e9, Y), None),
    ("a constant feature in one task", (X * [1, 0], Y), None),
    ("not contiguous", (np.asfortranarray(X)[::-1], Y[::-1]), None),
    ("read-only", (read_only(X.copy()), Y), None),
    ("lists", (X.tolist(), Y.tolist()), None),
    ("float16", (X.astype(np.float16), Y), None),
    ("integers", ((10 * X).astype(int), Y), None),
    ("booleans", (X > 0.3, Y), None),
    ("mixed dtypes in a DataFrame", (pd.DataFrame({"0": X[:, 0], "1": X[:, 1] > 0}), Y), None),
    ("tensors", (torch.tensor(X), Y), None),
    ("NaN", (X * np.nan, Y), "X of task '1' has 16 missing (NaN) or infinite values"),
    ("infinity", (X + [np.inf, 0], Y), "X of task '1' has 8 missing (NaN) or infinite values"),
    ("another number of features", (X[:, :1], Y), "task '1' has inputs of shape (1,), task '0' of (2,)"),
    ("a vector", (X[:, 0], Y), "X of task '1' has shape (8,), but expected [num_examples, num_features]"),
    ("text", (X.astype(str), Y), "X of task '1' has dtype"),
    ("no examples", (X[:0], Y[:0]), "task '1' has no examples"),
    ("one example", (X[:1], Y[:1]), "task '1' has 1 examples; a split needs at least 1 for the support and 1 for the"),
    ("only copies of one row", (X[[0] * 8], ["y"] * 8), "task '1' has 8 examples, 7 of them copies of others"),
    ("fewer labels than rows", (X, Y[:3]), "task '1' has 8 examples in X, but 3 targets in y"),
    ("missing labels", (X, [None, *Y[1:]]), "y of task '1' has 1 missing labels"),
    ("labels of another type", (X, [0, 1] * 4), "task '1' has labels of dtype int64, task '0' of <U1"),
    ("labels in a column", (X, Y[:, None]), "y of task '1' has shape (8, 1), but expected one class label per example"),
]


@pytest.mark.parametrize(("task", "message"), [case[1:] for case in BAD_INPUT], ids=[case[0] for case in BAD_INPUT])
def test_bad_input_to_fit(task, message):
    learner = MetaLearner()
    tasks = [(pd.DataFrame(X, columns=["0", "1"]) if isinstance(task[0], pd.DataFrame) else good(9)[0][:8], Y), task]
    if message is None:
        learner.fit(tasks, num_steps=1)
        assert np.isfinite(learner.adapt(X[:4], Y[:4]).predict(X).probs).all()
    else:
        with pytest.raises((ValueError, TypeError), match=re.escape(message)):
            learner.fit(tasks, num_steps=1)


@pytest.mark.parametrize(
    ("tasks", "likelihood", "message"),
    [
        ([(X * 0, Y)], "categorical", "every feature is constant over all training tasks: there is nothing to predict"),
        ([(X, ["y"] * 8)], "categorical", "all training tasks have the single class 'y'"),
        ([(X, X[:, 0])], "categorical", "labels that are no whole numbers, such as"),
        ([(X, Y)], "gaussian", "y of task '0' has dtype <U1, but expected real numbers"),
        ([(X, X[:, 0]), (X, X)], "gaussian", "task '1' has 2 targets, task '0' has 1"),
    ],
)
def test_tasks_that_cannot_be_learned_from(tasks, likelihood, message):
    with pytest.raises((ValueError, TypeError), match=re.escape(message)):
        MetaLearner(likelihood=likelihood).fit(tasks, num_steps=1)


def test_columns_belong_to_tables():
    tasks = SinusoidTasks(num_shots=4, num_queries=5)
    learner = MetaLearner(MLP(1, input_shape=1), likelihood="gaussian")
    with pytest.raises(TypeError, match="task, target and features name columns of a pandas DataFrame: leave them out"):
        learner.fit(tasks, task="school", num_steps=1)
    with pytest.raises(ValueError, match="a share of validation tasks needs data"):
        learner.fit(tasks, 0.2, num_steps=1)


ADAPT = [
    ("labels without inputs", X[:0], ["active"] * 8, "the task's support has 0 inputs and 8 targets"),
    ("NaN", X * np.nan, Y, "x_support has 16 missing (NaN) or infinite values"),
    ("another number of features", X[:, :1], Y, "x_support has shape (8, 1), but the model was trained on inputs of"),
    ("an unknown label", X, ["z"] * 8, "y_support has the label 'z' (row 0), but the classes are 'active', 'inactive'"),
    ("numbers for strings", X, [0, 1] * 4, "y_support has labels of dtype int64, but the model's classes are 'active'"),
    ("far beyond float32", X * 1e200, ["active"] * 8, "x_support has values beyond the range of float32 after scaling"),
    ("fewer labels", X, ["active"], "the task's support has 8 inputs and 1 targets"),
]


@pytest.mark.parametrize(("x", "y", "message"), [case[1:] for case in ADAPT], ids=[case[0] for case in ADAPT])
def test_bad_input_to_adapt(classifier, x, y, message):
    with pytest.raises((ValueError, TypeError), match=re.escape(message)):
        classifier.adapt(x, y)


def test_adaptation_to_one_class_and_to_constant_inputs_works(classifier):
    prediction = classifier.adapt(X[:3], ["active"] * 3).predict(X)
    assert (prediction.labels == "active").mean() > 0.5
    assert np.isfinite(classifier.adapt(np.ones((3, 2)), ["active"] * 3).predict(X).probs).all()


def test_a_large_support_works_and_one_beyond_memory_says_so(classifier, monkeypatch):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(50_000, 2))
    labels = np.array(["active", "inactive"])[(x[:, 0] > 0).astype(int)]
    assert classifier.adapt(x, labels).num_support == 50_000

    def adapt(*arguments: object, **settings: object) -> None:
        raise RuntimeError(
            "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 8e12 bytes."
        )

    monkeypatch.setattr(type(classifier.algorithm), "adapt", adapt)
    with pytest.raises(MemoryError, match=r"adapting to 3 support .* fit into memory: pass a random .* \(\[enforce"):
        classifier.adapt(X[:3], ["active"] * 3)


def test_numpy_for_a_learner_of_tensors():
    tasks = SinusoidTasks(num_shots=4, num_queries=5)
    learner = MetaLearner(MLP(1, input_shape=1, hidden_sizes=(5,)), likelihood="gaussian").fit(tasks, num_steps=1)
    x = np.linspace(-1, 1, 6, dtype=np.float32)[:, None]
    arrays = learner.adapt(x, x).predict(read_only(x[::-1]))
    assert isinstance(arrays.mean, np.ndarray) and arrays.mean.shape == (6, 1)
    tensors = learner.adapt(torch.tensor(x), torch.tensor(x)).predict(torch.tensor(x[::-1].copy()))
    np.testing.assert_array_equal(arrays.mean, tensors.mean.numpy())


def test_small_validation_tasks_are_left_out_of_the_score():
    rng = np.random.default_rng(0)
    tasks = [(rng.normal(size=(n, 2)), np.arange(n) % 2) for n in (3, 12, 12, 12, 13, 40)]
    source = prepare(
        tasks,
        tasks,
        target_kind="classes",
        classes="shared",
        splits=SplitSettings(),
        seed=0,
        dtype=torch.float32,
        columns={},
    )
    assert source.validation.names == ("1", "2", "3", "4", "5")
    for seed in range(5):
        episode = source.validation.sample(2, generator=torch.Generator().manual_seed(seed))
        assert episode.support.x.shape == (2, 6, 2) and episode.query.x.shape == (2, 6, 2)


def test_saving_over_a_model_that_ends_between_its_files(tmp_path, monkeypatch):
    """The new tensors hold all that is needed; the text beside them is mended by the next save."""
    learner = MetaLearner().fit([(X, Y), (X + 1, Y)], num_steps=1)
    learner.save(tmp_path)
    real = os.replace

    def replace(old, new):
        real(old, new)
        raise InterruptedError

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", replace)
        with pytest.raises(InterruptedError):
            MetaLearner(seed=3).fit([(X, Y), (X + 1, Y)], num_steps=1).save(tmp_path)
    with pytest.warns(RuntimeWarning, match="model.json was saved with another model than model.safetensors, as when"):
        loaded = MetaLearner.load(tmp_path)
    assert loaded.seed == 3
    loaded.save(tmp_path)
    assert MetaLearner.load(tmp_path).seed == 3
