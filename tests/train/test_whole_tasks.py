"""Marginal likelihoods of whole tasks, and the priors that they tell."""

import time

import pytest
import torch

from ibaml import tree
from ibaml.algorithms import MetaParameters, make_algorithm
from ibaml.algorithms.model import build_model
from ibaml.likelihoods import Categorical, Gaussian, NegativeBinomial
from ibaml.networks import MLP
from ibaml.priors import DiagonalColumnPrior, FullColumnPrior
from ibaml.train.hierarchical import wider
from ibaml.train.whole_tasks import estimate_prior, in_whole, widened
from ibaml.types import Batch


def draws(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def set_up(likelihood, num_outputs, head):
    model = build_model(MLP(num_outputs, input_shape=2, hidden_sizes=(), zero_head=True), likelihood, adapt="head.*")
    return model, head.init(model.adapted, model.shared, generator=torch.Generator())


def of_logits(num_tasks, num_rows=60, spread=(1.0, 0.5, 0.8)):
    """Binary tasks whose log-odds are lines of known mean and deviation."""
    weights = torch.tensor([1.0, -0.5, -1.0]).double() + torch.tensor(spread).double() * draws(num_tasks, 3, seed=1)
    found = []
    for task, own in enumerate(weights):
        x = draws(num_rows, 2, seed=10 + task)
        uniform = torch.special.ndtr(draws(len(x), seed=1000 + task))
        found.append(Batch(x, (uniform < torch.sigmoid(x @ own[:2] + own[2])).long()))
    return found


def test_the_prior_of_logits_is_found_again():
    head = make_algorithm("softmax", prior=FullColumnPrior())
    model, start = set_up(Categorical(), 2, head)
    tasks = in_whole(of_logits(150), generator=torch.Generator())
    found = estimate_prior(model, head, tasks, start=start, middle=start, most_steps=100)
    mean = found.meta.prior.mean[1] - found.meta.prior.mean[0]
    factor = found.meta.prior.factor()
    deviation = torch.diagonal((factor @ factor.mT).sum(0)).sqrt()
    # Standard errors are near .1, and Laplace's approximation takes up to a tenth of widths.
    torch.testing.assert_close(mean, torch.tensor([1.0, -0.5, -1.0]), rtol=0, atol=0.25)
    torch.testing.assert_close(deviation, torch.tensor([1.0, 0.5, 0.8]), rtol=0, atol=0.2)
    assert not found.is_late and 5 < found.num_steps < 100


def test_gaussian_noise_has_the_exact_marginal_likelihood_as_its_loss():
    head = make_algorithm("generalized_linear")
    model, start = set_up(Gaussian(), 1, head)
    batches = [Batch(draws(9, 2, seed=seed), 2 * draws(9, 1, seed=50 + seed)) for seed in range(40)]
    found = estimate_prior(
        model, head, in_whole(batches, generator=torch.Generator()), start=start, middle=start, most_steps=200
    ).meta
    prior, noise = found.prior, found.shared[Gaussian.parameter_name].double().exp()

    def loss(mean, log_var, log_noise):
        total = 0.0
        for batch in batches:
            z = torch.cat([batch.x, torch.ones(9, 1)], -1)
            covariance = z @ torch.diag(log_var.exp()) @ z.T + log_noise.exp() * torch.eye(9)
            one = torch.distributions.MultivariateNormal(z @ mean, covariance.double())
            total = total - one.log_prob(batch.y[:, 0])
        far = ((mean / 5) ** 2).sum() + (((log_var - start.prior.log_var[0]) / 2) ** 2).sum()
        return total + 0.5 * (far + ((log_noise - start.shared[Gaussian.parameter_name]) / 5).square().sum())

    # Before it was widened for a new task.
    log_var = prior.log_var[0].double() - torch.log(torch.tensor(wider(39) + 1 / 40))
    at = (prior.mean[0].double(), log_var, noise.log())
    best = loss(*at)
    for index in range(3):
        for change in (-0.3, 0.3):
            moved = [value + change * (place == index) for place, value in enumerate(at)]
            assert loss(*moved) > best, (index, change)


def test_rows_that_fill_up_do_not_count():
    head = make_algorithm("generalized_linear")
    model, start = set_up(NegativeBinomial(), 1, head)
    batches = [
        Batch(draws(size, 2, seed=size), torch.poisson(2 * torch.ones(size, 1, dtype=torch.float64)))
        for size in (3, 8, 5)
    ]
    together = in_whole(batches, generator=torch.Generator())
    assert together.x.shape == (3, 8, 3) and together.num_empty == 8
    assert together.x[0, 3:].eq(0).all() and together.x[0, :3, -1].eq(1).all()
    found = [
        estimate_prior(model, head, tasks, start=start, middle=start, most_steps=30).meta
        for tasks in (together, in_whole([batches[1]] * 3, generator=torch.Generator()))
    ]
    # The same tasks, one of them filled up by hand with rows that do count, are another problem.
    more = batches[0]._replace(
        x=torch.cat([batches[0].x, torch.zeros(5, 2)]), y=torch.cat([batches[0].y, torch.zeros(5, 1)])
    )
    other = in_whole([more, *batches[1:]], generator=torch.Generator())
    found.append(estimate_prior(model, head, other, start=start, middle=start, most_steps=30).meta)
    dispersions = [float(tree.leaves(one.shared)[0]) for one in found]
    assert abs(dispersions[0] - dispersions[2]) > 0.01

    def alone(meta):
        named = {name: value.double() for name, value in meta.shared.items()}
        own = make_algorithm("generalized_linear", likelihood=model.likelihood)
        return sum(
            own.marginal_nll(
                tree.map(torch.Tensor.double, meta.prior),
                named,
                Batch(torch.cat([batch.x, torch.ones_like(batch.x[:, :1])], -1), batch.y),
                1,
            )
            for batch in batches
        )

    assert alone(found[0]) < alone(found[2])


def test_of_large_tasks_some_rows_are_taken():
    tasks = [
        Batch(torch.zeros(200_000, 1), torch.zeros(200_000).long()),
        Batch(torch.zeros(4, 1), torch.zeros(4).long()),
    ]
    found = in_whole(tasks, generator=torch.Generator())
    assert found.x.shape == (2, 2**15, 2) and found.num_empty == 2**15 - 4


def test_a_deadline_ends_it():
    head = make_algorithm("softmax", prior=DiagonalColumnPrior())
    model, start = set_up(Categorical(), 2, head)
    tasks = in_whole(of_logits(6), generator=torch.Generator())
    found = estimate_prior(model, head, tasks, start=start, middle=start, most_steps=100, deadline=time.monotonic() - 1)
    assert found.is_late and found.num_steps == 0
    assert isinstance(found.meta, MetaParameters) and torch.equal(found.meta.prior.mean, start.prior.mean)


@pytest.mark.parametrize("family", [DiagonalColumnPrior(), FullColumnPrior()])
def test_a_few_tasks_leave_a_new_one_wide(family):
    prior = family.init(3, 2, like=torch.zeros((), dtype=torch.float64))
    identity = torch.eye(3, dtype=torch.float64)
    for num_tasks in (5, 500):
        found = widened(family, prior, num_tasks=num_tasks)
        before, after = (family.whiten(one, identity) for one in (prior, found))
        expected = (wider(num_tasks - 1) + 1 / num_tasks) * before @ before.mT
        torch.testing.assert_close(after @ after.mT, expected)
        torch.testing.assert_close(family.mean(found), family.mean(prior))
