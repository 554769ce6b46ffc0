"""Fig. 1 and Theorems 1 and 2 of Zhang et al. 2023: how far hypergradients are from the exact one.

Bayesian linear regression has its posterior, and so its hypergradient, in closed form. The error of the unrolled
(explicit) and of the implicit hypergradient is measured against it as the number K of inner steps grows, at the initial
meta-parameters, together with everything that the two theorems bound it by.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch

from ibaml import metrics, tree
from ibaml.data import LinearRegressionTasks
from ibaml.experiments.fig1.linear_gaussian import LinearGaussianProblem
from ibaml.experiments.fig1.theorems import TheoremCheck, theorem_1, theorem_2
from ibaml.metrics import Estimate
from ibaml.priors import DiagonalGaussian
from ibaml.solvers.linear import CG, Dense, LinearSolver
from ibaml.types import Episode, Tensor

UNROLLED = "unrolled"
EXACT_SOLVE = "implicit, exact solve"
PRECONDITIONED_CG = "implicit, L=2, preconditioned CG"
PRECONDITIONED_INNER = "implicit, L=2, preconditioned inner solver"
PRECONDITIONED_BOTH = "implicit, L=2, both preconditioned"


def implicit_name(num_products: int) -> str:
    """Returns the name of the implicit estimator with so many conjugate gradient steps."""
    return f"implicit, L={num_products}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fig1Settings:
    """Settings of the experiment.

    Attributes:
        condition_numbers: Condition numbers of the input covariance.
        shown_condition_number: The one of the main panel and of the theorems; one of ``condition_numbers``.
        inner_steps: Numbers K of inner steps.
        linear_steps: Numbers L of conjugate gradient steps.
        relative_learning_rate: Inner learning rate times the largest curvature of the inner loss over all tasks:
            below 2 for gradient descent to converge.
        preconditioned_learning_rate: Rate of the preconditioned inner solver; 1 is a Newton step if the curvature of
            the mean is diagonal.
        num_features: Weights of a task.
        num_shots: Support rows of a task.
        num_queries: Query rows of a task.
        noise_variance: Variance of the noise on the targets.
        num_tasks: Tasks per seed.
        num_seeds: Independent repetitions; bands are 95% intervals over them.
        seed: Seed of the first repetition.
    """

    condition_numbers: tuple[float, ...] = (1.0, 5.0, 20.0, 100.0)
    shown_condition_number: float = 20.0
    inner_steps: tuple[int, ...] = (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 15, 20, 30, 50, 100)
    linear_steps: tuple[int, ...] = (1, 2, 5)
    relative_learning_rate: float = 0.35
    preconditioned_learning_rate: float = 0.5
    num_features: int = 16
    num_shots: int = 32
    num_queries: int = 32
    noise_variance: float = 2.0
    num_tasks: int = 32
    num_seeds: int = 10
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuses settings without a meaning."""
        for field in ("condition_numbers", "inner_steps", "linear_steps"):
            if not getattr(self, field) or min(getattr(self, field)) < 1:
                raise ValueError(f"{field} must be one or more numbers of at least 1, but is {getattr(self, field)}.")
        if self.shown_condition_number not in self.condition_numbers:
            raise ValueError(
                f"shown_condition_number must be one of condition_numbers, {self.condition_numbers}, but is "
                f"{self.shown_condition_number}."
            )
        for field in ("relative_learning_rate", "preconditioned_learning_rate"):
            if not 0 < getattr(self, field) < 2:
                raise ValueError(f"{field} must be between 0 and 2, but is {getattr(self, field)}.")
        if self.num_seeds < 2:
            raise ValueError(f"num_seeds must be at least 2 for an interval, but is {self.num_seeds}.")


class ErrorPoint(NamedTuple):
    """The error of one estimator at one number of inner steps.

    Attributes:
        estimator: Which estimator.
        condition_number: Of the input covariance.
        num_inner_steps: K.
        num_gradients: Gradients of the inner and the outer loss per task.
        num_hvps: Products with second derivatives per task; an unrolled step costs one.
        nrmse: Root of the summed squared error over the tasks of a seed, over that of the exact hypergradients.
    """

    estimator: str
    condition_number: float
    num_inner_steps: int
    num_gradients: int
    num_hvps: int
    nrmse: Estimate


class BoundPoint(NamedTuple):
    """What Theorem 1 or 2 speaks of at one number of inner steps, each as a mean over all tasks.

    Attributes:
        estimator: ``"unrolled"`` (Theorem 1) or ``"implicit, L=..."`` (Theorem 2).
        num_inner_steps: K.
        distance: ``eps = ||v - v*||``.
        inexactness: Theorem 1: ``delta``, spectral norm of the error of the Jacobian ``dv/dtheta``. Theorem 2:
            ``delta' = ||u - H^-1 b||``, the error of the linear solver.
        error: ``||g - g*||``.
        bound: Right-hand side of the theorem.
        largest_ratio: Largest error / bound over all tasks; the theorem says at most 1.
    """

    estimator: str
    num_inner_steps: int
    distance: float
    inexactness: float
    error: float
    bound: float
    largest_ratio: float


