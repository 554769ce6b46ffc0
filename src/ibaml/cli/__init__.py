"""The command line, ``ibaml recipes | train | evaluate | ...``: it parses and prints."""

import contextlib
import os
import sys
from collections.abc import Callable, Mapping, Sequence

import tyro

from ibaml.cli.models import compare, evaluate, evaluate_with_flags, predict
from ibaml.cli.output import console, escape, tell
from ibaml.cli.tools import doctor, playground, reproduce
from ibaml.cli.training import Launch, list_recipes, train, train_with_flags
from ibaml.train import TrainingDivergedError
from ibaml.train.processes import ProcessLostError, is_told_by_first, launch, launched_rank
from ibaml.train.progress import say

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
_WITH_FLAGS: Mapping[str, Callable[[str, Sequence[str]], int | Launch | None]] = {
    "train": train_with_flags,
    "evaluate": evaluate_with_flags,
}
"""Commands whose first argument says which further flags there are."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line and exits."""
    arguments = [_expanded(one) for one in (sys.argv[1:] if arguments is None else arguments)]
    try:
        code = _run(arguments)
        if isinstance(code, Launch):
            code = _launch(arguments, code)
    except BrokenPipeError:
        # Nobody reads what is left, as in `ibaml doctor | head`; nor shall closing it fail.
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
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
            say(console, f"[bold red]error{origin}:[/] {escape(str(error))}", markup=True)
        code = 2
    except KeyboardInterrupt:
        tell("Interrupted.")
        code = 130
    sys.exit(code or 0)


def _run(arguments: Sequence[str]) -> int | Launch | None:
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


def _launch(arguments: Sequence[str], wanted: Launch) -> int:
    try:
        return launch(["-m", "ibaml.cli", *arguments], wanted.num_processes)
    except ProcessLostError as error:
        raise ProcessLostError(
            f"{error} Resume from the last checkpoint with the same command, or with another number of processes: "
            f"{wanted.resume} --devices N"
        ) from error


def _expanded(argument: str) -> str:
    """Returns an argument with ~ expanded, which shells leave alone in --name=~/folder."""
    flag, equals, value = argument.partition("=") if argument.startswith("-") else ("", "", argument)
    return f"{flag}{equals}{os.path.expanduser(value)}"
