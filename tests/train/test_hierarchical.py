import math

import pytest
import torch

from ibaml.train.hierarchical import (
    Moments,
    in_one,
    minimise,
    moments,
    query_nll,
    restricted,
    restricted_nll,
)
from ibaml.types import Batch

NUM_TARGETS, NUM_INPUTS = 2, 3
SIZES = (4, 7, 3, 9, 5)


@pytest.fixture
def example():
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    batches = [Batch(draw(size, NUM_INPUTS), draw(size, NUM_TARGETS)) for size in SIZES]
    factor = draw(NUM_TARGETS, NUM_INPUTS, NUM_INPUTS).tril()
    log_noise, precision = draw(NUM_TARGETS), draw(NUM_TARGETS, NUM_INPUTS).exp()
    return batches, factor, log_noise, precision


def dense(batches, factor, log_noise, precision, target):
    """Mean and joint covariance of the common weights and of all targets, by writing the model down."""
    z = torch.cat([batch.x for batch in batches])
    among = factor[target] @ factor[target].T
    noise = torch.exp(log_noise[target])
    own = torch.block_diag(
        *[batch.x @ among @ batch.x.T + noise * torch.eye(len(batch.x), dtype=z.dtype) for batch in batches]
    )
    common = torch.diag(1 / precision[target])
    return z, torch.cat([batch.y[:, target] for batch in batches]), own + z @ common @ z.T, common


def test_the_likelihood_is_that_of_all_rows_in_one_gaussian(example):
    batches, *model = example
    groups = in_one(batches)
    found = restricted(*model, moments(groups.x, groups))
    expected = 0.0
    for target in range(NUM_TARGETS):
        z, y, covariance, common = dense(batches, *model, target)
        expected -= torch.distributions.MultivariateNormal(torch.zeros_like(y), covariance).log_prob(y)
        mean, spread = (part[target] for part in found.common_weights())
        gain = common @ z.T @ torch.linalg.inv(covariance)
        torch.testing.assert_close(mean, gain @ y, rtol=0, atol=1e-10)
        torch.testing.assert_close(spread, common - gain @ z @ common, rtol=0, atol=1e-10)
    torch.testing.assert_close(found.nll, expected, rtol=1e-12, atol=0)


def test_a_group_is_left_out_as_if_it_had_never_been_there(example):
    batches, *model = example
    groups = in_one(batches)
    means, spreads = restricted(*model, moments(groups.x, groups)).common_weights_without_each()
    for index in range(len(batches)):
        rest = in_one([batch for place, batch in enumerate(batches) if place != index])
        mean, spread = restricted(*model, moments(rest.x, rest)).common_weights()
        torch.testing.assert_close(means[:, index], mean, rtol=0, atol=1e-10)
        torch.testing.assert_close(spreads[:, index], spread, rtol=0, atol=1e-10)


@pytest.mark.parametrize("has_gaps", [False, True], ids=["whole", "gaps"])
def test_derivatives_in_closed_form_are_those_of_autograd(example, has_gaps):
    batches, *model = example
    groups = in_one(with_gaps(batches) if has_gaps else batches)
    model = [part.clone().requires_grad_() for part in model]
    features = groups.x.clone().requires_grad_()
    inputs = [*model, features]
    expected_value = restricted(*model, moments(features, groups)).nll
    expected = torch.autograd.grad(expected_value, inputs)
    of = Moments(*(part.detach() for part in moments(features, groups)))
    value = restricted_nll(*model, of, features, groups)
    found = torch.autograd.grad(value, inputs)
    torch.testing.assert_close(value, expected_value, rtol=1e-12, atol=0)
    # Above its diagonal the factor has no entries.
    for one, other in zip(found, [expected[0].tril(), *expected[1:]], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)


def with_gaps(batches):
    """Leaves out some targets; the second was not measured in the first group at all."""
    generator = torch.Generator().manual_seed(3)
    missing = [torch.rand(batch.y.shape, generator=generator) < 0.3 for batch in batches]
    missing[0][:, 1], missing[0][:, 0] = True, False
    return [Batch(x, y.masked_fill(where, math.nan)) for (x, y), where in zip(batches, missing, strict=True)]


def alone(batches, target):
    """Returns the rows of each group where a target was measured."""
    kept = [~batch.y[:, target].isnan() for batch in batches]
    return [Batch(x[where], y[where, target : target + 1]) for (x, y), where in zip(batches, kept, strict=True)]


