"""The exact head against Bayesian linear regression by hand, and its hypergradient against Lemma 1 and autograd."""

import math
import re
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributions import MultivariateNormal, Normal, kl_divergence

from ibaml import MetaLearner, records, tree
from ibaml.algorithms import RECORDS, MetaParameters, TaskNoise, make_algorithm
from ibaml.algorithms.heads import LinearGaussian
from ibaml.algorithms.model import Model, build_model
from ibaml.hypergradients import gaussian_implicit_hypergradient
from ibaml.learner.defaults import table_algorithm
from ibaml.likelihoods import Categorical, Gaussian
from ibaml.priors import DiagonalGaussian, FullPrior, PointPrior
from ibaml.solvers.linear import Dense
from ibaml.types import Batch, Episode, Params, Tensor

DOUBLE = torch.float64
NOISE = Gaussian.parameter_name
NO_NOISE = TaskNoise({}, {})


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def small_model(num_targets: int = 1, adapt: str = "2.*") -> Model:
    network = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, num_targets)).double()
    source = generator(1)
    for parameter in network.parameters():
        parameter.data = 0.7 * torch.randn(parameter.shape, generator=source, dtype=DOUBLE)
    return build_model(network, Gaussian(num_targets=num_targets, initial_noise_variance=0.3), adapt=adapt)


def set_up(algorithm: LinearGaussian, num_targets: int = 1) -> tuple[Model, MetaParameters, Episode]:
    model, source = small_model(num_targets), generator(2)
    meta = algorithm.init(model.adapted, tree.map(torch.Tensor.double, model.shared), generator=source)
    # Away from any symmetry.
    meta = tree.map(lambda leaf: leaf + 0.3 * torch.randn(leaf.shape, generator=source, dtype=DOUBLE), meta)
    support, query = (
        Batch(*(torch.randn(size, width, generator=source, dtype=DOUBLE) for width in (2, num_targets)))
        for size in (6, 5)
    )
    return model, meta, Episode(support, query)


def features(shared: Params, x: Tensor) -> Tensor:
    """Hidden units and a constant: weight, then bias, as the weights are flattened for one output."""
    hidden = torch.tanh(x @ shared["0.weight"].mT + shared["0.bias"])
    return torch.cat([hidden, torch.ones_like(hidden[:, :1])], -1)


def by_hand(theta: MetaParameters, episode: Episode, temperature: float) -> tuple[Tensor, Tensor]:
    """Posterior mean and covariance of one output, by the normal equations."""
    design = features(theta.shared, episode.support.x)
    precision = torch.linalg.inv(theta.prior.factor() @ theta.prior.factor().mT)
    noise = temperature * theta.shared[NOISE].exp()
    covariance = torch.linalg.inv(design.mT @ design / noise + precision)
    prior_mean = tree.ravel(theta.prior.mean)[0]
    return covariance @ (precision @ prior_mean + design.mT @ episode.support.y[:, 0] / noise), covariance


def outer_by_hand(theta: MetaParameters, episode: Episode, temperature: float, *, outer: str, diagonal: bool) -> Tensor:
    mean, covariance = by_hand(theta, episode, temperature)
    if diagonal:
        covariance = torch.diag(1 / torch.diagonal(torch.linalg.inv(covariance)))
    design, y = features(theta.shared, episode.query.x), episode.query.y[:, 0]
    variance, noise = torch.einsum("ni,ij,nj->n", design, covariance, design), theta.shared[NOISE].exp()
    if outer == "predictive_nll":
        return -Normal(design @ mean, (variance + noise).sqrt()).log_prob(y).mean()
    return (-Normal(design @ mean, noise.sqrt()).log_prob(y) + 0.5 * variance / noise).mean()


def relative_error(actual: Any, expected: Any) -> float:
    pairs = zip(tree.leaves(actual), tree.leaves(expected), strict=True)
    return max(float((a - b).norm() / b.norm()) for a, b in pairs)


PRIORS = {"diagonal": make_algorithm("linear_gaussian").prior, "full": FullPrior(initial_log_var=(-2.0, -2.0))}


@pytest.mark.parametrize("temperature", [1.0, 0.3])
@pytest.mark.parametrize("covariance", ["full", "diagonal"])
@pytest.mark.parametrize("prior", list(PRIORS))
def test_adaptation_is_bayes_rule(prior: str, covariance: Any, temperature: float) -> None:
    algorithm = LinearGaussian(prior=PRIORS[prior], covariance=covariance, temperature=temperature)
    model, meta, episode = set_up(algorithm)
    adapted = algorithm.adapt(model, meta, episode.support, NO_NOISE)
    mean, expected = by_hand(meta, episode, temperature)
    torch.testing.assert_close(tree.ravel(adapted.value.mean)[0], mean, rtol=1e-10, atol=1e-10)
    found = adapted.value.factor() @ adapted.value.factor().mT
    if covariance == "diagonal":
        expected = torch.diag(1 / torch.diagonal(torch.linalg.inv(expected)))
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    assert adapted.grad_norm < 1e-10 and adapted.num_steps == 0


