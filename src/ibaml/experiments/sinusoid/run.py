"""Sinusoid regression of Finn et al. 2017: squared error after 1, 5 and 10 inner steps, and predictive intervals.

A task is ``y = A sin(x - phase)`` with ``A`` in [0.1, 5], ``phase`` in [0, pi], ``x`` in [-5, 5], without noise, seen
at 5 or 10 points; the network is an MLP with two hidden layers of 40. Each run is trained in a folder of its own and
can be stopped and resumed; its chosen state is then adapted to the same test tasks with each number of inner steps.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from rich.console import Console

from ibaml import tree
from ibaml.algorithms.gradient_based import num_inner_steps
from ibaml.data.sources import Sinusoid
from ibaml.experiments.report import Place, require_at_least
from ibaml.experiments.training import TrainedRun, train_or_resume
from ibaml.learner import MetaLearner
from ibaml.metrics import Estimate, central_interval, coverage, estimate
from ibaml.recipes import RECIPES, Recipe, get_recipe, runs
from ibaml.train.devices import resolve_device
from ibaml.train.evaluate import Evaluation, draw_tasks
from ibaml.types import Batch, Episode, Tensor

REFERENCE: Mapping[int, Mapping[int, float]] = {
    5: {1: 0.55, 5: 0.33, 10: 0.31},
    10: {1: 0.32, 5: 0.13, 10: 0.10},
}
"""Squared errors of an independent implementation of MAML after 70,000 meta-steps: shots, then inner steps."""

REFERENCE_META_STEPS = 70_000
LEVELS = (0.5, 0.9, 0.95)
"""Nominal probabilities of the predictive intervals."""

_PREFIX = "sinusoid_"
_DISPLAY_NAMES = {"maml": "MAML", "abml": "ABML", "ibaml": "iBaML"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class SinusoidSettings:
    """Settings of the experiment.

    Attributes:
        shots: Numbers of support points; there are recipes for 5 and 10.
        algorithms: Names of algorithms: ``"maml"``, ``"abml"``, ``"ibaml"``.
        inner_steps: Numbers of inner steps to adapt with; the number that a run was trained with comes on top.
        num_steps: Meta-steps of every run, instead of the recipes'.
        max_minutes: Train each run for at most so long in this call, ready to go on in the next. None: to the end.
        num_tasks: Test tasks, at least 2.
        num_examples: The first so many test tasks are kept with their predictions before and after adaptation.
        seed: Names the set of test tasks.
        device: ``"auto"`` (CUDA if present), ``"cpu"``, ``"cuda"``, ``"cuda:1"``, ...
    """

    shots: tuple[int, ...] = (5, 10)
    algorithms: tuple[str, ...] = ("maml", "abml", "ibaml")
    inner_steps: tuple[int, ...] = (1, 5, 10)
    num_steps: int | None = None
    max_minutes: float | None = None
    num_tasks: int = 2000
    num_examples: int = 3
    seed: int = 0
    device: str = "cpu"

    def __post_init__(self) -> None:
        """Refuses settings without a meaning."""
        for field in ("shots", "algorithms", "inner_steps"):
            value = getattr(self, field)
            if not value or len(set(value)) < len(value):
                raise ValueError(f"{field} must be one or more different values, but is {value}.")
        known = sorted({name.rsplit("_", 1)[1] for name in RECIPES if name.startswith(_PREFIX)})
        for name in self.algorithms:
            if name not in known:
                raise ValueError(f"algorithms names {name!r}; there are recipes of {', '.join(known)}.")
        for field in ("shots", "inner_steps"):
            if min(getattr(self, field)) < 1:
                raise ValueError(f"{field} must be numbers of at least 1, but is {getattr(self, field)}.")
        for num_shots in self.shots:
            if _name(num_shots, self.algorithms[0]) not in RECIPES:
                raise ValueError(f"shots has {num_shots}; there are recipes for {', '.join(map(str, REFERENCE))}.")
        require_at_least(self, 1, "num_steps")
        require_at_least(self, 2, "num_tasks", reason="for an interval over tasks")
        require_at_least(self, 0, "num_examples")
        if self.max_minutes is not None and not self.max_minutes > 0:
            raise ValueError(f"max_minutes must be positive, but is {self.max_minutes}.")

    def recipes(self) -> list[Recipe]:
        """Returns the recipes of all runs, by shots and then by algorithm."""
        found = [get_recipe(_name(num_shots, algorithm)) for num_shots in self.shots for algorithm in self.algorithms]
        if self.num_steps is None:
            return found
        return [recipe.replace({"trainer.num_steps": self.num_steps}) for recipe in found]


class SinusoidPoint(NamedTuple):
    """A run's chosen state, adapted with one number of inner steps; means over test tasks.

    Attributes:
        num_inner_steps: Inner steps.
        mse: Squared error of the predictive mean, target's unit squared.
        nll: Of the predictive distribution, in nats per query point; None for algorithms that adapt plain weights,
            whose noise is no statement about the error.
        coverage: Nominal level to the fraction of query points inside the central interval of a Gaussian with the
            predictive mean and variance; empty where ``nll`` is None.
        width: Nominal level to the mean width of these intervals, target's unit; empty where ``nll`` is None.
    """

    num_inner_steps: int
    mse: Estimate
    nll: Estimate | None
    coverage: Mapping[float, Estimate]
    width: Mapping[float, Estimate]


class SinusoidExample(NamedTuple):
    """One test task with its predictions, query points in ascending order of ``x``.

    Attributes:
        task: Support and query set.
        prior_mean: Predictive means at the query points before adaptation, ``[num_query, 1]``.
        prior_variance: Total predictive variances there, same shape.
        mean: Predictive means after adaptation with the run's own number of inner steps.
        variance: Total predictive variances after it.
    """

    task: Episode
    prior_mean: Tensor
    prior_variance: Tensor
    mean: Tensor
    variance: Tensor


class SinusoidRun(NamedTuple):
    """How far a run has come, and how good its chosen state is.

    Attributes:
        trained: How far training has come.
        points: Test results by number of inner steps, ascending.
        examples: The first test tasks; empty for algorithms that adapt plain weights.
        failures: Why points are missing: gradient descent that is stable for the steps it was trained with may diverge
            with more.
    """

    trained: TrainedRun
    points: tuple[SinusoidPoint, ...]
    examples: tuple[SinusoidExample, ...]
    failures: tuple[str, ...] = ()

    @property
    def recipe(self) -> Recipe:
        """The run's recipe."""
        return self.trained.recipe

    @property
    def display_name(self) -> str:
        """Name in tables and figures."""
        return _DISPLAY_NAMES.get(self.recipe.algorithm.name, self.recipe.algorithm.name)

    @property
    def num_shots(self) -> int:
        """Support points of a task."""
        assert isinstance(self.recipe.data, Sinusoid)
        return self.recipe.data.num_shots

    @property
    def own_point(self) -> SinusoidPoint:
        """The point with as many inner steps as in training."""
        own = num_inner_steps(self.recipe.algorithm)
        return next(point for point in self.points if point.num_inner_steps == own)


