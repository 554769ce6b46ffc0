"""The command line, ``ibaml recipes | train | evaluate | ...``: it parses and prints."""

import contextlib
import dataclasses
import functools
import json as json_text
import operator
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple, TypeAlias

import torch
import tyro
from rich.console import Console
from rich.table import Table

from ibaml.backbones import import_backbone
from ibaml.baselines import BaselineComparison
from ibaml.doctor import describe, examine
from ibaml.experiments.registry import EXPERIMENTS, experiment_name
from ibaml.experiments.report import Place, run_experiment
from ibaml.learner.compare import Comparison
from ibaml.learner.compare import compare as compare_models
from ibaml.learner.files import predict_files
from ibaml.learner.report import REPORT
from ibaml.metrics import Estimate
from ibaml.recipes import RECIPES, get_recipe, runs
from ibaml.recipes.flags import parse_flags
from ibaml.train import TrainingDivergedError
from ibaml.train.devices import resolve_device
from ibaml.train.processes import (
    ProcessLostError,
    connect,
    is_told_by_first,
    launch,
    launched_rank,
    num_launched,
    require_devices,
)
from ibaml.train.progress import ProgressBar, say

_console = Console(stderr=True)
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


class _Launch(NamedTuple):
    """Asks for the same command in several processes on this machine."""

    num_processes: int
    resume: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """How to train a recipe.

    Attributes:
        run_folder: Where everything goes [default: runs/RECIPE].
        data: Folder with data files, searched before $IBAML_DATA and the per-user cache.
        max_minutes: Stop after so many minutes, ready to resume.
        steps: Number of meta-steps, instead of the recipe's.
        seed: Seed of training, instead of the recipe's.
        device: "auto" (CUDA if present), "cpu", "cuda", "cuda:1", ...
        devices: Number of processes that share the tasks of a step: one for each GPU, or any number on the CPU.
        threads: Number of CPU threads [default: torch's choice].
    """

    run_folder: Path | None = None
    data: Path | None = None
    max_minutes: float | None = None
    steps: int | None = None
    seed: int | None = None
    device: str = "auto"
    devices: int = 1
    threads: int | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluateOptions:
    """How to evaluate a run.

    Attributes:
        tasks: Number of test tasks, instead of the recipe's.
        num_support: How many rows of each task of --test will be known; tasks with fewer are left out and named
            [default: as in training, or half of its rows].
        seed: Names the set of test tasks; the same seed gives every run of the same data the same tasks.
        data: Folder with data files, searched before $IBAML_DATA and the per-user cache.
        out_of_task: Whether queries of another task are predicted as well, to see whether the model notices them.
        test: Test tasks of a model that no recipe made: a CSV or Parquet table with the columns of training, or a
            folder of class folders of images.
        device: "auto" (CUDA if present), "cpu", "cuda", ...
    """

    tasks: int | None = None
    num_support: int | None = None
    seed: int = 0
    out_of_task: bool = False
    data: Path | None = None
    test: Path | None = None
    device: str = "auto"


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompareOptions:
    """How to compare.

    Attributes:
        out: Folder for the table [default: runs/compare_..., or RUN/baselines].
        baselines: Put these baselines beside one run, all if none is named; they are fitted on the recipe's tasks and
            used again where they were fitted before.
        seconds: Time for which baselines are trained, instead of that of the run.
        tasks: Number of test tasks, instead of the recipe's.
        seed: Names the set of test tasks.
        data: Folder with data files, searched before $IBAML_DATA and the per-user cache.
        device: "auto" (CUDA if present), "cpu", "cuda", ...
    """

    out: Path | None = None
    baselines: tuple[str, ...] | None = None
    seconds: float | None = None
    tasks: int | None = None
    seed: int = 0
    data: Path | None = None
    device: str = "auto"


_ONLY_WITH_BASELINES = ("seconds", "tasks", "seed", "data", "device")


