import dataclasses
import io
import json
import re

import numpy as np
import pytest
import torch
from rich.console import Console

from ibaml import MetaLearner
from ibaml.algorithms import make_algorithm
from ibaml.data.ragged import TaskSplits
from ibaml.learner import choice, defaults
from ibaml.learner.choice import Choice, simplest_good
from ibaml.learner.folder import SETTINGS
from ibaml.priors import DiagonalColumnPrior
from ibaml.train import Trainer
from ibaml.types import Batch, Episode


@pytest.fixture(autouse=True)
def short(monkeypatch):
    for name in ("SHORT_TRAINER", "TABLE_TRAINER"):
        few = dataclasses.replace(getattr(defaults, name), num_steps=40, learning_rate=0.05, log_var_learning_rate=0.1)
        monkeypatch.setattr(defaults, name, few)


def tasks(curve, num_tasks=24):
    rng = np.random.default_rng(0)
    found = []
    for _ in range(num_tasks):
        x, level, scale = rng.uniform(-3, 3, (12, 1)), rng.normal(), rng.normal()
        found.append((x, level + scale * curve(x[:, 0]) + 0.05 * rng.normal(size=12)))
    return found


def test_held_out_tasks_choose_a_bend_and_the_scores_are_kept(tmp_path):
    learner = MetaLearner(likelihood="gaussian").fit(tasks(lambda x: np.sin(2 * x)))
    found = learner.choice
    assert found.name == defaults.CURVES
    assert list(found.nll) == [defaults.CORRELATED, defaults.CURVES]
    assert found.num_tasks == 24 and found.nll[found.name] < found.nll[defaults.CORRELATED] - 0.5
    assert str(found).startswith(f"{found.name}, by the nll of 24 held-out tasks")
    learner.save(tmp_path)
    assert json.loads((tmp_path / SETTINGS).read_text())["choice"]["nll"] == found.nll
    loaded = MetaLearner.load(tmp_path)
    assert loaded.choice == found
    (x, y), *_ = tasks(np.sin)
    first, second = (one.adapt(x[:5], y[:5]).predict(x) for one in (learner, loaded))
    np.testing.assert_array_equal(first.mean, second.mean)


def test_with_few_tasks_nothing_is_held_out_and_the_simplest_is_taken():
    learner = MetaLearner(likelihood="gaussian").fit(tasks(np.sin, 4), num_steps=1)
    assert learner.choice is None and learner.network.constructor_arguments["hidden_sizes"] == ()


def test_a_network_of_ones_own_or_an_algorithm_by_name_leaves_nothing_to_choose():
    assert (
        MetaLearner(algorithm="linear_gaussian", likelihood="gaussian").fit(tasks(np.sin), num_steps=1).choice is None
    )


def of_counts(num_tasks=24, num_rows=20):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(num_tasks, num_rows, 2))
    log_rate = x @ np.array([0.5, -0.3]) + 0.2 * rng.normal(size=(num_tasks, 2, 1)).sum(1) + 1
    return list(zip(x, rng.poisson(np.exp(log_rate)), strict=True))


@pytest.mark.parametrize("likelihood", ["poisson", "negative_binomial", "student_t"])
def test_lines_are_candidates_for_counts_and_outliers(likelihood, tmp_path):
    learner = MetaLearner(likelihood=likelihood).fit(of_counts(), num_steps=10)
    assert learner.algorithm.name == "generalized_linear"
    assert list(learner.choice.nll) == [defaults.LINE, defaults.CORRELATED, defaults.BOTH]
    (x, y), *_ = of_counts()
    loaded = MetaLearner.load(learner.save(tmp_path))
    assert loaded.algorithm == learner.algorithm
    first, second = (one.adapt(x[:5], y[:5]).predict(x) for one in (learner, loaded))
    for probability in (0.1, 0.9):
        np.testing.assert_array_equal(first.quantile(probability), second.quantile(probability))
    # Rates that are drawn are those of whole functions, and positive.
    drawn = first.samples()
    assert drawn.shape == (64, len(x)) and (likelihood == "student_t" or (drawn > 0).all())
    nothing = learner.adapt(x[:0], y[:0]).predict(x)
    assert (nothing.epistemic > first.epistemic).all()


