"""Several targets of which some were not measured: each is what it is alone, with the examples where it was."""

import math

import pytest
import torch

from ibaml import tree
from ibaml.algorithms import make_algorithm
from ibaml.algorithms.heads.gaussian import Measured
from ibaml.likelihoods import Gaussian
from ibaml.priors import DiagonalColumnPrior, FullColumnPrior
from ibaml.types import Batch

NUM_TARGETS, NUM_INPUTS = 3, 5
HEADS = {
    "diagonal prior": ("linear_gaussian", {}),
    "full prior": ("linear_gaussian", {"prior": FullColumnPrior()}),
    "one prior for all": ("linear_gaussian", {"prior": DiagonalColumnPrior(tied=True)}),
    "diagonal posterior": ("linear_gaussian", {"covariance": "diagonal", "temperature": 0.5}),
    "process": ("gp", {}),
    "one process for all": ("gp", {"tied": True, "mean_function": "zero"}),
}
EXACT = [name for name in HEADS if name != "diagonal posterior"]
LOG_NOISE = torch.tensor([-1.0, 0.3, 0.7], dtype=torch.float64)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def draw(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=generator(seed))


def examples(number, seed):
    """Returns examples with a constant input, of which the last target was measured in the first two alone."""
    x = torch.cat([draw(number, NUM_INPUTS - 1, seed=seed), torch.ones(number, 1, dtype=torch.float64)], 1)
    missing = torch.rand(number, NUM_TARGETS, generator=generator(seed)) < 0.4
    missing[:, 2], missing[:2, :] = True, False
    return Batch(x, draw(number, NUM_TARGETS, seed=seed + 50).masked_fill(missing, math.nan))


def alone(batch, target):
    """Returns the examples where a target was measured, with that target."""
    kept = ~batch.y[:, target].isnan()
    return Batch(batch.x[kept], batch.y[kept, target : target + 1])


def build(name, outer="predictive_nll"):
    """Returns a head, its prior, and a function that gives prior and noise of a target alone."""
    algorithm, settings = HEADS[name]
    head = make_algorithm(algorithm, **settings, outer=outer)
    prior = head.init_prior(NUM_INPUTS, NUM_TARGETS, like=torch.empty(0, dtype=torch.float64))
    prior = tree.map(lambda leaf: leaf + 0.3 * torch.cos(torch.arange(leaf.numel())).view_as(leaf), prior)

    def of_target(target):
        own = tree.map(lambda leaf: leaf[target : target + 1] if len(leaf) == NUM_TARGETS else leaf, prior)
        return own, {Gaussian.parameter_name: LOG_NOISE[target : target + 1]}

    return head, prior, of_target


SHARED = {Gaussian.parameter_name: LOG_NOISE}
FEW, MANY, MORE, QUERY = examples(4, 1), examples(11, 2), examples(3, 3), examples(7, 4)


def assert_same(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


OF_SIZE = pytest.mark.parametrize("support", [FEW, MANY], ids=["few", "many"])


@OF_SIZE
@pytest.mark.parametrize("name", HEADS)
def test_each_target_has_the_posterior_of_its_own_examples(name, support):
    head, prior, of_target = build(name)
    solution, residual = head.solve(prior, SHARED, support, NUM_TARGETS)
    moments, covariance = head.moments(solution, QUERY.x), head.joint_covariance(solution, QUERY.x)
    assert float(residual) < 1e-10
    for target in range(NUM_TARGETS):
        expected, _ = head.solve(*of_target(target), alone(support, target), 1)
        for one, other in zip(moments, head.moments(expected, QUERY.x), strict=True):
            assert_same(one[target], other[0])
        assert_same(covariance[target], head.joint_covariance(expected, QUERY.x)[0])


@OF_SIZE
@pytest.mark.parametrize("name", EXACT)
def test_further_examples_are_taken_in_where_they_were_measured(name, support):
    head, prior, _ = build(name)
    first, _ = head.solve(prior, SHARED, support, NUM_TARGETS)
    extended, residual = head.extend(first, SHARED, MORE, NUM_TARGETS)
    both = Batch(torch.cat([support.x, MORE.x]), torch.cat([support.y, MORE.y]))
    expected, _ = head.solve(prior, SHARED, both, NUM_TARGETS)
    assert float(residual) < 1e-10
    for one, other in zip(head.moments(extended, QUERY.x), head.moments(expected, QUERY.x), strict=True):
        assert_same(one, other)
    assert_same(head.support_nll(extended)[0], head.support_nll(expected)[0])


@OF_SIZE
@pytest.mark.parametrize(
    ("name", "outer"),
    [(name, outer) for name in HEADS for outer in ("predictive_nll", "expected_nll")]
    + [(name, "marginal") for name in EXACT],
)
def test_losses_are_the_sums_of_those_of_single_targets(name, outer, support):
    head, prior, of_target = build(name, outer)
    solution, _ = head.solve(prior, SHARED, support, NUM_TARGETS)
    found = head.outer_loss(solution, SHARED, QUERY)
    total = torch.zeros((), dtype=torch.float64)
    of_support = torch.zeros((), dtype=torch.float64)
    for target in range(NUM_TARGETS):
        own_prior, own_shared = of_target(target)
        own_support, own_query = alone(support, target), alone(QUERY, target)
        own, _ = head.solve(own_prior, own_shared, own_support, 1)
        # Alone it is a mean over fewer examples.
        number = len(own_query.y) + (len(own_support.y) if outer == "marginal" else 0)
        total = total + number * head.outer_loss(own, own_shared, own_query)
        if outer == "marginal":
            of_support = of_support + head.support_nll(own)[0]
    num_examples = len(QUERY.y) + (len(support.y) if outer == "marginal" else 0)
    assert_same(num_examples * found, total)
    if outer == "marginal":
        assert_same(head.support_nll(solution)[0], of_support)


@pytest.mark.parametrize("name", HEADS)
def test_derivatives_are_those_of_single_targets(name):
    head, prior, of_target = build(name)

    def loss(prior, shared, support, query, num_targets):
        solution, _ = head.solve(prior, shared, support, num_targets)
        return len(query.y) * head.outer_loss(solution, shared, query)

    found = torch.func.grad(loss, argnums=1)(prior, SHARED, MANY, QUERY, NUM_TARGETS)[Gaussian.parameter_name]
    for target in range(NUM_TARGETS):
        own = [alone(batch, target) for batch in (MANY, QUERY)]
        expected = torch.func.grad(loss, argnums=1)(*of_target(target), *own, 1)[Gaussian.parameter_name]
        assert_same(found[target], expected[0])


@pytest.mark.parametrize("name", HEADS)
def test_a_target_that_was_measured_nowhere_keeps_its_prior(name):
    head, prior, _ = build(name)
    missing = MANY.y.clone()
    missing[:, 1] = math.nan
    solution, _ = head.solve(prior, SHARED, Batch(MANY.x, missing), NUM_TARGETS)
    nothing, _ = head.solve(prior, SHARED, Batch(MANY.x[:0], MANY.y[:0]), NUM_TARGETS)
    for one, other in zip(head.moments(solution, QUERY.x), head.moments(nothing, QUERY.x), strict=True):
        assert_same(one[1], other[1])


def test_a_single_target_is_taken_as_it_is():
    targets = Measured.of(torch.tensor([[1.0], [2.0]]))
    inputs = torch.ones(1, 2, 4, dtype=torch.float64)
    assert targets.rows(inputs) is inputs
    assert targets.num_examples.tolist() == [2]
