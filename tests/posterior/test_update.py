"""Further examples of a task: in parts and in any order what they are at once, without the earlier ones if exact."""

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch

from ibaml import MetaLearner, TaskPosterior, tree
from ibaml.algorithms import make_algorithm
from ibaml.algorithms.heads.linear_gaussian import Precision, Reduction
from ibaml.likelihoods import Gaussian
from ibaml.networks import MLP
from ibaml.solvers.inner import GradientDescent
from ibaml.train import TrainerSettings
from ibaml.types import Batch, Episode

ONE_STEP = TrainerSettings(num_steps=1, tasks_per_step=2)
NUM_ROWS = 40
REGRESSION: list[tuple[str, dict[str, Any]]] = [
    ("linear_gaussian", {}),
    ("linear_gaussian", {"prior": "full", "temperature": 0.5}),
    ("linear_gaussian", {"prior": "low_rank"}),
    ("linear_gaussian", {"covariance": "diagonal"}),
    ("linear_gaussian", {"centre": True}),
    ("gp", {}),
]
CLASSES: list[tuple[str, dict[str, Any]]] = [("gaussian_classes", {}), ("softmax", {}), ("prototypes", {})]


def learner_of(name: str, settings: dict[str, Any], *, num_outputs: int = 2) -> MetaLearner:
    """Two targets with different noise, or three classes, on eleven weights, in float64."""
    generator = np.random.default_rng(0)
    network = MLP(num_outputs, input_shape=2, hidden_sizes=(10,), generator=torch.Generator().manual_seed(0)).double()
    is_real = (name, settings) in REGRESSION
    likelihood = Gaussian(num_targets=2, initial_noise_variance=0.01) if is_real else "categorical"
    tasks = [data(generator, is_real=is_real) for _ in range(3)]
    return MetaLearner(network, make_algorithm(name, **settings), likelihood).fit(tasks, settings=ONE_STEP)


def data(generator: np.random.Generator, *, is_real: bool) -> tuple[np.ndarray, np.ndarray]:
    x = generator.normal(size=(NUM_ROWS, 2))
    y = np.stack([np.sin(2 * x[:, 0]), 100 + 20 * x[:, 1]], 1) + 0.1 * generator.normal(size=(NUM_ROWS, 2))
    return x, y if is_real else (x[:, 0] > -0.5).astype(int) + (x[:, 0] > 0.5)


def predicted(posterior: TaskPosterior, x: np.ndarray) -> np.ndarray:
    prediction = posterior.predict(x)
    if hasattr(prediction, "probs"):
        return prediction.probs
    return np.concatenate([prediction.mean, prediction.total_uncertainty], 1)


@pytest.mark.parametrize(("name", "settings"), [*REGRESSION, *CLASSES], ids=str)
@pytest.mark.parametrize("sizes", [(0, 3, 4, 5, 28), (7, 33), (1,) * 12 + (28,), (12, 27, 1)], ids=str)
def test_parts_in_any_order_are_all_at_once(name: str, settings: dict[str, Any], sizes: tuple[int, ...]) -> None:
    """Fewer examples than weights, as many, more, and from one side to the other; the same to 1e-8."""
    learner = learner_of(name, settings, num_outputs=2 if (name, settings) in REGRESSION else 3)
    x, y = data(np.random.default_rng(5), is_real=(name, settings) in REGRESSION)
    order = np.random.default_rng(sum(sizes[:1])).permutation(NUM_ROWS)
    has_prior = name not in ("prototypes",) and not settings.get("centre")
    parts = np.split(order, np.cumsum(sizes)[:-1])
    if not has_prior:
        parts = [part for part in parts if len(part)]
    posterior = learner.adapt(x[parts[0]], y[parts[0]])
    before = predicted(posterior, x[:4])
    first = posterior
    for part in parts[1:]:
        posterior = posterior.update(x[part], y[part])
    at_once = learner.adapt(x, y)
    assert posterior.num_support == at_once.num_support == NUM_ROWS
    np.testing.assert_allclose(predicted(posterior, x), predicted(at_once, x), rtol=1e-8)
    assert np.array_equal(predicted(first, x[:4]), before)
    is_exact = name in ("linear_gaussian", "gp", "gaussian_classes") and not settings.get("centre")
    is_exact = is_exact and settings.get("covariance") != "diagonal"
    assert (posterior._support is None) == is_exact == learner.algorithm.is_sequential


