"""A fixed set of tasks, whatever computes them and however many at a time, scored by the package's own metrics."""

import dataclasses
import re

import pytest
import torch

from ibaml import metrics, tree
from ibaml.algorithms import Algorithm, MetaParameters, make_algorithm
from ibaml.algorithms.model import Model, build_model
from ibaml.data import ClassImages, EpisodeSampler, FixedEpisodes, SinusoidTasks
from ibaml.evaluation import Evaluation, draw_tasks, evaluate, predict, task_generator
from ibaml.likelihoods import Categorical, make_likelihood
from ibaml.networks import MLP
from ibaml.solvers.inner import GradientDescent
from ibaml.types import Batch, Episode, TaskSampler

ALGORITHMS = {
    name: make_algorithm(
        name,
        inner=GradientDescent(num_steps=2, learning_rate=0.05),
        **({"num_evaluation_samples": 3} if name in ("abml", "ibaml") else {}),
    )
    for name in ("maml", "imaml", "abml", "ibaml")
}


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def image_tasks() -> EpisodeSampler:
    data = ClassImages(
        images=torch.randint(0, 256, (24, 1, 2, 2), generator=generator(), dtype=torch.uint8),
        class_start=torch.arange(5) * 6,
        class_names=tuple("abcd"),
    )
    return EpisodeSampler(data, num_ways=3, num_shots=2, num_queries=4)


def set_up(kind: str, name: str) -> tuple[Model, Algorithm, MetaParameters, TaskSampler]:
    shape, num_outputs = ((1, 2, 2), 3) if kind == "categorical" else ((1,), 1)
    network = MLP(num_outputs, input_shape=shape, hidden_sizes=(6,), activation="tanh", generator=generator(1))
    model = build_model(network, make_likelihood(kind, num_outputs))
    algorithm = ALGORITHMS[name]
    meta = algorithm.init(model.adapted, model.shared, generator=generator(2))
    tasks = image_tasks() if kind == "categorical" else SinusoidTasks(num_shots=4, num_queries=5)
    return model, algorithm, meta, tasks


def run(kind: str, name: str, num_tasks: int = 5, seed: int = 0, chunk: int | None = None) -> Evaluation:
    model, algorithm, meta, tasks = set_up(kind, name)
    return evaluate(model, algorithm, meta, tasks, num_tasks=num_tasks, seed=seed, tasks_per_chunk=chunk)


