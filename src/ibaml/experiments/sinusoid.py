"""Sinusoid regression of Finn et al. 2017: squared error after 1, 5 and 10 inner steps, and predictive intervals.

A task is ``y = A sin(x - phase)`` with ``A`` in [0.1, 5], ``phase`` in [0, pi], ``x`` in [-5, 5], without noise, seen
at 5 or 10 points; the network is an MLP with two hidden layers of 40. Each run is trained in a folder of its own and
can be stopped and resumed; its chosen state is then adapted to the same test tasks with each number of inner steps.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from rich.console import Console

from ibaml import runs, tree
from ibaml.algorithms import IBAML
from ibaml.algorithms.gradient_based import OnDistribution, num_inner_steps
from ibaml.data.sources import Sinusoid
from ibaml.evaluation import Evaluation, draw_tasks, predict, task_generator
from ibaml.metrics import Estimate, central_interval, coverage, estimate
from ibaml.prediction import RegressionPrediction
from ibaml.recipes import RECIPES, Recipe, get_recipe
from ibaml.train.checkpoint import load_tensors
from ibaml.train.trainer import CHECKPOINT
from ibaml.types import Batch, Episode, Params, Tensor

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
        if self.num_steps is not None and self.num_steps < 1:
            raise ValueError(f"num_steps must be at least 1, but is {self.num_steps}.")
        if self.max_minutes is not None and not self.max_minutes > 0:
            raise ValueError(f"max_minutes must be positive, but is {self.max_minutes}.")
        if self.num_tasks < 2:
            raise ValueError(f"num_tasks must be at least 2, for an interval over tasks, but is {self.num_tasks}.")
        if self.num_examples < 0:
            raise ValueError(f"num_examples must be at least 0, but is {self.num_examples}.")

    def recipes(self) -> list[Recipe]:
        """Returns the recipes of all runs, by shots and then by algorithm."""
        found = [get_recipe(_name(num_shots, algorithm)) for num_shots in self.shots for algorithm in self.algorithms]
        if self.num_steps is None:
            return found
        return [recipe.override({"trainer.num_steps": str(self.num_steps)}) for recipe in found]


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
        recipe: The run's recipe.
        folder: Its run folder.
        num_steps: Meta-steps taken so far.
        best_step: Meta-step of the chosen state, the one with the lowest nll on validation tasks.
        seconds: Seconds of training, validation included, over all calls.
        points: Test results by number of inner steps, ascending.
        examples: The first test tasks; empty for algorithms that adapt plain weights.
        failures: Why points are missing: gradient descent that is stable for the steps it was trained with may diverge
            with more.
    """

    recipe: Recipe
    folder: Path
    num_steps: int
    best_step: int
    seconds: float
    points: tuple[SinusoidPoint, ...]
    examples: tuple[SinusoidExample, ...]
    failures: tuple[str, ...] = ()

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
    def is_finished(self) -> bool:
        """Whether all meta-steps have been taken."""
        return self.num_steps >= self.recipe.trainer.num_steps

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


