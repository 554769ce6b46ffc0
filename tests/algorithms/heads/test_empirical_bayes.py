"""Incremental expectation maximisation against gradients of the marginal likelihood, and on data of a known prior."""

import dataclasses
import math
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributions import MultivariateNormal

from ibaml import tree
from ibaml.algorithms import MetaParameters, make_algorithm
from ibaml.algorithms.heads.empirical_bayes import Experience, observe
from ibaml.algorithms.model import Model, build_model
from ibaml.likelihoods import Gaussian, Poisson, UnitGaussian
from ibaml.priors import DiagonalColumnPrior, FullColumnPrior, LowRankColumnPrior
from ibaml.types import Batch, Tensor

DOUBLE = torch.float64
NOISE = Gaussian.parameter_name
NUM_INPUTS = 3
FAMILIES = [
    DiagonalColumnPrior(),
    FullColumnPrior(),
    FullColumnPrior(tied=True),
    DiagonalColumnPrior(tied=True, learn_mean=False),
    FullColumnPrior(learn_mean=False),
]


def set_up(family: Any, num_targets: int = 2, seed: int = 0) -> tuple[Any, Model, MetaParameters]:
    head = make_algorithm("linear_gaussian", prior=family)
    network = nn.Linear(NUM_INPUTS - 1, num_targets).double()
    model = build_model(network, Gaussian(num_targets=num_targets))
    source = torch.Generator().manual_seed(seed)
    meta = head.init(model.adapted, model.shared, generator=source)
    moved = tree.map(lambda leaf: leaf + 0.5 * torch.randn(leaf.shape, generator=source, dtype=DOUBLE), meta)
    return head, model, moved


def moments(head: Any, prior: Any) -> tuple[Tensor, Tensor]:
    factor = head.prior.whiten(prior, torch.eye(NUM_INPUTS, dtype=DOUBLE))
    return head.prior.mean(prior), factor @ factor.mT


def draw_task(head: Any, meta: MetaParameters, num_rows: int, source: torch.Generator) -> Batch:
    mean, covariance = moments(head, meta.prior)
    x = torch.randn(num_rows, NUM_INPUTS - 1, generator=source, dtype=DOUBLE)
    design = torch.cat([x, torch.ones(num_rows, 1, dtype=DOUBLE)], 1)
    noise = torch.exp(0.5 * meta.shared[NOISE].double())
    num_targets = len(noise)
    drawn = torch.randn(num_targets, NUM_INPUTS, 1, generator=source, dtype=DOUBLE)
    weights = (mean.unsqueeze(-1) + torch.linalg.cholesky(covariance) @ drawn).expand(num_targets, -1, -1).squeeze(-1)
    return Batch(x, design @ weights.mT + noise * torch.randn(num_rows, num_targets, generator=source, dtype=DOUBLE))


