"""Prototypes against distances to class means, one by one."""

import math
import re

import pytest
import torch

from ibaml import records, tree
from ibaml.algorithms import RECORDS, MetaParameters, TaskNoise, make_algorithm
from ibaml.algorithms.heads import Prototypes
from ibaml.algorithms.heads.prototypes import PrototypesScale
from ibaml.types import Batch, Episode, Params, Tensor

DOUBLE = torch.float64
HEAD = Prototypes()


def randn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)


def with_constant(features: Tensor) -> Tensor:
    return torch.cat([features, torch.ones_like(features[..., :1])], -1)


def set_up() -> tuple[PrototypesScale, Batch, Batch]:
    """A task of three classes, the last without an example in its support set."""
    support = Batch(with_constant(2 * randn(5, 3, seed=2)), torch.tensor([0, 1, 0, 0, 1]))
    query = Batch(with_constant(2 * randn(6, 3, seed=3)), torch.arange(6) % 3)
    return HEAD.init_prior(4, 3, like=query.x), support, query


def by_hand(prior: PrototypesScale, support: Batch, x: Tensor) -> Tensor:
    """Logits of classes 0 and 1."""
    means = [support.x[support.y == label, :-1].mean(0) for label in range(2)]
    return -torch.stack([((x[:, :-1] - mean) ** 2).sum(-1) for mean in means], -1) / prior.log_scale.exp()


def test_logits_are_squared_distances_over_the_scale() -> None:
    prior, support, query = set_up()
    assert float(prior.log_scale.exp()) == pytest.approx(3)
    solution, residual = HEAD.solve(prior, {}, support, 3)
    found = HEAD.mean(solution, query.x)
    expected = by_hand(prior, support, query.x)
    torch.testing.assert_close(found[:, :2], expected, rtol=1e-12, atol=1e-12)
    # The class without examples: as far as the others on average.
    torch.testing.assert_close(found[:, 2], expected.mean(-1), rtol=1e-12, atol=1e-12)
    assert residual == 0 and torch.equal(HEAD.predict(solution, {}, query.x, {})["outputs"][0], found)
    loss = torch.nn.functional.cross_entropy(found, query.y)
    torch.testing.assert_close(HEAD.outer_loss(solution, {}, query), loss, rtol=1e-12, atol=0)


def test_hypergradient_is_that_of_autograd_by_hand() -> None:
    class Model:
        num_outputs = 2

        def features(self, shared: Params, x: Tensor) -> Tensor:
            return torch.tanh(x @ shared["body.weight"].mT)

    prior, support, query = set_up()
    meta = MetaParameters(prior, {"body.weight": randn(3, 4, seed=4)})
    episode = Episode(support, Batch(query.x, query.y % 2))

    def objective(theta: MetaParameters) -> Tensor:
        z, z_query = (with_constant(Model().features(theta.shared, batch.x)) for batch in episode)
        return torch.nn.functional.cross_entropy(by_hand(theta.prior, Batch(z, support.y), z_query), episode.query.y)

    gradient, info = HEAD.hypergradient(Model(), meta, episode, TaskNoise({}, {}))
    torch.testing.assert_close(info.outer_loss, objective(meta), rtol=1e-12, atol=0)
    for one, other in zip(tree.leaves(gradient), tree.leaves(torch.func.grad(objective)(meta)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


def test_one_example_leaves_all_classes_equally_probable() -> None:
    prior, support, query = set_up()
    solution, _ = HEAD.solve(prior, {}, Batch(support.x[:1], support.y[:1]), 7)
    outputs = HEAD.mean(solution, query.x)
    assert outputs.shape == (6, 7)
    torch.testing.assert_close(outputs, outputs[:, :1].expand(6, 7), rtol=1e-12, atol=1e-12)


def test_vmap_over_tasks_equals_the_loop() -> None:
    prior, support, query = set_up()
    episodes = [Episode(support, query), Episode(Batch(support.x.flip(0), torch.tensor([2, 1, 1, 1, 1])), query)]
    stacked = tree.map(lambda *leaves: torch.stack(leaves), *episodes)

    def loss(prior: PrototypesScale, episode: Episode) -> Tensor:
        return HEAD.outer_loss(HEAD.solve(prior, {}, episode.support, 3)[0], {}, episode.query)

    found = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(prior, stacked)
    expected = torch.stack([torch.func.grad(loss)(prior, episode).log_scale for episode in episodes])
    torch.testing.assert_close(found.log_scale, expected, rtol=1e-12, atol=1e-12)


def test_float32_agrees_with_float64_for_thousands_of_examples_far_from_zero() -> None:
    labels = torch.arange(5000) % 4
    features = 30 + randn(4, 100, seed=1)[labels] + randn(5000, 100, seed=2)
    found: list[Tensor] = []
    for dtype in (torch.float32, DOUBLE):
        z = with_constant(features.to(dtype))
        solution, _ = HEAD.solve(HEAD.init_prior(101, 4, like=z), {}, Batch(z, labels), 4)
        found.append(HEAD.mean(solution, z[:50]).double())
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-5)


def test_it_survives_json_and_says_what_it_does() -> None:
    head = make_algorithm("prototypes", initial_scale=0.5)
    assert records.from_json(records.to_json(head), RECORDS) == head
    assert float(head.init_prior(11, 2, like=torch.zeros(())).log_scale) == pytest.approx(math.log(5))
    assert head.describe() == "class means, squared distances over a learned scale"
    assert head.temperature is None and head.serves_any_number_of_outputs
    prior = HEAD.init_prior(4, 3, like=torch.zeros(()))
    assert [len(group) for group in HEAD.parameter_groups(prior)] == [0, 1]


def test_a_scale_that_cannot_work_is_refused() -> None:
    with pytest.raises(ValueError, match=re.escape("initial_scale must be positive and finite, but is 0.0.")):
        make_algorithm("prototypes", initial_scale=0.0)
