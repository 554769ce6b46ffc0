"""No wrong answer without a word: what goes into a learner keeps its meaning or is refused, at every entrance."""

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor, wait

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from ibaml import Batch, Episode, MetaLearner, TrainerSettings
from ibaml.networks import MLP

RNG = np.random.default_rng(0)
FEW = {"num_steps": 1}


def task(num_rows: int = 12) -> tuple[np.ndarray, np.ndarray]:
    x = RNG.normal(size=(num_rows, 3))
    return x, 10 + 5 * x @ RNG.normal([2, -2, 0], 0.3)


TASKS = [task() for _ in range(6)]
X, Y = TASKS[0]


def network(num_outputs: int = 1) -> MLP:
    return MLP(num_outputs, input_shape=3, hidden_sizes=(4,), norm="none", generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def learner() -> MetaLearner:
    return MetaLearner(network(), likelihood="gaussian").fit(TASKS, **FEW)


@pytest.fixture(scope="module", params=["head", "ibaml", "maml"])
def fitted(request) -> MetaLearner:
    return MetaLearner(network(), request.param, likelihood="gaussian").fit(TASKS, **FEW)


MASKED_X = np.ma.masked_array(np.where(np.eye(12, 3), -9999.0, X), mask=np.eye(12, 3))
MASKED_Y = np.ma.masked_array(np.where(np.arange(12) == 4, -9999.0, Y), mask=np.arange(12) == 4)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda one: one.adapt(MASKED_X, Y), "x_support has 3 missing .* row 0, column 0"),
        (lambda one: one.adapt(X, MASKED_Y), "y_support has 1 missing .* row 4"),
        (lambda one: one.adapt(X, Y).update(X, MASKED_Y), "y_support has 1 missing .* row 4"),
        (lambda one: one.adapt(X, Y).predict(MASKED_X), "x_query has 3 missing .* row 0, column 0"),
        (lambda one: one.evaluate([(X, MASKED_Y)]), "y of task '0' has 1 missing .* row 4"),
        (lambda one: one.calibrate([(X, Y), (MASKED_X, Y)]), "X of task '1' has 3 missing .* row 0, column 0"),
        (lambda one: one.learning_curve([(X, MASKED_Y)], [1]), "y of task '0' has 1 missing .* row 4"),
        (lambda one: copy.copy(one).fit([(X, MASKED_Y)], **FEW), "y of task '0' has 1 missing .* row 4"),
    ],
    ids=["adapt X", "adapt y", "update", "predict", "evaluate", "calibrate", "learning_curve", "fit"],
)
def test_masked_values_are_missing_at_every_entrance(learner, call, message):
    with pytest.raises(ValueError, match=message):
        call(learner)


CLASSES = {"[n, 1]": lambda y: y[:, None], "one-hot": lambda y: torch.eye(2).long()[y]}


def episode(form: str, num_rows: int = 2) -> Episode:
    x = torch.randn(num_rows, 3, generator=torch.Generator().manual_seed(1))
    y = CLASSES.get(form, lambda y: y)(torch.arange(num_rows) % 2)
    return Episode(Batch(x, y), Batch(x, y))


@pytest.mark.parametrize("algorithm", ["head", "maml", "ibaml"])
@pytest.mark.parametrize("form", CLASSES)
def test_labels_with_an_axis_too_many_are_refused_at_every_entrance(algorithm, form):
    """Each example would be compared with the labels of all: one-hot labels of as many examples as classes fit in."""
    refusal = pytest.raises(ValueError, match=r"y has shape \(2, \d\), but expected one class index per example")
    with refusal:
        MetaLearner(network(2), algorithm).fit([episode(form)], **FEW)
    fitted = MetaLearner(network(2), algorithm).fit([episode("[n]")], **FEW)
    bad = episode(form)
    with refusal:
        fitted.adapt(*bad.support)
    with refusal:
        fitted.adapt(*episode("[n]").support).update(*bad.support)
    for tasks in ([bad], [episode("[n]"), bad], [episode("[n]")._replace(query=bad.query)]):
        with refusal:
            fitted.evaluate(tasks)


class Later:
    """A sampler whose first task is in order."""

    input_shape, num_outputs, calls = (3,), 2, 0

    def __init__(self, later: Episode) -> None:
        self.later = later

    def sample(self, num_tasks: int, *, generator: torch.Generator) -> Episode:
        self.calls += 1
        drawn = [episode("[n]") if self.calls == 1 else self.later] * num_tasks
        return Episode(*(Batch(*map(torch.stack, zip(*part, strict=True))) for part in zip(*drawn, strict=True)))


@pytest.mark.parametrize("algorithm", ["head", "maml", "imaml", "ibaml"])
def test_later_tasks_of_a_sampler_are_looked_at_as_well(algorithm):
    """An implicit gradient would take an infinite input after a tanh for a gradient of zero."""
    infinite = episode("[n]")._replace(query=Batch(torch.full((2, 3), torch.inf), torch.arange(2)))
    body = MLP(2, input_shape=3, hidden_sizes=(4,), activation="tanh", norm="none")
    with pytest.raises(ValueError, match=r"training task 0 of step 1 query.x has 6 NaN or infinite values"):
        MetaLearner(body, algorithm).fit(Later(infinite), **FEW)
    with pytest.raises(ValueError, match=r"training tasks of step 1 support.y has shape \(2, 1\), but expected one"):
        MetaLearner(body, algorithm).fit(Later(episode("[n, 1]")), **FEW)


