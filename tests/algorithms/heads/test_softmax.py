"""The softmax head against scipy, dense Hessians in weight space and central differences of the solved problem."""

import math
import re
from typing import Any

import pytest
import torch
from scipy.optimize import minimize
from torch.distributions import MultivariateNormal

import ibaml
from ibaml import records, tree
from ibaml.algorithms import RECORDS, MetaParameters, TaskNoise, make_algorithm
from ibaml.algorithms.heads import Softmax, class_problems, softmax
from ibaml.priors.columns import DiagonalColumnPrior, DiagonalColumns
from ibaml.solvers.linear import Dense
from ibaml.types import Batch, Episode, Params, Tensor

DOUBLE = torch.float64
TIED = DiagonalColumnPrior(tied=True, learn_mean=False)
OWN = DiagonalColumnPrior(tied=False, learn_mean=True)
PRIORS = {"tied": TIED, "own": OWN}
FORMS = {"examples": False, "weights": True}
NO_NOISE = TaskNoise({}, {})


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randn(*shape: int, seed: int, dtype: torch.dtype = DOUBLE) -> Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=DOUBLE).to(dtype)


def with_constant(features: Tensor) -> Tensor:
    return torch.cat([features, torch.ones_like(features[..., :1])], -1)


class LinearFeatures:
    """What a head asks of a model: features that are linear in a shared weight."""

    def __init__(self, num_outputs: int) -> None:
        self.num_outputs = num_outputs

    def features(self, shared: Params, x: Tensor) -> Tensor:
        return torch.tanh(x @ shared["body.weight"].mT)


def set_up(
    family: DiagonalColumnPrior, *, num_classes: int = 3, num_support: int = 7, num_features: int = 4
) -> tuple[MetaParameters, Episode]:
    """Meta-parameters away from any symmetry, and a task without examples of the last class in its support set."""
    prior = family.init(num_features + 1, num_classes, like=torch.zeros((), dtype=DOUBLE))
    prior = tree.map(lambda leaf: leaf + 0.5 * randn(*leaf.shape, seed=1), prior)
    shared = {"body.weight": randn(num_features, 3, seed=2)}
    support = Batch(2 * randn(num_support, 3, seed=3), torch.arange(num_support) % (num_classes - 1))
    query = Batch(2 * randn(5, 3, seed=4), torch.arange(5) % num_classes)
    return MetaParameters(prior, shared), Episode(support, query)


def inputs(meta: MetaParameters, x: Tensor) -> Tensor:
    return with_constant(LinearFeatures(0).features(meta.shared, x))


def inner_loss(family: DiagonalColumnPrior, prior: DiagonalColumns, weights: Tensor, batch: Batch) -> Tensor:
    """Summed cross entropy and minus the log density of the prior, in the weights themselves."""
    logits = batch.x @ weights.mT
    penalty = 0.5 * ((weights - family.mean(prior)) ** 2 * torch.exp(-prior.log_var)).sum()
    return torch.nn.functional.cross_entropy(logits, batch.y, reduction="sum") + penalty


def dense_covariance(
    family: DiagonalColumnPrior, prior: DiagonalColumns, weights: Tensor, batch: Batch, z: Tensor
) -> Tensor:
    hessian = torch.func.hessian(lambda flat: inner_loss(family, prior, flat.reshape(weights.shape), batch))(
        weights.flatten()
    )
    inverse = torch.linalg.inv(hessian).reshape(*weights.shape, *weights.shape)
    return torch.einsum("mi,kijl,ml->mkj", z, inverse, z)


def choose(monkeypatch: pytest.MonkeyPatch, in_weights: bool) -> None:
    monkeypatch.setattr(class_problems, "_costs_less_in_weights", lambda *sizes: in_weights)


def solve(algorithm: Softmax, prior: Any, z: Tensor, y: Tensor, num_classes: int) -> Any:
    return algorithm.solve(prior, {}, Batch(z, y), num_classes)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("family", PRIORS)
