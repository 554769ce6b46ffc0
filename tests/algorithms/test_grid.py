"""Every preset against finite differences, hand calculations and closed forms, on real modules."""

import dataclasses
import math
import re
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

from ibaml import algorithms, tree
from ibaml.algorithms import (
    ALGORITHMS,
    IBAML,
    Algorithm,
    GradientBased,
    MetaParameters,
    TaskNoise,
    make_algorithm,
    objectives,
)
from ibaml.algorithms.model import Model, build_model
from ibaml.data.linear_regression import closed_form_posterior
from ibaml.likelihoods import Categorical, Gaussian, Likelihood
from ibaml.priors import DiagonalGaussian, DiagonalPrior, PointPrior, kl_divergence
from ibaml.priors.diagonal import hyper_prior_nll
from ibaml.solvers.inner import INNER_SOLVERS, Adam, GradientDescent, InnerSolver, NaturalGradient, RelativeAdam
from ibaml.solvers.linear import CG, LINEAR_SOLVERS, MINRES, Dense, LinearSolver, Neumann
from ibaml.types import Batch, Episode, InnerSolution, Params, PyTree, Tensor

DOUBLE = torch.float64
FINITE_DIFFERENCE = 1e-7
GRID = [name for name, record in ALGORITHMS.items() if issubclass(record, GradientBased)]
NOISE_NAME = Gaussian.parameter_name


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def relative_error(actual: PyTree, expected: PyTree) -> float:
    """Largest over leaves of ``||actual - expected|| / ||expected||``: no leaf hides behind a larger one."""
    pairs = zip(tree.leaves(actual), tree.leaves(expected), strict=True)
    return max(float((a - b).norm() / b.norm()) for a, b in pairs)


def central_difference(function: Callable[[PyTree], Tensor], point: PyTree, step: float = 1e-5) -> PyTree:
    vector, unravel = tree.ravel(point)
    steps = step * torch.eye(len(vector), dtype=vector.dtype)
    values = torch.func.vmap(lambda v: function(unravel(v)))(torch.cat([vector + steps, vector - steps]))
    return unravel((values[: len(vector)] - values[len(vector) :]) / (2 * step))


def small_network(num_outputs: int) -> nn.Module:
    network = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, num_outputs)).double()
    source = generator(1)
    for parameter in network.parameters():
        parameter.data = 0.7 * torch.randn(parameter.shape, generator=source, dtype=DOUBLE)
    return network


def small_model(kind: str, adapt: str = "*") -> Model:
    likelihood: Likelihood = (
        Categorical() if kind == "classification" else Gaussian(num_targets=1, initial_noise_variance=0.3)
    )
    return build_model(small_network(3 if kind == "classification" else 1), likelihood, adapt=adapt)


def episode(kind: str, seed: int = 0) -> Episode:
    source = generator(seed)

    def batch(size: int) -> Batch:
        x = torch.randn(size, 2, generator=source, dtype=DOUBLE)
        if kind == "classification":
            return Batch(x, (x[:, 0] > 0).long() + (x[:, 1] > 0).long())
        return Batch(x, torch.sin(x.sum(-1, keepdim=True)) + 0.2 * torch.randn(size, 1, generator=source, dtype=DOUBLE))

    return Episode(batch(6), batch(9))


def set_up(
    algorithm: Algorithm, kind: str = "regression", adapt: str = "*", seed: int = 0
) -> tuple[Model, MetaParameters, Episode, TaskNoise]:
    """Returns a model, meta-parameters away from any symmetry, one task, and its noise; all in double precision."""
    model = small_model(kind, adapt)
    source = generator(seed + 50)
    shared = tree.map(torch.Tensor.double, model.shared)
    meta = algorithm.init(model.adapted, shared, generator=source)
    return model, meta, episode(kind, seed), algorithm.draw_noise(meta, generator=source)


def meta_loss(
    algorithm: Algorithm, model: Model, task: Episode, noise: TaskNoise
) -> Callable[[MetaParameters], Tensor]:
    """The outer loss after adaptation, as a plain function of the meta-parameters."""
    return lambda meta: algorithm.hypergradient(model, meta, task, noise)[1].outer_loss


