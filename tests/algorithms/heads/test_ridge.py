"""The ridge head against scikit-learn, the normal equations and differences."""

import math
import re
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge as ScikitRidge
from torch import nn
from torch.nn import functional

from ibaml import records, tree
from ibaml.algorithms import RECORDS, MetaParameters, TaskNoise, make_algorithm
from ibaml.algorithms.heads import Ridge
from ibaml.algorithms.model import build_model
from ibaml.likelihoods import Categorical, Gaussian
from ibaml.types import Batch, Episode, Params, Tensor

DOUBLE = torch.float64
NO_NOISE = TaskNoise({}, {})
NUM_FEATURES, NUM_CLASSES = 4, 3


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Features:
    num_outputs = NUM_CLASSES

    def features(self, shared: Params, x: Tensor) -> Tensor:
        return torch.tanh(x @ shared["weight"])


def set_up(algorithm: Ridge, num_support: int = 3) -> tuple[Features, MetaParameters, Episode]:
    source = generator(2)
    prior = algorithm.init_prior(NUM_FEATURES + 1, NUM_CLASSES, like=torch.zeros(0, dtype=DOUBLE))
    meta = MetaParameters(prior, {"weight": torch.zeros(2, NUM_FEATURES, dtype=DOUBLE)})
    meta = tree.map(lambda leaf: leaf + 0.5 * torch.randn(leaf.shape, generator=source, dtype=DOUBLE), meta)
    support, query = (
        Batch(torch.randn(size, 2, generator=source, dtype=DOUBLE), torch.arange(size) % NUM_CLASSES)
        for size in (num_support, 5)
    )
    return Features(), meta, Episode(support, query)


def logits_by_hand(theta: MetaParameters, support: Batch, x: Tensor) -> Tensor:
    def design(batch: Tensor) -> Tensor:
        hidden = torch.tanh(batch @ theta.shared["weight"])
        return torch.cat([hidden, torch.ones_like(hidden[:, :1])], -1)

    z, one_hot = design(support.x), functional.one_hot(support.y, NUM_CLASSES).double()
    regularization = theta.prior.log_regularization.exp() * torch.eye(NUM_FEATURES + 1, dtype=DOUBLE)
    weights = torch.linalg.inv(z.mT @ z + regularization) @ z.mT @ one_hot
    bias = theta.prior.bias if len(theta.prior.bias) else 0.0
    return theta.prior.log_scale.exp() * design(x) @ weights + bias


def assert_near(actual: Any, expected: Any, tolerance: float) -> None:
    for one, other in zip(tree.leaves(actual), tree.leaves(expected), strict=True):
        assert float((one - other).norm()) <= tolerance * float(other.norm()), f"{one} against {other}"


@pytest.mark.parametrize("tied", [True, False])
# Fewer examples than features, and more; classes without examples among them.
@pytest.mark.parametrize("num_support", [1, 3, 12])
def test_solution_and_hypergradient_are_those_of_the_normal_equations(num_support: int, tied: bool) -> None:
    algorithm = Ridge(tied=tied)
    nll, meta, episode = set_up(algorithm, num_support)
    adapted = algorithm.adapt(nll, meta, episode.support, NO_NOISE)
    found = algorithm.outputs(nll, meta.shared, adapted.value, episode.query.x, {})
    assert list(found) == ["outputs"] and found["outputs"].shape == (1, 5, NUM_CLASSES)
    assert_near(found["outputs"][0], logits_by_hand(meta, episode.support, episode.query.x), 1e-10)
    assert adapted.grad_norm < 1e-12
    gradient, info = algorithm.hypergradient(nll, meta, episode, NO_NOISE)

    def objective(theta: MetaParameters) -> Tensor:
        return functional.cross_entropy(logits_by_hand(theta, episode.support, episode.query.x), episode.query.y)

    assert_near(info.outer_loss, objective(meta), 1e-10)
    assert_near(gradient, torch.func.grad(objective)(meta), 1e-9)


def test_hypergradient_equals_central_differences() -> None:
    algorithm = Ridge(tied=False, centre=True)
    nll, meta, episode = set_up(algorithm)
    gradient, _ = algorithm.hypergradient(nll, meta, episode, NO_NOISE)
    flat, unravel = tree.ravel(meta)

    def loss(vector: Tensor) -> Tensor:
        return algorithm.hypergradient(nll, unravel(vector), episode, NO_NOISE)[1].outer_loss

    units = 1e-5 * torch.eye(len(flat), dtype=DOUBLE)
    above, below = torch.func.vmap(loss)(torch.cat([flat + units, flat - units])).chunk(2)
    assert_near(gradient, unravel((above - below) / 2e-5), 1e-7)