@pytest.mark.parametrize("name", ALGORITHMS)
@pytest.mark.parametrize("kind", ["categorical", "gaussian"])
def test_chunks_and_loop_give_the_same_numbers(kind, name):
    reference = run(kind, name, chunk=1)
    for chunk in (2, 5, None):
        other = run(kind, name, chunk=chunk)
        assert torch.equal(other.targets, reference.targets)
        for field in ("log_probs", "mean", "variance"):
            one, two = getattr(reference, field), getattr(other, field)
            assert (one is None) == (two is None)
            if one is not None:
                torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)
        for metric, value in reference.report.items():
            assert other.report[metric].mean == pytest.approx(value.mean, rel=1e-4, abs=1e-5)


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
    model, algorithm, meta, tasks = set_up("gaussian", name)
    inside, cdf = [], []
    for index in range(6):
        task = tree.map(lambda leaf: leaf[0], draw_tasks(tasks, index, index + 1, seed=0))
        source = generator(2**40 + index)
        noise = algorithm.draw_noise(meta, generator=source)
        evaluation_noise = algorithm.draw_evaluation_noise(meta, generator=source)
        posterior = algorithm.adapt(model, meta, task.support, noise).value
        prediction = predict(model, algorithm, meta, posterior, task.query.x, evaluation_noise)
        low, high = prediction.interval(0.9)
        inside.append(((low <= task.query.y) & (task.query.y <= high)).double().mean())
        deviation = prediction.noise_variance.sqrt()
        of_samples = torch.distributions.Normal(prediction.samples(), deviation).cdf(task.query.y)
        cdf.append(of_samples.mean(0).double())
    torch.testing.assert_close(result.per_task["coverage_90"], torch.stack(inside))
    torch.testing.assert_close(result.cdf, torch.stack(cdf), rtol=1e-4, atol=1e-5)
    error = torch.tensor([wasserstein(one) for one in result.cdf.flatten(1)], dtype=torch.float64)
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
def test_one_task_by_hand(kind, name):
    model, algorithm, meta, tasks = set_up(kind, name)
    result = evaluate(model, algorithm, meta, tasks, num_tasks=1, seed=8)
    task = tree.map(lambda leaf: leaf[0], draw_tasks(tasks, 0, 1, seed=8))
    source = generator(2**40 + 8 * 1_000_003)
    noise = algorithm.draw_noise(meta, generator=source)
    evaluation_noise = algorithm.draw_evaluation_noise(meta, generator=source)
    posterior = algorithm.adapt(model, meta, task.support, noise).value
    prediction = predict(model, algorithm, meta, posterior, task.query.x, evaluation_noise)
    samples = prediction.samples()
    assert samples.shape[0] == (3 if name == "ibaml" else 1)
    if kind == "categorical":
        torch.testing.assert_close(result.log_probs[0].exp().float(), samples.mean(0), rtol=1e-5, atol=1e-6)
    else:
        torch.testing.assert_close(result.mean[0].float(), samples.mean(0), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(result.per_task["nll"][0].float(), prediction.nll(task.query.y).mean())


def test_adaptation_is_what_is_scored():
    """Adapting must beat not adapting, from the same start."""
    model, algorithm, meta, tasks = set_up("categorical", "maml")
    still = dataclasses.replace(algorithm, inner=GradientDescent(num_steps=2, learning_rate=1e-12))
    quick = dataclasses.replace(algorithm, inner=GradientDescent(num_steps=20, learning_rate=0.5))
    nll = [evaluate(model, one, meta, tasks, num_tasks=20, seed=0).report["nll"].mean for one in (still, quick)]
    assert nll[1] < 0.8 * nll[0]


def test_progress_is_told():
    model, algorithm, meta, tasks = set_up("categorical", "maml")
    seen: list[int] = []
    evaluate(model, algorithm, meta, tasks, num_tasks=7, seed=0, tasks_per_chunk=3, on_progress=seen.append)
    assert seen == [3, 6, 7]


def test_support_sets_of_unequal_sizes():
    """What a list of one's own tasks looks like; each is its own chunk then."""
    source = generator(4)

    def batch(size: int) -> Batch:
        return Batch(torch.rand(size, 1, 2, 2, generator=source), torch.arange(size) % 3)

    model, algorithm, meta, _ = set_up("categorical", "ibaml")
    tasks = FixedEpisodes([Episode(batch(size), batch(6)) for size in (3, 5, 7)])
    result = evaluate(model, algorithm, meta, tasks, num_tasks=6, seed=0)
    assert result.log_probs.shape == (6, 6, 3)

    class Mistaken:
        """The same, announced as equal."""

        input_shape, num_outputs, sample = tasks.input_shape, tasks.num_outputs, tasks.sample
        has_equal_sizes = True

    message = r"tasks 0 and \d have tensors of different shapes, .*, and cannot be stacked: .* tasks_per_chunk=1\."
    with pytest.raises(ValueError, match=message):
        evaluate(model, algorithm, meta, Mistaken(), num_tasks=6, seed=0)
    again = evaluate(model, algorithm, meta, Mistaken(), num_tasks=6, seed=0, tasks_per_chunk=1)
    assert again.report == result.report


def bad(kind: str) -> Episode:
    x, y = torch.rand(3, 1, 2, 2, generator=generator()), torch.tensor([0, 1, 2])
    good = Batch(x, y)
    return {
        "label": Episode(good, Batch(x, y + 1)),
        "nan": Episode(Batch(torch.where(x == x[1, 0, 0, 1], torch.nan, x), y), good),
        "shape": Episode(Batch(x[:, :, :1], y), Batch(x[:, :, :1], y)),
        "dtype": Episode(Batch(x, y.float()), good),
        "uneven": Episode(Batch(x, y[:2]), good),
        "query": Episode(good, Batch(x[:2], y[:2])),
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
    model, algorithm, meta, _ = set_up("categorical", "maml")
    with pytest.raises(ValueError, match=message):
        evaluate(model, algorithm, meta, FixedEpisodes([bad(kind)]), num_tasks=2, seed=0)


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
        ("query", "test tasks have query sets of 2, 3 examples; expected one size, so that every task weighs the same"),
    ],
)
def test_later_tasks_are_checked_by_value(kind, message):
    model, algorithm, meta, _ = set_up("categorical", "maml")
    with pytest.raises(ValueError, match=message):
        evaluate(model, algorithm, meta, Second(bad(kind)), num_tasks=2, seed=0, tasks_per_chunk=1)


@pytest.mark.parametrize("chunk", [None, 1])
def test_predictions_that_are_not_finite_name_the_task(chunk):
    model, algorithm, meta, tasks = set_up("gaussian", "maml")
    wild = dataclasses.replace(algorithm, inner=GradientDescent(num_steps=4, learning_rate=1e30))
    message = "test task 0 gives predictions that are not finite. Likely causes: inner steps too large (unrolled"
    with pytest.raises(FloatingPointError, match=re.escape(message)):
        evaluate(model, wild, meta, tasks, num_tasks=2, seed=0, tasks_per_chunk=chunk)


@pytest.mark.parametrize("num_tasks", [0, -2])
def test_number_of_tasks_is_positive(num_tasks):
    with pytest.raises(ValueError, match=f"num_tasks must be at least 1, but is {num_tasks}"):
        run("categorical", "maml", num_tasks=num_tasks)


def test_results_do_not_require_gradients():
    network = MLP(3, input_shape=(1, 2, 2), hidden_sizes=(4,))
    model = build_model(network, Categorical())
    algorithm = ALGORITHMS["ibaml"]
    result = evaluate(
        model,
        algorithm,
        algorithm.init(model.adapted, model.shared, generator=generator()),
        image_tasks(),
        num_tasks=2,
        seed=0,
    )
    assert not result.log_probs.requires_grad