def descent(num_steps: int = 5, learning_rate: float = 0.05, **settings: Any) -> GradientDescent:
    return GradientDescent(num_steps=num_steps, learning_rate=learning_rate, **settings)


WIDE: dict[str, Any] = {
    "inner": descent(),
    "prior": DiagonalPrior(initial_log_var=(-3.0, -2.0)),
    "num_samples": 2,
    "temperature": 1.0,
}


@pytest.mark.parametrize("kind", ["classification", "regression"])
@pytest.mark.parametrize("name", ["abml", "vampire", "ibaml"])
def test_inner_steps_of_a_preset_lower_the_inner_loss(name: str, kind: str) -> None:
    # A step on the mean is stable while lr * lam / D < 2, which the published temperature of 0.01 sees to.
    algorithm = make_algorithm(name)
    assert algorithm.temperature == 0.01
    model, meta, task, noise = set_up(algorithm, kind)
    adapted = algorithm.adapt(model, meta, task.support, noise).value
    weight = objectives.kl_weight(6, algorithm.temperature)

    def inner_loss(q: DiagonalGaussian) -> Tensor:
        expected = objectives.expected_nll(
            lambda w, b: model.per_example(w, meta.shared, b), q, noise.inner, task.support
        )
        return objectives.negative_elbo(expected, q, meta.prior, weight)

    assert inner_loss(adapted) < inner_loss(meta.prior)


