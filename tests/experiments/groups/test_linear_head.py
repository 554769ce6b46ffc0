import pytest
import torch
from torch.distributions import Normal

from ibaml import tree
from ibaml.data import GroupedTasks, closed_form_posterior
from ibaml.experiments import linear_head
from ibaml.types import Batch, Episode


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def draw(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=generator(seed), dtype=torch.float64)


@pytest.fixture(params=[0, 3], ids=["linear", "hidden"])
def problem(request):
    meta = linear_head.init(2, request.param, generator=generator())
    meta = tree.map(lambda leaf: leaf + 0.3 * draw(*leaf.shape, seed=leaf.numel()), meta)
    parts = [Batch(draw(n, 2, seed=n), draw(n, 1, seed=n + 100)) for n in (4, 7)]
    return meta, Episode(*parts)


def test_the_inner_problem_is_solved_by_the_closed_form(problem):
    meta, episode = problem
    posterior = linear_head.adapt(meta, episode.support)
    mean, variance = closed_form_posterior(
        linear_head.features(meta.shared, episode.support.x),
        episode.support.y,
        meta.prior.mean["weight"],
        meta.prior.log_var["weight"].exp(),
        meta.shared["log_noise"].exp(),
    )
    assert torch.allclose(posterior.mean["weight"], mean, rtol=1e-10, atol=1e-10)
    assert torch.allclose(posterior.log_var["weight"].exp(), variance, rtol=1e-10)


def test_the_implicit_gradient_is_that_of_backpropagation_through_the_closed_form(problem):
    meta, episode = problem

    def outer(theta):
        mean, variance = linear_head.predict(linear_head.adapt(theta, episode.support), theta.shared, episode.query.x)
        return -Normal(mean, variance.sqrt()).log_prob(episode.query.y[:, 0]).mean()

    exact = torch.func.grad(outer)(meta)
    found, info = linear_head.hypergradient(meta, episode)
    for a, b in zip(tree.leaves(found), tree.leaves(exact), strict=True):
        assert (a - b).norm() < 1e-6 * (1 + b.norm())
    assert info.inner_grad_norm < 1e-10 and info.linear_residual < 1e-6
    assert torch.allclose(info.outer_loss, outer(meta))


def test_predictions_of_new_groups_are_nearly_those_of_exact_bayes_with_the_true_prior():
    num_groups, noise = 400, 0.3
    scale = torch.tensor([0.5, 0.2], dtype=torch.float64)
    weights = torch.tensor([2.0, -1.0], dtype=torch.float64) + scale * draw(num_groups, 2, seed=1)
    x = draw(num_groups, 12, seed=3)
    y = weights[:, :1] + weights[:, 1:] * x + noise * draw(num_groups, 12, seed=4)
    names = [group for group in range(num_groups // 2) for _ in range(12)]
    half = slice(num_groups // 2)
    tasks = GroupedTasks(x[half].reshape(-1, 1), y[half].reshape(-1), names, num_support=3)
    meta, info = linear_head.fit(tasks, num_hidden=0, num_steps=150)
    assert info.linear_residual.max() < 1e-6

    learned, exact, blind = [], [], []
    for group in range(num_groups // 2, num_groups):
        design = torch.stack([torch.ones(12, dtype=torch.float64), x[group]], 1)
        precision = torch.diag(scale**-2) + design[:3].T @ design[:3] / noise**2
        shift = weights.new_tensor([2.0, -1.0]) / scale**2 + design[:3].T @ y[group, :3] / noise**2
        covariance = torch.linalg.inv(precision)
        variance = (design @ covariance * design).sum(1) + noise**2
        posterior = linear_head.adapt(meta, Batch(x[group, :3, None], y[group, :3, None]))
        mean, own = linear_head.predict(posterior, meta.shared, x[group, 3:, None])
        learned.append(-Normal(mean, own.sqrt()).log_prob(y[group, 3:]).mean())
        exact.append(-Normal(design @ covariance @ shift, variance.sqrt()).log_prob(y[group])[3:].mean())
        prior_mean, prior_own = linear_head.predict(meta.prior, meta.shared, x[group, 3:, None])
        blind.append(-Normal(prior_mean, prior_own.sqrt()).log_prob(y[group, 3:]).mean())
    learned, exact, blind = (torch.stack(values).mean() for values in (learned, exact, blind))
    # A diagonal posterior costs something, but far less than not adapting.
    assert exact - 0.02 < learned < exact + 0.1 < blind - 0.2


def test_hidden_units_learn_a_curve_that_no_linear_model_has():
    x = 2 * draw(60, 15, seed=5)
    y = 2 * torch.sin(2 * x) + 0.5 * draw(60, 1, seed=6) + 0.1 * draw(60, 15, seed=7)
    names = [group for group in range(60) for _ in range(15)]
    tasks = GroupedTasks(x.reshape(-1, 1), y.reshape(-1), names, num_support=3)
    losses = [linear_head.fit(tasks, num_hidden=width, num_steps=150)[1].outer_loss.mean() for width in (0, 8)]
    assert losses[1] < losses[0] - 0.3