def list_recipes() -> None:
    """List the recipes: named, complete configurations."""
    for name in RECIPES:
        recipe = get_recipe(name)
        size = f"{recipe.trainer.num_steps:,} steps of {recipe.trainer.tasks_per_step} tasks"
        Console().print(f"{name}\n    {recipe.description}; {size}", soft_wrap=True, markup=False, highlight=False)


def train(
    recipe: tyro.conf.Positional[str],
    /,
    *,
    options: Annotated[TrainOptions, tyro.conf.arg(name="")] = TrainOptions(),  # noqa: B008 - frozen
) -> int | _Launch:
    """Train a recipe, or resume it if the run folder holds a checkpoint.

    Every setting of the recipe is a flag as well: `ibaml train RECIPE --help` lists them.

    Args:
        recipe: Name of a recipe; `ibaml recipes` lists them.
        options: How.
    """
    return train_with_flags(recipe, (), options)


def train_with_flags(name: str, flags: Sequence[str], default: TrainOptions = TrainOptions()) -> int | _Launch:  # noqa: B008
    """Trains a recipe with the settings that flags change."""
    command, what = f"ibaml train {name}", "Train this recipe, or resume it if the run folder holds a checkpoint."
    options, chosen = parse_flags(default, get_recipe(name), flags, command=command, description=what)
    folder = options.run_folder or Path("runs") / name
    if (folder / runs.RECIPE).is_file() and (stored := runs.read_recipe(folder)).name == name:
        # A run keeps its settings, without their being named again.
        options, chosen = parse_flags(default, stored, flags, command=command, description=what)
    changes = {"trainer.num_steps": options.steps, "trainer.seed": options.seed}
    chosen = chosen.replace({key: value for key, value in changes.items() if value is not None})
    device = resolve_device(options.device)
    require_devices(device, options.devices)
    if options.threads is not None and options.threads < 1:
        raise ValueError(f"--threads must be at least 1, but is {options.threads}.")
    resume = f"ibaml train {name} --run-folder {folder}"
    if options.devices > 1 and num_launched() == 1:
        return _Launch(options.devices, resume)
    if options.devices not in (1, num_launched()):
        raise ValueError(
            f"--devices is {options.devices}, but torchrun has started {num_launched()} processes: leave it out."
        )
    with connect(device) as processes:
        # Fabric has divided the cores among the processes of this machine.
        if options.threads is not None:
            torch.set_num_threads(options.threads)
        result = runs.train_run(
            chosen,
            folder,
            data=options.data,
            device=processes.device,
            max_minutes=options.max_minutes,
            console=_console,
            processes=processes,
        )
        if processes.is_first:
            then = f"Evaluate it with: ibaml evaluate {folder}"
            if result.stop_reason != "completed":
                then = f"Resume with the same command: {resume}"
            _tell(
                f"Training {result.stop_reason} at step {result.num_steps}; the best state is of step "
                f"{result.best_step}.\n{then}"
            )
    return 130 if result.stop_reason == "interrupted" else 0


def evaluate(
    run: tyro.conf.Positional[Path],
    /,
    *,
    options: Annotated[EvaluateOptions, tyro.conf.arg(name="")] = EvaluateOptions(),  # noqa: B008 - frozen
) -> None:
    """Evaluate a trained model on a fixed, seeded set of test tasks.

    Settings of a recipe's data and algorithm are flags as well: `ibaml evaluate RUN --help` lists them.

    Args:
        run: Folder of a trained model.
        options: How.
    """
    evaluate_with_flags(str(run), (), options)