@pytest.mark.parametrize("outer", ["predictive_nll", "expected_nll"])
@pytest.mark.parametrize("covariance", ["full", "diagonal"])
@pytest.mark.parametrize("prior", list(PRIORS))
def test_hypergradient_is_the_derivative_of_bayes_rule(prior: str, covariance: Any, outer: Any) -> None:
    algorithm = LinearGaussian(prior=PRIORS[prior], covariance=covariance, temperature=0.7, outer=outer)
    model, meta, episode = set_up(algorithm)
    gradient, info = algorithm.hypergradient(model, meta, episode, NO_NOISE)

    def objective(theta: MetaParameters) -> Tensor:
        return outer_by_hand(theta, episode, 0.7, outer=outer, diagonal=covariance == "diagonal")

    torch.testing.assert_close(info.outer_loss, objective(meta), rtol=1e-10, atol=1e-10)
    assert relative_error(gradient, torch.func.grad(objective)(meta)) < 1e-10
    assert info.inner_grad_norm < 1e-10 and info.linear_residual == 0 and info.linear_converged


@pytest.mark.parametrize("outer", ["predictive_nll", "expected_nll"])
def test_hypergradient_of_a_diagonal_posterior_is_lemma_1(outer: Any) -> None:
    algorithm = LinearGaussian(covariance="diagonal", outer=outer)
    model, meta, episode = set_up(algorithm)
    gradient, info = algorithm.hypergradient(model, meta, episode, NO_NOISE)

    def moments(posterior: DiagonalGaussian, shared: Params, batch: Batch) -> tuple[Tensor, Tensor]:
        design = features(shared, batch.x)
        variance = design**2 @ tree.ravel(posterior.log_var)[0].exp()
        return batch.y[:, 0] - design @ tree.ravel(posterior.mean)[0], variance

    def expected(posterior: DiagonalGaussian, shared: Params, batch: Batch) -> Tensor:
        error, variance = moments(posterior, shared, batch)
        return 0.5 * ((error**2 + variance) / shared[NOISE].exp() + shared[NOISE] + math.log(2 * math.pi)).mean()

    def outer_loss(posterior: DiagonalGaussian, prior: DiagonalGaussian, shared: Params) -> Tensor:
        if outer == "expected_nll":
            return expected(posterior, shared, episode.query)
        error, variance = moments(posterior, shared, episode.query)
        return -Normal(0.0, (variance + shared[NOISE].exp()).sqrt()).log_prob(error).mean()

    (prior, shared), _ = gaussian_implicit_hypergradient(
        lambda posterior, shared: expected(posterior, shared, episode.support),
        outer_loss,
        info.inner_params,
        meta.prior,
        1 / 6,
        Dense(),
        shared=meta.shared,
    )
    assert relative_error(gradient, MetaParameters(prior, shared)) < 1e-10