def test_each_target_is_estimated_from_the_rows_where_it_was_measured(example):
    batches, *model = example
    batches = with_gaps(batches)
    groups = in_one(batches)
    assert len(groups.measured) == NUM_TARGETS
    found = restricted(*model, moments(groups.x, groups))
    total = 0.0
    for target in range(NUM_TARGETS):
        own = in_one([batch for batch in alone(batches, target) if len(batch.y)])
        expected = restricted(*(part[target : target + 1] for part in model), moments(own.x, own))
        for one, other in zip(found.common_weights(), expected.common_weights(), strict=True):
            torch.testing.assert_close(one[target], other[0], rtol=1e-10, atol=1e-10)
        assert int(found.num_groups[target]) == int(expected.num_groups) == len(SIZES) - target
        total = total + expected.nll
    torch.testing.assert_close(found.nll, total, rtol=1e-12, atol=0)


def test_queries_of_each_target_are_predicted_from_where_it_was_measured(example):
    batches, factor, log_noise, _ = example
    mean = torch.ones(NUM_TARGETS, 1, NUM_INPUTS, dtype=torch.float64)
    covariance = (factor @ factor.mT).unsqueeze(1)
    known = [Batch(x[:2], y[:2]) for x, y in with_gaps(batches)]
    asked = [Batch(x[2:], y[2:].clone()) for x, y in batches]
    for _, y in asked:
        y[1:, 1] = math.nan
    total = torch.zeros(len(batches), dtype=torch.float64)
    for target in range(NUM_TARGETS):
        own = [in_one(alone(part, target)) for part in (known, asked)]
        model = (part[target : target + 1] for part in (mean, covariance, log_noise))
        # Alone it is a mean over fewer rows.
        total = total + query_nll(*model, *((group.x, group) for group in own)) * own[1].present.sum(-1)
    of_known, of_asked = in_one(known), in_one(asked)
    found = query_nll(mean, covariance, log_noise, (of_known.x, of_known), (of_asked.x, of_asked))
    torch.testing.assert_close(found * of_asked.present.sum(-1), total, rtol=1e-10, atol=0)


def test_queries_are_predicted_as_by_conditioning_a_gaussian(example):
    batches, factor, log_noise, _ = example
    generator = torch.Generator().manual_seed(1)
    mean = torch.randn(NUM_TARGETS, len(batches), NUM_INPUTS, dtype=torch.float64, generator=generator)
    covariance = (factor @ factor.mT).unsqueeze(1).expand(-1, len(batches), -1, -1)
    known = [Batch(batch.x[:2], batch.y[:2]) for batch in batches]
    asked = [Batch(batch.x[2:], batch.y[2:]) for batch in batches]
    parts = [(group.x, group) for group in (in_one(known), in_one(asked))]
    found = query_nll(mean, covariance, log_noise, parts[0], parts[1])
    for index, batch in enumerate(batches):
        expected = 0.0
        for target in range(NUM_TARGETS):
            own = covariance[target, index]
            whole = batch.x @ own @ batch.x.T + torch.exp(log_noise[target]) * torch.eye(len(batch.x)).double()
            gain = whole[2:, :2] @ torch.linalg.inv(whole[:2, :2])
            error = batch.y[:, target] - batch.x @ mean[target, index]
            left = whole[2:, 2:] - gain @ whole[:2, 2:]
            normal = torch.distributions.Normal(gain @ error[:2], torch.diagonal(left).sqrt())
            expected -= normal.log_prob(error[2:]).mean()
        torch.testing.assert_close(found[index], torch.as_tensor(expected), rtol=1e-10, atol=0)


def test_the_minimum_of_a_quadratic_is_found_and_walls_are_not_crossed():
    def function(p):
        # Not a number left of zero.
        return (p["a"].log() ** 2).sum() + ((p["b"] - 3) ** 2).sum()

    start = {"a": torch.full((2,), 5.0, dtype=torch.float64), "b": torch.zeros(1, dtype=torch.float64)}
    found = minimise(function, start, most_steps=100)
    assert found.value == pytest.approx(0, abs=1e-3) and 1 < found.num_steps < 30
    torch.testing.assert_close(found.parameters["a"], torch.ones(2).double(), rtol=0, atol=0.05)
    assert minimise(function, start, most_steps=1).num_steps == 1


def test_groups_are_filled_up_with_rows_that_do_not_count():
    groups = in_one([Batch(torch.ones(2, 1), torch.ones(2, 1)), Batch(torch.ones(3, 1), 2 * torch.ones(3, 1))])
    assert groups.measured.tolist() == [[[1, 1, 0], [1, 1, 1]]]
    assert groups.present.tolist() == [[1, 1, 0], [1, 1, 1]]
    found = moments(torch.ones_like(groups.x), groups)
    assert found.gram.flatten().tolist() == [2, 3] and found.square.tolist() == [[2, 12]]
    assert math.isclose(float(groups.of(torch.tensor([1])).y.sum()), 6)
