"""Commands that judge, compare and use trained models."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console

from ibaml.backbones import import_backbone
from ibaml.cli.options import Amount, CompareOptions, Device, EvaluateOptions
from ibaml.cli.output import as_table, print_comparison, tell
from ibaml.learner.compare import compare as compare_models
from ibaml.learner.files import predict_files
from ibaml.learner.report import REPORT
from ibaml.recipes import runs
from ibaml.recipes.flags import parse_flags
from ibaml.train.devices import resolve_device

_ONLY_WITH_BASELINES = ("seconds", "tasks", "seed", "data", "device")


def evaluate(
    run: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN")],
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
    output.print(as_table(result.evaluation.report))
    tell(f"The page {result.target / REPORT} shows it; per-task values and pictures are beside it.")


def compare(
    run: Annotated[tyro.conf.Positional[tuple[Path, ...]], tyro.conf.arg(metavar="RUN ...")],
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
        print_comparison(result)
        tell(f"Table and plot are in {result.folder}.")
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
        say=tell,
    )
    print_comparison(comparison)
    tell(f"Tables, picture and fitted baselines are in {folder}.")


def predict(
    run: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN")],
    /,
    *,
    support: Path,
    query: Path,
    out: Path,
    level: float = 0.9,
    max_error: Amount = None,
    backbone: Annotated[str | None, tyro.conf.arg(metavar="NAME")] = None,
    device: Device = "auto",
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
    tell(f"{count} predictions are in {out}.")
