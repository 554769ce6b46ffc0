"""Nearest neighbours against scikit-learn, and by hand."""

import math

import pytest
import torch

from ibaml.algorithms import MetaParameters
from ibaml.algorithms.heads import Neighbours
from ibaml.algorithms.heads.neighbours import NeighboursPrior
from ibaml.likelihoods import Gaussian, Poisson
from ibaml.types import Batch, Episode, Tensor

DOUBLE = torch.float64


def randn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)


def with_constant(features: Tensor) -> Tensor:
    return torch.cat([features, torch.ones_like(features[..., :1])], -1)


def prior(scale: float = math.inf, smoothing: float = 0.1) -> NeighboursPrior:
    return NeighboursPrior(*(torch.tensor(math.log(value), dtype=DOUBLE) for value in (scale, smoothing)))


def test_numbers_are_those_of_scikit_learn() -> None:
    neighbors = pytest.importorskip("sklearn.neighbors")
    x, y, query = randn(12, 3, seed=0), randn(12, 2, seed=1), randn(7, 3, seed=2)
    head = Neighbours(num_neighbours=4)
    solution, residual = head.solve(prior(), {}, Batch(with_constant(x), y), 2)
    found = head.predict(solution, {}, with_constant(query), {})["outputs"]
    expected = neighbors.KNeighborsRegressor(4).fit(x.numpy(), y.numpy()).predict(query.numpy())
    torch.testing.assert_close(found[0], torch.from_numpy(expected), rtol=1e-12, atol=1e-12)
    assert residual == 0


def test_probabilities_are_smoothed_weights() -> None:
    x, query = randn(9, 2, seed=0), randn(4, 2, seed=1)
    y = torch.arange(9) % 3
    head = Neighbours(num_neighbours=5)
    solution, _ = head.solve(prior(0.7), {}, Batch(with_constant(x), y), 4)
    probs = torch.softmax(head.mean(solution, with_constant(query)), -1)
    for row, point in zip(probs, query, strict=True):
        squares = ((x - point) ** 2).sum(-1)
        nearest = squares.argsort()[:5]
        weights = torch.exp(-squares[nearest] / 0.7)
        votes = torch.stack([weights[y[nearest] == label].sum() for label in range(4)]) / weights.sum() + 0.1
        torch.testing.assert_close(row, votes / votes.sum(), rtol=1e-10, atol=1e-12)


def test_loss_of_numbers_is_that_of_the_likelihood() -> None:
    support, query = (Batch(with_constant(randn(6, 2, seed=i)), randn(6, 2, seed=i + 5)) for i in range(2))
    shared = {Gaussian.parameter_name: torch.tensor([0.3, -0.4], dtype=DOUBLE)}
    head = Neighbours(num_neighbours=9)
    solution, _ = head.solve(prior(), shared, support, 2)
    expected = Gaussian(num_targets=2).nll(support.y.mean(0).expand(6, 2), query.y, shared).mean()
    torch.testing.assert_close(head.outer_loss(solution, shared, query), expected, rtol=1e-12, atol=0)


def test_settings_and_likelihoods_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="initial_scale must be positive and finite, but is 0"):
        Neighbours(initial_scale=0.0)
    with pytest.raises(ValueError, match="num_neighbours"):
        Neighbours(num_neighbours=0)

    class Model:
        likelihood = Poisson()

    batch = Batch(torch.zeros(1, 1), torch.zeros(1, 1))
    with pytest.raises(ValueError, match="averages classes, or numbers with Gaussian noise of one variance"):
        Neighbours().check_task(Model(), MetaParameters(prior(), {}), Episode(batch, batch))
