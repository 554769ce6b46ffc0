"""A fixed set of tasks, the same whoever computes them, scored by the package's own metrics."""

import dataclasses

import pytest
import torch
from sklearn.metrics import roc_auc_score

from ibaml import MetaLearner, TrainerSettings, metrics, tree
from ibaml.algorithms import make_algorithm
from ibaml.algorithms.model import build_model
from ibaml.data import ClassImages, EpisodeSampler, FixedEpisodes, SinusoidTasks
from ibaml.likelihoods import make_likelihood
from ibaml.networks import MLP
from ibaml.posterior import FittedModel
from ibaml.seeds import noise_generator, task_generator, task_seed
from ibaml.solvers.inner import GradientDescent
from ibaml.train.evaluate import Evaluation, draw_foreign, draw_task, draw_tasks, evaluate, tempered
from ibaml.types import Batch, Episode, TaskSampler

ALGORITHMS = {
    name: make_algorithm(
        name,
        inner=GradientDescent(num_steps=2, learning_rate=0.05),
        **({"num_evaluation_samples": 3} if name in ("abml", "ibaml") else {}),
    )
    for name in ("maml", "imaml", "abml", "ibaml")
}


CPU = torch.device("cpu")


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def image_tasks() -> EpisodeSampler:
    data = ClassImages(
        images=torch.randint(0, 256, (24, 1, 2, 2), generator=generator(), dtype=torch.uint8),
        class_start=torch.arange(5) * 6,
        class_names=tuple("abcd"),
    )
    return EpisodeSampler(data, num_ways=3, num_shots=2, num_queries=4)


def set_up(kind: str, name: str) -> tuple[FittedModel, TaskSampler]:
    shape, num_outputs = ((1, 2, 2), 3) if kind == "categorical" else ((1,), 1)
    network = MLP(num_outputs, input_shape=shape, hidden_sizes=(6,), activation="tanh", generator=generator(1))
    model = build_model(network, make_likelihood(kind, num_outputs))
    algorithm = ALGORITHMS[name]
    meta = algorithm.init(model.adapted, model.shared, generator=generator(2))
    tasks = image_tasks() if kind == "categorical" else SinusoidTasks(num_shots=4, num_queries=5)
    return FittedModel(model=model, algorithm=algorithm, meta=meta, preprocessing=None, device=CPU), tasks


def run(kind: str, name: str, num_tasks: int = 5, seed: int = 0) -> Evaluation:
    return evaluate(*set_up(kind, name), num_tasks=num_tasks, seed=seed)


def same(one: Evaluation, two: Evaluation) -> bool:
    """Whether two evaluations are equal to the last digit."""
    predictions = zip(one.predictions, two.predictions, strict=True)
    return (
        dict(one.report) == dict(two.report)
        and all(torch.equal(value, two.per_task[name]) for name, value in one.per_task.items())
        and all(torch.equal(a.samples(), b.samples()) for a, b in predictions)
    )


@pytest.mark.parametrize("kind", ["categorical", "gaussian"])
def test_every_way_to_evaluate_gives_the_same_numbers_to_the_last_digit(kind, tmp_path, monkeypatch):
    """The trainer's validation, the learner, the learner loaded, and adapting and predicting task by task."""
    fitted, tasks = set_up(kind, "ibaml")
    learner = MetaLearner(fitted.model.network, fitted.algorithm, kind)
    validations = []
    monkeypatch.setattr(
        "ibaml.train.trainer.tempered",
        lambda *arguments: validations.append(tempered(*arguments)) or validations[-1],
    )
    learner.fit(
        tasks, tasks, settings=TrainerSettings(num_steps=2, tasks_per_step=2, num_validation_tasks=3, validate_every=2)
    )
    seed = 10**6
    reference = learner.evaluate_in_full(tasks, num_tasks=3, seed=seed)
    assert same(reference, validations[-1])
    assert same(reference, MetaLearner.load(learner.save(tmp_path)).evaluate_in_full(tasks, num_tasks=3, seed=seed))
    episodes = [draw_task(tasks, index, seed=seed) for index in range(3)]
    assert same(reference, learner.evaluate_in_full(episodes, seed=seed))
    for index, (support, query) in enumerate(episodes):
        posterior = learner.adapt(support.x, support.y, seed=task_seed(seed, index))
        by_hand = posterior.predict(query.x, seed=task_seed(seed, index))
        assert torch.equal(by_hand.samples(), reference.predictions[index].samples())


