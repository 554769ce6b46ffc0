"""What the sinusoid experiment says: errors beside the reference, intervals, settings of each run."""

from ibaml.algorithms import IBAML
from ibaml.algorithms.gradient_based import num_inner_steps
from ibaml.algorithms.on_distribution import OnDistribution
from ibaml.experiments.report import Experiment, Place, Report, interval_columns, markdown_table, percent
from ibaml.experiments.sinusoid.run import (
    LEVELS,
    REFERENCE,
    REFERENCE_META_STEPS,
    SinusoidPoint,
    SinusoidResult,
    SinusoidRun,
    SinusoidSettings,
    run,
)
from ibaml.likelihoods import find_likelihood

_REFERENCE_CELLS = ("-", f"{REFERENCE_META_STEPS:,}", "-", "-")


def report(settings: SinusoidSettings, place: Place) -> Report:
    """Trains and evaluates all runs and returns what was found in words, a table and a picture."""
    from ibaml.experiments.sinusoid.plot import sinusoid_figure

    result = run(settings, place)
    return Report(summary(result), {"sinusoid": rows(result)}, {"sinusoid": sinusoid_figure(result)})


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
                "meta_steps": one.trained.num_steps,
                "meta_steps_planned": one.recipe.trainer.num_steps,
                "meta_step_of_state": one.trained.best_step,
                "tasks_per_meta_step": one.recipe.trainer.tasks_per_step,
                "training_seconds": round(one.trained.seconds, 1),
                "temperature": one.recipe.algorithm.temperature,
                **interval_columns("mse", point.mse),
                "reference_maml_mse": reference.get(point.num_inner_steps),
                **interval_columns("nll", point.nll),
            }
            for level in LEVELS:
                row |= interval_columns(f"coverage_{100 * level:g}", point.coverage.get(level))
                row |= interval_columns(f"width_{100 * level:g}", point.width.get(level))
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
        known = [f"{reference[k]:.2f}" if k in reference else "-" for k in steps]
        heads = [f"K = {num_inner_steps}" for num_inner_steps in steps]
        lines += [
            "",
            f"## {num_shots} shots",
            "",
            "Squared error of the predictive mean:",
            "",
            *markdown_table(
                ["", *heads, "K in training", "meta-steps", "state of meta-step", "training (minutes)"],
                [*(_error_cells(one, steps) for one in shown), ["reference (MAML)", *known, *_REFERENCE_CELLS]],
            ),
        ]
        lines += _interval_table([one for one in shown if one.recipe.algorithm.is_bayesian])
    lines += ["", "## Settings", "", *(_describe(one) for one in result.runs)]
    lines += [f"- Missing: {failure}" for one in result.runs for failure in one.failures]
    if unfinished := [one for one in result.runs if not one.trained.is_finished]:
        names = ", ".join(one.recipe.name for one in unfinished)
        lines += ["", f"**Training is not finished**: {names}."]
    return "\n".join(lines) + "\n"


def _error_cells(one: SinusoidRun, steps: list[int]) -> list[str]:
    values = {point.num_inner_steps: f"{point.mse:.3f}" for point in one.points}
    return [
        one.display_name,
        *(values.get(k, "-") for k in steps),
        str(num_inner_steps(one.recipe.algorithm)),
        one.trained.progress,
        f"{one.trained.best_step:,}",
        f"{one.trained.seconds / 60:.1f}",
    ]


def _interval_table(shown: list[SinusoidRun]) -> list[str]:
    if not shown:
        return []
    heads = ["", "K", "nll"]
    for level in LEVELS:
        heads += [f"inside {level:.0%}", f"width {level:.0%}"]
    return [
        "",
        "Predictive intervals: the fraction of query points inside (%) and the mean width (target's unit):",
        "",
        *markdown_table(heads, [_interval_cells(one, point) for one in shown for point in one.points]),
    ]


def _interval_cells(one: SinusoidRun, point: SinusoidPoint) -> list[str]:
    cells = [one.display_name, str(point.num_inner_steps), f"{point.nll:.3f}"]
    for level in LEVELS:
        cells += [percent(point.coverage[level]), f"{point.width[level]:.2f}"]
    return cells


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
    likelihood = find_likelihood(one.recipe.likelihood).name.replace("_", " ")
    return (
        f"{text}; likelihood {likelihood}; {trainer.tasks_per_step} tasks a meta-step, "
        f"Adam with rate {trainer.learning_rate:g}, {trainer.schedule}."
    )


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


SINUSOID = Experiment(
    settings=SinusoidSettings,
    report=report,
    description="Sinusoid regression: errors, intervals, coverage. Resumable.",
    trains=True,
)