def test_evaluation_scores_the_whole_task():
    """A task of four classes is not scored as one of two of them."""

    def of(num_classes: int) -> tuple[np.ndarray, np.ndarray]:
        y = np.repeat(np.arange(num_classes), 4)
        return 5 * np.eye(4)[y] + RNG.normal(size=(len(y), 4)), y

    def fit(algorithm: str) -> MetaLearner:
        body = MLP(2, input_shape=4, hidden_sizes=(4,), norm="none")
        return MetaLearner(body, algorithm, classes="per_task").fit([of(2), of(2), of(3)], **FEW)

    tasks = [of(2), of(4), of(3)]
    any_number = fit("head")
    found = any_number.evaluate_in_full(tasks)
    assert [one.probs.shape[-1] for one in found.predictions] == [2, 4, 3]
    for call in (any_number.evaluate, any_number.calibrate):
        call(4 * tasks)
    for call in (fit("maml").evaluate, fit("maml").calibrate):
        with pytest.raises(ValueError, match="task '1' has 4 classes, but the model tells 2 apart: give tasks of as"):
            call(tasks)


@pytest.mark.parametrize("value", [1e20, -1e30])
def test_values_far_from_training_are_told(learner, value):
    far = np.where(np.eye(12, 3) * (np.arange(12) == 2)[:, None], value, X)
    told = "1 values more than 10000 standard deviations of training .* in row 2, column 2: if it is a fill value"
    calls = {
        "x_support": lambda: learner.adapt(far, Y),
        "y_support": lambda: learner.adapt(X, np.where(np.arange(12) == 2, value, Y)),
        "x_query": lambda: learner.adapt(X, Y).predict(far),
        "X of task '0'": lambda: learner.evaluate([(far, Y)]),
    }
    for name, call in calls.items():
        with pytest.warns(RuntimeWarning, match=f"{name} has {told if name != 'y_support' else '1 values more'}"):
            try:
                call()
            except FloatingPointError as error:
                assert "not finite" in str(error)


def test_what_is_not_finite_is_no_answer(fitted):
    """A head's variance overflows in the query; adapted weights do in the support."""
    with pytest.warns(RuntimeWarning, match="standard deviations"):
        if fitted.algorithm.uses_features:
            posterior = fitted.adapt(X, Y)
            with pytest.raises(
                FloatingPointError, match="the prediction is not finite. Likely causes: inputs of another"
            ):
                posterior.predict(1e37 * X)
        else:
            refusal = r"adapting to the 12 support examples gives numbers .* not finit.*up to .*e\+3\d among the inputs"
            with pytest.raises(FloatingPointError, match=refusal):
                fitted.adapt(1e37 * X, Y)


def test_gradients_that_nobody_gets_are_refused(learner):
    posterior = learner.adapt(X, Y)
    wanted = torch.zeros(1, 3, requires_grad=True)
    with pytest.raises(ValueError, match=r"x_query requires a gradient, .* pass x_query.detach\(\)"):
        posterior.predict(wanted)
    with torch.no_grad():
        assert not posterior.predict(wanted).mean.requires_grad


