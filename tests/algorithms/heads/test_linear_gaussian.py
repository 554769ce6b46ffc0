"""The linear-Gaussian head against joint Gaussians of dense matrices, Lemma 1, central differences and simulations."""

import math
import re
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from scipy import stats
from torch import nn
from torch.distributions import MultivariateNormal, Normal

from ibaml import records, tree
from ibaml.algorithms import RECORDS, MetaParameters, TaskNoise, make_algorithm
from ibaml.algorithms.heads import LinearGaussian
from ibaml.algorithms.heads.linear_gaussian import Independent, Precision, Reduction
from ibaml.algorithms.model import build_model
from ibaml.hypergradients import gaussian_implicit_hypergradient
from ibaml.likelihoods import Categorical, Gaussian, StudentT
from ibaml.priors import COLUMN_PRIORS, DiagonalGaussian, DiagonalPrior
from ibaml.solvers.linear import Dense
from ibaml.types import Batch, Episode, Params, Tensor

DOUBLE = torch.float64
NOISE = Gaussian.parameter_name
NO_NOISE = TaskNoise({}, {})
NUM_FEATURES = 4
# Fewer examples than features, and more.
SIZES = [1, 3, 12]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Features:
    """A hidden layer: what a head sees of a network."""

    def __init__(self, num_outputs: int = 1) -> None:
        self.num_outputs = num_outputs

    def features(self, shared: Params, x: Tensor) -> Tensor:
        return torch.tanh(x @ shared["weight"])


def set_up(
    algorithm: LinearGaussian, num_support: int = 3, num_targets: int = 1
) -> tuple[Features, MetaParameters, Episode]:
    source = generator(2)
    prior = algorithm.init_prior(NUM_FEATURES + 1, num_targets, like=torch.zeros(0, dtype=DOUBLE))
    shared = {
        "weight": torch.zeros(2, NUM_FEATURES, dtype=DOUBLE),
        NOISE: torch.full((num_targets,), -1.0, dtype=DOUBLE),
    }
    # Away from any symmetry.
    meta = tree.map(
        lambda leaf: leaf + 0.5 * torch.randn(leaf.shape, generator=source, dtype=DOUBLE),
        MetaParameters(prior, shared),
    )
    support, query = (
        Batch(*(torch.randn(size, width, generator=source, dtype=DOUBLE) for width in (2, num_targets)))
        for size in (num_support, 5)
    )
    return Features(num_targets), meta, Episode(support, query)


def covariances(member: Any) -> Tensor:
    """Of the weights of each column, by hand."""
    if hasattr(member, "lower"):
        factor = member.factor()
        return factor @ factor.mT
    variances = torch.exp(member.log_var)
    if not hasattr(member, "loadings"):
        return torch.diag_embed(variances)
    factors = variances.sqrt().unsqueeze(-1) * member.loadings
    return torch.diag_embed(variances) + factors @ factors.mT


def design(shared: Params, x: Tensor, *, centre: Tensor | float = 0.0) -> Tensor:
    hidden = torch.tanh(x @ shared["weight"]) - centre
    return torch.cat([hidden, torch.ones_like(hidden[:, :1])], -1)


def weights_by_hand(
    theta: MetaParameters, support: Batch, target: int, temperature: float = 1.0, *, centre: Tensor | float = 0.0
) -> tuple[Tensor, Tensor]:
    """Posterior mean and covariance of the weights of a target, by the normal equations."""
    z, column = design(theta.shared, support.x, centre=centre), target % len(covariances(theta.prior))
    precision = torch.linalg.inv(covariances(theta.prior)[column])
    noise = temperature * theta.shared[NOISE][target].exp()
    covariance = torch.linalg.inv(z.mT @ z / noise + precision)
    return covariance @ (precision @ theta.prior.mean[column] + z.mT @ support.y[:, target] / noise), covariance


def outer_by_hand(theta: MetaParameters, episode: Episode, algorithm: LinearGaussian) -> Tensor:
    losses: list[Tensor] = []
    for target in range(episode.query.y.shape[-1]):
        noise = theta.shared[NOISE][target].exp()
        if algorithm.outer == "marginal":
            z = torch.cat([design(theta.shared, batch.x) for batch in episode])
            y = torch.cat([batch.y[:, target] for batch in episode])
            column = target % len(theta.prior.mean)
            covariance = z @ covariances(theta.prior)[column] @ z.mT + noise * torch.eye(len(y), dtype=DOUBLE)
            losses.append(-MultivariateNormal(z @ theta.prior.mean[column], covariance).log_prob(y) / len(y))
            continue
        mean, covariance = weights_by_hand(theta, episode.support, target, algorithm.temperature)
        if algorithm.covariance == "diagonal":
            covariance = torch.diag(1 / torch.diagonal(torch.linalg.inv(covariance)))
        z, y = design(theta.shared, episode.query.x), episode.query.y[:, target]
        variance = torch.diagonal(z @ covariance @ z.mT)
        if algorithm.outer == "predictive_nll":
            losses.append(-Normal(z @ mean, (variance + noise).sqrt()).log_prob(y).mean())
        else:
            losses.append((-Normal(z @ mean, noise.sqrt()).log_prob(y) + 0.5 * variance / noise).mean())
    return torch.stack(losses).sum()


