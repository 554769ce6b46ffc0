"""The command line: ``ibaml recipes | train | evaluate | compare | predict | reproduce``."""

import contextlib
import csv
import functools
import operator
import sys
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple, TypeAlias

import torch
import tyro
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Column, Table

from ibaml import plots, runs
from ibaml.evaluation import Evaluation, draw_tasks
from ibaml.experiments.registry import EXPERIMENTS, experiment_name
from ibaml.experiments.report import Place, run_experiment
from ibaml.file_prediction import load_fitted, predict_files
from ibaml.metrics import paired_difference, reliability_curve
from ibaml.processes import (
    ProcessLostError,
    connect,
    is_told_by_first,
    launch,
    launched_rank,
    num_launched,
    require_devices,
)
from ibaml.recipes import RECIPES, Recipe, get_recipe
from ibaml.train.log import METRICS, read_metrics
from ibaml.train.trainer import TrainingDivergedError, TrainingResult
from ibaml.types import Batch, Episode

_console = Console(stderr=True)
# Append: a second --set adds to the first.
_Settings: TypeAlias = Annotated[
    tuple[tuple[str, ...], ...], tyro.conf.UseAppendAction, tyro.conf.arg(metavar="KEY=VALUE ...")
]
if TYPE_CHECKING:
    _Experiment: TypeAlias = object
else:
    _Experiment = functools.reduce(
        operator.or_,
        [
            Annotated[each.settings, tyro.conf.subcommand(name, description=each.description)]
            for name, each in EXPERIMENTS.items()
        ],
    )
_LOWER_IS_BETTER = ("nll", "brier", "ece", "mce", "mse", "quantile_calibration_error")


class _Launch(NamedTuple):
    """Asks for the same command in several processes on this machine."""

    num_processes: int
    resume: str


def list_recipes() -> None:
    """List the recipes: named, complete configurations."""
    table = Table(Column("recipe", no_wrap=True), "what it is", "steps x tasks", box=None, pad_edge=False)
    for name in RECIPES:
        recipe = get_recipe(name)
        table.add_row(name, recipe.description, f"{recipe.trainer.num_steps:,} x {recipe.trainer.tasks_per_step}")
    Console().print(table)


def train(
    recipe: tyro.conf.Positional[str],
    /,
    *,
    run_folder: Path | None = None,
    data: Path | None = None,
    max_minutes: float | None = None,
    steps: int | None = None,
    seed: int | None = None,
    device: str = "auto",
    devices: int = 1,
    threads: int | None = None,
    set: _Settings = (),  # noqa: A002
) -> int | _Launch:
    """Train a recipe, or resume it if the run folder holds a checkpoint.

    Args:
        recipe: Name of a recipe; `ibaml recipes` lists them.
        run_folder: Where everything goes [default: runs/RECIPE].
        data: Folder with data files, searched before $IBAML_DATA and the per-user cache.
        max_minutes: Stop after so many minutes, ready to resume.
        steps: Number of meta-steps, instead of the recipe's.
        seed: Seed of training, instead of the recipe's.
        device: "auto" (CUDA if present), "cpu", "cuda", "cuda:1", ...
        devices: Number of processes that share the tasks of a step: one for each GPU, or any number on the CPU.
        threads: Number of CPU threads [default: torch's choice].
        set: Change settings of the recipe, such as algorithm.inner.num_steps=10 trainer.learning_rate=0.002.
    """
    chosen = get_recipe(recipe)
    folder = run_folder or Path("runs") / recipe
    if (folder / runs.RECIPE).is_file() and (stored := runs.read_recipe(folder)).name == recipe:
        chosen = stored
    changes = dict(_split_setting(item) for group in set for item in group)
    if steps is not None:
        changes["trainer.num_steps"] = str(steps)
    if seed is not None:
        changes["trainer.seed"] = str(seed)
    chosen = chosen.override(changes)
    where = runs.resolve_device(device)
    require_devices(where, devices)
    if threads is not None and threads < 1:
        raise ValueError(f"--threads must be at least 1, but is {threads}.")
    resume = f"ibaml train {recipe} --run-folder {folder}"
    if devices > 1 and num_launched() == 1:
        return _Launch(devices, resume)
    if devices not in (1, num_launched()):
        raise ValueError(f"--devices is {devices}, but torchrun has started {num_launched()} processes: leave it out.")

    with connect(where) as processes:
        # Fabric has divided the cores among the processes of this machine.
        if threads is not None:
            torch.set_num_threads(threads)
        result = runs.train_run(
            chosen,
            folder,
            data=data,
            device=processes.device,
            max_minutes=max_minutes,
            console=_console,
            processes=processes,
        )
        if processes.is_first:
            _report_training(chosen, folder, result, resume)
    return 130 if result.stop_reason == "interrupted" else 0