class Fig1Result(NamedTuple):
    """All points of the experiment."""

    settings: Fig1Settings
    errors: list[ErrorPoint]
    bounds: list[BoundPoint]


def run(settings: Fig1Settings, *, on_progress: Callable[[int, int], None] | None = None) -> Fig1Result:
    """Measures all errors and bounds.

    Args:
        settings: What to measure.
        on_progress: Called with the number of finished and of all points.
    """
    errors: list[ErrorPoint] = []
    bounds: list[BoundPoint] = []
    total = (len(settings.condition_numbers) + 1) * len(settings.inner_steps)
    finished = 0
    for condition_number in settings.condition_numbers:
        problem = _problem(settings, condition_number)
        exact = torch.func.vmap(problem.exact_hypergradient)(problem.episodes)
        shown = condition_number == settings.shown_condition_number
        for num_steps in settings.inner_steps:
            for name, estimator in _estimators(settings, problem, num_steps).items():
                error = tree.sub(torch.func.vmap(estimator.estimate)(problem.episodes), exact)
                nrmse = metrics.estimate((_per_seed(settings, error) / _per_seed(settings, exact)).sqrt())
                cost = (estimator.num_gradients, estimator.num_hvps)
                errors.append(ErrorPoint(name, condition_number, num_steps, *cost, nrmse))
            if shown:
                bounds += _check_theorems(settings, problem, num_steps)
            finished += 2 if shown else 1
            if on_progress is not None:
                on_progress(finished, total)
    return Fig1Result(settings, errors, bounds)


class _Estimator(NamedTuple):
    """An estimate of one task's hypergradient and what it costs."""

    estimate: Callable[[Episode], DiagonalGaussian]
    num_gradients: int
    num_hvps: int


def _problem(settings: Fig1Settings, condition_number: float) -> LinearGaussianProblem:
    features = torch.ones(settings.num_features, dtype=torch.float64)
    sampler = LinearRegressionTasks(
        prior_mean=0 * features,
        prior_variance=features,
        noise_variance=settings.noise_variance,
        num_shots=settings.num_shots,
        num_queries=settings.num_queries,
        condition_number=condition_number,
        dtype=torch.float64,
    )
    seeds = range(settings.seed, settings.seed + settings.num_seeds)
    drawn = [sampler.sample(settings.num_tasks, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    return LinearGaussianProblem(
        tree.map(lambda *leaves: torch.cat(leaves), *drawn),
        noise_variance=settings.noise_variance,
        relative_learning_rate=settings.relative_learning_rate,
        preconditioned_learning_rate=settings.preconditioned_learning_rate,
    )


def _estimators(settings: Fig1Settings, problem: LinearGaussianProblem, num_steps: int) -> dict[str, _Estimator]:
    plain, preconditioned = problem.gradient_descent(num_steps), problem.preconditioned(num_steps)
    # Gradients: one per inner step, one of the outer loss, and for the implicit ones one of the nll at the posterior.
    found = {UNROLLED: _Estimator(partial(problem.unrolled, plain), num_steps + 1, num_steps)}
    for num_products in settings.linear_steps:
        estimate = partial(problem.implicit, plain, _conjugate_gradients(num_products), False)
        found[implicit_name(num_products)] = _Estimator(estimate, num_steps + 2, num_products)
    # A dense solve asks for every column of the Hessian.
    exact_solve = partial(problem.implicit, plain, Dense(), False)
    found[EXACT_SOLVE] = _Estimator(exact_solve, num_steps + 2, 2 * settings.num_features)
    for name, solver, precondition in (
        (PRECONDITIONED_CG, plain, True),
        (PRECONDITIONED_INNER, preconditioned, False),
        (PRECONDITIONED_BOTH, preconditioned, True),
    ):
        estimate = partial(problem.implicit, solver, _conjugate_gradients(2), precondition)
        found[name] = _Estimator(estimate, num_steps + 2, 2)
    return found


def _conjugate_gradients(num_products: int) -> LinearSolver:
    return CG(max_steps=num_products, rtol=0.0)


def _per_seed(settings: Fig1Settings, value: DiagonalGaussian) -> Tensor:
    """Returns the squared norm of the gradients of all tasks of a seed, shape ``[num_seeds]``."""
    return torch.stack([(leaf**2).reshape(settings.num_seeds, -1).sum(1) for leaf in tree.leaves(value)]).sum(0)


def _check_theorems(settings: Fig1Settings, problem: LinearGaussianProblem, num_steps: int) -> list[BoundPoint]:
    solver = problem.gradient_descent(num_steps)
    checks: dict[str, Callable[[Episode], TheoremCheck]] = {UNROLLED: partial(theorem_1, problem, solver)}
    for num_products in settings.linear_steps:
        checks[implicit_name(num_products)] = partial(theorem_2, problem, solver, _conjugate_gradients(num_products))
    points: list[BoundPoint] = []
    for name, check in checks.items():
        values = torch.func.vmap(check)(problem.episodes)
        largest_ratio = float((values.error / values.bound).max())
        means = {quantity: float(value.mean()) for quantity, value in values._asdict().items()}
        points.append(BoundPoint(name, num_steps, largest_ratio=largest_ratio, **means))
    return points
