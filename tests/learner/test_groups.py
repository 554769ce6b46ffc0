"""Many groups of a table in one call against one after the other, and groups of which nothing is known."""

import re

import numpy as np
import pandas as pd
import pytest
import torch

from ibaml import MetaLearner, SplitSettings
from ibaml.algorithms.heads import GaussianClasses
from ibaml.data import SinusoidTasks
from ibaml.data.sources import Mixtures
from ibaml.learner import groups
from ibaml.networks import MLP


def table(num_groups: int, *, classes: bool = False, seed: int = 0) -> pd.DataFrame:
    """Groups of 8 to 11 rows."""
    rng = np.random.default_rng(seed)
    parts = []
    for group in range(num_groups):
        x = rng.normal(size=(rng.integers(8, 12), 2))
        y = x @ rng.normal(size=2) + rng.normal() + 0.3 * rng.normal(size=len(x))
        target = np.where(y > 0, "high", "low") if classes else 100 + 10 * y
        parts.append(pd.DataFrame({"group": f"g{group}", "a": x[:, 0], "b": x[:, 1], "y": target}))
    return pd.concat(parts, ignore_index=True)


def fit(algorithm: str, *, dtype: torch.dtype = torch.float64, norm: str = "none") -> MetaLearner:
    classes = algorithm in CLASSES
    network = MLP(1 + classes, input_shape=2, hidden_sizes=(3,), norm=norm, generator=torch.Generator().manual_seed(0))
    learner = MetaLearner(
        network.to(dtype), algorithm, "categorical" if classes else "gaussian", adapt=network_head(network)
    )
    splits = SplitSettings(num_support=4)
    return learner.fit(table(9, classes=classes), task="group", target="y", num_steps=2, splits=splits)


def network_head(network: MLP) -> tuple[str, ...]:
    *_, weight, bias = (name for name, _ in network.named_parameters())
    return weight, bias


CLASSES = ("softmax", "gaussian_classes")
BAYESIAN = ("linear_gaussian", "gp", *CLASSES, "ibaml")