def assert_near(actual: Any, expected: Any, tolerance: float) -> None:
    for one, other in zip(tree.leaves(actual), tree.leaves(expected), strict=True):
        assert float((one - other).norm()) <= tolerance * float(other.norm()), f"{one} against {other}"


VARIANTS = [
    {"prior": "diagonal"},
    {"prior": "full"},
    {"prior": "low_rank"},
    {"prior": "full", "temperature": 0.3},
    {"prior": "diagonal", "covariance": "diagonal", "temperature": 0.7},
]


@pytest.mark.parametrize("settings", VARIANTS, ids=str)
@pytest.mark.parametrize("num_support", [0, *SIZES])
def test_predictions_are_those_of_the_normal_equations(num_support: int, settings: dict[str, Any]) -> None:
    algorithm: Any = make_algorithm("linear_gaussian", **settings)
    nll, meta, episode = set_up(algorithm, num_support, num_targets=2)
    adapted = algorithm.adapt(nll, meta, episode.support, NO_NOISE)
    assert adapted.grad_norm < 1e-12 and adapted.num_steps == 0
    found = algorithm.outputs(nll, meta.shared, adapted.value, episode.query.x, {})
    assert found["outputs"].shape == found["output_variance"].shape == (1, 5, 2)
    z = design(meta.shared, episode.query.x)
    for target in range(2):
        mean, covariance = weights_by_hand(meta, episode.support, target, algorithm.temperature)
        if algorithm.covariance == "diagonal":
            covariance = torch.diag(1 / torch.diagonal(torch.linalg.inv(covariance)))
        assert_near(adapted.value.solution.mean[target], mean, 1e-10)
        assert_near(found["outputs"][0, :, target], z @ mean, 1e-10)
        assert_near(found["output_variance"][0, :, target], torch.diagonal(z @ covariance @ z.mT), 1e-10)
    assert_near(algorithm.mean_outputs(nll, meta.shared, adapted.value, episode.query.x), found["outputs"][0], 0.0)


@pytest.mark.parametrize("outer", ["predictive_nll", "expected_nll", "marginal"])
@pytest.mark.parametrize("settings", VARIANTS, ids=str)
@pytest.mark.parametrize("num_support", SIZES)
def test_hypergradient_is_the_derivative_of_dense_closed_forms(
    num_support: int, settings: dict[str, Any], outer: str
) -> None:
    if outer == "marginal":
        settings = {"prior": settings["prior"]}
    algorithm: Any = make_algorithm("linear_gaussian", outer=outer, **settings)
    nll, meta, episode = set_up(algorithm, num_support, num_targets=2)
    gradient, info = algorithm.hypergradient(nll, meta, episode, NO_NOISE)

    def objective(theta: MetaParameters) -> Tensor:
        return outer_by_hand(theta, episode, algorithm)

    assert_near(info.outer_loss, objective(meta), 1e-10)
    assert_near(gradient, torch.func.grad(objective)(meta), 1e-9)
    assert info.inner_grad_norm < 1e-12 and info.linear_residual == 0 and info.linear_converged


@pytest.mark.parametrize("settings", [*VARIANTS, {"prior": "full", "outer": "marginal"}], ids=str)
def test_hypergradient_equals_central_differences(settings: dict[str, Any]) -> None:
    algorithm: Any = make_algorithm("linear_gaussian", centre=True, **settings)
    nll, meta, episode = set_up(algorithm)
    gradient, _ = algorithm.hypergradient(nll, meta, episode, NO_NOISE)
    flat, unravel = tree.ravel(meta)

    def loss(vector: Tensor) -> Tensor:
        return algorithm.hypergradient(nll, unravel(vector), episode, NO_NOISE)[1].outer_loss

    units = 1e-5 * torch.eye(len(flat), dtype=DOUBLE)
    above, below = torch.func.vmap(loss)(torch.cat([flat + units, flat - units])).chunk(2)
    assert_near(gradient, unravel((above - below) / 2e-5), 1e-7)