def test_noise_of_adaptation_of_prediction_and_the_draw_of_a_task_are_different_streams():
    drawn = [
        torch.randn(20, generator=source)
        for source in (
            task_generator(3, 5),
            noise_generator("inner", task_seed(3, 5)),
            noise_generator("prediction", task_seed(3, 5)),
        )
    ]
    assert not any(bool(torch.isin(one, two).any()) for one, two in zip(drawn, drawn[1:] + drawn[:1], strict=True))


@pytest.mark.parametrize("kind", ["categorical", "gaussian"])
def test_tasks_are_the_same_for_every_algorithm_and_number(kind):
    reference = run(kind, "maml").targets
    for name in ALGORITHMS:
        assert torch.equal(run(kind, name).targets, reference)
        assert torch.equal(run(kind, name, num_tasks=3).targets, reference[:3])
    assert kind == "categorical" or not torch.equal(run(kind, "maml", seed=1).targets, reference)


def test_drawn_tasks_depend_on_seed_and_index_alone():
    tasks = image_tasks()
    whole = draw_tasks(tasks, 0, 6, seed=3)
    assert whole.support.x.shape == (6, 6, 1, 2, 2)
    for start, stop in ((0, 1), (2, 5), (5, 6)):
        part = draw_tasks(tasks, start, stop, seed=3)
        for one, two in zip(tree.leaves(part), tree.leaves(whole), strict=True):
            assert torch.equal(one, two[start:stop])
    single = tasks.sample(1, generator=task_generator(3, 4))
    assert torch.equal(single.query.x[0], whole.query.x[4])
    assert not torch.equal(draw_tasks(tasks, 0, 6, seed=4).support.x, whole.support.x)
    seeds = {task_generator(seed, index).initial_seed() for seed in range(20) for index in range(50)}
    assert len(seeds) == 1000


@pytest.mark.parametrize("name", ["maml", "ibaml"])
def test_classification_report_is_that_of_the_predictions(name):
    result = run("categorical", name, num_tasks=6)
    assert result.mean is None and result.variance is None
    assert result.log_probs.shape == (6, 12, 3) and result.log_probs.dtype == torch.float64
    assert dict(result.report) == metrics.classification_report(result.log_probs, result.targets)
    probs = result.log_probs.exp()
    right = (probs.argmax(-1) == result.targets).double()
    picked = result.log_probs.gather(-1, result.targets.unsqueeze(-1)).squeeze(-1)
    squared = ((probs - torch.nn.functional.one_hot(result.targets, 3)) ** 2).sum(-1)
    for task, (p, hit) in enumerate(zip(probs, right, strict=True)):
        surest = hit[torch.distributions.Categorical(p).entropy().argsort()]
        area = sum(float(surest[:k].mean()) for k in range(1, 13)) / 12
        assert float(result.per_task["selective_area"][task]) == pytest.approx(area, abs=1e-10)
    for metric, value in {"accuracy": right, "nll": -picked, "brier": squared}.items():
        torch.testing.assert_close(result.per_task[metric], value.mean(-1), rtol=1e-10, atol=1e-10)
    for metric, value in result.per_task.items():
        assert value.shape == (6,) and value.dtype == torch.float64
        assert result.report[metric] == metrics.estimate(value)


def wasserstein(values: torch.Tensor, num_points: int = 200_000) -> float:
    """Distance of values in [0, 1] from the uniform distribution, by the midpoint rule over the levels."""
    levels = (torch.arange(num_points, dtype=torch.float64) + 0.5) / num_points
    return float((torch.searchsorted(values.sort().values, levels, right=True) / len(values) - levels).abs().mean())