def test_mode_is_that_of_scipy_and_stationary(monkeypatch: pytest.MonkeyPatch, family: str, form: str) -> None:
    choose(monkeypatch, FORMS[form])
    algorithm = Softmax(prior=PRIORS[family])
    meta, episode = set_up(algorithm.prior)
    batch = Batch(inputs(meta, episode.support.x), episode.support.y)
    solution, residual = algorithm.solve(meta.prior, {}, batch, 3)
    loss = torch.func.grad_and_value(lambda flat: inner_loss(PRIORS[family], meta.prior, flat.reshape(3, 5), batch))
    gradient, value = loss(solution.weights.flatten())
    assert gradient.abs().max() < 1e-10 and residual < 1e-13
    by_scipy = minimize(
        lambda flat: tuple(part.numpy() for part in reversed(loss(torch.from_numpy(flat)))),
        torch.zeros(15, dtype=DOUBLE).numpy(),
        jac=True,
        method="BFGS",
        options={"gtol": 1e-9},
    )
    assert abs(by_scipy.fun - float(value)) < 1e-10
    torch.testing.assert_close(solution.weights.flatten(), torch.from_numpy(by_scipy.x), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("family", PRIORS)
def test_covariance_is_the_inverse_hessian_in_weights(monkeypatch: pytest.MonkeyPatch, family: str, form: str) -> None:
    choose(monkeypatch, FORMS[form])
    algorithm = Softmax(prior=PRIORS[family], posterior_temperature=0.3)
    meta, episode = set_up(algorithm.prior)
    batch = Batch(inputs(meta, episode.support.x), episode.support.y)
    solution, _ = algorithm.solve(meta.prior, {}, batch, 3)
    z = inputs(meta, episode.query.x)
    expected = 0.3 * dense_covariance(PRIORS[family], meta.prior, solution.weights, batch, z)
    torch.testing.assert_close(algorithm.covariance(solution, z), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("family", PRIORS)
def test_marginal_likelihood_is_that_of_laplace_in_weights(
    monkeypatch: pytest.MonkeyPatch, family: str, form: str
) -> None:
    choose(monkeypatch, FORMS[form])
    algorithm = Softmax(prior=PRIORS[family])
    meta, episode = set_up(algorithm.prior)
    batch = Batch(inputs(meta, episode.support.x), episode.support.y)

    def nll(prior: Any) -> Tensor:
        return algorithm.marginal_nll(prior, {}, batch, 3)

    weights = solve(algorithm, meta.prior, batch.x, batch.y, 3)[0].weights.flatten()

    def loss(flat: Tensor) -> Tensor:
        return inner_loss(PRIORS[family], meta.prior, flat.reshape(3, 5), batch)

    log_var = meta.prior.log_var.expand(3, -1)
    expected = loss(weights) + 0.5 * (torch.func.hessian(loss)(weights).logdet() + log_var.sum())
    torch.testing.assert_close(nll(meta.prior), expected, rtol=1e-10, atol=1e-10)
    assert torch.autograd.gradcheck(
        lambda log_var: nll(meta.prior._replace(log_var=log_var)), meta.prior.log_var.clone().requires_grad_()
    )


@pytest.mark.parametrize("family", PRIORS)
def test_unknowns_of_examples_and_of_weights_give_the_same(monkeypatch: pytest.MonkeyPatch, family: str) -> None:
    algorithm = Softmax(prior=PRIORS[family], posterior_temperature=1.0, outer="predictive_nll")
    meta, episode = set_up(algorithm.prior)
    found: list[Any] = []
    for form in FORMS:
        choose(monkeypatch, FORMS[form])
        gradient, info = algorithm.hypergradient(LinearFeatures(3), meta, episode, NO_NOISE)
        solution = info.inner_params.solution
        covariance = algorithm.covariance(solution, inputs(meta, episode.query.x))
        found.append((solution.weights, covariance, info.outer_loss, gradient))
    for one, other in zip(*(tree.leaves(each) for each in found), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


def test_the_cheaper_unknowns_are_chosen() -> None:
    assert isinstance(class_problems.problem_of(torch.zeros(1, 25, 801), 5), class_problems._OfExamples)
    assert isinstance(class_problems.problem_of(torch.zeros(1, 5000, 11), 3), class_problems._OfWeights)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("outer", ["map_nll", "predictive_nll"])
@pytest.mark.parametrize("family", PRIORS)
def test_hypergradient_is_that_of_central_differences_of_the_solved_problem(
    monkeypatch: pytest.MonkeyPatch, family: str, outer: Any, form: str
) -> None:
    choose(monkeypatch, FORMS[form])
    algorithm = Softmax(prior=PRIORS[family], posterior_temperature=0.5, outer=outer, num_evaluation_samples=8)
    meta, episode = set_up(algorithm.prior)
    model = LinearFeatures(3)

    def outer_loss(theta: MetaParameters) -> Tensor:
        posterior = algorithm.adapt(model, theta, episode.support, NO_NOISE).value
        query = Batch(inputs(theta, episode.query.x), episode.query.y)
        return algorithm.outer_loss(posterior.solution, theta.shared, query)

    gradient, info = algorithm.hypergradient(model, meta, episode, NO_NOISE)
    torch.testing.assert_close(info.outer_loss, outer_loss(meta), rtol=1e-12, atol=0)
    flat, unravel = tree.ravel(meta)
    step = 1e-4
    along = [
        # Fourth order, so that its own error is far below the tolerance.
        (8 * (value(1) - value(-1)) - (value(2) - value(-2))) / (12 * step)
        for direction in torch.eye(len(flat), dtype=DOUBLE)
        for value in [lambda k, d=direction: outer_loss(unravel(flat + k * step * d))]
    ]
    expected = torch.stack(along)
    assert (tree.ravel(gradient)[0] - expected).norm() < 1e-8 * expected.norm()
    assert info.inner_grad_norm < 1e-13 and info.linear_residual == 0 and info.linear_converged


@pytest.mark.parametrize("family", PRIORS)
def test_hypergradient_is_that_of_the_generic_implicit_one(family: str) -> None:
    algorithm = Softmax(prior=PRIORS[family], posterior_temperature=0.0)
    meta, episode = set_up(algorithm.prior)
    found, info = algorithm.hypergradient(LinearFeatures(3), meta, episode, NO_NOISE)
    expected, _ = ibaml.implicit_hypergradient(
        lambda weights, theta: inner_loss(
            PRIORS[family], theta.prior, weights, Batch(inputs(theta, episode.support.x), episode.support.y)
        ),
        lambda weights, theta: torch.nn.functional.cross_entropy(
            inputs(theta, episode.query.x) @ weights.mT, episode.query.y
        ),
        info.inner_params.solution.weights,
        meta,
        Dense(),
    )
    one, other = tree.ravel(found)[0], tree.ravel(expected)[0]
    assert (one - other).norm() < 1e-10 * other.norm()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("outer", ["map_nll", "predictive_nll"])
@pytest.mark.parametrize("family", PRIORS)
def test_vmap_over_tasks_equals_the_loop(monkeypatch: pytest.MonkeyPatch, family: str, outer: Any, form: str) -> None:
    choose(monkeypatch, FORMS[form])
    algorithm = Softmax(prior=PRIORS[family], outer=outer)
    meta, episode = set_up(algorithm.prior)
    # One that takes more steps than the other.
    episodes = [episode, tree.map(lambda leaf: leaf.flip(0) * (5 if leaf.is_floating_point() else 1), episode)]
    stacked = tree.map(lambda *leaves: torch.stack(leaves), *episodes)

    def of_task(one: Episode) -> Any:
        return algorithm.hypergradient(LinearFeatures(3), meta, one, NO_NOISE)

    found = torch.func.vmap(of_task)(stacked)
    for i, each in enumerate(episodes):
        gradient, info = of_task(each)
        for actual, wanted in zip(tree.leaves(found[0]), tree.leaves(gradient), strict=True):
            torch.testing.assert_close(actual[i], wanted, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(found[1].outer_loss[i], info.outer_loss, rtol=1e-12, atol=0)
        assert found[1].inner_grad_norm[i] < 1e-13
    twice = torch.func.vmap(torch.func.vmap(of_task))(tree.map(lambda leaf: leaf.unsqueeze(1), stacked))
    for one, other in zip(tree.leaves(twice[0]), tree.leaves(found[0]), strict=True):
        torch.testing.assert_close(one[:, 0], other, rtol=1e-12, atol=1e-12)


def test_relabelling_classes_relabels_the_posterior_of_a_tied_prior() -> None:
    algorithm = Softmax(posterior_temperature=1.0)
    meta, episode = set_up(TIED)
    z, order = inputs(meta, episode.support.x), torch.tensor([2, 0, 1])
    first, _ = solve(algorithm, meta.prior, z, episode.support.y, 3)
    second, _ = solve(algorithm, meta.prior, z, order[episode.support.y], 3)
    torch.testing.assert_close(second.weights[order], first.weights, rtol=1e-10, atol=1e-12)
    one, other = (algorithm.covariance(each, z) for each in (first, second))
    torch.testing.assert_close(other[:, order][:, :, order], one, rtol=1e-10, atol=1e-12)


def test_a_small_temperature_is_the_point_estimate() -> None:
    meta, episode = set_up(TIED)
    z, query = inputs(meta, episode.support.x), Batch(inputs(meta, episode.query.x), episode.query.y)
    cold, point = (Softmax(posterior_temperature=t, outer="predictive_nll") for t in (1e-10, 0.0))
    found, expected = (solve(each, meta.prior, z, episode.support.y, 3)[0] for each in (cold, point))
    torch.testing.assert_close(found.weights, expected.weights, rtol=0, atol=0)
    losses = [a.outer_loss(s, {}, query) for a, s in ((cold, found), (point, expected))]
    torch.testing.assert_close(*losses, rtol=1e-8, atol=0)
    outputs = point.predict(expected, {}, query.x, {})["outputs"]
    assert outputs.shape == (1, 5, 3) and torch.equal(outputs[0], point.mean(expected, query.x))


def test_samples_have_the_moments_of_the_posterior() -> None:
    algorithm = Softmax(prior=OWN, posterior_temperature=1.0, num_evaluation_samples=32)
    meta, episode = set_up(OWN)
    solution, _ = solve(algorithm, meta.prior, inputs(meta, episode.support.x), episode.support.y, 3)
    z = inputs(meta, episode.query.x)
    samples = algorithm.predict(solution, {}, z, {})["outputs"]
    assert samples.shape == (32, 5, 3)
    torch.testing.assert_close(samples.mean(0), algorithm.mean(solution, z), rtol=0, atol=1e-12)
    centred = samples - samples.mean(0)
    found = torch.einsum("snk,snj->nkj", centred, centred) / 32
    torch.testing.assert_close(found, algorithm.covariance(solution, z), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("form", FORMS)
def test_many_classes_are_predicted_a_few_queries_at_a_time(monkeypatch: pytest.MonkeyPatch, form: str) -> None:
    algorithm = Softmax(prior=OWN, posterior_temperature=1.0)
    choose(monkeypatch, FORMS[form])
    meta, episode = set_up(OWN)
    solution, _ = solve(algorithm, meta.prior, inputs(meta, episode.support.x), episode.support.y, 3)
    z = inputs(meta, episode.query.x)
    whole = algorithm.covariance(solution, z)
    monkeypatch.setattr("ibaml.algorithms.heads.softmax._MOST_AT_ONCE", 2 * 3 * 15)
    torch.testing.assert_close(algorithm.covariance(solution, z), whole, rtol=1e-12, atol=1e-14)


def test_predictive_loss_is_that_of_averaged_probabilities() -> None:
    algorithm = Softmax(prior=OWN, posterior_temperature=1.0, outer="predictive_nll")
    meta, episode = set_up(OWN)
    solution, _ = solve(algorithm, meta.prior, inputs(meta, episode.support.x), episode.support.y, 3)
    query = Batch(inputs(meta, episode.query.x), episode.query.y)
    found = algorithm.outer_loss(solution, {}, query)
    by_torch = MultivariateNormal(algorithm.mean(solution, query.x), algorithm.covariance(solution, query.x))
    torch.manual_seed(0)
    probs = torch.softmax(by_torch.sample((200_000,)), -1).mean(0)
    # The error of 64 points, which is that of some thousand random ones.
    assert abs(found + torch.log(probs.gather(-1, query.y[:, None])).mean()) < 0.01
    of_prediction = algorithm.predict(solution, {}, query.x, {})["outputs"].softmax(-1).mean(0)
    expected = -torch.log(of_prediction.gather(-1, query.y[:, None])).mean()
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("num_dimensions", [1, 5, 20, 100])
def test_points_are_nearer_to_a_normal_distribution_than_random_ones(num_dimensions: int) -> None:
    points = softmax.normal_points(64, torch.zeros(num_dimensions, dtype=DOUBLE))
    assert points.shape == (max(64, 4 * num_dimensions), num_dimensions) and points.mean(0).abs().max() < 1e-12
    torch.testing.assert_close(
        points.mT @ points / len(points), torch.eye(num_dimensions, dtype=DOUBLE), rtol=0, atol=1e-12
    )

    # A function with a known mean: E exp(a^T x) = exp(|a|^2 / 2), here for a of norm one.
    direction = torch.ones(num_dimensions, dtype=DOUBLE) / math.sqrt(num_dimensions)

    def error(at: Tensor) -> float:
        return abs(float(torch.exp(0.5 * at @ direction).mean()) / math.exp(0.125) - 1)

    assert error(points) < 0.002


def test_a_direction_that_no_example_has_keeps_the_variance_of_the_prior() -> None:
    algorithm = Softmax(posterior_temperature=1.0)
    prior = TIED.init(41, 3, like=torch.zeros((), dtype=DOUBLE))
    z = with_constant(torch.cat([randn(6, 20, seed=1), torch.zeros(6, 20, dtype=DOUBLE)], 1))
    solution, _ = solve(algorithm, prior, z, torch.arange(6) % 3, 3)
    new = torch.cat([torch.zeros(1, 20), torch.ones(1, 20), torch.zeros(1, 1)], 1).double()
    # Twenty features, each of a weight with variance 1/40.
    expected = 0.5 * torch.eye(3, dtype=DOUBLE)
    torch.testing.assert_close(algorithm.covariance(solution, new)[0], expected, rtol=1e-12, atol=0)
    assert algorithm.mean(solution, new).abs().max() == 0


@pytest.mark.parametrize("family", PRIORS)
def test_without_examples_logits_are_those_of_the_prior_at_the_temperature(family: str) -> None:
    """``f_c = z.w_c`` with independent weights of each class: mean ``z.m_c``, variance ``T z^T D_c z``."""
    algorithm = Softmax(prior=PRIORS[family], posterior_temperature=0.7)
    meta, episode = set_up(algorithm.prior, num_support=0)
    adapted = algorithm.adapt(LinearFeatures(3), meta, episode.support, NO_NOISE)
    assert adapted.grad_norm == 0
    mean = algorithm.prior.mean(meta.prior).expand(3, -1)
    variances = meta.prior.log_var.exp().expand(3, -1)
    z = inputs(meta, episode.query.x)
    torch.testing.assert_close(algorithm.mean(adapted.value.solution, z), z @ mean.mT, rtol=1e-12, atol=1e-12)
    expected = torch.diag_embed(0.7 * z**2 @ variances.mT)
    torch.testing.assert_close(algorithm.covariance(adapted.value.solution, z), expected, rtol=1e-12, atol=1e-12)


def test_one_example_is_enough() -> None:
    algorithm = Softmax(posterior_temperature=1.0)
    prior = TIED.init(6, 4, like=torch.zeros((), dtype=DOUBLE))
    z = with_constant(randn(1, 5, seed=1))
    solution, residual = solve(algorithm, prior, z, torch.tensor([2]), 4)
    logits = algorithm.mean(solution, z)[0]
    assert residual < 1e-13 and int(logits.argmax()) == 2
    # The classes without examples are exchangeable.
    torch.testing.assert_close(logits[[0, 1]], logits[[1, 3]], rtol=1e-12, atol=0)
    assert torch.isfinite(algorithm.predict(solution, {}, z, {})["outputs"]).all()


def test_one_class_is_certain() -> None:
    algorithm = Softmax(posterior_temperature=1.0, outer="predictive_nll")
    prior = TIED.init(6, 1, like=torch.zeros((), dtype=DOUBLE))
    batch = Batch(with_constant(randn(3, 5, seed=1)), torch.zeros(3, dtype=torch.int64))
    solution, residual = algorithm.solve(prior, {}, batch, 1)
    assert residual == 0 and algorithm.outer_loss(solution, {}, batch).abs() < 1e-12


@pytest.mark.parametrize(
    ("num_classes", "num_support", "num_features"), [(5, 25, 800), (2, 5000, 10), (20, 100, 64), (5, 5, 800)]
)
def test_float32_agrees_with_float64(num_classes: int, num_support: int, num_features: int) -> None:
    y, algorithm = torch.arange(num_support) % num_classes, Softmax(posterior_temperature=1.0)
    centres = randn(num_classes, num_features, seed=1)
    features = 0.5 * centres[y] + randn(num_support, num_features, seed=2)
    found: dict[torch.dtype, Any] = {}
    for dtype in (torch.float32, DOUBLE):
        z = with_constant(features.to(dtype))
        solution, residual = solve(algorithm, TIED.init(num_features + 1, num_classes, like=z), z, y, num_classes)
        found[dtype] = (algorithm.mean(solution, z[:50]), algorithm.covariance(solution, z[:50]))
        assert residual < (1e-6 if dtype == torch.float32 else 1e-14)
    for one, other in zip(found[torch.float32], found[DOUBLE], strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-3, atol=2e-5)


def test_a_weak_prior_of_classes_that_can_be_separated_is_solved_by_shorter_steps() -> None:
    algorithm = Softmax(prior=DiagonalColumnPrior(tied=True, learn_mean=False, initial_variance=1e4))
    z = with_constant(randn(20, 3, seed=1) * torch.tensor([1.0, 1e-3, 1e3], dtype=DOUBLE))
    y = (z[:, 0] > 0).long() + 2 * (z[:, 2] > 0).long()
    solution, residual = solve(algorithm, algorithm.init_prior(4, 4, like=z), z, y, 4)
    assert residual < 1e-11 and bool((algorithm.mean(solution, z).argmax(-1) == y).all())


def test_too_few_steps_are_seen_in_the_gradient_norm() -> None:
    algorithm = Softmax(max_newton_steps=1, prior=DiagonalColumnPrior(tied=True, initial_variance=1e4))
    z = with_constant(randn(20, 3, seed=1))
    _, residual = solve(algorithm, algorithm.init_prior(4, 3, like=z), z, (z[:, 0] > 0).long(), 3)
    assert residual > 1e-2


def test_centred_features_ignore_a_shift_of_all() -> None:
    algorithm = Softmax(centre=True)
    meta, episode = set_up(TIED)

    class Shifted(LinearFeatures):
        def features(self, shared: Params, x: Tensor) -> Tensor:
            return super().features(shared, x) + 7

    found = [algorithm.adapt(m, meta, episode.support, NO_NOISE).value for m in (LinearFeatures(3), Shifted(3))]
    torch.testing.assert_close(found[1].centre, found[0].centre + 7, rtol=1e-12, atol=0)
    torch.testing.assert_close(found[1].solution.weights, found[0].solution.weights, rtol=1e-9, atol=1e-11)


def test_tied_priors_serve_any_number_of_classes_and_others_refuse() -> None:
    z, y = with_constant(randn(4, 3, seed=1)), torch.arange(4) % 2
    assert Softmax().serves_any_number_of_outputs and not Softmax(prior=OWN).serves_any_number_of_outputs
    solution, _ = solve(Softmax(), TIED.init(4, 3, like=z), z, y, 7)
    assert solution.weights.shape == (7, 4)
    message = "the task has 7 classes, but there are priors for 3: classes that each have a prior of their own are"
    with pytest.raises(ValueError, match=re.escape(message)):
        solve(Softmax(prior=OWN), OWN.init(4, 3, like=z), z, y, 7)


def test_it_survives_json_and_says_what_it_does() -> None:
    algorithm = make_algorithm("softmax", prior=OWN, posterior_temperature=0.0)
    assert records.from_json(records.to_json(algorithm), RECORDS) == algorithm
    assert algorithm.describe() == "Newton's method to convergence, mode alone"
    assert Softmax().describe() == "Newton's method to convergence, Laplace posterior at temperature 0.03"
    prior = OWN.init(4, 3, like=torch.zeros(()))
    assert [len(group) for group in Softmax(prior=OWN).parameter_groups(prior)] == [1, 1]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"outer": "elbo"}, "outer must be one of map_nll, predictive_nll, but is 'elbo'."),
        ({"posterior_temperature": -1.0}, "posterior_temperature must be 0 or positive and finite, but is -1.0."),
        ({"num_evaluation_samples": 7}, "num_evaluation_samples must be even, since samples come in pairs, but is 7."),
        ({"num_evaluation_samples": 0}, "num_evaluation_samples must be at least 1, got 0"),
        ({"max_newton_steps": 0}, "max_newton_steps must be at least 1, got 0"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        make_algorithm("softmax", **settings)