def asked_and_known(*, classes: bool, num_groups: int = 6) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Groups with 0 to 5 known rows, asked for in mixed order under an index of their own."""
    new = table(num_groups, classes=classes, seed=7)
    number = new.groupby("group").cumcount()
    is_known = number < new.group.str[1:].astype(int)
    asked = new[~is_known].drop(columns="y").sample(frac=1, random_state=0)
    return new[is_known], asked


def values(prediction, names=("mean", "epistemic", "aleatoric")):
    names = names if hasattr(prediction, "mean") else ("probs", "epistemic", "out_of_task")
    return np.column_stack([getattr(prediction, name).reshape(len(prediction.epistemic), -1) for name in names])


def one_by_one(learner: MetaLearner, known: pd.DataFrame, asked: pd.DataFrame) -> np.ndarray:
    found = None
    for name, rows in asked.groupby("group").indices.items():
        own = known[known.group == name]
        each = values(learner.adapt(own, own.y).predict(asked.iloc[rows]))
        found = np.full((len(asked), each.shape[1]), np.nan) if found is None else found
        found[rows] = each
    assert found is not None
    return found


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)], ids=str)
@pytest.mark.parametrize("algorithm", BAYESIAN)
def test_many_groups_are_as_one_after_the_other(algorithm, dtype, tolerance):
    learner = fit(algorithm, dtype=dtype)
    known, asked = asked_and_known(classes=algorithm in CLASSES)
    prediction = learner.predict_new(known, asked)
    assert prediction.to_frame().index.equals(asked.index)
    expected = one_by_one(learner, known, asked)
    np.testing.assert_allclose(values(prediction), expected, rtol=tolerance, atol=tolerance)
    assert isinstance(prediction.epistemic, np.ndarray)


def test_features_that_hang_on_the_batch_are_those_of_the_group():
    learner = fit("linear_gaussian", norm="batch")
    known, asked = asked_and_known(classes=False)
    known = known[known.group != "g1"]  # A single row has no variance.
    np.testing.assert_allclose(values(learner.predict_new(known, asked)), one_by_one(learner, known, asked), rtol=1e-10)


@pytest.mark.parametrize("most", [1, 200])
def test_groups_are_solved_in_portions_of_any_size(monkeypatch, most):
    learner = fit("linear_gaussian")
    known, asked = asked_and_known(classes=False, num_groups=8)
    expected = values(learner.predict_new(known, asked))
    monkeypatch.setattr(groups, "_MOST_PRODUCTS", most)
    np.testing.assert_allclose(values(learner.predict_new(known, asked)), expected, rtol=1e-12)


@pytest.mark.parametrize("algorithm", BAYESIAN)
def test_updating_nothing_is_adapting(algorithm):
    learner = fit(algorithm)
    new = table(1, classes=algorithm in CLASSES, seed=3)
    prior = learner.adapt(new[:0], new.y[:0])
    assert prior.num_support == 0 and prior.update(new[:0], new.y[:0]) is prior
    expected = values(learner.adapt(new[:5], new.y[:5]).predict(new))
    np.testing.assert_allclose(values(prior.update(new[:5], new.y[:5]).predict(new)), expected, rtol=1e-12)


@pytest.mark.parametrize("empty", [np.empty((0, 2)), pd.DataFrame(columns=["b", "a"]), torch.empty(0, 2)], ids=type)
def test_nothing_in_any_form(empty):
    learner = fit("linear_gaussian")
    y = torch.empty(0) if isinstance(empty, torch.Tensor) else np.empty(0)
    asked = table(1, seed=3)
    found = learner.adapt(empty, y).predict(asked)
    np.testing.assert_array_equal(found.mean, learner.predict_new(asked[:0], asked).mean)
    with pytest.raises(ValueError, match=re.escape("x_support has shape (0, 5), but the model was trained on")):
        learner.adapt(np.empty((0, 5)), [])


def test_a_new_group_is_one_of_the_population():
    """The prior's predictive in units of the data, from features and the weights' distribution."""
    learner = fit("linear_gaussian")
    asked = table(1, seed=3)
    found = learner.predict_new(asked[:0], asked)
    fitted = learner.fitted_model
    with torch.no_grad():
        features = fitted.model.features(fitted.meta.shared, fitted.encode("asked", asked))
    z = torch.cat([features, torch.ones_like(features[:, :1])], -1)
    prior, targets = fitted.meta.prior, fitted.preprocessing.targets
    mean = targets.mean + targets.scale * (z @ prior.mean.mT).squeeze(-1)
    variance = targets.scale**2 * (z**2 @ prior.log_var.exp().mT).squeeze(-1)
    np.testing.assert_allclose(found.mean, mean, rtol=1e-12)
    np.testing.assert_allclose(found.epistemic, variance, rtol=1e-12)


def test_draws_are_of_whole_functions_and_independent_between_groups(monkeypatch):
    monkeypatch.setattr("ibaml.algorithms.heads.base._NUM_DRAWS", 4_000)
    learner = fit("linear_gaussian")
    rows = table(1, seed=3)[:2]
    asked = pd.concat([rows.assign(group=name) for name in ("new", "other", "new")])
    drawn = learner.predict_new(rows[:0], asked).samples()
    assert drawn.shape == (4_000, 6)
    np.testing.assert_allclose(drawn[:, :2], drawn[:, 4:], atol=0.02)
    fitted = learner.predict_new(rows[:0], asked)
    np.testing.assert_allclose(drawn.mean(0), fitted.mean, atol=4 * np.sqrt(fitted.epistemic.max() / 4_000))
    np.testing.assert_allclose(drawn.var(0), fitted.epistemic, rtol=0.15)
    between = np.corrcoef(drawn[:, :4].T)
    assert np.abs(between[:2, 2:]).max() < 5 / np.sqrt(4_000)


def test_classes_of_each_group_are_joined():
    rng = np.random.default_rng(0)

    def named(names: str, group: str) -> pd.DataFrame:
        y = np.repeat(list(names), 4)
        return pd.DataFrame({"group": group, "a": rng.normal(size=len(y)) + (y == names[0]), "b": 1.0 * len(y), "y": y})

    learner = MetaLearner(classes="per_task", algorithm="softmax")
    learner.fit(pd.concat([named("ab", "0"), named("xyz", "1")]), task="group", target="y", num_steps=1)
    new = pd.concat([named("pq", "n"), named("qrs", "m")], ignore_index=True)
    asked = new.sample(frac=1, random_state=1)
    prediction = learner.predict_new(new, asked)
    assert prediction.classes.tolist() == ["p", "q", "r", "s"]
    assert asked.join(prediction.to_frame()).query("group == 'n'").predicted.isin(["p", "q"]).all()
    for name, own in new.groupby("group"):
        rows = (asked.group == name).to_numpy()
        expected = learner.adapt(own, own.y).predict(asked[rows])
        mine = np.isin(prediction.classes, expected.classes)
        np.testing.assert_allclose(prediction.probs[rows][:, mine], expected.probs, rtol=1e-5)
        assert (prediction.probs[rows][:, ~mine] == 0).all()
        assert prediction.labels[rows].tolist() == expected.labels.tolist()
        for part in ("total_uncertainty", "epistemic", "out_of_task"):
            np.testing.assert_allclose(getattr(prediction, part)[rows], getattr(expected, part), rtol=1e-4, atol=1e-6)
    with pytest.raises(ValueError, match=r"known has no rows of 1 groups of asked, such as 'm': the support is empty"):
        learner.predict_new(new[new.group == "n"], asked)
    with pytest.raises(ValueError, match="the support is empty, and where each task has classes of its own nothing"):
        learner.adapt(new[:0], new.y[:0])


def test_columns_of_another_name():
    learner = MetaLearner(algorithm="linear_gaussian", likelihood="gaussian")
    pairs = [(rows[["a", "b"]], rows.y) for _, rows in table(5).groupby("group")]
    learner.fit(pairs, num_steps=1)
    known, asked = asked_and_known(classes=False)
    with pytest.raises(ValueError, match="task is None, and fit was told of no column with tasks: name the"):
        learner.predict_new(known, asked)
    prediction = learner.predict_new(known, asked, task="group", target="y")
    np.testing.assert_allclose(values(prediction), one_by_one(learner, known, asked), rtol=1e-5)


def test_shared_classes_are_all_there_where_known_rows_have_some():
    """A prior that serves any number of classes is asked for those of training."""
    learner = fit("softmax")
    new = table(1, classes=True, seed=3)
    low = new[new.y == "high"]
    assert learner.adapt(low, low.y).predict(new).probs.shape == (len(new), 2)


KNOWN, ASKED = asked_and_known(classes=False)
REFUSED = [
    (
        "arrays",
        np.ones((3, 2)),
        ASKED,
        TypeError,
        "known must be a table, such as a pandas DataFrame, with a column that names",
    ),
    ("no target", KNOWN.drop(columns="y"), ASKED, ValueError, "known has no column 'y', the target."),
    ("no group", KNOWN, ASKED.drop(columns="group"), ValueError, "asked has no column 'group', which says to which"),
    ("no rows", KNOWN, ASKED[:0], ValueError, "asked has no rows."),
    ("a feature is missing", KNOWN, ASKED.drop(columns="a"), ValueError, "asked has no column a"),
    ("a value is infinite", KNOWN.assign(a=np.inf), ASKED, ValueError, "known has 15 infinite values in column 'a'"),
    ("a value is text", KNOWN.assign(a="x"), ASKED, TypeError, "column 'a' of known holds text, such as 'x' (row 0)"),
    ("a target is missing", KNOWN.assign(y=np.nan), ASKED, ValueError, "the target of known has 15 missing"),
    (
        "a group is missing",
        KNOWN,
        ASKED.assign(group=None),
        ValueError,
        f"column 'group' of asked is missing in {len(ASKED)} rows, the first is row 0: every row needs a task",
    ),
    (
        "groups of another type",
        KNOWN.assign(group=KNOWN.group.str[1:].astype(int)),
        ASKED,
        TypeError,
        "column 'group' of known holds no text, that of asked text, so that no group would find its rows",
    ),
]


@pytest.mark.parametrize("case", REFUSED, ids=[case[0] for case in REFUSED])
def test_what_is_refused(case):
    _, known, asked, kind, message = case
    learner = fit("linear_gaussian")
    with pytest.raises(kind, match=re.escape(message)):
        learner.predict_new(known, asked)


@pytest.mark.parametrize("algorithm", ["maml", "neighbours"])
def test_algorithms_without_a_prior_say_so(algorithm):
    learner = fit(algorithm)
    message = f"the support is empty, and algorithm {algorithm!r} has no prior that says what is likely of a task"
    with pytest.raises(ValueError, match=message):
        learner.adapt(KNOWN[:0], KNOWN.y[:0])
    with pytest.raises(ValueError, match=f"known has no rows of 1 groups of asked, such as 'g0': {message}"):
        learner.predict_new(KNOWN, ASKED)
    rest = ASKED[ASKED.group != "g0"]
    np.testing.assert_allclose(
        learner.predict_new(KNOWN, rest).mean, one_by_one(learner, KNOWN, rest)[:, 0], rtol=1e-12
    )


def test_abstaining():
    learner = MetaLearner().fit(table(12, classes=True), 0.4, task="group", target="y", num_steps=2)
    known, asked = asked_and_known(classes=True)
    found = learner.predict_new(known, asked, max_error=0.99)
    expected = learner.predict_new(known, asked)
    least = learner.fitted_model.min_confidence(0.99)
    assert found.abstains.tolist() == (expected.confidence < least).tolist()


def test_nothing_in_tensors_of_a_learner_of_tensors():
    network = MLP(1, input_shape=1, hidden_sizes=(3,), generator=torch.Generator().manual_seed(0))
    learner = MetaLearner(network, "linear_gaussian", "gaussian").fit(
        SinusoidTasks(num_shots=3, num_queries=3), num_steps=1
    )
    x = torch.rand(5, 1)
    prior = learner.adapt(torch.empty(0, 1), torch.empty(0, 1))
    assert prior.predict(x).mean.shape == (5, 1)
    learned = prior.update(x, x).predict(x).mean
    torch.testing.assert_close(learned, learner.adapt(x, x).predict(x).mean, rtol=0, atol=0)
    with pytest.raises(ValueError, match="the task's support has 0 inputs and 5 targets"):
        learner.adapt(torch.empty(0, 1), x)


@pytest.mark.parametrize("tied", [True, False])
def test_classes_of_tensors_are_known_if_each_has_a_prior(tied):
    head = GaussianClasses(tied=tied)
    network = MLP(3, input_shape=4, hidden_sizes=(3,), generator=torch.Generator().manual_seed(0))
    tasks = Mixtures(num_ways=3, num_features=4, num_informative=2, num_queries=3).sampler("train")
    learner = MetaLearner(network, head).fit(tasks, num_steps=1)
    x, y = torch.empty(0, 4), torch.empty(0, dtype=torch.int64)
    if tied:
        with pytest.raises(ValueError, match="nothing else says which they are: give at least one example of each"):
            learner.adapt(x, y)
    else:
        assert learner.adapt(x, y).predict(torch.rand(5, 4)).probs.shape == (5, 3)


def test_tables_with_categories_and_gaps():
    """The same gate as for one group; tables whose rows are named otherwise, and columns named by integers."""
    rng = np.random.default_rng(0)
    table = pd.DataFrame(
        {"group": np.repeat(np.arange(12), 8), "kind": rng.choice(["a", "b", "c"], 96), 7: rng.random(96)}
    )
    table["y"] = table[7] + (table.kind == "b") + 0.1 * rng.normal(size=96)
    table.loc[rng.random(96) < 0.2, 7] = np.nan
    learner = MetaLearner(likelihood="gaussian").fit(table, task="group", target="y", num_steps=2)
    known, asked = table[table.index % 2 == 0].set_index("kind", drop=False), table[table.index % 2 == 1]
    found = learner.predict_new(known, asked.drop(columns="y"))
    for name, rows in asked.groupby("group"):
        own = known[known.group == name]
        alone = learner.adapt(own, own.y).predict(rows)
        np.testing.assert_allclose(found.mean[(asked.group == name).to_numpy()], alone.mean, rtol=1e-5, atol=1e-6)


def test_groups_that_are_all_unknown_are_warned_of():
    learner = MetaLearner(likelihood="gaussian").fit(
        pd.DataFrame({"group": np.repeat(np.arange(12), 4), "a": np.arange(48.0), "y": np.arange(48.0)}),
        task="group",
        target="y",
        num_steps=1,
    )
    known = pd.DataFrame({"group": [1, 1], "a": [1.0, 2.0], "y": [1.0, 2.0]})
    with pytest.warns(RuntimeWarning, match="no group of asked is among those of known"):
        learner.predict_new(known, known.assign(group=2))
    with pytest.raises(ValueError, match="target names y, a, but the model has one target"):
        learner.predict_new(known, known, target=["y", "a"])
    with pytest.raises(ValueError, match="known has several columns named group"):
        learner.predict_new(pd.concat([known, known[["group"]]], axis=1), known)


def test_a_model_of_pairs_asks_for_the_target():
    pairs = [(pd.DataFrame({"a": np.arange(6.0) + i}), np.arange(6.0)) for i in range(4)]
    learner = MetaLearner(likelihood="gaussian").fit(pairs, num_steps=1)
    known = pd.DataFrame({"g": [1, 1], "a": [1.0, 2.0], "y": [1.0, 2.0]})
    with pytest.raises(ValueError, match=r"fitted on pairs \(X, y\), so the target has no column name: name it"):
        learner.predict_new(known, known, task="g")
    assert len(learner.predict_new(known, known, task="g", target="y").mean) == 2
