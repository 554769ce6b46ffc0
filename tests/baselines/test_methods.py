"""The methods against scikit-learn, and how confidence and time are found."""

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torch

from ibaml.baselines import BASELINES, Problem, pose
from ibaml.baselines.choosing import (
    Rows,
    residual_variance,
    tempered,
    training_rows,
    with_confidence,
    with_noise,
    with_penalty,
)
from ibaml.baselines.logistic_regression import LOGISTIC
from ibaml.baselines.neighbours import nearest_neighbours
from ibaml.baselines.pooled import _fixed, pooled_logistic, pooled_ridge
from ibaml.baselines.ridge import RIDGE
from ibaml.baselines.training import Setting, train
from ibaml.data import Augmentation, ClassImages, EpisodeSampler
from ibaml.data.sources import Sinusoid
from ibaml.learner import MetaLearner
from ibaml.likelihoods import Gaussian
from ibaml.networks import MLP
from ibaml.train import TrainerSettings, TrainingDivergedError
from ibaml.types import Batch, Episode, Tensor

SETTINGS = TrainerSettings(tasks_per_step=2, num_validation_tasks=6, fast=False)


def episodes(*, classes: bool, num_tasks: int = 12) -> list[Episode]:
    generator = torch.Generator().manual_seed(0)

    def batch(size: int, weights: Tensor) -> Batch:
        x = torch.randn(size, 4, generator=generator, dtype=torch.float64)
        outputs = x @ weights + torch.randn(size, 3, generator=generator, dtype=torch.float64)
        return Batch(x, outputs.argmax(-1) if classes else outputs[:, :2])

    found: list[Episode] = []
    for _ in range(num_tasks):
        weights = torch.randn(4, 3, generator=generator, dtype=torch.float64) + 1
        found.append(Episode(batch(15, weights), batch(20, weights)))
    return found


def problem(*, classes: bool) -> Problem:
    tasks = episodes(classes=classes)
    network = MLP(3 if classes else 2, input_shape=4, hidden_sizes=(3,)).double()
    learner = MetaLearner(network, "maml", "categorical" if classes else "gaussian")
    learner.fit(tasks[:6], settings=SETTINGS, num_steps=1)
    return pose(learner, tasks[:6], tasks[6:], settings=SETTINGS)


def predicted(learner: MetaLearner, task: Episode) -> Any:
    return learner.adapt(*task.support).predict(task.query.x)


def test_logistic_regression_is_that_of_scikit_learn() -> None:
    linear_model = pytest.importorskip("sklearn.linear_model")
    posed = problem(classes=True)
    learner = with_penalty(posed, LOGISTIC, 0.7, 1e6)
    for task in episodes(classes=True)[:3]:
        x, y = (part.numpy() for part in task.support)
        expected = linear_model.LogisticRegression(C=0.7, tol=1e-9, max_iter=5000).fit(x, y)
        assert len(expected.classes_) == 3
        probs = predicted(learner, task).probs
        np.testing.assert_allclose(probs, expected.predict_proba(task.query.x.numpy()), atol=2e-5)


def test_ridge_is_that_of_scikit_learn() -> None:
    linear_model = pytest.importorskip("sklearn.linear_model")
    learner = with_penalty(problem(classes=False), RIDGE, 1 / 2.5, 1e8)
    task = episodes(classes=False)[0]
    expected = linear_model.Ridge(alpha=2.5).fit(*(part.numpy() for part in task.support))
    mean = predicted(learner, task).mean
    np.testing.assert_allclose(mean, expected.predict(task.query.x.numpy()), atol=1e-6)


