"""Gaussian classes against dense Gaussian conditioning, Monte Carlo and central differences."""

import math
import re
from typing import Any

import pytest
import torch
from torch.distributions import MultivariateNormal, Normal

from ibaml import records, tree
from ibaml.algorithms import RECORDS, MetaParameters, TaskNoise, make_algorithm
from ibaml.algorithms.heads import GaussianClasses
from ibaml.algorithms.heads.gaussian_classes import GaussianClassesPrior
from ibaml.types import Batch, Episode, Params, Tensor

DOUBLE = torch.float64
HEADS = {"tied": GaussianClasses(), "own": GaussianClasses(tied=False)}
NO_NOISE = TaskNoise({}, {})


def randn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)


def with_constant(features: Tensor) -> Tensor:
    return torch.cat([features, torch.ones_like(features[..., :1])], -1)


class LinearFeatures:
    """What a head asks of a model."""

    num_outputs = 3

    def features(self, shared: Params, x: Tensor) -> Tensor:
        return torch.tanh(x @ shared["body.weight"].mT)


def set_up(head: GaussianClasses, num_classes: int = 3) -> tuple[GaussianClassesPrior, Batch, Batch]:
    """A prior away from any symmetry, and a task whose last class has no example and whose first has most."""
    prior = head.init_prior(4, num_classes, like=torch.zeros((), dtype=DOUBLE))
    prior = tree.map(lambda leaf: leaf + 0.5 * randn(*leaf.shape, seed=1), prior)
    support = Batch(with_constant(2 * randn(5, 3, seed=2)), torch.tensor([0, 1, 0, 0, 1]))
    return prior, support, Batch(with_constant(2 * randn(6, 3, seed=3)), torch.arange(6) % num_classes)


def log_frequency(head: GaussianClasses, prior: GaussianClassesPrior, num_classes: int = 3) -> Tensor:
    if head.tied:
        return torch.full((num_classes,), -math.log(num_classes), dtype=DOUBLE)
    return torch.log_softmax(prior.log_frequency, 0)