def _report_training(recipe: Recipe, folder: Path, result: TrainingResult, resume: str) -> None:
    history = read_metrics(folder / METRICS) if (folder / METRICS).is_file() else []
    if history:
        plots.save(plots.training_curves(history, title=recipe.name), folder / "training.png")
    _console.print(
        f"Training {result.stop_reason} at step {result.num_steps}; the best state is of step {result.best_step}.\n"
        + (
            f"Evaluate it with: ibaml evaluate {folder}"
            if result.stop_reason == "completed"
            else f"Resume with the same command: {resume}"
        ),
        soft_wrap=True,
        markup=False,
    )


def evaluate_run(
    run: tyro.conf.Positional[Path],
    /,
    *,
    tasks: int | None = None,
    seed: int = 0,
    data: Path | None = None,
    device: str = "auto",
    set: _Settings = (),  # noqa: A002
) -> None:
    """Evaluate a run's best state on a fixed, seeded set of test tasks.

    Args:
        run: Run folder.
        tasks: Number of test tasks, instead of the recipe's.
        seed: Names the set of test tasks; the same seed gives every run of the same data the same tasks.
        data: Folder with data files, searched before $IBAML_DATA and the per-user cache.
        device: "auto" (CUDA if present), "cpu", "cuda", ...
        set: Change settings for the evaluation alone, such as algorithm.inner.num_steps=20.
    """
    changes = dict(_split_setting(item) for group in set for item in group)
    num_tasks = runs.read_recipe(run).override(changes).num_test_tasks if tasks is None else tasks
    where = runs.resolve_device(device)
    with _progress("evaluate", num_tasks) as on_progress:
        recipe, result, step, target, sampler = runs.evaluate_run(
            run,
            num_tasks=num_tasks,
            seed=seed,
            data=data,
            device=where,
            changes=changes,
            on_progress=on_progress,
        )
    _draw_evaluation(recipe, result, draw_tasks(sampler, 0, 1, seed=seed), target)

    algorithm = recipe.algorithm
    temperature = f", temperature {algorithm.temperature}" if algorithm.temperature is not None else ""
    table = Table("metric", "mean", "95% interval", box=None, pad_edge=False)
    for name, value in result.report.items():
        table.add_row(name, f"{value.mean:.4f}", f"+- {value.half_width:.4f}")
    output = Console()
    output.print(
        f"{recipe.name}: {num_tasks} test tasks, seed {seed}, state of step {step}{temperature}",
        soft_wrap=True,
        markup=False,
    )
    output.print(table)
    _console.print(f"Report, per-task values and pictures are in {target}.", soft_wrap=True, markup=False)