def test_pooled_models_are_those_of_scikit_learn() -> None:
    linear_model = pytest.importorskip("sklearn.linear_model")
    for classes in (True, False):
        posed = problem(classes=classes)
        rows = training_rows(posed)
        assert len(rows.y) == 6 * 35
        if classes:
            model = linear_model.LogisticRegression(C=0.2, tol=1e-10, max_iter=5000)
            weights = pooled_logistic(posed, rows, 0.2)
        else:
            model = linear_model.Ridge(alpha=5.0)
            weights = pooled_ridge(posed, rows, 0.2)
        expected = model.fit(rows.x.numpy(), rows.y.numpy())
        np.testing.assert_allclose(weights[:, :-1], expected.coef_, atol=1e-5)
        task = episodes(classes=classes)[7]
        prediction = predicted(_fixed(posed, weights), task)
        wanted = expected.predict_proba if classes else expected.predict
        np.testing.assert_allclose(
            prediction.probs if classes else prediction.mean, wanted(task.query.x.numpy()), atol=1e-5
        )


def test_neighbours_are_those_of_scikit_learn() -> None:
    neighbors = pytest.importorskip("sklearn.neighbors")
    learner = nearest_neighbours(problem(classes=True), 3, math.inf)
    task = episodes(classes=True)[0]
    expected = neighbors.KNeighborsClassifier(3).fit(*(part.numpy() for part in task.support))
    probs = expected.predict_proba(task.query.x.numpy()) + 0.1
    np.testing.assert_allclose(predicted(learner, task).probs, probs / probs.sum(1, keepdims=True), atol=1e-6)


def test_rows_are_those_of_the_training_tasks_each_once() -> None:
    rng = np.random.default_rng(0)
    tasks = [(rng.normal(size=(n, 2)), rng.normal(size=n)) for n in (6, 9, 7, 8)]
    learner = MetaLearner(MLP(1, input_shape=2, hidden_sizes=()), "maml", "gaussian").fit(tasks, num_steps=1)
    rows = training_rows(pose(learner, tasks, tasks))
    x = learner.fitted_model.encode("x", np.concatenate([task[0] for task in tasks]))
    torch.testing.assert_close(rows.x, x)
    assert rows.spread == pytest.approx(2, rel=1e-4)


def test_the_noise_is_the_likeliest() -> None:
    posed = problem(classes=False)
    learner = with_penalty(posed, RIDGE, 0.5, 100.0)
    variance = residual_variance(posed.validate(learner))
    means = [posed.validate(one).mean for one in (learner, with_noise(learner, variance))]
    # The strength of the penalty is in units of the noise: predictions stay.
    torch.testing.assert_close(*means, rtol=1e-8, atol=1e-8)

    def nll(factor: Tensor) -> float:
        return posed.validate(with_noise(learner, variance * factor)).report["nll"].mean

    best = nll(torch.ones(2))
    for change in (0.9, 1.1):
        assert all(nll(torch.tensor(factor)) > best for factor in ([change, 1.0], [1.0, change]))
    assert with_confidence(posed, learner)[1] == pytest.approx(best, rel=1e-9)
    chosen = BASELINES["ridge"].fit(posed, seconds=1.0).learner
    assert Gaussian.parameter_name in chosen.meta_parameters.shared
    assert posed.validate(chosen).report["nll"].mean <= best


def test_the_choice_has_the_least_validation_nll() -> None:
    posed = problem(classes=True)
    found = BASELINES["logistic_regression"].fit(posed, seconds=1.0)
    spread = training_rows(posed).spread
    nlls = {}
    for strength in (0.01, 0.1, 1.0, 10.0, 100.0, 1000.0):
        for bias in (1.0, 100.0):
            learner = with_penalty(posed, LOGISTIC, strength / spread, bias)
            _, nll = tempered(learner, posed.validate(learner))
            nlls[f"C = {strength / spread:.2g}, of the constant {bias:g}"] = nll
    assert found.chosen == min(nlls, key=lambda key: nlls[key])
    # Its temperature is part of it.
    assert posed.validate(found.learner).report["nll"].mean == pytest.approx(min(nlls.values()), abs=1e-9)