@pytest.mark.parametrize("outer", ["predictive_nll", "expected_nll"])
def test_hypergradient_of_a_diagonal_posterior_is_lemma_1(outer: Any) -> None:
    algorithm = LinearGaussian(covariance="diagonal", outer=outer)
    nll, meta, episode = set_up(algorithm)
    gradient, info = algorithm.hypergradient(nll, meta, episode, NO_NOISE)
    solution = info.inner_params.solution

    def named(mean: Tensor, log_var: Tensor) -> DiagonalGaussian:
        return DiagonalGaussian({"w": mean[0]}, {"w": log_var[0]})

    def moments(posterior: DiagonalGaussian, shared: Params, batch: Batch) -> tuple[Tensor, Tensor]:
        z = design(shared, batch.x)
        return batch.y[:, 0] - z @ posterior.mean["w"], z**2 @ posterior.log_var["w"].exp()

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
        named(solution.mean, meta.prior.log_var + solution.spread.variances.log()),
        named(*meta.prior),
        1 / len(episode.support.y),
        Dense(),
        shared=meta.shared,
    )
    assert_near(named(*gradient.prior), prior, 1e-10)
    assert_near(gradient.shared, shared, 1e-10)


@pytest.mark.parametrize("prior", list(COLUMN_PRIORS))
def test_primal_and_dual_are_one(prior: str) -> None:
    algorithm: Any = make_algorithm("linear_gaussian", prior=prior, outer="marginal")
    nll, meta, episode = set_up(algorithm)
    # Examples of no weight turn the one into the other: their targets are the prior's mean, their features zero.
    inputs = design(meta.shared, episode.support.x)
    padded = Batch(
        torch.cat([inputs, inputs.new_zeros(20, NUM_FEATURES + 1)]),
        torch.cat([episode.support.y, inputs.new_zeros(20, 1)]),
    )
    dual, _ = algorithm.solve(meta.prior, meta.shared, Batch(inputs, episode.support.y), 1)
    primal, _ = algorithm.solve(meta.prior, meta.shared, padded, 1)
    assert isinstance(dual.spread, Reduction) and isinstance(primal.spread, Precision)
    query = Batch(design(meta.shared, episode.query.x), episode.query.y)
    assert_near(primal.mean, dual.mean, 1e-10)
    assert_near(algorithm.moments(primal, query.x), algorithm.moments(dual, query.x), 1e-10)
    noise = meta.shared[NOISE].exp()
    assert_near(algorithm.joint_nll(primal, noise, query), algorithm.joint_nll(dual, noise, query), 1e-10)
    nothing = 20 * 0.5 * (meta.shared[NOISE] + math.log(2 * math.pi)).sum()
    assert_near(algorithm.support_nll(primal)[0] - nothing, algorithm.support_nll(dual)[0], 1e-10)


def test_one_prior_serves_all_targets_if_tied() -> None:
    tied = LinearGaussian(prior=COLUMN_PRIORS["full"](tied=True))
    nll, meta, episode = set_up(tied, num_targets=3)
    each = LinearGaussian(prior=COLUMN_PRIORS["full"]())
    copies = meta._replace(prior=tree.map(lambda leaf: leaf.repeat(3, 1), meta.prior))
    found, expected = (
        algorithm.outputs(
            nll, meta.shared, algorithm.adapt(nll, theta, episode.support, NO_NOISE).value, episode.query.x, {}
        )
        for algorithm, theta in ((tied, meta), (each, copies))
    )
    assert_near(found, expected, 1e-12)


def test_a_mean_that_is_not_learned_is_zero_and_noise_that_is_not_learned_is_one() -> None:
    algorithm = LinearGaussian(prior=COLUMN_PRIORS["diagonal"](learn_mean=False))
    nll, meta, episode = set_up(algorithm)
    shared = {"weight": meta.shared["weight"]}
    found = algorithm.adapt(nll, MetaParameters(meta.prior, shared), episode.support, NO_NOISE).value
    zero = meta.prior._replace(mean=torch.zeros_like(meta.prior.log_var))
    mean, _ = weights_by_hand(MetaParameters(zero, {**shared, NOISE: torch.zeros(1)}), episode.support, 0)
    assert_near(found.solution.mean[0], mean, 1e-10)


def test_centring_takes_an_example() -> None:
    nll, meta, episode = set_up(LinearGaussian(centre=True), num_support=0)
    with pytest.raises(ValueError, match="x_support is empty, but centre=True subtracts the mean of its features"):
        LinearGaussian(centre=True).adapt(nll, meta, episode.support, NO_NOISE)