def compare(run: tyro.conf.Positional[tuple[Path, ...]], /, *, out: Path | None = None) -> None:
    """Compare evaluated runs on the same test tasks, task by task.

    Args:
        run: Two or more run folders; differences are to the first.
        out: Folder for the table and the plot [default: runs/compare_...].
    """
    if len(run) < 2:
        raise ValueError(f"compare needs at least two run folders, but got {len(run)}.")
    for index, folder in enumerate(run):
        if folder.resolve() in (other.resolve() for other in run[:index]):
            raise ValueError(f"{folder} is named twice: compare needs different run folders.")
    names = [folder.name for folder in run]
    if len({*names}) < len(names):
        names = [str(folder) for folder in run]
    stored = dict(zip(names, (runs.read_evaluation(folder) for folder in run), strict=True))
    first = stored[names[0]]
    for name, other in stored.items():
        if other.tasks != first.tasks:
            difference = _describe_difference(first.tasks, other.tasks)
            raise ValueError(
                f"{names[0]} and {name} were evaluated on different tasks ({difference}): evaluate both with the same "
                "--tasks and --seed, on the same data."
            )
    out = out or Path("runs") / ("compare_" + "_vs_".join(Path(name).name for name in names))
    out.mkdir(parents=True, exist_ok=True)

    table = Table("metric", *names, *(f"{name} - {names[0]}" for name in names[1:]), box=None, pad_edge=False)
    rows: list[list[str]] = []
    # Evaluations stored by an earlier version may lack a metric.
    common = [metric for metric in first.per_task if all(metric in other.per_task for other in stored.values())]
    for metric in common:
        value = first.per_task[metric]
        row = [metric, *(f"{stored[name].report[metric]:.4f}" for name in names)]
        for name in names[1:]:
            difference = paired_difference(stored[name].per_task[metric], value)
            verdict = ""
            # Of a coverage neither more nor less is better, only nearer to its level.
            if metric != "coverage_90" and abs(difference.mean) > difference.half_width:
                better = (difference.mean < 0) == (metric in _LOWER_IS_BETTER)
                verdict = " better" if better else " worse"
            row.append(f"{difference:+.4f}{verdict}")
        table.add_row(*row)
        rows.append(row)
    with (out / "comparison.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["metric", *names, *(f"{name} - {names[0]}" for name in names[1:])], *rows])
    figure = plots.comparison({name: evaluation.per_task for name, evaluation in stored.items()})
    plots.save(figure, out / "comparison.png")
    output = Console()
    output.print(f"{first.tasks['num_tasks']} paired test tasks; intervals are 95%", soft_wrap=True, markup=False)
    output.print(table)
    _console.print(f"Table and plot are in {out}.", soft_wrap=True, markup=False)


def predict(
    run: tyro.conf.Positional[Path],
    /,
    *,
    support: Path,
    query: Path,
    out: Path,
    level: float = 0.9,
    device: str = "auto",
) -> None:
    """Adapt a saved model to the examples of a new task and predict the rest.

    Args:
        run: Folder of a saved model (MetaLearner.save), or of a run trained on images.
        support: Labelled examples: a CSV or Parquet table, or a folder of class folders of images.
        query: Examples to predict: a table, or a folder of images.
        out: CSV or Parquet file for the predictions.
        level: Probability that a regression interval holds the target.
        device: "auto" (CUDA if present), "cpu", "cuda", ...
    """
    fitted = load_fitted(run, device=runs.resolve_device(device))
    count = predict_files(fitted, support, query, out, level=level)
    _console.print(f"{count} predictions are in {out}.", soft_wrap=True, markup=False)


def reproduce(experiment: _Experiment, *, out: Path | None = None, data: Path | None = None) -> None:
    """Run an experiment: a figure or table of the paper, or real data beside other methods.

    Args:
        experiment: Which one; `ibaml reproduce fig1 --help` lists its settings.
        out: Folder for results and pictures [default: reproductions/EXPERIMENT].
        data: Folder with data files, searched before $IBAML_DATA and the per-user cache.
    """
    name = experiment_name(experiment)
    folder = out or Path("reproductions") / name
    wanted = EXPERIMENTS[name]
    # Training shows a bar of its own.
    with contextlib.nullcontext() if wanted.trains else _progress(name, None) as on_progress:
        summary = run_experiment(wanted, experiment, Place(folder, data, _console, on_progress))
    Console().print(summary, soft_wrap=True, markup=False, highlight=False)
    _console.print(f"Tables, pictures and settings are in {folder}.", soft_wrap=True, markup=False)


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line and exits."""
    commands = {
        "recipes": list_recipes,
        "train": train,
        "evaluate": evaluate_run,
        "compare": compare,
        "predict": predict,
        "reproduce": reproduce,
    }
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    try:
        code = tyro.extras.subcommand_cli_from_dict(
            commands,
            args=arguments,
            prog="ibaml",
            # `ibaml reproduce fig1 --out ...`, not `ibaml reproduce --out ... experiment:fig1 --experiment.seed ...`
            config=(tyro.conf.CascadeSubcommandArgs, tyro.conf.OmitArgPrefixes, tyro.conf.OmitSubcommandPrefixes),
            description="Implicit Bayesian meta-learning: few-shot predictions that know how sure they are.",
        )
        if isinstance(code, _Launch):
            code = _launch(arguments, code)
    except (
        ValueError,
        OSError,
        MemoryError,
        ImportError,
        FloatingPointError,
        TrainingDivergedError,
        ProcessLostError,
    ) as error:
        # What a user can mend gets a sentence; anything else is a defect and keeps its traceback.
        if not is_told_by_first(error):
            origin = f" in process {launched_rank()}" if launched_rank() > 0 else ""
            _console.print(f"[bold red]error{origin}:[/] {_escape(str(error))}", soft_wrap=True, highlight=False)
        code = 2
    except KeyboardInterrupt:
        _console.print("Interrupted.")
        code = 130
    sys.exit(code or 0)


def _launch(arguments: Sequence[str], wanted: _Launch) -> int:
    try:
        return launch(["-m", "ibaml.cli", *arguments], wanted.num_processes)
    except ProcessLostError as error:
        raise ProcessLostError(
            f"{error} Resume from the last checkpoint with the same command, or with another number of processes: "
            f"{wanted.resume} --devices N"
        ) from error


def _draw_evaluation(recipe: Recipe, result: Evaluation, first: Episode, target: Path) -> None:
    support, query = (Batch(batch.x[0], batch.y[0]) for batch in first)
    episode = Episode(support, query)
    if result.log_probs is None:
        if result.mean is not None and result.variance is not None and support.x.shape[-1] == 1:
            figure = plots.example_regression(
                episode, result.mean[0], result.variance[0], title=f"{recipe.name}: one task"
            )
            plots.save(figure, target / "example_task.png")
        return
    curve = reliability_curve(result.log_probs.exp(), result.targets)
    plots.save(plots.reliability_diagram({recipe.name: curve}), target / "reliability.png")
    if recipe.data.is_image:
        figure = plots.example_task(episode, result.log_probs[0].exp(), title=f"{recipe.name}: one test task")
        plots.save(figure, target / "example_task.png")


@contextlib.contextmanager
def _progress(name: str, total: int | None) -> Generator[Callable[..., None], None, None]:
    """Shows a bar and yields ``(done, total=total)``, which moves it."""
    with Progress(
        TextColumn(f"[bold]{name}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=_console,
        disable=not _console.is_terminal,
    ) as progress:
        task = progress.add_task(name, total=total)
        yield lambda done, total=total: progress.update(task, completed=done, total=total)


def _split_setting(item: str) -> tuple[str, str]:
    key, separator, value = item.partition("=")
    if not separator:
        raise ValueError(f"--set expects KEY=VALUE, such as algorithm.inner.num_steps=10, but got {item!r}.")
    return key, value


def _describe_difference(first: dict[str, Any], second: dict[str, Any]) -> str:
    flat = [
        {**tasks["data"], **{key: value for key, value in tasks.items() if key != "data"}} for tasks in (first, second)
    ]
    return ", ".join(
        f"{key} {flat[0][key]} and {flat[1].get(key)}" for key in flat[0] if flat[0][key] != flat[1].get(key)
    )


def _escape(text: str) -> str:
    return text.replace("[", r"\[")


if __name__ == "__main__":
    main()