def test_groups_of_counts_are_predicted_in_one_call():
    pandas = pytest.importorskip("pandas")
    parts = [pandas.DataFrame({"group": i, "a": x[:, 0], "y": y}) for i, (x, y) in enumerate(of_counts())]
    table = pandas.concat(parts)
    learner = MetaLearner(likelihood="poisson").fit(table, task="group", target="y", num_steps=5)
    known, asked = (pandas.concat([part[rows] for part in parts[:4]]) for rows in (slice(0, 6), slice(6, None)))
    found = learner.predict_new(known[known.group != 3], asked)
    for group, part in enumerate(parts[:4]):
        rows = (asked.group == group).to_numpy()
        support = part[: 6 if group != 3 else 0]
        alone = learner.adapt(support[["a"]], support["y"]).predict(asked[rows][["a"]])
        np.testing.assert_allclose(found.mean[rows], alone.mean, rtol=1e-5)
        np.testing.assert_allclose(found.quantile(0.9)[rows], alone.quantile(0.9))


def test_wide_inputs_have_independent_weights():
    rng = np.random.default_rng(0)
    wide = [(rng.normal(size=(6, 30)), rng.normal(size=6)) for _ in range(12)]
    learner = MetaLearner(likelihood="gaussian").fit(wide, num_steps=1)
    assert list(learner.choice.nll) == [defaults.LINE, defaults.BOTH]


def test_a_difference_within_its_error_does_not_count():
    simple = torch.tensor([1.0, 2.0, 3.0, 4.0])
    noisy = simple - torch.tensor([0.5, -0.5, 0.6, -0.5])
    clear = simple - torch.tensor([0.5, 0.4, 0.6, 0.5])
    assert simplest_good({"simple": simple, "noisy": noisy}) == "simple"
    assert simplest_good({"simple": simple, "noisy": noisy, "clear": clear}) == "clear"
    assert simplest_good({"simple": simple}) == "simple"
    assert "simple 1.000" in str(Choice("simple", {"simple": 1.0}, 4))


def of_classes(num_tasks=24, num_rows=40, log_odds=-2.0):
    rng = np.random.default_rng(0)
    found = []
    for _ in range(num_tasks):
        x = rng.normal(size=(num_rows, 2))
        logits = log_odds + 0.5 * rng.normal() + x @ (np.array([1.0, -1.0]) + 0.3 * rng.normal(size=2))
        found.append((x, np.where(rng.random(num_rows) < 1 / (1 + np.exp(-logits)), "yes", "no")))
    return found


def test_lines_are_candidates_for_classes_that_all_tasks_share():
    train = of_classes()
    learner = MetaLearner().fit(train)
    assert list(learner.choice.nll) == [defaults.LINE, defaults.CORRELATED, defaults.CLUSTERS, defaults.BOTH]
    assert learner.choice.name in (defaults.LINE, defaults.CORRELATED)
    own = MetaLearner(classes="per_task").fit(train, num_steps=1)
    assert list(own.choice.nll) == [defaults.CLUSTERS, defaults.BOTH]


def test_where_clusters_are_best_they_are_what_is_trained(monkeypatch):
    monkeypatch.setattr(choice, "simplest_good", lambda losses: defaults.CLUSTERS)
    rng = np.random.default_rng(0)
    train = []
    for _ in range(40):
        means, labels = 3 * rng.normal(size=(3, 2)), np.arange(30) % 3
        train.append((means[labels] + 0.5 * rng.normal(size=(30, 2)), labels))
    learner = MetaLearner(classes="per_task").fit(train)
    assert learner.choice.name == defaults.CLUSTERS and learner.algorithm.name == "gaussian_classes"
    right = [learner.adapt(x[:6], y[:6]).predict(x[6:]).probs.argmax(1) == y[6:] for x, y in train]
    assert np.mean(right) > 0.8


