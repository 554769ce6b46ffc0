"""A fitted learner that goes on learning its prior from single tasks."""

import dataclasses
import json
import re

import numpy as np
import pytest
import torch

from ibaml import MetaLearner, make_algorithm, tree
from ibaml.algorithms.heads.empirical_bayes import Experience
from ibaml.data.sources import RandomSlopes
from ibaml.learner.folder import read_model
from ibaml.learner.online import experience_of
from ibaml.networks import MLP
from ibaml.priors import FullColumnPrior
from ibaml.train import TrainerSettings
from ibaml.types import Batch, Episode

LINE = make_algorithm("linear_gaussian", prior=FullColumnPrior(), outer="marginal")
SHORT = TrainerSettings(num_steps=40, tasks_per_step=8, learning_rate=3e-2, log_var_learning_rate=0.1)


def pairs(num_tasks: int, *, slope: float = 1.0, seed: int = 0) -> list[tuple[np.ndarray, np.ndarray]]:
    rng = np.random.default_rng(seed)
    tasks = []
    for _ in range(num_tasks):
        x = rng.normal(size=(int(rng.integers(6, 12)), 1))
        tasks.append((x, 10 + 3 * (rng.normal(slope, 0.3) * x[:, 0] + rng.normal() + 0.3 * rng.normal(size=len(x)))))
    return tasks


def fitted(tasks: list[tuple[np.ndarray, np.ndarray]] | None = None) -> MetaLearner:
    network = MLP(1, input_shape=1, hidden_sizes=())
    return MetaLearner(network, LINE, "gaussian").fit(pairs(20) if tasks is None else tasks, settings=SHORT)


def mean_nll(learner: MetaLearner, tasks: list[tuple[np.ndarray, np.ndarray]]) -> float:
    return float(np.mean([learner.adapt(x[:2], y[:2]).predict(x[2:]).nll(y[2:]).mean() for x, y in tasks]))


def test_a_stream_of_another_kind_is_learned_without_keeping_it(tmp_path) -> None:
    """Slopes of -1 where training had 1; features and scales stay, and learning goes on after loading."""
    learner = fitted()
    before = learner.fitted_model
    known = before.experience
    assert known == Experience(20, sum(len(y) for _, y in pairs(20)))
    stream, later = pairs(60, slope=-1.0, seed=1), pairs(40, slope=-1.0, seed=2)
    first = mean_nll(learner, later)
    posterior = learner.adapt(*later[0])
    kept = posterior.predict(later[0][0]).mean
    for x, y in stream[:30]:
        assert learner.observe(x, y) is learner
    learner = MetaLearner.load(learner.save(tmp_path))
    for x, y in stream[30:]:
        learner.observe(x, y)
    total = sum(len(y) for _, y in stream)
    assert learner.fitted_model.experience == Experience(80, known.num_rows + total)
    assert mean_nll(learner, later) < first - 0.5
    assert learner.preprocessing.tensors()["targets/mean"].equal(before.preprocessing.tensors()["targets/mean"])
    np.testing.assert_array_equal(posterior.predict(later[0][0]).mean, kept)
    assert [leaf.dtype for leaf in tree.leaves(learner.meta_parameters)] == [
        leaf.dtype for leaf in tree.leaves(before.meta)
    ]
    # Who forgets is there sooner.
    quick = fitted()
    for x, y in stream[:10]:
        quick.observe(x, y, most_tasks=5)
    assert quick.fitted_model.experience.num_tasks == 6
    assert mean_nll(quick, later) < first - 0.5


def test_nothing_observed_changes_nothing() -> None:
    learner = fitted()
    before = learner.fitted_model
    assert learner.observe(np.zeros((0, 1)), np.zeros(0)).fitted_model is before


def test_a_body_of_learned_features_stays() -> None:
    network = MLP(1, input_shape=1, hidden_sizes=(6,), generator=torch.Generator().manual_seed(0))
    learner = MetaLearner(network, LINE, "gaussian").fit(pairs(8), settings=dataclasses.replace(SHORT, num_steps=2))
    before = learner.meta_parameters
    learner.observe(*pairs(1, seed=4)[0])
    after = learner.meta_parameters
    assert after.shared.keys() == before.shared.keys()
    changed = {name for name in after.shared if not after.shared[name].equal(before.shared[name])}
    assert changed == {"likelihood.log_noise_variance"}
    assert not after.prior.mean.equal(before.prior.mean) and not after.prior.lower.equal(before.prior.lower)


def test_experience_counts_tasks_and_their_rows() -> None:
    batch = Batch(torch.zeros(3, 2), torch.zeros(3, 1))
    of_episodes = MetaLearner(MLP(1, input_shape=2, hidden_sizes=()), LINE, "gaussian").fit(
        [Episode(batch, batch), Episode(batch, batch)], settings=TrainerSettings(num_steps=1, tasks_per_step=3)
    )
    assert of_episodes.fitted_model.experience == Experience(2, 12)
    endless = RandomSlopes(num_shots=4, num_queries=6).sampler("train")
    assert experience_of(endless, 50) == Experience(50, 500)
    assert MetaLearner(algorithm="gp", likelihood="gaussian").fit(pairs(4), num_steps=1).fitted_model.experience is None


def test_models_that_do_not_say_how_much_they_know(tmp_path) -> None:
    """As those of earlier versions; also that the number is stored as it was."""
    learner = fitted()
    folder = learner.save(tmp_path)
    assert read_model(folder).experience == learner.fitted_model.experience
    unknown = learner.with_fitted(dataclasses.replace(learner.fitted_model, experience=None))
    assert MetaLearner.load(unknown.save(tmp_path / "older")).fitted_model.experience is None
    assert json.loads((tmp_path / "older" / "model.json").read_text())["experience"] is None
    x, y = pairs(1)[0]
    with pytest.raises(ValueError, match="the model does not say from how many tasks it was learned"):
        unknown.observe(x, y)
    unknown.observe(x, y, most_tasks=9)
    assert unknown.fitted_model.experience == Experience(10, 10 * len(y))


def test_what_cannot_be_observed_is_refused() -> None:
    x, y = pairs(1)[0]
    learner = fitted()
    for most_tasks in (0, -1.0, float("nan")):
        with pytest.raises(ValueError, match=re.escape(f"most_tasks is {most_tasks}; expected a positive number")):
            learner.observe(x, y, most_tasks=most_tasks)
    process = MetaLearner(algorithm="gp", likelihood="gaussian").fit(pairs(4), num_steps=1)
    with pytest.raises(ValueError, match="algorithm 'gp' has no closed form by which a single task moves its prior"):
        process.observe(x, y)
    classes = MetaLearner(algorithm="softmax").fit([(x, np.arange(len(x)) % 2) for x, _ in pairs(4)], num_steps=1)
    with pytest.raises(ValueError, match="algorithm 'softmax' has no closed form .* for counts and outliers 'general"):
        classes.observe(x, np.arange(len(x)) % 2)


def test_a_model_of_counts_learns_on(tmp_path) -> None:
    counts = [(x, np.random.default_rng(0).poisson(3, len(x))) for x, _ in pairs(6)]
    learner = MetaLearner(algorithm="generalized_linear", likelihood="poisson").fit(counts[:5], num_steps=1)
    before = learner.fitted_model
    assert before.experience.num_tasks == 5
    learner.observe(*counts[5])
    assert learner.fitted_model.experience.num_tasks == 6
    assert not learner.meta_parameters.prior.mean.equal(before.meta.prior.mean)
    assert MetaLearner.load(learner.save(tmp_path)).fitted_model.experience == learner.fitted_model.experience
