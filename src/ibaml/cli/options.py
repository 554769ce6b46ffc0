"""Options of the commands that train and judge, with the texts of their help."""

import dataclasses
from pathlib import Path
from typing import Annotated, TypeAlias

import tyro

# In words of the help, in place of types of Python.
Folder: TypeAlias = Annotated[Path | None, tyro.conf.arg(metavar="FOLDER")]
File: TypeAlias = Annotated[Path | None, tyro.conf.arg(metavar="PATH")]
Count: TypeAlias = Annotated[int | None, tyro.conf.arg(metavar="NUMBER")]
Amount: TypeAlias = Annotated[float | None, tyro.conf.arg(metavar="NUMBER")]
Names: TypeAlias = Annotated[tuple[str, ...] | None, tyro.conf.arg(metavar="[NAME ...]")]
Device: TypeAlias = Annotated[str, tyro.conf.arg(metavar="DEVICE")]


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

    run_folder: Folder = None
    data: Folder = None
    max_minutes: Amount = None
    steps: Count = None
    seed: Count = None
    device: Device = "auto"
    devices: int = 1
    threads: Count = None


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

    tasks: Count = None
    num_support: Count = None
    seed: int = 0
    out_of_task: bool = False
    data: Folder = None
    test: File = None
    device: Device = "auto"


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

    out: Folder = None
    baselines: Names = None
    seconds: Amount = None
    tasks: Count = None
    seed: int = 0
    data: Folder = None
    device: Device = "auto"