def test_a_rare_class_is_predicted_as_often_as_it_comes_and_evaluation_says_so():
    """Even from no row, and from two, which hardly ever show it."""
    learner = MetaLearner().fit(of_classes(60), num_steps=20)
    test = of_classes(180)[60:]
    share = np.mean([np.mean(y[32:] == "yes") for _, y in test])
    nll = []
    for num_support in (0, 2, 8, 32):
        found = [learner.adapt(x[:num_support], y[:num_support]).predict(x[32:]) for x, y in test]
        assert abs(np.mean([one.probs[:, 1] for one in found]) / share - 1) < 0.15, num_support
        nll.append(np.mean([one.nll(y[32:]) for one, (_, y) in zip(found, test, strict=True)]))
    curve = learner.learning_curve(test, num_support=[0, 2, 8, 32]).to_frame()
    np.testing.assert_allclose(curve["nll"], nll, atol=0.03)


def test_training_starts_from_how_frequent_classes_are():
    train = of_classes()
    algorithm = make_algorithm("softmax", prior=DiagonalColumnPrior(tied=False, learn_mean=True))
    learner = MetaLearner(algorithm=algorithm).fit(train, num_steps=1)
    share = np.mean(np.concatenate([y for _, y in train]) == "yes")
    mean = learner.meta_parameters.prior.mean[:, -1]
    assert float(mean[1] - mean[0]) == pytest.approx(np.log(share / (1 - share)), abs=0.3)


def test_the_choice_is_told_with_the_progress():
    console = Console(file=io.StringIO(), width=300)
    learner = MetaLearner().fit(of_classes(), num_steps=1, progress=console)
    told = console.file.getvalue()
    assert "Comparing 4 models on 6 of the tasks: a line in the inputs, " in told
    assert f"Chosen: {learner.choice}." in told
    learner = MetaLearner(likelihood="gaussian").fit(tasks(np.sin), progress=console)
    assert f"Chosen: {learner.choice}." in console.file.getvalue()


def test_an_interruption_ends_the_comparison(monkeypatch):
    def interrupted(trainer, source, **options):
        return original(trainer, source, **options)._replace(stop_reason="interrupted")

    original = Trainer.fit
    monkeypatch.setattr(Trainer, "fit", interrupted)
    with pytest.raises(KeyboardInterrupt):
        MetaLearner().fit(of_classes(), num_steps=1)


def test_few_tasks_of_classes_get_learned_features():
    learner = MetaLearner().fit(of_classes(9), num_steps=1)
    assert learner.choice is None and learner.network.constructor_arguments["hidden_sizes"] != ()


def test_layers_that_are_named_are_those_of_learned_features():
    learner = MetaLearner(freeze="features.0.weight").fit(of_classes(12), num_steps=1)
    assert learner.choice is None and list(learner.model.frozen) == ["features.0.weight"]


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (torch.tensor([0.0, 1.0, 0.0, 1.0]), "for real targets use likelihood='gaussian'"),
        (torch.tensor([0, 1, 0, -1]), "labels from -1 to 1"),
    ],
)
def test_targets_that_are_no_classes_are_named(targets, message):
    batch = Batch(torch.randn(4, 2), targets)
    with pytest.raises(ValueError, match=re.escape(message)):
        MetaLearner().fit([Episode(batch, batch)] * 3)


def test_a_head_of_classes_refuses_numbers():
    with pytest.raises(
        ValueError, match="algorithm 'softmax' tells classes apart, but the likelihood 'gaussian' is of"
    ):
        MetaLearner(likelihood="gaussian", algorithm="softmax").fit(tasks(np.sin), num_steps=1)


def test_the_time_limit_holds_for_estimates_in_closed_form():
    learner = MetaLearner(likelihood="gaussian").fit(tasks(np.sin), max_minutes=1e-9)
    assert learner.training_result.stop_reason == "time limit" and learner.training_result.num_steps == 0
    (x, y), *_ = tasks(np.sin)
    assert np.isfinite(learner.adapt(x[:5], y[:5]).predict(x).mean).all()


def test_more_inputs_correlate_where_there_are_many_tasks_of_classes():
    learner = MetaLearner()
    batch = Batch(torch.randn(4, 14), torch.tensor([0, 1, 0, 1]))
    for num_tasks, expected in ((28, True), (27, False)):
        found = defaults.suited_to(
            TaskSplits([batch] * num_tasks, num_outputs=2), learner.get_params(), learner.algorithm
        )
        assert (defaults.CORRELATED in found) == expected
        assert found[defaults.LINE].in_whole and not found[defaults.BOTH].in_whole