def evaluate_with_flags(run: str, flags: Sequence[str], default: EvaluateOptions = EvaluateOptions()) -> None:  # noqa: B008
    """Evaluates a trained model with the settings that flags change for this evaluation alone."""
    folder = Path(run)
    recipe = runs.read_recipe(folder) if (folder / runs.RECIPE).is_file() else None
    options, recipe = parse_flags(
        default,
        recipe,
        flags,
        command=f"ibaml evaluate {run}",
        description="Evaluate this model on a fixed, seeded set of test tasks.",
        only=("data", "algorithm", "num_test_tasks"),
    )
    result = runs.evaluate_run(
        folder,
        recipe=recipe,
        test=options.test,
        num_support=options.num_support,
        num_tasks=options.tasks,
        seed=options.seed,
        out_of_task=options.out_of_task,
        data=options.data,
        device=resolve_device(options.device),
    )
    output = Console()
    output.print(result.headline, soft_wrap=True, markup=False, highlight=False)
    output.print(_as_table(result.evaluation.report))
    _tell(f"The page {result.target / REPORT} shows it; per-task values and pictures are beside it.")


def compare(
    run: tyro.conf.Positional[tuple[Path, ...]],
    /,
    *,
    options: Annotated[CompareOptions, tyro.conf.arg(name="")] = CompareOptions(),  # noqa: B008 - frozen
) -> None:
    """Compare evaluated models on the same test tasks, task by task; or one model with baselines.

    Args:
        run: Two or more folders of models; differences are to the first. With --baselines one run of a recipe.
        options: How.
    """
    if options.baselines is None:
        if given := [
            name for name in _ONLY_WITH_BASELINES if getattr(options, name) != getattr(CompareOptions(), name)
        ]:
            raise ValueError(f"--{given[0]} is for --baselines; runs are compared as `ibaml evaluate` left them.")
        result = compare_models(run, options.out)
        _print_comparison(result)
        _tell(f"Table and plot are in {result.folder}.")
        return
    if len(run) != 1:
        raise ValueError(f"--baselines are compared with one run, but there are {len(run)} run folders.")
    comparison, folder = runs.compare_run_with_baselines(
        run[0],
        baselines=options.baselines,
        seconds=options.seconds,
        num_tasks=options.tasks,
        seed=options.seed,
        data=options.data,
        device=resolve_device(options.device),
        out=options.out,
        say=_tell,
    )
    _print_comparison(comparison)
    _tell(f"Tables, picture and fitted baselines are in {folder}.")


def _print_comparison(comparison: Comparison | BaselineComparison) -> None:
    output = Console()
    output.print(f"{comparison.num_tasks} paired test tasks; intervals are 95%", soft_wrap=True, markup=False)
    whole = [[comparison.header, *comparison.rows]]
    for header, *rows in comparison.printed() if isinstance(comparison, BaselineComparison) else whole:
        table = Table(*header, box=None, pad_edge=False)
        for row in rows:
            table.add_row(*map(_escape, row))
        output.print(table)
        output.print()


def predict(
    run: tyro.conf.Positional[Path],
    /,
    *,
    support: Path,
    query: Path,
    out: Path,
    level: float = 0.9,
    max_error: float | None = None,
    backbone: str | None = None,
    device: str = "auto",
) -> None:
    """Adapt a trained model to the examples of a new task and predict the rest.

    Args:
        run: Folder of a trained model.
        support: Labelled examples: a CSV or Parquet table, or a folder of class folders of images. A task of the query
            that a table has no examples of gets the prediction of the prior.
        query: Examples to predict: a table, or a folder of images.
        out: CSV or Parquet file for the predictions.
        level: Probability that a regression interval holds the target.
        max_error: Abstain from examples such that no more than this share of the other labels is wrong; for classes,
            of a model that was trained with validation tasks, or calibrated.
        backbone: The feature extractor that the model was trained with, if it had one: timm:resnet50 and the like, or
            module:name, such as my_backbones:resnet for an object of my_backbones.py in this folder, whose code is run.
        device: "auto" (CUDA if present), "cpu", "cuda", ...
    """
    extractor = None if backbone is None else import_backbone(backbone)
    fitted = runs.load_fitted(run, backbone=extractor, device=resolve_device(device))
    count = predict_files(fitted, support, query, out, level=level, max_error=max_error)
    _tell(f"{count} predictions are in {out}.")


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
    with contextlib.nullcontext() if wanted.trains else ProgressBar(_console, name) as bar:
        on_progress = None if bar is None else bar.update
        summary = run_experiment(wanted, experiment, Place(folder, data, _console, on_progress))
    Console().print(summary, soft_wrap=True, markup=False, highlight=False)
    _tell(f"Tables, pictures and settings are in {folder}.")