@pytest.mark.parametrize("outer", ["predictive_nll", "marginal"])
def test_the_marginal_likelihood_goes_on(outer: str) -> None:
    """That of all examples, however they came, and the parts of the posterior are those of solving at once."""
    learner = learner_of("linear_gaussian", {})
    head, x, y = learner.algorithm, *data(np.random.default_rng(5), is_real=True)
    head = dataclasses.replace(head, outer=outer)
    for sizes, kind in (((2, 3, 4), Reduction), ((4, 8), Precision), ((15, 5), Precision)):
        total = sum(sizes)
        parts = np.split(np.arange(total), np.cumsum(sizes)[:-1])
        posterior = learner.adapt(x[parts[0]], y[parts[0]])
        for part in parts[1:]:
            posterior = posterior.update(x[part], y[part])
        found, expected = (each.value.solution for each in (posterior, learner.adapt(x[:total], y[:total])))
        assert isinstance(found.spread, kind) and type(expected.spread) is kind
        for one, other in zip(head.support_nll(found), head.support_nll(expected), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-9, atol=0)
        torch.testing.assert_close(found.mean, expected.mean, rtol=1e-8, atol=1e-12)
        torch.testing.assert_close(found.spread.cholesky, expected.spread.cholesky, rtol=1e-8, atol=1e-10)
        roots = (each.spread.root for each in (found, expected))
        torch.testing.assert_close(*(root.mT @ root for root in roots), rtol=1e-8, atol=1e-9)


def test_a_thousand_updates_lose_nothing_and_cost_the_same() -> None:
    """One example at a time: what an update works with does not grow with the number of earlier ones."""
    learner = learner_of("linear_gaussian", {"prior": "full", "temperature": 0.5})
    generator = np.random.default_rng(7)
    x, y = (np.concatenate(parts) for parts in zip(*(data(generator, is_real=True) for _ in range(25)), strict=True))
    posterior = learner.adapt(x[:0], y[:0])
    sizes: set[int] = set()
    for row in range(len(x)):
        posterior = posterior.update(x[row : row + 1], y[row : row + 1])
        if row >= 10:
            sizes.add(sum(leaf.numel() for leaf in tree.leaves(posterior.value)))
    assert len(sizes) == 1
    expected = predicted(learner.adapt(x, y), x[:9])
    np.testing.assert_allclose(predicted(posterior, x[:9]), expected, rtol=1e-8, atol=1e-11)


def test_a_class_may_come_later_where_classes_are_exchangeable() -> None:
    """Of tensors the classes are those that were seen: a new one has the prior, as if it had been there before."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(12, 2, generator=generator, dtype=torch.float64)
    y = torch.arange(12) % 3
    tasks = [Episode(Batch(x, y), Batch(x, y))]
    network = MLP(3, input_shape=2, hidden_sizes=(4,), generator=generator).double()
    one_task = TrainerSettings(num_steps=1, tasks_per_step=1)
    learner = MetaLearner(network, "gaussian_classes").fit(tasks, settings=one_task)
    two = y < 2
    late = learner.adapt(x[two], y[two]).update(x[~two], y[~two])
    at_once = learner.adapt(x, y)
    torch.testing.assert_close(late.predict(x).log_probs, at_once.predict(x).log_probs, rtol=1e-9, atol=1e-12)
    assert learner.adapt(x[two], y[two]).predict(x).probs.shape == (12, 2)


def test_how_far_from_solved_and_what_helps() -> None:
    """With few inner steps parts differ from the whole; further steps bring both to the one solution."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(12, 2, generator=generator, dtype=torch.float64)
    y = 3 * x[:, :1] - 1 + 0.1 * torch.randn(12, 1, generator=generator, dtype=torch.float64)
    tasks = [Episode(Batch(x, y), Batch(x, y))]
    one_task = TrainerSettings(num_steps=1, tasks_per_step=1)

    def fit(algorithm: Any) -> MetaLearner:
        network = MLP(1, input_shape=2, hidden_sizes=(), norm="none").double()
        return MetaLearner(network, algorithm, "gaussian").fit(tasks, settings=one_task)

    def gap(one: TaskPosterior, other: TaskPosterior) -> float:
        return float(tree.norm(tree.sub(one.value, other.value)))

    inner = GradientDescent(num_steps=3, learning_rate=0.1)
    learner = fit(make_algorithm("imaml", inner=inner, proximal_strength=0.5))
    whole, parts = learner.adapt(x, y), learner.adapt(x[:3], y[:3]).update(x[3:], y[3:])
    assert whole.distance_to_solution() == gap(whole.refined(), whole) / float(tree.norm(whole.value)) > 0.1
    assert gap(whole.refined(60), parts.refined(60)) < 1e-6 < 1e-2 < gap(whole, parts)
    assert whole.refined(60).distance_to_solution() < 1e-6
    distribution = fit("ibaml").adapt(x, y)
    before, after = distribution.value, distribution.refined().value
    shifts = [
        (after.mean[name] - before.mean[name]) / (0.5 * log_var).exp() for name, log_var in before.log_var.items()
    ]
    expected = torch.cat([each.flatten() for each in shifts]).square().mean().sqrt()
    assert distribution.distance_to_solution() == pytest.approx(float(expected))
    head = fit("linear_gaussian").adapt(x, y)
    assert head.refined(3) is head and head.distance_to_solution() == 0
    with pytest.raises(ValueError, match="rounds must be at least 1, got 0"):
        whole.refined(0)