@pytest.mark.parametrize("name", ["maml", "ibaml"])
def test_regression_report_is_that_of_the_predictions(name):
    result = run("gaussian", name, num_tasks=6)
    assert result.log_probs is None
    assert result.mean.shape == result.variance.shape == result.targets.shape == (6, 5, 1)
    squared = ((result.mean - result.targets) ** 2).mean((1, 2))
    torch.testing.assert_close(result.per_task["mse"], squared, rtol=1e-10, atol=1e-10)
    fitted, tasks = set_up("gaussian", name)
    inside, cdf = [], []
    for index in range(6):
        task = tree.map(lambda leaf: leaf[0], draw_tasks(tasks, index, index + 1, seed=0))
        posterior = fitted.solve(task.support, None, seed=index)
        prediction = fitted.predict(posterior.value, task.query.x, seed=index)
        low, high = prediction.interval(0.9)
        inside.append(((low <= task.query.y) & (task.query.y <= high)).double().mean())
        deviation = prediction.components.noise_variance.sqrt()
        of_samples = torch.distributions.Normal(prediction.samples(), deviation).cdf(task.query.y)
        cdf.append(of_samples.mean(0).double())
    torch.testing.assert_close(result.per_task["coverage_90"], torch.stack(inside))
    error = torch.tensor([wasserstein(one) for one in torch.stack(cdf).flatten(1)], dtype=torch.float64)
    torch.testing.assert_close(result.per_task["quantile_calibration_error"], error, rtol=0, atol=1e-5)
    for metric, value in result.per_task.items():
        assert result.report[metric].mean == pytest.approx(value.mean().item(), abs=1e-10)
        assert result.report[metric].num_tasks == 6
    if name == "maml":
        # A single sample: the mixture is one Gaussian.
        oracle = -torch.distributions.Normal(result.mean, result.variance.sqrt()).log_prob(result.targets)
        torch.testing.assert_close(result.per_task["nll"], oracle.mean((1, 2)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["maml", "ibaml"])
@pytest.mark.parametrize("kind", ["categorical", "gaussian"])
def test_one_task_from_the_algorithm_itself(kind, name):
    fitted, tasks = set_up(kind, name)
    model, algorithm, meta = fitted.model, fitted.algorithm, fitted.meta
    result = evaluate(fitted, tasks, num_tasks=1, seed=8)
    task = tree.map(lambda leaf: leaf[0], draw_tasks(tasks, 0, 1, seed=8))
    noise = algorithm.draw_noise(meta, generator=noise_generator("inner", task_seed(8, 0)))
    evaluation_noise = algorithm.draw_evaluation_noise(meta, generator=noise_generator("prediction", task_seed(8, 0)))
    posterior = algorithm.adapt(model, meta, task.support, noise).value
    outputs = [
        model.outputs(one, meta.shared, task.query.x) for one in algorithm.weight_samples(posterior, evaluation_noise)
    ]
    prediction = model.likelihood.predict(torch.stack(outputs), meta.shared)
    samples = prediction.samples()
    assert samples.shape[0] == (3 if name == "ibaml" else 1)
    if kind == "categorical":
        torch.testing.assert_close(result.log_probs[0].exp().float(), samples.mean(0), rtol=1e-5, atol=1e-6)
    else:
        torch.testing.assert_close(result.mean[0].float(), samples.mean(0), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(result.per_task["nll"][0].float(), prediction.nll(task.query.y).mean())


def test_adaptation_is_what_is_scored():
    """Adapting must beat not adapting, from the same start."""
    fitted, tasks = set_up("categorical", "maml")
    algorithm = fitted.algorithm
    still = dataclasses.replace(algorithm, inner=GradientDescent(num_steps=2, learning_rate=1e-12))
    quick = dataclasses.replace(algorithm, inner=GradientDescent(num_steps=20, learning_rate=0.5))
    nll = [
        evaluate(dataclasses.replace(fitted, algorithm=one), tasks, num_tasks=20, seed=0).report["nll"].mean
        for one in (still, quick)
    ]
    assert nll[1] < 0.8 * nll[0]


def test_progress_is_told():
    seen: list[int] = []
    evaluate(*set_up("categorical", "maml"), num_tasks=3, seed=0, on_progress=seen.append)
    assert seen == [1, 2, 3]


def test_support_and_query_sets_of_unequal_sizes():
    """What a list of one's own tasks looks like."""
    source = generator(4)

    def batch(size: int) -> Batch:
        return Batch(torch.rand(size, 1, 2, 2, generator=source), torch.arange(size) % 3)

    fitted, _ = set_up("categorical", "ibaml")
    episodes = [Episode(batch(size), batch(size + 2)) for size in (3, 5, 7)]
    result = evaluate(fitted, episodes, seed=0)
    assert [len(one.probs) for one in result.predictions] == [5, 7, 9]
    assert [len(one) for one in result.query_targets] == [5, 7, 9]
    assert result.per_task["nll"].shape == (3,) and result.report["ece_pooled"].num_tasks == 3
    for name in ("targets", "log_probs"):
        with pytest.raises(ValueError, match="tasks have query sets of 5, 7, 9 examples, which cannot be stacked: go"):
            getattr(result, name)
    drawn = evaluate(fitted, FixedEpisodes(episodes), num_tasks=6, seed=0)
    assert {len(one.probs) for one in drawn.predictions} <= {5, 7, 9}


def bad(kind: str) -> Episode:
    x, y = torch.rand(3, 1, 2, 2, generator=generator()), torch.tensor([0, 1, 2])
    good = Batch(x, y)
    return {
        "label": Episode(good, Batch(x, y + 1)),
        "nan": Episode(Batch(torch.where(x == x[1, 0, 0, 1], torch.nan, x), y), good),
        "shape": Episode(Batch(x[:, :, :1], y), Batch(x[:, :, :1], y)),
        "dtype": Episode(Batch(x, y.float()), good),
        "uneven": Episode(Batch(x, y[:2]), good),
    }[kind]


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("label", r"test task 0 query\.y has labels from 1 to 3, but the network has 3 outputs"),
        ("nan", r"test task 0 support\.x has 1 NaN or infinite values, the first at index \(1, 0, 0, 1\)"),
        ("shape", r"the network \(MLP\) cannot process test task 0 support\.x of shape \(3, 1, 1, 2\)"),
        ("dtype", r"test task 0 support\.y has dtype torch\.float32, but expected class indices"),
        ("uneven", r"test task 0 support has 3 inputs and 2 targets; expected as many"),
    ],
)
def test_the_first_task_is_checked_in_full(kind, message):
    fitted, _ = set_up("categorical", "maml")
    with pytest.raises(ValueError, match=message):
        evaluate(fitted, FixedEpisodes([bad(kind)]), num_tasks=2, seed=0)