def test_several_targets_have_one_posterior() -> None:
    algorithm = LinearGaussian()
    model, meta, episode = set_up(algorithm, num_targets=2)
    posterior = algorithm.adapt(model, meta, episode.support, NO_NOISE).value
    # Given the features the targets are independent: each has the posterior that it has by itself.
    for target in range(2):
        prior = DiagonalGaussian(
            *({name: leaf[target : target + 1] for name, leaf in part.items()} for part in meta.prior)
        )
        one = MetaParameters(prior, {**meta.shared, NOISE: meta.shared[NOISE][target : target + 1]})
        support = Batch(episode.support.x, episode.support.y[:, target : target + 1])
        mean, _ = by_hand(one, Episode(support, support), 1.0)
        found = torch.cat([posterior.mean["2.weight"][target], posterior.mean["2.bias"][target : target + 1]])
        torch.testing.assert_close(found, mean, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("num_targets", [1, 2])
def test_outputs_are_those_at_the_mean_with_their_exact_variance(num_targets: int) -> None:
    algorithm = LinearGaussian()
    model, meta, episode = set_up(algorithm, num_targets)
    posterior = algorithm.adapt(model, meta, episode.support, NO_NOISE).value

    def network(weights: Params) -> Tensor:
        return model.outputs(weights, meta.shared, episode.query.x)

    found = algorithm.outputs(network, posterior, {})
    assert found["outputs"].shape == found["output_variance"].shape == (1, 5, num_targets)
    draws = torch.func.vmap(network)(posterior.sample(FullPrior().draw_noise(posterior, 40_000, generator=generator())))
    variance = found["output_variance"][0]
    assert ((draws.mean(0) - found["outputs"][0]).abs() < 5 * (variance / 40_000).sqrt()).all()
    assert ((draws.var(0) - variance).abs() < 5 * variance * math.sqrt(2 / 40_000)).all()


def test_posterior_minimises_the_negative_elbo() -> None:
    algorithm = LinearGaussian()
    model, meta, episode = set_up(algorithm)
    posterior = algorithm.adapt(model, meta, episode.support, NO_NOISE).value
    design, noise = features(meta.shared, episode.support.x), meta.shared[NOISE].exp()

    def negative_elbo(mean: Tensor, factor: Tensor) -> Tensor:
        error = episode.support.y[:, 0] - design @ mean
        expected = ((error**2 + ((design @ factor) ** 2).sum(-1)) / (2 * noise)).sum()
        q, p = (MultivariateNormal(*each) for each in ((mean, factor @ factor.mT), (at, prior @ prior.mT)))
        return expected + kl_divergence(q, p)

    at, prior = tree.ravel(meta.prior.mean)[0], meta.prior.factor()
    gradients = torch.func.grad(negative_elbo, argnums=(0, 1))(tree.ravel(posterior.mean)[0], posterior.factor())
    assert all(gradient.tril().abs().max() < 1e-9 for gradient in (gradients[0][None], gradients[1]))


def test_vmap_over_tasks_equals_the_loop() -> None:
    algorithm = LinearGaussian()
    model, meta, episode = set_up(algorithm)
    episodes = [episode, tree.map(lambda leaf: leaf.flip(0) + 0.1, episode)]
    stacked = tree.map(lambda *leaves: torch.stack(leaves), *episodes)
    found = torch.func.vmap(lambda e: algorithm.hypergradient(model, meta, e, NO_NOISE))(stacked)
    for i, each in enumerate(episodes):
        expected = algorithm.hypergradient(model, meta, each, NO_NOISE)
        for actual, wanted in zip(tree.leaves(found), tree.leaves(expected), strict=True):
            torch.testing.assert_close(actual[i], wanted, rtol=1e-9, atol=1e-12)


def test_a_model_that_is_not_affine_or_not_gaussian_is_refused() -> None:
    algorithm = LinearGaussian()
    model, meta, episode = set_up(algorithm)
    algorithm.check_task(model, meta, episode)
    message = "the outputs are not affine in the adapted parameters (0.weight, 0.bias, 2.weight, 2.bias), or the noise"
    everything = small_model(adapt="*")
    check = partial(algorithm.check_task, everything)
    with pytest.raises(ValueError, match=re.escape(message)):
        check(algorithm.init(everything.adapted, everything.shared, generator=generator()), episode)
    classes = build_model(nn.Linear(2, 3).double(), Categorical())
    labels = Episode(*(Batch(batch.x, torch.arange(len(batch.x)) % 3) for batch in episode))
    with pytest.raises(ValueError, match="or the noise is not Gaussian: algorithm 'linear_gaussian' solves the last"):
        algorithm.check_task(classes, algorithm.init(classes.adapted, {}, generator=generator()), labels)


def test_learner_predicts_in_closed_form_and_updates_exactly() -> None:
    source = generator(4)
    network = small_model().network
    tasks = [Episode(*(Batch(*(torch.randn(5, n, generator=source, dtype=DOUBLE) for n in (2, 1))) for _ in range(2)))]
    learner = MetaLearner(network, "linear_gaussian", "gaussian", adapt="2.*").fit(tasks, num_steps=2)
    episode, meta = tasks[0], learner.meta_parameters
    posterior = learner.adapt(*episode.support)
    prediction = posterior.predict(episode.query.x)
    mean, covariance = by_hand(meta, episode, 1.0)
    design = features(meta.shared, episode.query.x)
    noise = meta.shared[NOISE].exp()
    variance = torch.einsum("ni,ij,nj->n", design, covariance, design)
    torch.testing.assert_close(prediction.mean[:, 0], design @ mean, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(prediction.epistemic[:, 0], variance, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(prediction.total_uncertainty[:, 0], variance + noise, rtol=1e-8, atol=1e-8)
    expected = -Normal(design @ mean, (variance + noise).sqrt()).log_prob(episode.query.y[:, 0])
    torch.testing.assert_close(prediction.nll(episode.query.y), expected, rtol=1e-8, atol=1e-8)
    at_once = learner.adapt(*(torch.cat(pair) for pair in zip(*episode, strict=True)))
    late = posterior.update(*episode.query)
    for one, other in zip(tree.leaves(late.value), tree.leaves(at_once.value), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


def test_default_learner_of_tables_takes_the_head_by_name() -> None:
    assert table_algorithm("linear_gaussian", (3,), is_regression=True).describe().startswith("exact solution")


def test_an_algorithm_survives_json() -> None:
    algorithm = make_algorithm("linear_gaussian", prior="full", covariance="diagonal")
    assert records.from_json(records.to_json(algorithm), RECORDS) == algorithm


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"covariance": "low_rank"}, "covariance must be one of full, diagonal, but is 'low_rank'."),
        ({"outer": "elbo"}, "outer must be one of predictive_nll, expected_nll, but is 'elbo'."),
        ({"temperature": 0.0}, "temperature must be positive, but is 0.0."),
        ({"prior": PointPrior()}, "prior must be a distribution such as DiagonalPrior(), but is PointPrior()."),
        ({"inner": "adam"}, "linear_gaussian has no setting 'inner'"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        make_algorithm("linear_gaussian", **settings)