@pytest.mark.parametrize("family", FAMILIES, ids=str)
@pytest.mark.parametrize("num_rows", [1, 2, 9])
@pytest.mark.parametrize("num_missing", [0, 1], ids=["all", "some"])
def test_a_step_is_along_the_gradient_of_the_marginal_likelihood(family: Any, num_rows: int, num_missing: int) -> None:
    """Fisher's identity: with ``l`` the log marginal likelihood of what was measured and weight ``g`` of the task, for
    each column

    ``dm = g S dl/dm``, ``dS = 2 g S (dl/dS) S - g^2 d d^T`` (``d`` the posterior's mean minus ``m``), and for the noise
    ``ds2 = (N / (R + N)) (2 s2^2 / N) dl/ds2``.
    """
    head, model, meta = set_up(family)
    task = draw_task(head, meta, num_rows, torch.Generator().manual_seed(1))
    task.y[:num_missing, 1] = math.nan
    experience = Experience(3.0, 30.0)
    found, after = observe(head, model, meta, task, experience)
    assert after == Experience(4.0, 30.0 + num_rows)
    weight = 1 / 4
    mean, covariance = (part.clone().requires_grad_() for part in moments(head, meta.prior))
    noise = torch.exp(meta.shared[NOISE].double()).requires_grad_()
    design = torch.cat([task.x, torch.ones(num_rows, 1, dtype=DOUBLE)], 1)
    log_density = torch.zeros((), dtype=DOUBLE)
    for target in range(2):
        column = target % len(mean)
        rows = design[~task.y[:, target].isnan()]
        if len(rows):
            total = rows @ covariance[column] @ rows.mT + noise[target] * torch.eye(len(rows), dtype=DOUBLE)
            y = task.y[-len(rows) :, target]
            log_density = log_density + MultivariateNormal(rows @ mean[column], total).log_prob(y)
    in_mean, in_covariance, in_noise = torch.autograd.grad(log_density, [mean, covariance, noise])
    num_draws = 2 // len(mean)
    own = covariance.detach()
    step = (own @ in_mean.unsqueeze(-1)).squeeze(-1) / num_draws
    step = step if family.learn_mean else torch.zeros_like(step)
    expected_mean = mean.detach() + weight * step
    expected = own + weight * 2 * own @ in_covariance @ own / num_draws
    if family.learn_mean:
        expected = expected - weight**2 * step.unsqueeze(-1) * step.unsqueeze(-2)
    found_mean, found_covariance = moments(head, found.prior)
    if family.is_diagonal:
        expected, found_covariance = (torch.diagonal(each, dim1=-2, dim2=-1) for each in (expected, found_covariance))
    torch.testing.assert_close(found_mean, expected_mean, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(found_covariance, expected, rtol=1e-9, atol=1e-10)
    share = num_rows / (30 + num_rows)
    expected_noise = noise.detach() + share * 2 * noise.detach() ** 2 / num_rows * in_noise
    torch.testing.assert_close(torch.exp(found.shared[NOISE].double()), expected_noise, rtol=1e-6, atol=0)


def test_a_prior_that_is_right_stays_on_average() -> None:
    """Over tasks of the prior, what posteriors expect is the prior: within five standard errors."""
    head, model, meta = set_up(FullColumnPrior(), num_targets=1)
    source = torch.Generator().manual_seed(2)
    num_tasks = 500
    changes: list[Tensor] = []
    mean, covariance = moments(head, meta.prior)
    for _ in range(num_tasks):
        found, _ = observe(head, model, meta, draw_task(head, meta, 4, source), Experience(1e6, 4e6))
        after_mean, after_covariance = moments(head, found.prior)
        noise = torch.exp(found.shared[NOISE].double()) - torch.exp(meta.shared[NOISE].double())
        changes.append(torch.cat([(after_mean - mean).flatten(), (after_covariance - covariance).flatten(), noise]))
    change = torch.stack(changes)
    assert (change[:, :-1].mean(0).abs() < 5 * change[:, :-1].std(0) / math.sqrt(num_tasks)).all()
    # Parameters of the noise are float32: a single step is hardly more than their rounding.
    assert change[:, -1].mean().abs() < 5 * change[:, -1].std() / math.sqrt(num_tasks) + 1e-7


def test_a_stream_leads_to_the_prior_of_its_tasks() -> None:
    """From a wrong prior that stands for one task, to the moments of the weights that were drawn."""
    head, model, truth = set_up(FullColumnPrior(), num_targets=1)
    source = torch.Generator().manual_seed(3)
    _, _, meta = set_up(FullColumnPrior(), num_targets=1, seed=9)
    experience = Experience(1.0, 30.0)
    for _ in range(500):
        meta, experience = observe(head, model, meta, draw_task(head, truth, 30, source), experience)
    (mean, covariance), (found_mean, found) = moments(head, truth.prior), moments(head, meta.prior)
    assert experience == Experience(501.0, 15030.0)
    deviation = torch.diagonal(covariance, dim1=-2, dim2=-1).sqrt()
    # Five standard errors of the moments of 500 draws are 0.22 deviations, and 0.32 variances.
    assert ((found_mean - mean).abs() < 0.22 * deviation).all()
    assert ((found - covariance).abs() < 0.32 * deviation.unsqueeze(-1) * deviation.unsqueeze(-2)).all()
    assert float((meta.shared[NOISE] - truth.shared[NOISE]).abs()) < 0.1


def test_experience_that_is_forgotten_weighs_less() -> None:
    assert Experience(200.0, 1000.0).at_most(50.0) == Experience(50.0, 250.0)
    assert Experience(20.0, 100.0).at_most(50.0) == Experience(20.0, 100.0)


def test_noise_that_is_not_learned_stays_away() -> None:
    head, model, meta = set_up(FullColumnPrior(), num_targets=1)
    task = draw_task(head, meta, 4, torch.Generator().manual_seed(0))
    shared = {name: value for name, value in meta.shared.items() if name != NOISE}
    model = dataclasses.replace(model, likelihood=UnitGaussian(), shared=shared)
    found, _ = observe(head, model, meta._replace(shared=shared), task, Experience(3.0, 30.0))
    assert found.shared == {}


def test_what_is_no_closed_form_is_refused() -> None:
    head, model, meta = set_up(LowRankColumnPrior(rank=1), num_targets=1)
    task = Batch(torch.zeros(2, 2, dtype=DOUBLE), torch.zeros(2, 1, dtype=DOUBLE))
    with pytest.raises(ValueError, match=r"prior=LowRankColumnPrior\(.*\) has no closed form for the moments"):
        observe(head, model, meta, task, Experience(1.0, 1.0))
    for settings in ({"covariance": "diagonal"}, {"temperature": 0.5}):
        head, model, meta = set_up(DiagonalColumnPrior(), num_targets=1)
        head = dataclasses.replace(head, **settings)
        with pytest.raises(ValueError, match="expected covariance='full' and temperature=1, but they are"):
            observe(head, model, meta, task, Experience(1.0, 1.0))


def test_counts_and_outliers_move_the_prior_by_laplace() -> None:
    """With Gaussian noise Laplace's approximation is exact, and so the prior moves as that of the exact head."""
    head, model, meta = set_up(FullColumnPrior())
    task = draw_task(head, meta, 6, torch.Generator().manual_seed(1))
    expected, after = observe(head, model, meta, task, Experience(3.0, 30.0))
    general = make_algorithm("generalized_linear", prior=FullColumnPrior())
    found, experience = observe(general, model, meta, task, Experience(3.0, 30.0))
    for one, other in zip(moments(general, found.prior), moments(head, expected.prior), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-9)
    assert experience == after
    # The likelihood's own parameters stay.
    assert found.shared[NOISE].equal(meta.shared[NOISE])


def test_a_stream_of_counts_leads_to_the_prior_of_its_tasks() -> None:
    head = make_algorithm("generalized_linear", prior=DiagonalColumnPrior())
    model = build_model(nn.Linear(NUM_INPUTS - 1, 1).double(), Poisson())
    source = torch.Generator().manual_seed(1)
    meta, experience = head.init(model.adapted, model.shared, generator=source), Experience(1.0, 20.0)
    mean = torch.tensor([0.5, -0.3, 1.0], dtype=DOUBLE)
    for _ in range(120):
        weights = mean + 0.5 * torch.randn(NUM_INPUTS, generator=source, dtype=DOUBLE)
        x = torch.randn(20, NUM_INPUTS - 1, generator=source, dtype=DOUBLE)
        rate = torch.exp(x @ weights[:-1] + weights[-1])
        task = Batch(x, torch.poisson(rate, generator=source).unsqueeze(-1))
        meta, experience = observe(head, model, meta, task, experience)
    found_mean, found = moments(head, meta.prior)
    # Five standard errors of the moments of 120 draws are 0.46 deviations, and 0.65 variances.
    assert ((found_mean - mean).abs() < 0.46 * 0.5).all()
    assert ((torch.diagonal(found, dim1=-2, dim2=-1) - 0.25).abs() < 0.65 * 0.25).all()


def test_outputs_that_all_tasks_share_are_not_observed() -> None:
    head, likelihood = make_algorithm("generalized_linear"), Gaussian(heteroscedastic=True)
    model = build_model(nn.Linear(NUM_INPUTS - 1, 2).double(), likelihood)
    meta = head.init(model.adapted, model.shared, generator=torch.Generator())
    task = Batch(torch.zeros(2, 2, dtype=DOUBLE), torch.zeros(2, 1, dtype=DOUBLE))
    with pytest.raises(ValueError, match=r"heteroscedastic=True\) has outputs that all tasks share, which a"):
        observe(head, model, meta, task, Experience(1.0, 1.0))