def test_centring_subtracts_the_mean_of_the_support_set() -> None:
    algorithm = LinearGaussian(centre=True)
    nll, meta, episode = set_up(algorithm)
    posterior = algorithm.adapt(nll, meta, episode.support, NO_NOISE).value
    centre = nll.features(meta.shared, episode.support.x).mean(0)
    mean, _ = weights_by_hand(meta, episode.support, 0, centre=centre)
    expected = design(meta.shared, episode.query.x, centre=centre) @ mean
    assert_near(algorithm.mean_outputs(nll, meta.shared, posterior, episode.query.x)[:, 0], expected, 1e-10)


@pytest.mark.parametrize("settings", [*VARIANTS, {"outer": "marginal"}], ids=str)
@pytest.mark.parametrize("num_support", [3, 12])
def test_vmap_over_tasks_equals_the_loop(num_support: int, settings: dict[str, Any]) -> None:
    algorithm: Any = make_algorithm("linear_gaussian", **settings)
    nll, meta, episode = set_up(algorithm, num_support)
    episodes = [episode, tree.map(lambda leaf: leaf.flip(0) + 0.1, episode)]
    stacked = tree.map(lambda *leaves: torch.stack(leaves), *episodes)
    found = torch.func.vmap(lambda e: algorithm.hypergradient(nll, meta, e, NO_NOISE))(stacked)
    for i, each in enumerate(episodes):
        expected = algorithm.hypergradient(nll, meta, each, NO_NOISE)
        for actual, wanted in zip(tree.leaves(found), tree.leaves(expected), strict=True):
            torch.testing.assert_close(actual[i], wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("num_support", [20, 5_000])
def test_float32_features_with_little_noise_lose_nothing(num_support: int) -> None:
    algorithm = LinearGaussian(outer="marginal")
    source = generator(5)
    inputs = [torch.cat([torch.randn(n, 32, generator=source), torch.ones(n, 1)], -1) for n in (num_support, 10)]
    weights = torch.randn(33, 1, generator=source)
    support, query = (Batch(x, x @ weights + 1e-4 * torch.randn(len(x), 1, generator=source)) for x in inputs)
    prior = algorithm.init_prior(33, 1, like=torch.zeros(0))
    shared = {NOISE: torch.full((1,), math.log(1e-8))}

    def run(dtype: torch.dtype) -> Any:
        theta, examples = tree.map(lambda leaf: leaf.to(dtype), ((prior, shared), (support, query)))

        def objective(theta: Any) -> tuple[Tensor, Any]:
            solution, residual = algorithm.solve(*theta, examples[0], 1)
            outputs = algorithm.predict(solution, theta[1], examples[1].x, {})
            return algorithm.outer_loss(solution, theta[1], examples[1]), (outputs, residual)

        return torch.func.grad_and_value(objective, has_aux=True)(theta)

    gradient, (loss, (outputs, residual)) = run(torch.float32)
    wanted_gradient, (wanted_loss, (wanted_outputs, _)) = run(DOUBLE)
    assert outputs["outputs"].dtype == loss.dtype == torch.float32
    assert residual < 1e-12
    # Rounding of the noise's logarithm itself changes values by 1e-6.
    assert_near(loss, wanted_loss, 1e-5)
    assert_near(outputs, wanted_outputs, 1e-5)
    assert_near(gradient, wanted_gradient, 1e-4)


def test_posterior_ranks_of_tasks_from_the_prior_are_uniform_and_intervals_cover() -> None:
    algorithm: Any = LinearGaussian(prior=COLUMN_PRIORS["full"]())
    nll, meta, _ = set_up(algorithm)
    source, num_tasks = generator(7), 4_000
    noise = meta.shared[NOISE].exp().sqrt()
    weights = meta.prior.mean + torch.randn(num_tasks, 5, generator=source, dtype=DOUBLE) @ meta.prior.factor()[0].mT

    def draw(size: int) -> tuple[Batch, Tensor]:
        x = torch.randn(num_tasks, size, 2, generator=source, dtype=DOUBLE)
        clean = torch.einsum("tnf,tf->tn", torch.func.vmap(lambda each: design(meta.shared, each))(x), weights)
        return Batch(x, (clean + noise * torch.randn(clean.shape, generator=source, dtype=DOUBLE)).unsqueeze(-1)), clean

    for num_support in (3, 12):
        (support, _), (query, clean) = draw(num_support), draw(1)

        def predict(one: Batch, x: Tensor) -> dict[str, Tensor]:
            posterior = algorithm.adapt(nll, meta, one, NO_NOISE).value
            return algorithm.outputs(nll, meta.shared, posterior, x, {})

        found = torch.func.vmap(predict)(support, query.x)
        mean, variance = found["outputs"][:, 0, 0, 0], found["output_variance"][:, 0, 0, 0]
        draws = mean + variance.sqrt() * torch.randn(99, num_tasks, generator=source, dtype=DOUBLE)
        ranks = (draws < clean[:, 0]).sum(0)
        counts = torch.bincount(ranks // 5, minlength=20)
        assert stats.chisquare(counts.numpy()).pvalue > 0.01
        scores = (query.y[:, 0, 0] - mean) / (variance + noise**2).sqrt()
        for level in (0.5, 0.8, 0.9, 0.95):
            covered = float((scores.abs() < stats.norm.ppf(0.5 + level / 2)).double().mean())
            assert abs(covered - level) < 2 * math.sqrt(level * (1 - level) / num_tasks)


def test_the_spread_has_the_form_of_fewer_numbers() -> None:
    algorithm = LinearGaussian(covariance="diagonal")
    nll, meta, episode = set_up(algorithm)
    assert isinstance(algorithm.adapt(nll, meta, episode.support, NO_NOISE).value.solution.spread, Independent)
    assert not algorithm.serves_any_number_of_outputs
    where, wide = algorithm.parameter_groups(meta.prior)
    assert where == [meta.prior.mean] and wide == [meta.prior.log_var]
    assert algorithm.describe() == "exact solution with diagonal covariance, temperature 1"


@pytest.mark.parametrize("likelihood", [Categorical(), StudentT(), Gaussian(heteroscedastic=True)], ids=repr)
def test_other_noise_is_refused(likelihood: Any) -> None:
    algorithm = LinearGaussian()
    nll, meta, episode = set_up(algorithm)
    known = SimpleNamespace(likelihood=Gaussian(), num_outputs=1, features=nll.features)
    algorithm.check_task(known, meta, episode)  # pyright: ignore[reportArgumentType]
    message = "algorithm 'linear_gaussian' is exact for Gaussian noise of one variance for each target, but the "
    with pytest.raises(
        ValueError, match=re.escape(f"{message}likelihood is {likelihood!r}: use likelihood='gaussian'")
    ):
        algorithm.check_task(build_model(nn.Linear(2, 1), likelihood), meta, episode)


def test_an_algorithm_survives_json() -> None:
    algorithm = make_algorithm("linear_gaussian", prior="low_rank", outer="marginal", centre=True)
    assert records.from_json(records.to_json(algorithm), RECORDS) == algorithm


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"covariance": "low_rank"}, "covariance must be one of full, diagonal, but is 'low_rank'."),
        ({"outer": "elbo"}, "outer must be one of predictive_nll, expected_nll, marginal, but is 'elbo'."),
        ({"temperature": 0.0}, "temperature must be positive, but is 0.0."),
        (
            {"prior": DiagonalPrior()},
            "prior must be one of columns such as DiagonalColumnPrior(), but is DiagonalPrior(",
        ),
        ({"prior": "point"}, "prior must be one of diagonal, full, low_rank, but is 'point'."),
        (
            {"prior": "full", "covariance": "diagonal"},
            "covariance='diagonal' is a family of posteriors for independent weights, but the prior is FullColumn",
        ),
        (
            {"outer": "marginal", "temperature": 0.5},
            "outer='marginal' is the marginal likelihood of Bayes' rule; expected temperature=1 and covariance='full', "
            "but they are 0.5 and 'full'.",
        ),
        ({"inner": "adam"}, "linear_gaussian has no setting 'inner'"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        make_algorithm("linear_gaussian", **settings)


@pytest.mark.parametrize("first", [1, 7])
def test_further_examples_give_the_posterior_of_all_and_say_how_exactly(first: int) -> None:
    """From fewer examples than features, and from more; the residual is that of the normal equations."""
    algorithm: Any = make_algorithm("linear_gaussian")
    nll, meta, episode = set_up(algorithm, 12)
    parts = (tree.map(lambda leaf: leaf[:first], episode.support), tree.map(lambda leaf: leaf[first:], episode.support))
    known = algorithm.adapt(nll, meta, parts[0], NO_NOISE).value
    found = algorithm.update(nll, meta, known, parts[1])
    whole = algorithm.adapt(nll, meta, episode.support, NO_NOISE).value
    assert_near(found.value.solution.mean, whole.solution.mean, 1e-10)
    assert_near(found.value.solution.squares, whole.solution.squares, 1e-10)
    assert 0 <= found.grad_norm < 1e-10