class Second:
    """Draws a good task first and then what the test wants."""

    def __init__(self, episode: Episode) -> None:
        x, y = torch.rand(3, 1, 2, 2, generator=generator(1)), torch.tensor([0, 1, 2])
        self.episodes = [Episode(Batch(x, y), Batch(x, y)), episode]
        self.input_shape, self.num_outputs, self.count, self.has_equal_sizes = (1, 2, 2), 3, 0, True

    def sample(self, num_tasks: int, *, generator: torch.Generator) -> Episode:
        self.count += 1
        return tree.map(lambda leaf: leaf.unsqueeze(0), self.episodes[min(self.count, 2) - 1])


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("label", r"test task 1 query\.y has labels from 1 to 3"),
        ("nan", r"test task 1 support\.x has 1 NaN or infinite values"),
    ],
)
def test_later_tasks_are_checked_by_value(kind, message):
    fitted, _ = set_up("categorical", "maml")
    with pytest.raises(ValueError, match=message):
        evaluate(fitted, Second(bad(kind)), num_tasks=2, seed=0)


def test_predictions_that_are_not_finite_name_the_task():
    fitted, tasks = set_up("gaussian", "maml")
    wild = dataclasses.replace(fitted.algorithm, inner=GradientDescent(num_steps=4, learning_rate=1e30))
    message = r"test task 0: adapting to the \d+ support examples gives numbers that are not .* too large \(unrolled"
    with pytest.raises(FloatingPointError, match=message):
        evaluate(dataclasses.replace(fitted, algorithm=wild), tasks, num_tasks=2, seed=0)


@pytest.mark.parametrize("num_tasks", [0, -2])
def test_number_of_tasks_is_positive(num_tasks):
    with pytest.raises(ValueError, match=f"num_tasks must be at least 1, but is {num_tasks}"):
        run("categorical", "maml", num_tasks=num_tasks)


