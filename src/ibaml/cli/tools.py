"""Commands beside training: experiments, what is installed, and the page to play with."""

import contextlib
import functools
import json as json_text
import operator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeAlias

import tyro
from rich.console import Console

from ibaml.cli.options import Folder
from ibaml.cli.output import console, tell
from ibaml.doctor import describe, examine
from ibaml.experiments.registry import EXPERIMENTS, experiment_name
from ibaml.experiments.report import Place, run_experiment
from ibaml.train.progress import ProgressBar

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


def reproduce(experiment: _Experiment, *, out: Folder = None, data: Folder = None) -> None:
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
    with contextlib.nullcontext() if wanted.trains else ProgressBar(console, name) as bar:
        on_progress = None if bar is None else bar.update
        summary = run_experiment(wanted, experiment, Place(folder, data, console, on_progress))
    Console().print(summary, soft_wrap=True, markup=False, highlight=False)
    tell(f"Tables, pictures and settings are in {folder}.")


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

    serve(port, open_page=open, say=tell)
