"""The algorithms as cells of a grid: which inner variable, and how to differentiate through its optimisation.

| inner variable | unrolled | first_order | implicit |
|---|---|---|---|
| weights | MAML | FOMAML | iMAML |
| Gaussian over weights | ABML, VAMPIRE | first-order ABML | **iBaML** |

``maml() ... ibaml()`` return an ``Algorithm`` with the settings of their publication; every setting can be overridden.
"""

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Literal, cast

import torch

from ibaml import inner, linear_solve, objectives, tree
from ibaml.curvature import at_fixed
from ibaml.gaussian import DiagonalGaussian, sample_noise
from ibaml.hypergradient import (
    first_order_hypergradient,
    gaussian_implicit_hypergradient,
    implicit_hypergradient,
    unrolled_hypergradient,
)
from ibaml.inner_problem import (
    InnerProblem,
    MetaParameters,
    TaskNll,
    TaskNoise,
    expected_nll,
    mean_nll,
    negative_elbo,
    penalised_nll,
)
from ibaml.types import Batch, Episode, HypergradientInfo, InnerSolution, InnerSolver, LinearSolver, Params, Tensor

# In relative Adam: examples lower a log-variance by several nats, and move a mean by a deviation or two.
_LOG_VAR_SPEED = 2.5
INNER_OPTIMIZERS = ("gradient_descent", "adam", "natural_gradient", "relative_adam")
LINEAR_SOLVERS: Mapping[str, Callable[..., Any]] = {
    "cg": linear_solve.cg,
    "minres": linear_solve.minres,
    "neumann": linear_solve.neumann,
    "dense": linear_solve.dense,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Algorithm:
    """One cell of the grid with all its settings. Stateless: meta-parameters and noise are arguments.

    Attributes:
        name: Name for reports.
        inner_variable: ``"weights"`` or ``"gaussian"`` (mean and log-variance per weight).
        estimator: How the hypergradient is computed.
        outer: Outer loss: ``"expected_nll"`` (Jensen), ``"predictive_nll"``, or ``"abml"`` (support and query nll
            weighted by their sizes plus the KL divergence). Weights algorithms have only the plain nll.
        num_inner_steps: Steps ``K`` of the inner solver, in training and in adaptation.
        inner_learning_rate: Step size of the inner solver. The KL term alone makes gradient descent on a Gaussian
            diverge above ``2 D / lam``, with ``D`` the smallest prior variance and ``lam`` the KL weight; in
            ``"natural_gradient"`` steps both cancel.
        inner_optimizer: ``"gradient_descent"``, ``"adam"``, and for Gaussians ``"natural_gradient"`` (steps scaled by
            the posterior variance) and ``"relative_adam"`` (steps of the means in units of the prior's standard
            deviation: however narrow training makes the prior of a weight, the inner problem stays as easy; those of
            the log-variances are 2.5 times as large).
        inner_momentum: Momentum of gradient descent.
        relative_log_var_rate: Gaussian, gradient descent: learning rate of the log-variances in units of the inverse
            of their curvature, ``2 / lam``; 0.1 to 0.4 suits most problems. None: that of the means, with which the
            variances hardly move.
        temperature: The KL divergence has weight ``temperature / num_support``. 1 is exact Bayes.
        proximal_strength: Weights algorithms: strength of ``||w - prior||^2 / 2`` in the inner loss (iMAML's lambda).
        num_samples: Weight samples ``S`` in training.
        num_evaluation_samples: Weight samples in prediction.
        antithetic: Draw noise in pairs of opposite sign (``num_samples`` even).
        fresh_noise: New noise at every inner step, instead of one draw for the whole inner problem. The implicit
            estimator then differentiates the problem of one more draw, an approximation.
        linear_solver: ``"cg"``, ``"minres"``, ``"neumann"`` or ``"dense"``, for the implicit estimator.
        num_linear_steps: Steps ``L`` of the linear solver.
        linear_rtol: Its relative tolerance.
        precondition: Give the Gaussian implicit system its free preconditioner.
        truncation: Unrolled: differentiate the last so many steps only.
        hyper_prior_weight: Weight of ABML's hyper-prior (nats, summed over weights) in the outer loss.
        initial_log_var: Range of the uniform distribution of the prior's initial log-variances.
    """

    name: str
    inner_variable: Literal["weights", "gaussian"]
    estimator: Literal["unrolled", "first_order", "implicit"]
    outer: Literal["expected_nll", "predictive_nll", "abml"] = "expected_nll"
    num_inner_steps: int = 5
    inner_learning_rate: float = 0.01
    inner_optimizer: Literal["gradient_descent", "adam", "natural_gradient", "relative_adam"] = "gradient_descent"
    inner_momentum: float = 0.0
    relative_log_var_rate: float | None = None
    temperature: float = 1.0
    proximal_strength: float = 0.0
    num_samples: int = 1
    num_evaluation_samples: int = 10
    antithetic: bool = False
    fresh_noise: bool = False
    linear_solver: Literal["cg", "minres", "neumann", "dense"] = "cg"
    num_linear_steps: int = 5
    linear_rtol: float = 1e-6
    precondition: bool = True
    truncation: int | None = None
    hyper_prior_weight: float = 0.0
    initial_log_var: tuple[float, float] = (-10.0, -9.0)

    def __post_init__(self) -> None:
        """Refuses settings that contradict each other."""
        _check_choice("inner_variable", self.inner_variable, ("weights", "gaussian"))
        _check_choice("estimator", self.estimator, ("unrolled", "first_order", "implicit"))
        _check_choice("outer", self.outer, ("expected_nll", "predictive_nll", "abml"))
        _check_choice("inner_optimizer", self.inner_optimizer, INNER_OPTIMIZERS)
        _check_choice("linear_solver", self.linear_solver, tuple(LINEAR_SOLVERS))
        for field in ("num_inner_steps", "num_samples", "num_evaluation_samples", "num_linear_steps"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field} must be at least 1, but is {getattr(self, field)}.")
        for field in ("inner_learning_rate", "temperature"):
            if not getattr(self, field) > 0:
                raise ValueError(f"{field} must be positive, but is {getattr(self, field)}.")
        for field in ("proximal_strength", "hyper_prior_weight"):
            if not getattr(self, field) >= 0:
                raise ValueError(f"{field} must be at least 0, but is {getattr(self, field)}.")
        for field in ("inner_momentum", "linear_rtol"):
            if not 0 <= getattr(self, field) < 1:
                raise ValueError(f"{field} must be in [0, 1), but is {getattr(self, field)}.")
        if self.inner_momentum and self.inner_optimizer != "gradient_descent":
            raise ValueError(
                f"inner_momentum belongs to gradient_descent, but inner_optimizer is {self.inner_optimizer!r}."
            )
        if self.relative_log_var_rate is not None:
            if not self.relative_log_var_rate > 0:
                raise ValueError(
                    f"relative_log_var_rate must be positive or None, but is {self.relative_log_var_rate}."
                )
            if self.inner_optimizer != "gradient_descent" or self.inner_variable != "gaussian":
                raise ValueError(
                    "relative_log_var_rate belongs to gradient_descent on a Gaussian, but inner_optimizer is "
                    f"{self.inner_optimizer!r} and inner_variable is {self.inner_variable!r}."
                )
        if self.truncation is not None and self.truncation < 0:
            raise ValueError(f"truncation must be at least 0 or None, but is {self.truncation}.")
        if self.antithetic and self.num_samples % 2:
            raise ValueError(f"num_samples must be even with antithetic=True, but is {self.num_samples}.")
        if self.truncation is not None and self.estimator != "unrolled":
            raise ValueError(f"truncation belongs to the unrolled estimator, but estimator is {self.estimator!r}.")
        if self.initial_log_var[0] > self.initial_log_var[1]:
            raise ValueError(f"initial_log_var must be (low, high) with low <= high, but is {self.initial_log_var}.")
        if self.inner_variable == "gaussian" and self.proximal_strength:
            raise ValueError("proximal_strength belongs to inner_variable='weights'; a Gaussian has its KL divergence.")
        if self.inner_variable == "weights":
            if self.outer != "expected_nll" or self.hyper_prior_weight or self.fresh_noise or self.antithetic:
                raise ValueError(
                    "outer, hyper_prior_weight, fresh_noise and antithetic concern distributions over weights: they "
                    "need inner_variable='gaussian'."
                )
            if self.inner_optimizer in ("natural_gradient", "relative_adam"):
                raise ValueError("inner_optimizer='natural_gradient' needs variances: set inner_variable='gaussian'.")
            if self.estimator == "implicit" and self.proximal_strength == 0:
                raise ValueError(
                    "proximal_strength must be positive for the implicit estimator on weights: without it the solution "
                    "of the inner problem does not depend on the meta-learned weights."
                )

    @property
    def is_bayesian(self) -> bool:
        """Whether adaptation gives a distribution over weights."""
        return self.inner_variable == "gaussian"

    def init(self, adapted: Params, shared: Params, *, generator: torch.Generator) -> MetaParameters:
        """Returns initial meta-parameters.

        Args:
            adapted: Initial values of the adapted parameters; they become the prior mean.
            shared: Initial values of the shared parameters.
            generator: Source of the initial log-variances.
        """
        if not self.is_bayesian:
            return MetaParameters(adapted, shared)
        low, high = self.initial_log_var

        def draw(leaf: Tensor) -> Tensor:
            uniform = torch.rand(leaf.shape, generator=generator, dtype=leaf.dtype, device=generator.device)
            return (low + (high - low) * uniform).to(leaf.device)

        return MetaParameters(DiagonalGaussian(adapted, tree.map(draw, adapted)), shared)

    def draw_noise(self, meta: MetaParameters, *, generator: torch.Generator) -> TaskNoise:
        """Draws the noise of one task."""
        if not isinstance(meta.prior, DiagonalGaussian):
            return TaskNoise({}, {}, {})
        draw = partial(sample_noise, meta.prior.mean, generator=generator, antithetic=self.antithetic)
        steps: Params = {}
        if self.fresh_noise:
            draws = [draw(self.num_samples) for _ in range(self.num_inner_steps)]
            steps = tree.map(lambda *leaves: torch.stack(leaves), *draws)
        return TaskNoise(draw(self.num_samples), draw(self.num_samples), steps)

    def adapt(
        self,
        nll: TaskNll,
        meta: MetaParameters,
        support: Batch,
        noise: TaskNoise,
        *,
        start: Params | DiagonalGaussian | None = None,
        with_grad_norm: bool = True,
    ) -> InnerSolution:
        """Solves the inner problem of one task.

        Args:
            nll: Per-example nll.
            meta: Meta-parameters.
            support: Support set.
            noise: Noise of the task.
            start: Where the inner solver starts; the problem itself stays the same. None: at the prior.
            with_grad_norm: False spares the gradient at the solution; its norm is then NaN.

        Returns:
            Adapted weights, or a DiagonalGaussian posterior.
        """
        problem = self._problem(nll, support, noise)
        loss_at = problem.inner_loss_at
        return self._inner_solver(support, meta)(
            at_fixed(problem.inner_loss, meta),
            meta.prior if start is None else start,
            loss_at=None if loss_at is None else lambda step: at_fixed(loss_at(step), meta),
            with_grad_norm=with_grad_norm,
        )

    def hypergradient(
        self, nll: TaskNll, meta: MetaParameters, episode: Episode, noise: TaskNoise
    ) -> tuple[MetaParameters, HypergradientInfo]:
        """Returns one task's gradient of the outer loss in the meta-parameters.

        Args:
            nll: Per-example nll.
            meta: Meta-parameters.
            episode: Support and query set.
            noise: Noise of the task.
        """
        # Parameters that ask for gradients would make every inner step keep its graph.
        meta = tree.detach(meta)
        if self.estimator == "implicit":
            return self._implicit(nll, meta, episode, noise)
        goes_back_through_all_steps = self.estimator == "unrolled" and self.truncation is None
        problem = self._problem(nll, episode.support, noise, twice=goes_back_through_all_steps)
        outer_loss = partial(self._outer_loss, nll, episode, noise)
        solver = self._inner_solver(episode.support, meta)
        arguments = (problem.inner_loss, outer_loss, lambda theta: theta.prior, meta, solver)
        if self.estimator == "first_order":
            return first_order_hypergradient(*arguments, inner_loss_at=problem.inner_loss_at)
        return unrolled_hypergradient(*arguments, inner_loss_at=problem.inner_loss_at, truncation=self.truncation)

    def draw_evaluation_noise(self, meta: MetaParameters, *, generator: torch.Generator) -> Params:
        """Draws the noise of ``num_evaluation_samples`` weight samples; empty for weights algorithms."""
        if not isinstance(meta.prior, DiagonalGaussian):
            return {}
        return sample_noise(meta.prior.mean, self.num_evaluation_samples, generator=generator)

    def weight_samples(self, posterior: Params | DiagonalGaussian, noise: Params) -> list[Params]:
        """Returns weight samples of an adapted posterior; the weights themselves, once, if it is a point.

        Args:
            posterior: What ``adapt`` returned.
            noise: From ``draw_evaluation_noise``.
        """
        if not isinstance(posterior, DiagonalGaussian):
            return [posterior]
        draws = posterior.sample(noise)
        num_samples = tree.leaves(noise)[0].shape[0]
        return [tree.map(lambda leaf, i=i: leaf[i], draws) for i in range(num_samples)]

    def _inner_solver(self, support: Batch, meta: MetaParameters) -> InnerSolver:
        settings: dict[str, Any] = {"num_steps": self.num_inner_steps, "learning_rate": self.inner_learning_rate}
        if self.inner_optimizer == "adam":
            return partial(inner.adam, **settings)
        if self.inner_optimizer == "relative_adam":
            log_var = cast(DiagonalGaussian, meta.prior).log_var
            deviation = tree.map(lambda leaf: torch.exp(0.5 * leaf.detach()), log_var)
            speed = tree.map(lambda leaf: torch.full_like(leaf, _LOG_VAR_SPEED), log_var)
            return partial(inner.adam, scale=DiagonalGaussian(deviation, speed), **settings)
        if self.inner_optimizer == "natural_gradient":
            preconditioner = objectives.natural_gradient(self._kl_weight(support))
            return partial(inner.preconditioned_gradient_descent, preconditioner=preconditioner, **settings)
        settings["momentum"] = self.inner_momentum
        if self.relative_log_var_rate is not None:
            rate = self.relative_log_var_rate * 2 / self._kl_weight(support)
            preconditioner = objectives.two_rates(rate / self.inner_learning_rate)
            return partial(inner.preconditioned_gradient_descent, preconditioner=preconditioner, **settings)
        return partial(inner.gradient_descent, **settings)

    def _linear_solver(self) -> LinearSolver:
        return partial(LINEAR_SOLVERS[self.linear_solver], max_steps=self.num_linear_steps, rtol=self.linear_rtol)

    def _kl_weight(self, support: Batch) -> float:
        return objectives.kl_weight(support.y.shape[0], self.temperature)

    def _problem(self, nll: TaskNll, support: Batch, noise: TaskNoise, *, twice: bool = False) -> InnerProblem:
        """Returns the inner problem; ``twice`` announces that its losses will be differentiated twice."""
        if not self.is_bayesian:
            return InnerProblem(None, penalised_nll(nll, support, self.proximal_strength, twice=twice), None)
        weight = self._kl_weight(support)
        expected = expected_nll(nll, support, noise.inner, twice=twice)

        def with_noise_of(step: int) -> Callable[..., Tensor]:
            draws = tree.map(lambda leaf: leaf[step], noise.steps)
            return negative_elbo(expected_nll(nll, support, draws, twice=twice), weight)

        return InnerProblem(expected, negative_elbo(expected, weight), with_noise_of if self.fresh_noise else None)

    def _outer_loss(
        self,
        nll: TaskNll,
        episode: Episode,
        noise: TaskNoise,
        posterior: Any,
        theta: MetaParameters,
        *,
        with_support: bool = True,
    ) -> Tensor:
        """Returns the outer loss; without the support set's nll of ABML if ``with_support`` is False."""
        if not self.is_bayesian:
            return mean_nll(nll, posterior, theta.shared, episode.query)
        if self.outer == "predictive_nll":
            loss = objectives.predictive_nll(
                lambda w, batch: nll(w, theta.shared, batch), posterior, noise.outer, episode.query
            )
        else:
            loss = expected_nll(nll, episode.query, noise.outer)(posterior, theta.shared)
        if self.outer == "abml":
            loss = (1 - self._support_share(episode)) * loss
            if with_support:
                support_loss = expected_nll(nll, episode.support, noise.inner)(posterior, theta.shared)
                loss = loss + self._support_share(episode) * support_loss
            weight = objectives.kl_weight(episode.support.y.shape[0] + episode.query.y.shape[0], self.temperature)
            loss = objectives.negative_elbo(loss, posterior, cast(DiagonalGaussian, theta.prior), weight)
        if self.hyper_prior_weight:
            loss = loss + self.hyper_prior_weight * objectives.hyper_prior_nll(cast(DiagonalGaussian, theta.prior))
        return loss

    def _support_share(self, episode: Episode) -> float:
        """Returns the weight of the support set in the outer loss of ABML."""
        num_support = episode.support.y.shape[0]
        return num_support / (num_support + episode.query.y.shape[0])

    def _implicit(
        self, nll: TaskNll, meta: MetaParameters, episode: Episode, noise: TaskNoise
    ) -> tuple[MetaParameters, HypergradientInfo]:
        problem = self._problem(nll, episode.support, noise, twice=True)
        adapted = self.adapt(nll, meta, episode.support, noise, with_grad_norm=False).value
        if problem.expected_nll is None:
            outer_loss = partial(self._outer_loss, nll, episode, noise)
            return implicit_hypergradient(problem.inner_loss, outer_loss, adapted, meta, self._linear_solver())
        # The pass for the curvature gives the support set's part of the outer loss as well.
        reuses_support = self.outer == "abml" and not tree.leaves(meta.shared)
        outer_loss = partial(self._outer_loss, nll, episode, noise, with_support=not reuses_support)
        (prior_gradient, shared_gradient), info = gaussian_implicit_hypergradient(
            problem.expected_nll,
            lambda v, prior, shared: outer_loss(v, MetaParameters(prior, shared)),
            adapted,
            cast(DiagonalGaussian, meta.prior),
            self._kl_weight(episode.support),
            self._linear_solver(),
            shared=meta.shared,
            precondition=self.precondition,
            outer_nll_weight=self._support_share(episode) if reuses_support else 0.0,
        )
        return MetaParameters(prior_gradient, shared_gradient), info


def maml(**settings: Any) -> Algorithm:
    """MAML (Finn et al. 2017): learned initial weights, backpropagation through the inner steps."""
    return _preset(settings, name="maml", inner_variable="weights", estimator="unrolled")


def fomaml(**settings: Any) -> Algorithm:
    """First-order MAML (Finn et al. 2017): the query gradient at the adapted weights."""
    return _preset(settings, name="fomaml", inner_variable="weights", estimator="first_order")


def imaml(**settings: Any) -> Algorithm:
    """The iMAML algorithm (Rajeswaran et al. 2019): proximal inner problem, implicit gradient."""
    return _preset(
        settings,
        name="imaml",
        inner_variable="weights",
        estimator="implicit",
        proximal_strength=2.0,
        num_inner_steps=16,
    )


def abml(**settings: Any) -> Algorithm:
    """ABML (Ravi and Beatson 2019): learned Gaussian prior, unrolled; support and query nll and the KL outside."""
    return _preset(
        settings,
        name="abml",
        inner_variable="gaussian",
        estimator="unrolled",
        outer="abml",
        num_samples=5,
        temperature=0.01,
    )


def vampire(**settings: Any) -> Algorithm:
    """VAMPIRE (Nguyen et al. 2020): learned Gaussian prior, unrolled; only the query's expected nll outside."""
    return _preset(
        settings, name="vampire", inner_variable="gaussian", estimator="unrolled", num_samples=5, temperature=0.01
    )


def ibaml(**settings: Any) -> Algorithm:
    """Implicit Bayesian meta-learning (Zhang et al. 2023): learned Gaussian prior, implicit gradient by Lemma 1."""
    return _preset(
        settings, name="ibaml", inner_variable="gaussian", estimator="implicit", num_samples=5, temperature=0.01
    )


ALGORITHMS: Mapping[str, Callable[..., Algorithm]] = {
    "maml": maml,
    "fomaml": fomaml,
    "imaml": imaml,
    "abml": abml,
    "vampire": vampire,
    "ibaml": ibaml,
}


def make_algorithm(name: str, **settings: Any) -> Algorithm:
    """Builds an algorithm by name.

    Raises:
        ValueError: If the name is unknown, or a setting is.
    """
    if name not in ALGORITHMS:
        raise ValueError(f"algorithm must be one of {', '.join(ALGORITHMS)}, but is {name!r}.")
    return ALGORITHMS[name](**settings)


def _preset(overrides: Mapping[str, Any], **defaults: Any) -> Algorithm:
    known = {field.name for field in dataclasses.fields(Algorithm)}
    unknown = sorted(set(overrides) - known)
    if unknown:
        raise ValueError(
            f"{defaults['name']} has no setting {', '.join(unknown)}; there are {', '.join(sorted(known))}."
        )
    return Algorithm(**{**defaults, **overrides})


def _check_choice(field: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{field} must be one of {', '.join(choices)}, but is {value!r}.")
