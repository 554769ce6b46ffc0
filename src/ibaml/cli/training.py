"""Commands that list and train recipes."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, NamedTuple

import torch
import tyro
from rich.console import Console

from ibaml.cli.options import TrainOptions
from ibaml.cli.output import console, tell
from ibaml.recipes import RECIPES, get_recipe, runs
from ibaml.recipes.flags import parse_flags
from ibaml.train.devices import resolve_device
from ibaml.train.processes import (
    connect,
    num_launched,
    require_devices,
)


class Launch(NamedTuple):
    """Asks for the same command in several processes on this machine."""

    num_processes: int
    resume: str


def list_recipes() -> None:
    """List the recipes: named, complete configurations."""
    for name in RECIPES:
        recipe = get_recipe(name)
        tasks = recipe.trainer.tasks_per_step
        size = f"{recipe.trainer.num_steps:,} steps of {tasks} task{'s' if tasks > 1 else ''}"
        Console().print(f"{name}\n    {recipe.description}; {size}", soft_wrap=True, markup=False, highlight=False)


def train(
    recipe: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="RECIPE")],
    /,
    *,
    options: Annotated[TrainOptions, tyro.conf.arg(name="")] = TrainOptions(),  # noqa: B008 - frozen
) -> int | Launch:
    """Train a recipe, or resume it if the run folder holds a checkpoint.

    Every setting of the recipe is a flag as well: `ibaml train RECIPE --help` lists them.

    Args:
        recipe: Name of a recipe; `ibaml recipes` lists them.
        options: How.
    """
    return train_with_flags(recipe, (), options)


def train_with_flags(name: str, flags: Sequence[str], default: TrainOptions = TrainOptions()) -> int | Launch:  # noqa: B008
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
        return Launch(options.devices, resume)
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
            console=console,
            processes=processes,
        )
        if processes.is_first:
            then = f"Evaluate it with: ibaml evaluate {folder}"
            if result.stop_reason != "completed":
                then = f"Resume with the same command: {resume}"
            tell(
                f"Training {result.stop_reason} at step {result.num_steps}; the best state is of step "
                f"{result.best_step}.\n{then}"
            )
    return 130 if result.stop_reason == "interrupted" else 0