def run(settings: SinusoidSettings, *, folder: Path, console: Console | None = None) -> SinusoidResult:
    """Trains each run, or resumes it, and then evaluates all on the same test tasks.

    Args:
        settings: What to do.
        folder: Output folder; the runs are in ``runs/NAME``. A further call with the same one goes on where the last
            stopped.
        console: Where progress is shown; None is silent.

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
    device = runs.resolve_device(settings.device)
    recipes = settings.recipes()
    for recipe in recipes:
        result = runs.train_run(
            recipe, _folder(folder, recipe), device=device, max_minutes=settings.max_minutes, console=console
        )
        if result.stop_reason == "interrupted":
            raise KeyboardInterrupt
    return SinusoidResult(settings, tuple(_evaluate(recipe, settings, folder, device, console) for recipe in recipes))


def rows(result: SinusoidResult) -> list[dict[str, object]]:
    """Returns all points as rows of a table; what does not apply is None."""
    found: list[dict[str, object]] = []
    for one in result.runs:
        reference = REFERENCE.get(one.num_shots, {})
        for point in one.points:
            row: dict[str, object] = {
                "recipe": one.recipe.name,
                "algorithm": one.recipe.algorithm.name,
                "num_shots": one.num_shots,
                "num_inner_steps": point.num_inner_steps,
                "num_inner_steps_in_training": num_inner_steps(one.recipe.algorithm),
                "num_tasks": point.mse.num_tasks,
                "meta_steps": one.num_steps,
                "meta_steps_planned": one.recipe.trainer.num_steps,
                "meta_step_of_state": one.best_step,
                "tasks_per_meta_step": one.recipe.trainer.tasks_per_step,
                "training_seconds": round(one.seconds, 1),
                "temperature": one.recipe.algorithm.temperature,
                **_columns("mse", point.mse),
                "reference_maml_mse": reference.get(point.num_inner_steps),
                **_columns("nll", point.nll),
            }
            for level in LEVELS:
                row |= _columns(f"coverage_{100 * level:g}", point.coverage.get(level))
                row |= _columns(f"width_{100 * level:g}", point.width.get(level))
            found.append(row)
    return found


def summary(result: SinusoidResult) -> str:
    """Returns what was found, as Markdown: squared errors beside the reference, intervals, settings of each run."""
    settings = result.settings
    lines = [
        "# Sinusoid regression",
        "",
        f"{settings.num_tasks:,} test tasks (seed {settings.seed}) of {result.runs[0].recipe.data.num_test_queries} "
        "query points each, the same for every run; +- is a 95% interval over tasks. K: inner steps. The state of each "
        "run is the one with the lowest nll on validation tasks. The reference is an independent implementation of "
        f"MAML after {REFERENCE_META_STEPS:,} meta-steps.",
    ]
    for num_shots in settings.shots:
        shown = [one for one in result.runs if one.num_shots == num_shots]
        steps = sorted({point.num_inner_steps for one in shown for point in one.points})
        reference = REFERENCE.get(num_shots, {})
        heads = [f"K = {num_inner_steps}" for num_inner_steps in steps]
        lines += [
            "",
            f"## {num_shots} shots",
            "",
            "Squared error of the predictive mean:",
            "",
            _line(["", *heads, "K in training", "meta-steps", "state of meta-step", "training (minutes)"]),
            _line(["---"] + ["---:"] * (len(steps) + 4)),
        ]
        for one in shown:
            values = {point.num_inner_steps: f"{point.mse:.3f}" for point in one.points}
            lines.append(
                _line(
                    [
                        one.display_name,
                        *(values.get(k, "-") for k in steps),
                        str(num_inner_steps(one.recipe.algorithm)),
                        f"{one.num_steps:,} of {one.recipe.trainer.num_steps:,}",
                        f"{one.best_step:,}",
                        f"{one.seconds / 60:.1f}",
                    ]
                )
            )
        known = [f"{reference[k]:.2f}" if k in reference else "-" for k in steps]
        lines.append(_line(["reference (MAML)", *known, "-", f"{REFERENCE_META_STEPS:,}", "-", "-"]))
        lines += _interval_table([one for one in shown if one.recipe.algorithm.is_bayesian])
    lines += ["", "## Settings", "", *(_describe(one) for one in result.runs)]
    lines += [f"- Missing: {failure}" for one in result.runs for failure in one.failures]
    if unfinished := [one for one in result.runs if not one.is_finished]:
        names = ", ".join(one.recipe.name for one in unfinished)
        lines += ["", f"**Training is not finished**: {names}."]
    return "\n".join(lines) + "\n"


def _name(num_shots: int, algorithm: str) -> str:
    return f"{_PREFIX}{num_shots}shot_{algorithm}"


def _folder(folder: Path, recipe: Recipe) -> Path:
    return folder / "runs" / recipe.name


def _evaluate(
    recipe: Recipe, settings: SinusoidSettings, folder: Path, device: torch.device, console: Console | None
) -> SinusoidRun:
    run_folder = _folder(folder, recipe)
    own = num_inner_steps(recipe.algorithm)
    points: dict[int, SinusoidPoint] = {}
    failures: list[str] = []
    best_step = 0
    # The run's own number last: its evaluation is what the run folder then holds.
    for num_steps in [*(k for k in settings.inner_steps if k != own), own]:
        if console is not None:
            console.print(f"Evaluating {recipe.name} with {num_steps} inner steps.", soft_wrap=True, markup=False)
        try:
            evaluated = runs.evaluate_run(
                run_folder,
                num_tasks=settings.num_tasks,
                seed=settings.seed,
                device=device,
                changes={"algorithm.inner.num_steps": str(num_steps)},
            )
        except FloatingPointError as error:
            if num_steps == own:
                raise
            failures.append(f"{recipe.name} with {num_steps} inner steps: {error}")
            continue
        best_step = evaluated.step
        points[num_steps] = _point(num_steps, evaluated.evaluation, recipe.algorithm.is_bayesian)
    progress = load_tensors(run_folder / CHECKPOINT)[1]
    return SinusoidRun(
        recipe=recipe,
        folder=run_folder,
        num_steps=int(progress["step"]),
        best_step=best_step,
        seconds=float(progress["seconds"]),
        points=tuple(points[k] for k in sorted(points)),
        examples=_examples(recipe, settings, run_folder) if recipe.algorithm.is_bayesian else (),
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


def _examples(recipe: Recipe, settings: SinusoidSettings, folder: Path) -> tuple[SinusoidExample, ...]:
    """Predicts the first test tasks before and after adaptation, on the CPU."""
    model, algorithm = recipe.build_model(), recipe.algorithm
    meta, _ = runs.load_best(folder, recipe, model)
    sampler = recipe.data.sampler("test")

    def predicted(posterior: object, x: Tensor, noise: Params) -> tuple[Tensor, Tensor]:
        prediction = predict(model, algorithm, meta, posterior, x, noise)  # pyright: ignore[reportArgumentType]
        assert isinstance(prediction, RegressionPrediction)
        return prediction.mean.detach(), prediction.total_uncertainty.detach()

    examples: list[SinusoidExample] = []
    for index in range(min(settings.num_examples, settings.num_tasks)):
        episode = draw_tasks(sampler, index, index + 1, seed=settings.seed)
        support, query = tree.map(lambda leaf: leaf[0], episode)
        order = query.x[:, 0].argsort()
        query = Batch(query.x[order], query.y[order])
        generator = task_generator(settings.seed, index)
        noise = algorithm.draw_noise(meta, generator=generator)
        posterior = algorithm.adapt(model.nll, meta, support, noise).value
        evaluation_noise = algorithm.draw_evaluation_noise(meta, generator=generator)
        before = predicted(meta.prior, query.x, evaluation_noise)
        examples.append(
            SinusoidExample(Episode(support, query), *before, *predicted(posterior, query.x, evaluation_noise))
        )
    return tuple(examples)


def _columns(name: str, value: Estimate | None) -> dict[str, object]:
    if value is None:
        return {name: None, f"{name}_low": None, f"{name}_high": None}
    return {name: value.mean, f"{name}_low": value.low, f"{name}_high": value.high}


def _interval_table(shown: list[SinusoidRun]) -> list[str]:
    if not shown:
        return []
    heads = ["", "K", "nll"]
    for level in LEVELS:
        heads += [f"inside {level:.0%}", f"width {level:.0%}"]
    lines = [
        "",
        "Predictive intervals: the fraction of query points inside (%) and the mean width (target's unit):",
        "",
        _line(heads),
        _line(["---"] + ["---:"] * (len(heads) - 1)),
    ]
    for one in shown:
        for point in one.points:
            cells = [one.display_name, str(point.num_inner_steps), f"{point.nll:.3f}"]
            for level in LEVELS:
                covered = point.coverage[level]
                cells += [f"{100 * covered.mean:.1f} +- {100 * covered.half_width:.1f}", f"{point.width[level]:.2f}"]
            lines.append(_line(cells))
    return lines


def _describe(one: SinusoidRun) -> str:
    algorithm, trainer = one.recipe.algorithm, one.recipe.trainer
    text = f"- {one.recipe.name}: {algorithm.describe()}"
    if isinstance(algorithm, OnDistribution):
        text += (
            f"; {algorithm.prior}, {_count(algorithm.num_samples, 'weight sample')} in training and "
            f"{algorithm.num_evaluation_samples} in prediction"
        )
    if isinstance(algorithm, IBAML):
        text += f"; {algorithm.linear} with{'' if algorithm.precondition else 'out'} the free preconditioner"
    return (
        f"{text}; likelihood {one.recipe.likelihood.replace('_', ' ')}; {trainer.tasks_per_step} tasks a meta-step, "
        f"Adam with rate {trainer.learning_rate:g}, {trainer.schedule}."
    )


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"