def test_equals_scikit_learn() -> None:
    source = generator(1)
    x, query = (torch.randn(size, 40, generator=source, dtype=DOUBLE) for size in (25, 7))
    labels = torch.arange(25) % 5
    prior = Ridge().init_prior(40, 5, like=x)
    solution, _ = Ridge().solve(prior, {}, Batch(x, labels), 5)
    wanted = ScikitRidge(alpha=39.0, fit_intercept=False).fit(x.numpy(), functional.one_hot(labels).double().numpy())
    np.testing.assert_allclose(Ridge().mean(solution, query), 10 * wanted.predict(query.numpy()), rtol=1e-9, atol=1e-12)


def test_tied_classes_may_be_of_any_number() -> None:
    algorithm = Ridge()
    assert algorithm.serves_any_number_of_outputs and not Ridge(tied=False).serves_any_number_of_outputs
    source = generator(1)
    prior = algorithm.init_prior(9, 5, like=torch.zeros(0, dtype=DOUBLE))
    labels = torch.arange(14) % 7
    inputs = 3 * torch.eye(9, dtype=DOUBLE)[labels] + torch.randn(14, 9, generator=source, dtype=DOUBLE)
    solution, _ = algorithm.solve(prior, {}, Batch(inputs, labels), 7)
    assert algorithm.mean(solution, inputs).argmax(-1).tolist() == labels.tolist()


@pytest.mark.parametrize("num_support", [3, 12])
def test_vmap_over_tasks_equals_the_loop(num_support: int) -> None:
    algorithm = Ridge()
    nll, meta, episode = set_up(algorithm, num_support)
    episodes = [episode, tree.map(lambda leaf: leaf.flip(0), episode)]
    stacked = tree.map(lambda *leaves: torch.stack(leaves), *episodes)
    found = torch.func.vmap(lambda e: algorithm.hypergradient(nll, meta, e, NO_NOISE))(stacked)
    for i, each in enumerate(episodes):
        expected = algorithm.hypergradient(nll, meta, each, NO_NOISE)
        for actual, wanted in zip(tree.leaves(found), tree.leaves(expected), strict=True):
            torch.testing.assert_close(actual[i], wanted, rtol=1e-12, atol=1e-12)


def test_logits_have_the_type_of_the_features() -> None:
    algorithm = Ridge()
    prior, inputs = algorithm.init_prior(3, 2, like=torch.zeros(0)), torch.ones(4, 3)
    solution, _ = algorithm.solve(prior, {}, Batch(inputs, torch.arange(4) % 2), 2)
    assert algorithm.mean(solution, inputs).dtype == torch.float32
    assert algorithm.outer_loss(solution, {}, Batch(inputs, torch.arange(4) % 2)).dtype == torch.float32


def test_it_has_no_posterior() -> None:
    algorithm = make_algorithm("ridge")
    assert not algorithm.is_bayesian and algorithm.temperature is None
    assert algorithm.describe() == "exact ridge regression on one-hot labels"
    assert records.from_json(records.to_json(algorithm), RECORDS) == algorithm
    prior = Ridge(tied=False).init_prior(3, 2, like=torch.zeros(0))
    where, wide = Ridge().parameter_groups(prior)
    assert where == [prior.bias] and wide == [prior.log_regularization, prior.log_scale]


def test_numbers_are_refused() -> None:
    algorithm = Ridge()
    nll, meta, episode = set_up(algorithm)
    known = SimpleNamespace(likelihood=Categorical(), num_outputs=3, features=nll.features)
    algorithm.check_task(known, meta, episode)  # pyright: ignore[reportArgumentType]
    message = "algorithm 'ridge' is regression on one-hot labels of classes, but the likelihood is Gaussian("
    with pytest.raises(ValueError, match=re.escape(message)):
        algorithm.check_task(build_model(nn.Linear(2, 1), Gaussian()), meta, episode)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"initial_regularization": 0.0}, "initial_regularization must be positive and finite, but is 0.0."),
        ({"initial_scale": math.inf}, "initial_scale must be positive and finite, but is inf."),
    ],
)
def test_settings_that_cannot_work_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        make_algorithm("ridge", **settings)