class SinusoidResult(NamedTuple):
    """What the experiment found.

    Attributes:
        settings: The settings.
        runs: All runs, by shots and then by algorithm.
    """

    settings: SinusoidSettings
    runs: tuple[SinusoidRun, ...]


def run(settings: SinusoidSettings, place: Place) -> SinusoidResult:
    """Trains each run, or resumes it, and then evaluates all on the same test tasks.

    Args:
        settings: What to do.
        place: The output folder; the runs are in ``runs/NAME``. A further call with the same one goes on where the last
            stopped.

    Raises:
        ValueError: If CUDA is asked for and absent, or the folder holds runs with other settings.
        OSError: If the folder cannot be written.
        TrainingDivergedError: If a loss or gradient is not finite.
        FloatingPointError: If predictions are not finite, naming the task.
        KeyboardInterrupt: If training was interrupted; everything is saved.

    Cost:
        The meta-steps that are still to be taken; then, for each run and number of inner steps, one adaptation and ten
        predictions per test task.
    """
    device = resolve_device(settings.device)
    trained = [
        train_or_resume(recipe, place, device=device, max_minutes=settings.max_minutes) for recipe in settings.recipes()
    ]
    return SinusoidResult(settings, tuple(_evaluate(one, settings, device, place.console) for one in trained))