def test_presets_are_the_cells_of_the_grid() -> None:
    cells = {name: (type(make().prior), make().estimator) for name in GRID for make in [ALGORITHMS[name]]}
    assert (
        cells.items()
        >= {
            "maml": (PointPrior, "unrolled"),
            "fomaml": (PointPrior, "first_order"),
            "imaml": (PointPrior, "implicit"),
            "abml": (DiagonalPrior, "unrolled"),
            "vampire": (DiagonalPrior, "unrolled"),
            "ibaml": (DiagonalPrior, "implicit"),
        }.items()
    )


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("ibaml", {"outer": "sum"}, "outer must be one of expected_nll, predictive_nll, elbo, but is 'sum'."),
        ("vampire", {"outer": "elbo"}, "outer must be one of expected_nll, predictive_nll, but is 'elbo'."),
        ("ibaml", {"num_samples": 0}, "num_samples must be at least 1, but is 0."),
        ("abml", {"num_evaluation_samples": 0}, "num_evaluation_samples must be at least 1, but is 0."),
        ("ibaml", {"temperature": -1.0}, "temperature must be positive, but is -1.0."),
        ("ibaml", {"temperature": math.nan}, "temperature must be positive, but is nan."),
        ("imaml", {"proximal_strength": 0.0}, "proximal_strength must be positive, but is 0.0."),
        ("imaml", {"proximal_strength": math.nan}, "proximal_strength must be positive, but is nan."),
        ("abml", {"hyper_prior_weight": -1.0}, "hyper_prior_weight must be at least 0, but is -1.0."),
        ("ibaml", {"antithetic": True, "num_samples": 3}, "num_samples must be even with antithetic=True, but is 3."),
        ("maml", {"truncation": -1}, "truncation must be at least 0 or None, but is -1."),
        ("maml", {"inner": 3}, "inner must be a solver such as GradientDescent(num_steps=5), but is 3."),
        ("ibaml", {"linear": None}, "linear must be a solver such as CG(max_steps=5), but is None."),
        (
            "ibaml",
            {"prior": PointPrior()},
            "prior must be a distribution such as DiagonalPrior(), but is PointPrior().",
        ),
        ("ibaml", {"truncation": 2}, "ibaml has no setting 'truncation'; did you mean "),
        ("maml", {"iner": "adam"}, "maml has no setting 'iner'; did you mean 'inner'? There are inner, truncation."),
        ("maml", {"inner": "sgd"}, f"inner must be one of {', '.join(INNER_SOLVERS)}, but"),
        ("ibaml", {"linear": "lu"}, f"linear must be one of {', '.join(LINEAR_SOLVERS)}, but is 'lu'."),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_settings_that_cannot_work_are_refused(name: str, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        make_algorithm(name, **settings)


def test_unknown_algorithm_is_refused_with_the_known_names() -> None:
    message = f"algorithm must be one of {', '.join(ALGORITHMS)}, but is 'sgd'."
    with pytest.raises(ValueError, match=re.escape(message)):
        make_algorithm("sgd")


def test_names_stand_for_solvers_and_families_with_their_defaults() -> None:
    assert make_algorithm("ibaml", inner="adam", linear="minres", prior="diagonal") == IBAML(
        inner=Adam(), linear=MINRES(), prior=DiagonalPrior()
    )


@pytest.mark.parametrize("solver", [RelativeAdam(), NaturalGradient(), GradientDescent(curvature_rate=0.2)])
def test_steps_in_units_of_the_prior_are_refused_for_plain_weights(solver: InnerSolver) -> None:
    algorithm = algorithms.maml(inner=solver)
    model, meta, task, noise = set_up(algorithm)
    with pytest.raises(ValueError, match=f"{type(solver).__name__} takes its steps in units of a prior, but plain"):
        algorithm.adapt(model, meta, task.support, noise)


def test_a_solver_of_the_users_own_is_called() -> None:
    @dataclasses.dataclass(frozen=True)
    class Twice:
        num_steps: int = 2

        def __call__(self, loss: Any, init: Any, /, **settings: Any) -> InnerSolution:
            return descent(self.num_steps)(loss, init, **settings)

    own, theirs = algorithms.maml(inner=Twice()), algorithms.maml(inner=descent(2))
    model, meta, task, noise = set_up(own)
    found, expected = (each.hypergradient(model, meta, task, noise)[0] for each in (own, theirs))
    assert relative_error(found, expected) == 0


def test_initial_prior_has_the_given_mean_and_uniform_log_variances() -> None:
    weights = {"w": torch.arange(4000, dtype=DOUBLE)}
    meta = algorithms.ibaml(prior=DiagonalPrior(initial_log_var=(-4.0, -1.0))).init(weights, {}, generator=generator())
    assert isinstance(meta.prior, DiagonalGaussian)
    assert torch.equal(meta.prior.mean["w"], weights["w"])
    log_var = meta.prior.log_var["w"]
    assert -4 <= log_var.min() < -3.9 and -1.1 < log_var.max() <= -1
    # Five standard errors of the mean of a uniform variable of width 3.
    assert abs(float(log_var.mean()) + 2.5) < 5 * 3 / math.sqrt(12 * 4000)
    again = algorithms.ibaml(prior=DiagonalPrior(initial_log_var=(-4.0, -1.0))).init(weights, {}, generator=generator())
    assert torch.equal(again.prior.log_var["w"], log_var)
    assert algorithms.maml().init(weights, {}, generator=generator()).prior is weights


UNROLLED: dict[str, dict[str, Any]] = {
    "maml": {"inner": descent(3, 0.1)},
    "maml with momentum": {"inner": descent(3, 0.1, momentum=0.5)},
    "maml with adam": {"inner": Adam(num_steps=3, learning_rate=0.02)},
    "abml": {**WIDE, "inner": descent(3), "temperature": 0.5, "hyper_prior_weight": 0.01},
    "vampire": {**WIDE, "inner": descent(3)},
    "vampire with opposite samples": {**WIDE, "inner": descent(3), "antithetic": True},
    "vampire with natural gradients and the predictive nll": {
        **WIDE,
        "inner": NaturalGradient(num_steps=3, learning_rate=0.05),
        "outer": "predictive_nll",
    },
}


@pytest.mark.parametrize("kind", ["classification", "regression"])
@pytest.mark.parametrize("name", list(UNROLLED))
def test_unrolled_hypergradients_equal_central_differences(name: str, kind: str) -> None:
    # The head is adapted and the body is shared, so that all of prior mean, log-variance, body and likelihood count.
    algorithm = make_algorithm(name.split()[0], **UNROLLED[name])
    model, meta, task, noise = set_up(algorithm, kind, adapt="2.*")
    assert {"0.weight", "0.bias"} <= set(meta.shared)
    gradient, _ = algorithm.hypergradient(model, meta, task, noise)
    numeric = central_difference(meta_loss(algorithm, model, task, noise), meta)
    assert relative_error(gradient, numeric) < FINITE_DIFFERENCE


def test_maml_with_one_step_equals_a_hand_calculation() -> None:
    # One weight, one output, noise variance s2, squared errors: nll = (y - w x)^2 / (2 s2) + const. One step gives
    # w' = w - a dL/dw with dL/dw = mean(x (w x - y)) / s2, so
    # dO/dw = mean(x_q (w' x_q - y_q)) / s2 * (1 - a mean(x^2) / s2).
    network = nn.Linear(1, 1, bias=False).double()
    model = build_model(network, Gaussian(num_targets=1, initial_noise_variance=0.5))
    x, y = torch.tensor([[1.0], [2.0]], dtype=DOUBLE), torch.tensor([[1.0], [3.0]], dtype=DOUBLE)
    query = Batch(torch.tensor([[-1.0], [0.5]], dtype=DOUBLE), torch.tensor([[0.4], [1.0]], dtype=DOUBLE))
    meta = MetaParameters(
        {"weight": torch.tensor([[0.3]], dtype=DOUBLE)}, {NOISE_NAME: torch.tensor([math.log(0.5)], dtype=DOUBLE)}
    )
    algorithm = algorithms.maml(inner=descent(1, 0.1))
    gradient, info = algorithm.hypergradient(model, meta, Episode(Batch(x, y), query), TaskNoise({}, {}))
    # mean(x (0.3 x - y)) = ((0.3 - 1) + 2 (0.6 - 3)) / 2 = -2.75, so w' = 0.3 + 0.1 * 5.5 = 0.85.
    assert math.isclose(float(info.inner_params["weight"]), 0.85, rel_tol=1e-14)
    # mean(x_q (0.85 x_q - y_q)) = (1.25 - 0.2875) / 2 = 0.48125; mean(x^2) = 2.5.
    assert math.isclose(float(gradient.prior["weight"]), 0.48125 / 0.5 * (1 - 0.1 * 2.5 / 0.5), rel_tol=1e-14)
    # Query errors 0.4 + 0.85 = 1.25 and 1 - 0.425 = 0.575; nll = e^2 / (2 s2) + log(2 pi s2) / 2.
    outer = (1.25**2 + 0.575**2) / 2 + 0.5 * math.log(2 * math.pi * 0.5)
    assert math.isclose(float(info.outer_loss), outer, rel_tol=1e-14)
    first_order, _ = algorithms.fomaml(inner=descent(1, 0.1)).hypergradient(
        model, meta, Episode(Batch(x, y), query), TaskNoise({}, {})
    )
    assert math.isclose(float(first_order.prior["weight"]), 0.48125 / 0.5, rel_tol=1e-14)


def test_first_order_gradient_is_the_outer_gradient_at_the_adapted_point() -> None:
    algorithm = algorithms.vampire(**{**WIDE, "inner": descent(3)}, truncation=0)
    model, meta, task, noise = set_up(algorithm)
    gradient, info = algorithm.hypergradient(model, meta, task, noise)
    through = torch.func.grad(
        lambda q, shared: objectives.expected_nll(
            lambda w, b: model.per_example(w, shared, b), q, noise.outer, task.query
        ),
        argnums=(0, 1),
    )(info.inner_params, meta.shared)
    assert relative_error(tuple(gradient), through) < 1e-12


def test_abml_outer_loss_equals_a_hand_computation() -> None:
    algorithm = algorithms.abml(**{**WIDE, "temperature": 0.7}, hyper_prior_weight=0.02)
    model, meta, task, noise = set_up(algorithm)
    _, info = algorithm.hypergradient(model, meta, task, noise)
    posterior, prior = info.inner_params, meta.prior
    assert isinstance(prior, DiagonalGaussian)

    def summed_nll(batch: Batch, draws: Params) -> float:
        total = 0.0
        for s in range(2):
            weights = {
                name: posterior.mean[name] + (0.5 * posterior.log_var[name]).exp() * draws[name][s] for name in draws
            }
            hidden = torch.tanh(batch.x @ weights["0.weight"].mT + weights["0.bias"])
            error = batch.y - (hidden @ weights["2.weight"].mT + weights["2.bias"])
            # Noise variance 0.3.
            total += float((error**2 / 0.6 + 0.5 * math.log(2 * math.pi * 0.3)).sum()) / 2
        return total

    def normal(mean: Params, log_var: Params) -> torch.distributions.Normal:
        return torch.distributions.Normal(tree.ravel(mean)[0], (0.5 * tree.ravel(log_var)[0]).exp())

    p = normal(prior.mean, prior.log_var)
    divergence = float(torch.distributions.kl_divergence(normal(posterior.mean, posterior.log_var), p).sum())
    # The fit of all 15 examples as one sum, with one KL divergence, per example.
    negative_elbo = (
        summed_nll(task.query, noise.outer) + summed_nll(task.support, noise.inner) + 0.7 * divergence
    ) / 15
    hyper_prior = -torch.distributions.Normal(0.0, 1.0).log_prob(p.mean).sum()
    gamma = torch.distributions.Gamma(torch.tensor(1.0, dtype=DOUBLE), torch.tensor(0.01, dtype=DOUBLE))
    hyper_prior = hyper_prior - gamma.log_prob(1 / p.variance).sum()
    # The noise variance starts as a float32 logarithm.
    assert math.isclose(float(info.outer_loss), negative_elbo + 0.02 * float(hyper_prior), rel_tol=1e-6)


@pytest.mark.parametrize(
    ("name", "changes"),
    [("abml", {}), *(("ibaml", {"outer": outer}) for outer in ("expected_nll", "predictive_nll", "elbo"))],
)
def test_hyper_prior_adds_its_own_gradient_and_nothing_else(name: str, changes: dict[str, Any]) -> None:
    settings: dict[str, Any] = {**WIDE, **changes}
    plain = make_algorithm(name, **settings)
    model, meta, task, noise = set_up(plain)
    without, info_without = plain.hypergradient(model, meta, task, noise)
    penalised = make_algorithm(name, **settings, hyper_prior_weight=0.3)
    gradient, info = penalised.hypergradient(model, meta, task, noise)
    penalty = tree.scale(0.3, torch.func.grad(hyper_prior_nll)(meta.prior))
    assert relative_error(tree.sub(gradient.prior, without.prior), penalty) < 1e-9
    torch.testing.assert_close(gradient.shared, without.shared, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(
        info.outer_loss - info_without.outer_loss, 0.3 * hyper_prior_nll(meta.prior), rtol=1e-10, atol=0
    )


def test_noise_is_drawn_with_the_shapes_that_are_documented() -> None:
    meta = algorithms.ibaml().init({"w": torch.zeros(3, 2, dtype=DOUBLE)}, {}, generator=generator())
    noise = algorithms.ibaml(num_samples=4).draw_noise(meta, generator=generator())
    assert noise.inner["w"].shape == noise.outer["w"].shape == (4, 3, 2)
    assert noise.inner["w"].dtype == DOUBLE
    assert not torch.equal(noise.inner["w"], noise.outer["w"])
    paired = algorithms.ibaml(num_samples=4, antithetic=True).draw_noise(meta, generator=generator())
    for draw in (paired.inner["w"], paired.outer["w"]):
        assert torch.equal(draw[:2], -draw[2:])
    weights = algorithms.maml().init(meta.prior.mean, {}, generator=generator())
    assert algorithms.maml().draw_noise(weights, generator=generator()) == TaskNoise({}, {})


def test_log_variances_move_at_a_rate_of_their_own() -> None:
    algorithm = algorithms.ibaml(**{**WIDE, "inner": descent(2, momentum=0.3, curvature_rate=0.2)})
    model, meta, task, noise = set_up(algorithm)
    posterior = meta.prior
    assert isinstance(posterior, DiagonalGaussian)

    def inner_loss(q: DiagonalGaussian) -> Tensor:
        nll = objectives.expected_nll(lambda w, b: model.per_example(w, meta.shared, b), q, noise.inner, task.support)
        return nll + kl_divergence(q, meta.prior) / 6

    velocity = tree.zeros_like(posterior)
    for _ in range(2):
        velocity = tree.axpy(0.3, velocity, torch.func.grad(inner_loss)(posterior))
        # The weight of the KL divergence is 1 / 6, and the curvature of a log-variance about half of that.
        posterior = DiagonalGaussian(
            tree.axpy(-0.05, velocity.mean, posterior.mean),
            tree.axpy(-0.2 * 12, velocity.log_var, posterior.log_var),
        )
    adapted = algorithm.adapt(model, meta, task.support, noise)
    assert relative_error(adapted.value, posterior) < 1e-13


def test_relative_adam_moves_means_in_units_of_the_priors_deviation() -> None:
    algorithm = algorithms.ibaml(inner=RelativeAdam(num_steps=1, learning_rate=0.2))
    model, meta, task, noise = set_up(algorithm)
    assert isinstance(meta.prior, DiagonalGaussian)
    adapted = algorithm.adapt(model, meta, task.support, noise).value
    moved = tree.sub(adapted, meta.prior)
    # The first step of Adam has the size of the learning rate wherever the gradient is not tiny.
    sizes = tree.map(lambda step, log_var: step.abs() / torch.exp(0.5 * log_var), moved.mean, meta.prior.log_var)
    for size in [*tree.leaves(sizes), *tree.leaves(tree.map(lambda step: step.abs() / 2.5, moved.log_var))]:
        assert size.max() <= 0.2 + 1e-12
        assert size.median() == pytest.approx(0.2, rel=1e-2)


def test_weight_samples_are_draws_from_the_posterior_or_the_weights_themselves() -> None:
    posterior = DiagonalGaussian({"w": torch.tensor([1.0, -2.0])}, {"w": torch.tensor([-1.0, 0.5])})
    algorithm = algorithms.ibaml(num_evaluation_samples=4000)
    noise = algorithm.draw_evaluation_noise(MetaParameters(posterior, {}), generator=generator())
    assert noise["w"].shape == (4000, 2)
    draws = algorithm.weight_samples(posterior, noise)
    stacked = torch.stack([draw["w"] for draw in draws]).double()
    assert len(draws) == 4000
    standard_error = (0.5 * posterior.log_var["w"]).exp() / math.sqrt(4000)
    assert ((stacked.mean(0) - posterior.mean["w"]).abs() < 5 * standard_error).all()
    variance = posterior.log_var["w"].exp()
    assert ((stacked.var(0) - variance).abs() < 5 * variance * math.sqrt(2 / 4000)).all()
    point = {"w": torch.zeros(2)}
    no_noise = algorithms.maml().draw_evaluation_noise(MetaParameters(point, {}), generator=generator())
    assert no_noise == {}
    assert algorithms.maml().weight_samples(point, no_noise) == [point]


# A linear model with one weight per feature and a design with X^T X / N = diag(scale): mean-field is exact, and noise
# with mean zero and unit, uncorrelated second moments makes the sampled expected nll exact.
SIGNS = torch.tensor([[1, 1, 1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1]], dtype=DOUBLE)


def linear_task(scale: Tensor, noise_variance: float = 0.2) -> tuple[Model, Params, Episode, TaskNoise]:
    source = generator(3)
    design = torch.linalg.qr(torch.randn(8, 3, generator=source, dtype=DOUBLE)).Q * math.sqrt(8) * scale.sqrt()
    weights = torch.tensor([[1.0], [-0.5], [0.8]], dtype=DOUBLE)
    y = design @ weights + math.sqrt(noise_variance) * torch.randn(8, 1, generator=source, dtype=DOUBLE)
    query_x = torch.randn(5, 3, generator=source, dtype=DOUBLE)
    query = Batch(query_x, query_x @ weights)
    model = build_model(nn.Linear(3, 1, bias=False).double(), Gaussian(num_targets=1))
    noise = {"weight": SIGNS.unsqueeze(1)}
    shared = {NOISE_NAME: torch.tensor([math.log(noise_variance)], dtype=DOUBLE)}
    return model, shared, Episode(Batch(design, y), query), TaskNoise(noise, noise)


def linear_prior() -> DiagonalGaussian:
    return DiagonalGaussian(
        {"weight": torch.tensor([[0.3, 0.1, -0.2]], dtype=DOUBLE)},
        {"weight": torch.tensor([[-1.0, -1.5, -2.0]], dtype=DOUBLE)},
    )


def linear_solution(prior: DiagonalGaussian, shared: Params, support: Batch, kl_weight: float) -> DiagonalGaussian:
    mean, variance = closed_form_posterior(
        support.x,
        support.y,
        prior.mean["weight"][0],
        prior.log_var["weight"][0].exp(),
        shared[NOISE_NAME].exp(),
        kl_weight=kl_weight,
    )
    return DiagonalGaussian({"weight": mean.unsqueeze(0)}, {"weight": variance.log().unsqueeze(0)})


def test_natural_gradient_reaches_the_closed_form_in_far_fewer_steps_than_gradient_descent() -> None:
    # Curvatures of 5, 0.5 and 0.05 in the mean and lam/2 = 1/16 in the log-variance: gradient descent is stable up to a
    # learning rate of about 0.3 and then gains 2% a step in the log-variances.
    model, shared, task, noise = linear_task(torch.tensor([1.0, 0.1, 0.01], dtype=DOUBLE))
    meta = MetaParameters(linear_prior(), shared)
    solution = linear_solution(linear_prior(), shared, task.support, 1 / 8)

    def error(solver: InnerSolver) -> float:
        algorithm = algorithms.ibaml(inner=solver, temperature=1.0)
        adapted = algorithm.adapt(model, meta, task.support, noise)
        assert adapted.num_steps == solver.num_steps
        return relative_error(adapted.value, solution)

    natural = error(NaturalGradient(num_steps=32, learning_rate=1.0))
    plain = {num_steps: error(descent(num_steps, 0.3)) for num_steps in (32, 512)}
    report = f"natural gradient: 32 steps, error {natural:.1e}; gradient descent: {plain}"
    assert natural < 1e-10, report
    assert plain[32] > 0.05, report
    assert plain[512] < 1e-4, report


@pytest.mark.parametrize("temperature", [1.0, 0.3])
def test_ibaml_on_a_linear_model_is_the_derivative_of_the_closed_form(temperature: float) -> None:
    model, shared, task, noise = linear_task(torch.tensor([1.0, 0.5, 0.25], dtype=DOUBLE))
    meta = MetaParameters(linear_prior(), shared)
    algorithm = algorithms.ibaml(
        inner=NaturalGradient(num_steps=120, learning_rate=0.9),
        temperature=temperature,
        linear=CG(max_steps=30, rtol=1e-13),
    )
    gradient, info = algorithm.hypergradient(model, meta, task, noise)
    assert info.inner_grad_norm < 1e-12
    assert info.linear_converged

    def total(theta: MetaParameters) -> Tensor:
        posterior = linear_solution(theta.prior, theta.shared, task.support, temperature / 8)
        return objectives.expected_nll(
            lambda w, b: model.per_example(w, theta.shared, b), posterior, noise.outer, task.query
        )

    assert relative_error(gradient, torch.func.grad(total)(meta)) < 1e-10
    torch.testing.assert_close(info.outer_loss, total(meta), rtol=1e-12, atol=0)


def test_imaml_on_a_linear_model_is_the_derivative_of_ridge_regression() -> None:
    model, shared, task, _ = linear_task(torch.tensor([1.0, 0.5, 0.25], dtype=DOUBLE))
    meta = MetaParameters(linear_prior().mean, shared)
    algorithm = algorithms.imaml(inner=descent(300, 0.2), linear=CG(max_steps=10, rtol=1e-13), proximal_strength=0.7)
    gradient, info = algorithm.hypergradient(model, meta, task, TaskNoise({}, {}))
    assert info.inner_grad_norm < 1e-12

    def total(theta: MetaParameters) -> Tensor:
        x, y, precision = task.support.x, task.support.y[:, 0], torch.exp(-theta.shared[NOISE_NAME])
        matrix = precision * x.mT @ x / 8 + 0.7 * torch.eye(3, dtype=DOUBLE)
        weights = torch.linalg.solve(matrix, precision * x.mT @ y / 8 + 0.7 * theta.prior["weight"][0])
        return model.per_example({"weight": weights.unsqueeze(0)}, theta.shared, task.query).mean()

    assert relative_error(gradient, torch.func.grad(total)(meta)) < 1e-10


@pytest.mark.parametrize("outer", ["predictive_nll", "elbo"])
def test_gradient_of_a_shared_body_is_the_unrolled_one_once_the_head_has_converged(outer: str) -> None:
    settings: dict[str, Any] = {
        "inner": descent(220, 0.08),
        "prior": DiagonalPrior(initial_log_var=(-1.0, 0.0)),
        "num_samples": 2,
        "antithetic": True,
        "temperature": 12.0,
    }
    implicit = algorithms.ibaml(**settings, outer=outer, linear=CG(max_steps=40, rtol=1e-13))
    model, meta, task, noise = set_up(implicit, adapt="2.*")
    assert set(meta.prior.mean) == {"2.weight", "2.bias"}
    assert set(meta.shared) == {"0.weight", "0.bias", NOISE_NAME}
    gradient, info = implicit.hypergradient(model, meta, task, noise)
    assert info.inner_grad_norm < 1e-7
    assert info.linear_converged
    through = (
        partial(algorithms.abml, **settings)
        if outer == "elbo"
        else partial(algorithms.vampire, **settings, outer=outer)
    )
    unrolled, _ = through(**settings).hypergradient(model, meta, task, noise)
    assert relative_error(gradient, unrolled) < 1e-6
    # The body reaches the outer loss through the adapted head too, not only directly.
    first_order, _ = through(**settings, truncation=0).hypergradient(model, meta, task, noise)
    assert relative_error(gradient.shared, first_order.shared) > 0.01


@pytest.mark.parametrize("linear", [CG(max_steps=60, rtol=1e-12), MINRES(max_steps=60, rtol=1e-12), Dense(rtol=1e-12)])
def test_linear_solvers_are_interchangeable(linear: LinearSolver) -> None:
    settings: dict[str, Any] = {**WIDE, "temperature": 3.0, "inner": descent(20)}
    reference = algorithms.ibaml(**settings, linear=Dense())
    model, meta, task, noise = set_up(reference)
    expected, _ = reference.hypergradient(model, meta, task, noise)
    gradient, info = algorithms.ibaml(**settings, linear=linear).hypergradient(model, meta, task, noise)
    assert info.linear_converged
    assert relative_error(gradient, expected) < 1e-8


def test_neumann_series_converges_to_the_solution_of_the_linear_system() -> None:
    # Its step is the preconditioned residual, stable where the preconditioned matrix has eigenvalues below 2: near the
    # solution of a linear model with orthogonal design it is the identity.
    model, shared, task, noise = linear_task(torch.ones(3, dtype=DOUBLE))
    meta = MetaParameters(linear_prior(), shared)
    inner = NaturalGradient(num_steps=120, learning_rate=0.9)
    (gradient, info), (expected, _) = (
        algorithms.ibaml(inner=inner, linear=linear).hypergradient(model, meta, task, noise)
        for linear in (Neumann(max_steps=20, rtol=1e-10), Dense(rtol=1e-10))
    )
    assert info.linear_converged
    assert relative_error(gradient, expected) < 1e-9


def test_linear_steps_and_tolerance_reach_the_solver() -> None:
    settings: dict[str, Any] = {**WIDE, "temperature": 3.0, "inner": descent(20)}
    model, meta, task, noise = set_up(algorithms.ibaml(**settings))
    residuals = []
    for num_steps, tolerance in ((1, 1e-12), (4, 1e-12), (60, 1e-3), (60, 1e-12)):
        algorithm = algorithms.ibaml(**settings, linear=CG(max_steps=num_steps, rtol=tolerance))
        _, info = algorithm.hypergradient(model, meta, task, noise)
        residuals.append(float(info.linear_residual))
        assert bool(info.linear_converged) == (num_steps == 60)
    assert residuals[0] > residuals[1] > 1e-3 > residuals[2] > residuals[3] and residuals[3] < 1e-11


@pytest.mark.parametrize("make", [algorithms.vampire, partial(algorithms.vampire, truncation=0), algorithms.ibaml])
def test_result_carries_no_graph_when_the_meta_parameters_require_gradients(
    make: Callable[..., Algorithm],
) -> None:
    # Meta-parameters that a torch optimiser holds usually do.
    algorithm = make(**{**WIDE, "temperature": 3.0})
    model, meta, task, noise = set_up(algorithm)
    leaves = tree.map(lambda leaf: leaf.clone().requires_grad_(), meta)
    gradient, info = algorithm.hypergradient(model, leaves, task, noise)
    assert not any(leaf.requires_grad for leaf in tree.leaves((gradient, info)))
    expected, _ = algorithm.hypergradient(model, meta, task, noise)
    assert relative_error(gradient, expected) == 0