def test_training_takes_the_time_that_it_has() -> None:
    source = Sinusoid(num_shots=5, num_queries=5)
    tasks = source.sampler("train")
    learner = MetaLearner(MLP(1, input_shape=1, hidden_sizes=(8,)), "maml", "gaussian").fit(tasks, num_steps=1)
    settings = dataclasses.replace(SETTINGS, schedule="cosine")
    posed = pose(learner, tasks, source.sampler("validation"), settings=settings)
    found = BASELINES["gp"].fit(posed, seconds=1.5)
    # A machine with other work on it is slower at times, but there is a limit.
    assert 0.3 < found.seconds < 1.2 * 1.5 + 0.5
    assert found.learner.training_result.stop_reason in ("completed", "time limit")
    assert "steps" in found.chosen


def test_settings_that_diverge_are_left_out() -> None:
    posed = problem(classes=False)
    good = Setting("good", posed.same_network(posed.learner.algorithm), SETTINGS)
    algorithm = dataclasses.replace(
        posed.learner.algorithm, inner=dataclasses.replace(posed.learner.algorithm.inner, learning_rate=1e60)
    )
    bad = Setting("bad", posed.same_network(algorithm), SETTINGS)
    assert train(posed, [bad, good], seconds=0.1, folder=None).chosen.startswith("good")
    with pytest.raises(TrainingDivergedError, match="bad: step 1: the hypergradient is not finite"):
        train(posed, [bad], seconds=0.1, folder=None)


def test_the_network_is_the_learners_with_initial_weights() -> None:
    posed = problem(classes=True)
    learner = posed.same_network(posed.learner.algorithm)
    assert learner.network is not posed.learner.network
    assert learner.settings.network == posed.learner.settings.network
    again = posed.same_network(posed.learner.algorithm)
    assert all(map(torch.equal, learner.model.adapted.values(), again.model.adapted.values()))


def test_tasks_of_other_ways_change_images_as_before() -> None:
    pixels = torch.zeros(12, 1, 8, 8, dtype=torch.uint8)
    images = ClassImages(images=pixels, class_start=torch.tensor([0, 4, 8, 12]), class_names=("a", "b", "c"))
    tasks = EpisodeSampler(images, num_ways=3, num_shots=1, num_queries=2, augmentation=Augmentation(crop=0.5))
    posed = dataclasses.replace(problem(classes=True), train=tasks)
    fewer = posed.with_ways(2).train
    assert isinstance(fewer, EpisodeSampler) and fewer.num_ways == 2 and fewer.augmentation == tasks.augmentation
    assert posed.with_ways(3) is posed


def test_pooled_rows_of_each_target_are_those_where_it_was_measured():
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(9, size, generator=generator, dtype=torch.float64) for size in (3, 2))
    y[:4, 1] = math.nan
    found = pooled_ridge(problem(classes=False), Rows(x, y), 0.5)
    for target, rows in enumerate((Rows(x, y[:, :1]), Rows(x[4:], y[4:, 1:]))):
        expected = pooled_ridge(problem(classes=False), rows, 0.5)
        torch.testing.assert_close(found[target], expected[0], rtol=1e-12, atol=0)


def test_baselines_of_tasks_with_gaps():
    """Noise is of what was measured, and what needs all targets is left out."""
    rng = np.random.default_rng(0)
    tasks = [(x, np.where(rng.random((8, 2)) < 0.2, np.nan, x @ [[1, 2], [3, 4]])) for x in rng.normal(size=(12, 8, 2))]
    tasks = [(x[kept], y[kept]) for x, y in tasks for kept in [~np.isnan(y).all(1)]]
    learner = MetaLearner(likelihood="gaussian").fit(tasks[:6], num_steps=2)
    posed = pose(learner, tasks[:6], tasks[6:], settings=SETTINGS)
    assert {name for name, baseline in BASELINES.items() if baseline.suits(posed)} == {"gp", "pooled", "ridge"}
    fitted = BASELINES["ridge"].fit(posed, seconds=0)
    evaluation = posed.validate(fitted.learner)
    assert any(bool(targets.isnan().any()) for targets in evaluation.query_targets)
    torch.testing.assert_close(residual_variance(evaluation), torch.ones(2).double(), rtol=1e-3, atol=0)