@pytest.mark.parametrize("name", HEADS)
def test_outputs_are_those_of_conditioning_a_joint_gaussian(name: str) -> None:
    """Support features of a class and one query are jointly Gaussian: ``cov = sigma2 I + tau2 1 1^T`` per feature."""
    head = HEADS[name]
    prior, support, query = set_up(head)
    solution, residual = head.solve(prior, {}, support, 3)
    found = head.mean(solution, query.x)
    assert residual == 0 and found.shape == (6, 3)
    assert torch.equal(head.predict(solution, {}, query.x, {})["outputs"][0], found)
    frequency = log_frequency(head, prior)
    for label in range(3):
        row = 0 if head.tied else label
        mine = support.x[support.y == label, :-1]
        for i, z in enumerate(query.x[:, :-1]):
            density = frequency[label]
            for f in range(3):
                tau2, sigma2 = prior.log_tau2[row, f].exp(), prior.log_sigma2[f].exp()

                def joint(size: int, f: int = f, row: int = row, tau2: Tensor = tau2, sigma2: Tensor = sigma2) -> Any:
                    covariance = sigma2 * torch.eye(size, dtype=DOUBLE) + tau2
                    return MultivariateNormal(prior.mean[row, f].expand(size), covariance)

                values = torch.cat([mine[:, f], z[f : f + 1]])
                density = density + joint(len(values)).log_prob(values)
                if len(mine):
                    density = density - joint(len(mine)).log_prob(mine[:, f])
            torch.testing.assert_close(found[i, label], density, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", HEADS)
def test_without_examples_features_are_those_of_the_prior(name: str) -> None:
    """``log pi_c + log N(z; m_c, tau2_c + sigma2)``."""
    head = HEADS[name]
    prior, support, query = set_up(head)
    meta = MetaParameters(prior, {"body.weight": randn(3, 2, seed=4)})
    nothing = Batch(randn(0, 2, seed=1), support.y[:0])
    adapted = head.adapt(LinearFeatures(), meta, nothing, NO_NOISE)
    scale = (prior.log_tau2.exp() + prior.log_sigma2.exp()).sqrt()
    expected = Normal(prior.mean, scale).log_prob(query.x[:, None, :-1]).sum(-1) + log_frequency(head, prior)
    torch.testing.assert_close(head.mean(adapted.value.solution, query.x), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", HEADS)
def test_outputs_integrate_over_class_means(name: str) -> None:
    head = HEADS[name]
    prior, support, query = set_up(head)
    solution, _ = head.solve(prior, {}, support, 3)
    num_samples = 100_000
    noise = torch.randn(num_samples, 3, 3, generator=torch.Generator().manual_seed(5), dtype=DOUBLE)
    means = solution.mean + torch.exp(0.5 * solution.log_var) * noise
    for z, expected in zip(query.x[:3, :-1], head.mean(solution, query.x[:3]), strict=True):
        densities = Normal(means, torch.exp(0.5 * solution.log_sigma2)).log_prob(z).sum(-1).exp()
        expected = torch.exp(expected - solution.log_frequency)
        assert ((densities.mean(0) - expected).abs() < 5 * densities.std(0) / math.sqrt(num_samples)).all()


@pytest.mark.parametrize("name", HEADS)
def test_posterior_is_that_of_one_example_after_the_other(name: str) -> None:
    """Bayes' rule: the posterior of some examples is the prior of the next, class by class."""
    head, own = HEADS[name], HEADS["own"]
    prior, support, _ = set_up(head)
    at_once, _ = head.solve(prior, {}, support, 3)
    step = GaussianClassesPrior(
        prior.mean.expand(3, 3), prior.log_tau2.expand(3, 3), prior.log_sigma2, torch.zeros(3, dtype=DOUBLE)
    )
    for i in range(5):
        after, _ = own.solve(step, {}, Batch(support.x[i : i + 1], support.y[i : i + 1]), 3)
        step = step._replace(mean=after.mean, log_tau2=after.log_var)
    torch.testing.assert_close(at_once.mean, step.mean, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(at_once.log_var, step.log_tau2, rtol=1e-12, atol=1e-12)
    # The class without examples keeps the prior.
    assert torch.equal(at_once.mean[2], prior.mean[-1]) and torch.equal(at_once.log_var[2], prior.log_tau2[-1])


@pytest.mark.parametrize("name", HEADS)
def test_out_of_task_is_the_log_bayes_factor_of_a_class_that_is_not_in_the_task(name: str) -> None:
    """Densities by torch.distributions: of a class from the prior over the task's own."""
    head = HEADS[name]
    prior, support, query = set_up(head)
    solution, _ = head.solve(prior, {}, support, 3)
    frequency = log_frequency(head, prior)

    def log_density(mean: Tensor, log_var: Tensor, weights: Tensor) -> Tensor:
        deviation = (log_var.exp() + prior.log_sigma2.exp()).sqrt()
        each = Normal(mean, deviation).log_prob(query.x[:, None, :-1]).sum(-1)
        return torch.log((weights.exp() * each.exp()).sum(-1))

    new = log_density(prior.mean, prior.log_tau2, frequency if not head.tied else torch.zeros(1, dtype=DOUBLE))
    expected = new - log_density(solution.mean, solution.log_var, frequency)
    found = head.predict(solution, {}, query.x, {})["out_of_task"]
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def test_what_is_far_away_is_of_no_class_and_what_is_at_a_class_mean_is_not_foreign() -> None:
    head = GaussianClasses()
    prior = tree.map(lambda leaf: leaf.double(), head.init_prior(4, 2, like=torch.zeros(())))
    support = Batch(with_constant(torch.eye(3, dtype=DOUBLE)[[0, 0, 0, 1, 1, 1]]), torch.tensor([0, 0, 0, 1, 1, 1]))
    solution, _ = head.solve(prior, {}, support, 2)
    along = with_constant(torch.tensor([0.0, 1.0, 3.0, 10.0, 100.0], dtype=DOUBLE)[:, None] * solution.mean[0])
    far = head.predict(solution, {}, along, {})["out_of_task"]
    assert (far[2:].diff() > 0).all() and far[-1] > 100
    assert far[1] < 0


@pytest.mark.parametrize("name", HEADS)
def test_hypergradient_is_that_of_central_differences(name: str) -> None:
    head, model = HEADS[name], LinearFeatures()
    prior, _, _ = set_up(head)
    meta = MetaParameters(prior, {"body.weight": randn(3, 4, seed=6)})
    support = Batch(randn(5, 4, seed=7), torch.tensor([0, 1, 0, 0, 1]))
    episode = Episode(support, Batch(randn(6, 4, seed=8), torch.arange(6) % 3))

    def outer_loss(theta: MetaParameters) -> Tensor:
        solution = head.adapt(model, theta, episode.support, NO_NOISE).value.solution
        query = Batch(with_constant(model.features(theta.shared, episode.query.x)), episode.query.y)
        return torch.nn.functional.cross_entropy(head.mean(solution, query.x), query.y)

    gradient, info = head.hypergradient(model, meta, episode, NO_NOISE)
    torch.testing.assert_close(info.outer_loss, outer_loss(meta), rtol=1e-12, atol=0)
    flat, unravel = tree.ravel(meta)
    expected = torch.stack(
        [
            (8 * (value(1) - value(-1)) - (value(2) - value(-2))) / (12 * 1e-3)
            for direction in torch.eye(len(flat), dtype=DOUBLE)
            for value in [lambda k, d=direction: outer_loss(unravel(flat + k * 1e-3 * d))]
        ]
    )
    assert (tree.ravel(gradient)[0] - expected).norm() < 1e-8 * expected.norm()


@pytest.mark.parametrize("name", HEADS)
def test_vmap_over_tasks_equals_the_loop(name: str) -> None:
    head = HEADS[name]
    prior, support, query = set_up(head)
    episodes = [Episode(support, query), tree.map(lambda leaf: leaf.flip(0), Episode(support, query))]
    stacked = tree.map(lambda *leaves: torch.stack(leaves), *episodes)

    def loss(prior: GaussianClassesPrior, episode: Episode) -> Tensor:
        return head.outer_loss(head.solve(prior, {}, episode.support, 3)[0], {}, episode.query)

    found = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(prior, stacked)
    for i, episode in enumerate(episodes):
        expected = torch.func.grad(loss)(prior, episode)
        for actual, wanted in zip(tree.leaves(found), tree.leaves(expected), strict=True):
            torch.testing.assert_close(actual[i], wanted, rtol=1e-12, atol=1e-12)


def test_a_tied_prior_serves_any_number_of_classes_and_one_example() -> None:
    head = HEADS["tied"]
    prior, support, query = set_up(head)
    assert head.serves_any_number_of_outputs and not HEADS["own"].serves_any_number_of_outputs
    solution, _ = head.solve(prior, {}, Batch(support.x[:1], support.y[:1]), 7)
    outputs = head.mean(solution, query.x)
    assert outputs.shape == (6, 7) and torch.isfinite(outputs).all()
    # The classes without examples are exchangeable; the example itself is most probably of its own.
    assert (outputs[:, 1:] - outputs[:, 1:2]).abs().max() < 1e-12
    assert int(head.mean(solution, support.x[:1]).argmax()) == 0
    message = "the task has 7 classes, but there are priors for 3: classes that each have a prior of their own are"
    with pytest.raises(ValueError, match=re.escape(message)):
        HEADS["own"].solve(HEADS["own"].init_prior(4, 3, like=prior.mean), {}, support, 7)


def test_thousands_of_examples_leave_the_class_means() -> None:
    # Both variances are 1.
    head = GaussianClasses(initial_within_variance=1 / math.sqrt(20))
    labels = torch.arange(5000) % 4
    features = randn(4, 20, seed=1)[labels] + 0.5 * randn(5000, 20, seed=2)
    prior = head.init_prior(21, 4, like=features)
    solution, _ = head.solve(prior, {}, Batch(with_constant(features), labels), 4)
    averages = torch.stack([features[labels == label].mean(0) for label in range(4)])
    torch.testing.assert_close(solution.mean, averages * 1250 / 1251, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(solution.log_var.exp(), torch.full_like(averages, 1 / 1251), rtol=1e-12, atol=0)


@pytest.mark.parametrize("offset", [0.0, 30.0])
def test_float32_agrees_with_float64(offset: float) -> None:
    head, labels = HEADS["tied"], torch.arange(25) % 5
    features = offset + randn(5, 800, seed=1)[labels] + randn(25, 800, seed=2)
    found: list[Tensor] = []
    for dtype in (torch.float32, DOUBLE):
        z = with_constant(features.to(dtype))
        prior = head.init_prior(801, 5, like=z)
        prior = prior._replace(mean=prior.mean + offset)
        found.append(torch.log_softmax(head.mean(head.solve(prior, {}, Batch(z, labels), 5)[0], z), -1).double())
    # Log-probabilities of some hundred nats; features of 30 are rounded by 1e-6 each.
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-3)


def test_it_survives_json_and_says_what_it_does() -> None:
    head = make_algorithm("gaussian_classes", tied=False, initial_class_variance=0.5)
    assert records.from_json(records.to_json(head), RECORDS) == head
    assert head.describe() == "exact posterior of class means, Bayes' rule" and head.temperature == 1.0
    prior = HEADS["own"].init_prior(4, 3, like=torch.zeros(()))
    assert [len(group) for group in HEADS["own"].parameter_groups(prior)] == [2, 2]


@pytest.mark.parametrize("name", ["initial_class_variance", "initial_within_variance"])
def test_settings_that_cannot_work_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=re.escape(f"{name} must be positive and finite, but is 0.0.")):
        make_algorithm("gaussian_classes", **{name: 0.0})