def test_results_do_not_require_gradients():
    assert not run("categorical", "ibaml", num_tasks=2).log_probs.requires_grad


# Queries of other tasks


def classes_of(tasks: EpisodeSampler, x: torch.Tensor) -> torch.Tensor:
    """Which classes of ``image_tasks`` the inputs are of; pixels tell."""
    pixels = tasks.images.images.flatten(1).float() / 255
    return torch.cdist(x.flatten(1), pixels).argmin(-1) // 6


def test_foreign_inputs_are_queries_of_the_next_task_of_classes_that_a_task_has_not():
    tasks = image_tasks()
    for index in range(20):
        own = tasks.sample_classes(1, generator=task_generator(3, index))[0]
        foreign = draw_foreign(tasks, index, num_tasks=20, seed=3)
        # Three of four classes: the next task that has the fourth one has four queries of it.
        assert foreign.shape == (4, 1, 2, 2)
        assert not torch.isin(classes_of(tasks, foreign), own).any()
    # Of a list it is not known which classes its tasks have.
    episodes = [draw_task(tasks, index, seed=3) for index in range(3)]
    assert torch.equal(draw_foreign(episodes, 2, num_tasks=3, seed=0), episodes[0].query.x)


@pytest.mark.parametrize("name", ["maml", "ibaml"])
def test_out_of_task_auroc_against_a_count_of_pairs(name):
    fitted, tasks = set_up("categorical", name)
    result = evaluate(fitted, tasks, num_tasks=5, seed=2, out_of_task=True)
    for index in range(5):
        task = draw_task(tasks, index, seed=2)
        posterior = fitted.solve(task.support, None, seed=task_seed(2, index))
        inside, outside = (
            fitted.predict(posterior.value, x, seed=task_seed(2, index)).out_of_task.tolist()
            for x in (task.query.x, draw_foreign(tasks, index, num_tasks=5, seed=2))
        )
        pairs = [(b > a) + 0.5 * (b == a) for a in inside for b in outside]
        assert float(result.per_task["out_of_task_auroc"][index]) == pytest.approx(sum(pairs) / len(pairs), abs=1e-10)
        truth = [0] * len(inside) + [1] * len(outside)
        assert roc_auc_score(truth, inside + outside) == pytest.approx(sum(pairs) / len(pairs), abs=1e-10)
    assert result.report["out_of_task_auroc"] == metrics.estimate(result.per_task["out_of_task_auroc"])
    # All else is as without.
    plain = evaluate(fitted, tasks, num_tasks=5, seed=2)
    assert plain.report.keys() == result.report.keys() - {"out_of_task_auroc"}
    assert all(result.report[metric] == value for metric, value in plain.report.items())


def test_out_of_task_is_refused_where_nothing_is_foreign():
    with pytest.raises(ValueError, match="out_of_task is for classes, but the likelihood is 'gaussian'"):
        evaluate(*set_up("gaussian", "maml"), num_tasks=2, seed=0, out_of_task=True)
    fitted, tasks = set_up("categorical", "maml")
    everywhere = EpisodeSampler(tasks.images.select([0, 1, 2]), num_ways=3, num_shots=2, num_queries=4)
    for one, num_tasks in ((everywhere, 4), (tasks, 1)):
        with pytest.raises(ValueError, match="out_of_task needs queries of classes that test task 0 has not"):
            evaluate(fitted, one, num_tasks=num_tasks, seed=0, out_of_task=True)


def test_a_learner_asks_for_tasks_with_classes_of_their_own():
    fitted, tasks = set_up("categorical", "maml")
    learner = MetaLearner(fitted.model.network, fitted.algorithm)
    learner.fit(tasks, settings=TrainerSettings(num_steps=1, tasks_per_step=2))
    assert "out_of_task_auroc" in learner.evaluate(tasks, num_tasks=2, out_of_task=True)
    assert "out_of_task_auroc" not in learner.evaluate(tasks, num_tasks=2)
    episodes = [draw_task(tasks, index, seed=0) for index in range(2)]
    with pytest.raises(ValueError, match="out_of_task needs tasks with classes of their own, but labels mean the same"):
        learner.evaluate(episodes, out_of_task=True)