class Checkpointed(nn.Module):
    """Recomputes its body on the way back."""

    num_outputs = 1

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(3, 4), nn.Linear(4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(checkpoint(self.body, x, use_reentrant=False).tanh())


@pytest.mark.parametrize("algorithm", ["ibaml", "maml", "fomaml"])
def test_activation_checkpointing_is_refused_by_name(algorithm):
    learner = MetaLearner(Checkpointed(), algorithm, likelihood="gaussian")
    with pytest.raises(TypeError, match=r"network \(Checkpointed\) has a part .* max_examples_per_pass in TrainerSett"):
        learner.fit(TASKS, settings=TrainerSettings(num_steps=1))


class Pair(nn.Module):
    """Returns two things, as recurrent layers do."""

    num_outputs = 1

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(3, 1)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.body(x), x


def test_outputs_and_inputs_are_one_tensor():
    with pytest.raises(
        ValueError, match=r"the network \(Pair\) returned a tuple for training task support.x; expected"
    ):
        MetaLearner(Pair(), "maml", likelihood="gaussian").fit(TASKS, **FEW)
    named = Batch({"ids": torch.zeros(2, 3), "mask": torch.ones(2, 3)}, torch.arange(2))
    with pytest.raises(TypeError, match=r"episode 0 has a dict as support.x; expected one tensor, .* network's forw"):
        MetaLearner(network(2), "maml").fit([Episode(named, named)], **FEW)
    two = episode("[n]")
    wide = two._replace(query=Batch(two.query.x.double(), two.query.y))
    with pytest.raises(TypeError, match=r"episode 1 has query.x of dtype torch.float64, episode 0 of torch.float32"):
        MetaLearner(network(2), "maml").fit([two, wide], **FEW)


def test_another_default_dtype():
    expected = MetaLearner(likelihood="gaussian").fit(TASKS, **FEW).adapt(X, Y).predict(X)
    torch.set_default_dtype(torch.float64)
    try:
        found = MetaLearner(likelihood="gaussian").fit(TASKS, **FEW).adapt(X, Y).predict(X)
    finally:
        torch.set_default_dtype(torch.float32)
    assert np.corrcoef(found.mean, expected.mean)[0, 1] > 0.9


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (lambda one: MetaLearner(seed=1.5), TypeError, "seed must be an integer, got 1.5 of type float"),
        (lambda one: one.adapt(X, Y, seed=1.5), TypeError, "seed must be an integer, got 1.5"),
        (lambda one: one.adapt(X, Y).predict(X, seed="a"), ValueError, "seed must be an integer, got 'a'"),
        (lambda one: one.evaluate(TASKS, seed=0.5), TypeError, "seed must be an integer, got 0.5"),
        (lambda one: MetaLearner(device="zzz"), ValueError, "device must be auto, cpu, cuda or cuda:N, but is 'zzz'"),
    ],
)
def test_seeds_and_devices_are_checked(learner, call, kind, message):
    with pytest.raises(kind, match=message):
        call(learner)
    assert learner.adapt(X, Y, seed=np.int64(3)).num_support == 12


def test_where_text_stands_among_numbers():
    table = pd.DataFrame(X, columns=["a", "b", "y"]).assign(site=np.arange(12) // 6)

    def fit(column: str, value: object) -> None:
        broken = table.astype({column: object})
        broken.loc[7, column] = value
        MetaLearner(likelihood="gaussian").fit(broken, task="site", target="y", **FEW)

    with pytest.raises(TypeError, match=r"column 'b' of the table .*'<0.1' \(row 7\) among numbers"):
        fit("b", "<0.1")
    with pytest.raises(TypeError, match="y of task '1' holds values that are no numbers, the first '<0.1' in row 7"):
        fit("y", "<0.1")


def test_cross_validation_of_scikit_learn():
    selection = pytest.importorskip("sklearn.model_selection")

    def score(learner: MetaLearner, tasks: list, y: object = None) -> float:
        return learner.evaluate(tasks)["nll"].mean

    estimator = MetaLearner(network(), likelihood="gaussian")
    found = selection.cross_val_score(estimator, TASKS, scoring=score, cv=2, params=FEW)
    halves = [(TASKS[:3], TASKS[3:]), (TASKS[3:], TASKS[:3])]
    expected = [score(MetaLearner(network(), likelihood="gaussian").fit(train, **FEW), test) for test, train in halves]
    np.testing.assert_allclose(found, expected)
    search = selection.GridSearchCV(estimator, {"algorithm": ["head", "maml"]}, scoring=score, cv=2).fit(TASKS, **FEW)
    assert len(search.cv_results_["params"]) == 2


def answers(posterior, x: np.ndarray) -> list[np.ndarray]:
    prediction = posterior.predict(x)
    return [prediction.mean, prediction.total_uncertainty]


def test_many_threads_answer_as_one(fitted):
    """Bit for bit, and the module is left as it was."""
    jobs = [task(5 + index % 3) for index in range(12)]
    module = {name: value.clone() for name, value in fitted.network.state_dict().items()}

    def answer(job: tuple[np.ndarray, np.ndarray]) -> list[np.ndarray]:
        first = fitted.adapt(job[0][:4], job[1][:4])
        return [*answers(first, X), *answers(first.update(*job), X)]

    alone = [answer(job) for job in jobs]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(answer, jobs))
    np.testing.assert_array_equal(together, alone)
    assert all(value.equal(module[name]) for name, value in fitted.network.state_dict().items())


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda one: pickle.loads(pickle.dumps(one))], ids=["copy", "pickle"])  # noqa: S301
def test_copies_answer_as_the_original(fitted, copied):
    posterior = fitted.adapt(X, Y)
    for other in (copied(posterior), copied(fitted).adapt(X, Y)):
        np.testing.assert_array_equal(answers(other, X), answers(posterior, X))


@pytest.mark.parametrize("copied", [copy.deepcopy, pickle.dumps], ids=["copy", "pickle"])
def test_copies_wait_until_no_thread_runs_the_network(fitted, copied):
    """In the middle of a call the module has other tensors for parameters."""
    posterior = fitted.adapt(X, Y)
    for one in (fitted, posterior):
        with ThreadPoolExecutor(1) as pool:
            with fitted.fitted_model.model.guard:
                waiting = pool.submit(copied, one)
                assert not wait([waiting], timeout=0.05).done
            assert waiting.result(timeout=60) is not None


def test_a_shallow_copy_has_the_same_network(fitted):
    other = copy.copy(fitted)
    assert other is not fitted and other.__dict__ == fitted.__dict__