def doctor(*, json: bool = False) -> int:
    """Say what is installed, on which devices it can compute, where data and caches lie, and what is missing for what.

    The exit code is 1 if something that is always needed is missing or too old.

    Args:
        json: Print JSON.
    """
    found = examine()
    print(json_text.dumps(found, indent=2) if json else describe(found))
    return 1 if found["missing"] else 0


def playground(*, port: int = 7860, open: bool = True) -> None:
    """Serve a page to play with to this machine alone: draw, click, paste, and see how sure a model is.

    Args:
        port: Port of the page; 0 takes a free one.
        open: Whether a browser is opened.
    """
    # Nothing else needs its models.
    from ibaml.playground.server import serve

    serve(port, open_page=open, say=_tell)


_COMMANDS = {
    "recipes": list_recipes,
    "train": train,
    "evaluate": evaluate,
    "compare": compare,
    "predict": predict,
    "reproduce": reproduce,
    "doctor": doctor,
    "playground": playground,
}
_WITH_FLAGS: Mapping[str, Callable[[str, Sequence[str]], int | _Launch | None]] = {
    "train": train_with_flags,
    "evaluate": evaluate_with_flags,
}
"""Commands whose first argument says which further flags there are."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line and exits."""
    arguments = [_expanded(one) for one in (sys.argv[1:] if arguments is None else arguments)]
    try:
        code = _run(arguments)
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
            say(_console, f"[bold red]error{origin}:[/] {_escape(str(error))}", markup=True)
        code = 2
    except KeyboardInterrupt:
        _tell("Interrupted.")
        code = 130
    sys.exit(code or 0)


def _run(arguments: Sequence[str]) -> int | _Launch | None:
    if len(arguments) > 1 and arguments[0] in _WITH_FLAGS and not arguments[1].startswith("-"):
        return _WITH_FLAGS[arguments[0]](arguments[1], arguments[2:])
    return tyro.extras.subcommand_cli_from_dict(
        _COMMANDS,
        args=list(arguments),
        prog="ibaml",
        # `ibaml reproduce fig1 --out ...`, not `ibaml reproduce --out ... experiment:fig1 --experiment.seed ...`
        config=(tyro.conf.CascadeSubcommandArgs, tyro.conf.OmitArgPrefixes, tyro.conf.OmitSubcommandPrefixes),
        description="Implicit Bayesian meta-learning: few-shot predictions that know how sure they are.",
    )


def _launch(arguments: Sequence[str], wanted: _Launch) -> int:
    try:
        return launch(["-m", "ibaml.cli", *arguments], wanted.num_processes)
    except ProcessLostError as error:
        raise ProcessLostError(
            f"{error} Resume from the last checkpoint with the same command, or with another number of processes: "
            f"{wanted.resume} --devices N"
        ) from error


def _as_table(report: Mapping[str, Estimate]) -> Table:
    table = Table("metric", "mean", "95% interval", box=None, pad_edge=False)
    for name, value in report.items():
        table.add_row(name, f"{value.mean:.4f}", f"+- {value.half_width:.4f}")
    return table


def _expanded(argument: str) -> str:
    """Returns an argument with ~ expanded, which shells leave alone in --name=~/folder."""
    flag, equals, value = argument.partition("=") if argument.startswith("-") else ("", "", argument)
    return f"{flag}{equals}{os.path.expanduser(value)}"


def _tell(text: str) -> None:
    say(_console, text)


def _escape(text: str) -> str:
    return text.replace("[", r"\[")


if __name__ == "__main__":
    main()