def _name(num_shots: int, algorithm: str) -> str:
    return f"{_PREFIX}{num_shots}shot_{algorithm}"


def _evaluate(
    trained: TrainedRun, settings: SinusoidSettings, device: torch.device, console: Console | None
) -> SinusoidRun:
    recipe = trained.recipe
    own = num_inner_steps(recipe.algorithm)
    points: dict[int, SinusoidPoint] = {}
    failures: list[str] = []
    # The run's own number last: its evaluation is what the run folder then holds.
    for num_steps in [*(k for k in settings.inner_steps if k != own), own]:
        if console is not None:
            console.print(f"Evaluating {recipe.name} with {num_steps} inner steps.", soft_wrap=True, markup=False)
        try:
            evaluated = runs.evaluate_run(
                trained.folder,
                num_tasks=settings.num_tasks,
                seed=settings.seed,
                device=device,
                recipe=recipe.replace({"algorithm.inner.num_steps": num_steps}),
            )
        except FloatingPointError as error:
            if num_steps == own:
                raise
            failures.append(f"{recipe.name} with {num_steps} inner steps: {error}")
            continue
        points[num_steps] = _point(num_steps, evaluated.evaluation, recipe.algorithm.is_bayesian)
    return SinusoidRun(
        trained,
        points=tuple(points[k] for k in sorted(points)),
        examples=_examples(trained, settings) if recipe.algorithm.is_bayesian else (),
        failures=tuple(failures),
    )


def _point(num_inner_steps: int, evaluation: Evaluation, is_bayesian: bool) -> SinusoidPoint:
    mse = estimate(evaluation.per_task["mse"])
    mean, variance = evaluation.mean, evaluation.variance
    if not is_bayesian or mean is None or variance is None:
        return SinusoidPoint(num_inner_steps, mse, None, {}, {})
    covered: dict[float, Estimate] = {}
    width: dict[float, Estimate] = {}
    for level in LEVELS:
        lower, upper = central_interval(mean, variance, level)
        covered[level] = estimate(coverage(lower, upper, evaluation.targets))
        width[level] = estimate((upper - lower).flatten(1).mean(-1))
    return SinusoidPoint(num_inner_steps, mse, estimate(evaluation.per_task["nll"]), covered, width)


def _examples(trained: TrainedRun, settings: SinusoidSettings) -> tuple[SinusoidExample, ...]:
    """Predicts the first test tasks before and after adaptation, on the CPU."""
    learner = MetaLearner.load(trained.folder)
    sampler = trained.recipe.data.sampler("test")
    examples: list[SinusoidExample] = []
    for index in range(min(settings.num_examples, settings.num_tasks)):
        episode = draw_tasks(sampler, index, index + 1, seed=settings.seed)
        support, query = tree.map(lambda leaf: leaf[0], episode)
        order = query.x[:, 0].argsort()
        query = Batch(query.x[order], query.y[order])
        before: Any = learner.fitted_model.predict(learner.meta_parameters.prior, query.x, seed=settings.seed)
        after: Any = learner.adapt(support.x, support.y, seed=settings.seed).predict(query.x, seed=settings.seed)
        bands = [(prediction.mean.detach(), prediction.total_uncertainty.detach()) for prediction in (before, after)]
        examples.append(SinusoidExample(Episode(support, query), *bands[0], *bands[1]))
    return tuple(examples)
