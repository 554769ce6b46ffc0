"""Trainings that are killed, signalled, left without output or disk."""

import contextlib
import itertools
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from rich.console import Console

from ibaml import MetaLearner, TrainerSettings
from ibaml.data import SinusoidTasks
from ibaml.networks import MLP
from ibaml.train.checkpoint import CHECKPOINT, load_tensors
from ibaml.train.lock import only_training_in
from ibaml.train.log import METRICS, read_metrics

from .damage import Failure

Cases = Iterator[Failure | None]

_TIMES = ("seconds", "tasks_per_second")
_REFUSED, _DEFECT = 70, 99
_SETTINGS = TrainerSettings(
    num_steps=24,
    tasks_per_step=2,
    checkpoint_every=3,
    log_every=2,
    validate_every=8,
    num_validation_tasks=3,
    fast=False,
)


def train(folder: Path, *, num_steps: int = _SETTINGS.num_steps, console: Console | None = None) -> None:
    """Trains a small network in a run folder, or goes on with it."""
    torch.set_num_threads(1)
    network = MLP(1, input_shape=1, hidden_sizes=(8,), generator=torch.Generator().manual_seed(0))
    settings = TrainerSettings(**{**vars(_SETTINGS), "num_steps": num_steps})
    tasks = SinusoidTasks(num_shots=5, num_queries=5)
    learner = MetaLearner(network, algorithm="maml", likelihood="gaussian")
    learner.fit(tasks, tasks, settings=settings, run_folder=folder, progress=console or False)


def start(function: Callable[[], object], output: Path) -> int:
    """Calls a function in a forked process and returns its id; a sentence or a traceback goes to a file."""
    child = os.fork()
    if child:
        return child
    code = 0
    try:
        with output.open("a") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        function()
    except KeyboardInterrupt:
        code = 130
    except (OSError, ValueError) as error:
        code = _REFUSED
        _note(output, f"{type(error).__name__}: {error}\n")
    except BaseException:
        code = _DEFECT
        _note(output, traceback.format_exc())
    finally:
        os._exit(code)


def _note(output: Path, text: str) -> None:
    # A full disk has no room for it.
    with contextlib.suppress(OSError), output.open("a") as file:
        file.write(text)


def ended(child: int) -> int:
    """Waits for a process and returns its exit code, or minus the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


class Undisturbed:
    """A training that nobody disturbed, in a folder of its own, and how long it took."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True)
        self.folder, self.output = folder / "whole", folder / "output"
        # What is imported on the way is imported for all processes that are forked later.
        train(folder / "first", num_steps=1)
        began = time.monotonic()
        code = ended(start(lambda: train(self.folder), self.output))
        assert code == 0, self.output.read_text()
        self.seconds = time.monotonic() - began

    def failure_of(self, folder: Path, what: str) -> Failure | None:
        """Goes on with a training to its end and compares it with this one, bit by bit; removes it."""
        code = ended(start(lambda: train(folder), self.output))
        if code != 0:
            return Failure("", what, f"does not go on: {self.output.read_text()[-600:]}")
        found = self._difference(folder)
        shutil.rmtree(folder)
        return None if found is None else Failure("", what, found)

    def _difference(self, folder: Path) -> str | None:
        (tensors, told), (others, other_told) = (load_tensors(one / CHECKPOINT) for one in (self.folder, folder))
        differing = [name for name in tensors.keys() | others.keys() if not _equal(tensors.get(name), others.get(name))]
        if differing:
            return f"other bits in {', '.join(sorted(differing)[:3])}"
        for name in ("step", "best_step", "best_nll", "best_temperature"):
            if told[name] != other_told[name]:
                return f"{name} is {other_told[name]} in place of {told[name]}"
        rows, other_rows = (self._rows(one) for one in (self.folder, folder))
        if rows != other_rows:
            return f"metrics of steps {[row['step'] for row in other_rows]}, or other numbers in them"
        left = [path.name for path in folder.iterdir() if path.name.startswith(".")]
        return f"left behind: {', '.join(left)}" if left else None

    def _rows(self, folder: Path) -> list[dict[str, float]]:
        return [{k: v for k, v in row.items() if k not in _TIMES} for row in read_metrics(folder / METRICS)]


def _equal(one: torch.Tensor | None, other: torch.Tensor | None) -> bool:
    return one is not None and other is not None and torch.equal(one, other)


def killed(folder: Path, seed: int) -> Cases:
    """SIGKILL at up to three uniform moments."""
    whole, random_ = Undisturbed(folder), random.Random(seed)
    for number in itertools.count():
        moments = [random_.uniform(0, whole.seconds) for _ in range(random_.randrange(1, 4))]
        for moment in moments:
            child = start(lambda: train(folder / "part"), whole.output)
            time.sleep(moment)
            os.kill(child, signal.SIGKILL)
            ended(child)
        yield whole.failure_of(folder / "part", f"case {number}, killed after {moments} s")


def killed_at_a_write(folder: Path, seed: int) -> Cases:
    """SIGKILL right before or after a file takes its place."""
    whole, random_ = Undisturbed(folder), random.Random(seed)
    real = os.replace
    for number in itertools.count():
        when, after = random_.randrange(1, 60), random_.random() < 0.5
        count = itertools.count(1)

        def replace(old: Path, new: Path, when: int = when, after: bool = after, count: Iterator[int] = count) -> None:
            is_now = next(count) == when
            if is_now and not after:
                os.kill(os.getpid(), signal.SIGKILL)
            real(old, new)
            if is_now:
                os.kill(os.getpid(), signal.SIGKILL)

        def training(replace: Callable[..., None] = replace) -> None:
            os.replace = replace
            train(folder / "part")

        ended(start(training, whole.output))
        yield whole.failure_of(folder / "part", f"case {number}, {'after' if after else 'before'} write {when}")


def signals(folder: Path, seed: int) -> Cases:
    """SIGINT, SIGTERM and SIGHUP at up to three moments; each is passed on once all is saved."""
    whole, random_ = Undisturbed(folder), random.Random(seed)
    # The first seconds of a process are Python's.
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    for number in itertools.count():
        sent, code, allowed = [], 0, {0, 130}
        for _ in range(random_.randrange(1, 4)):
            child = start(lambda: train(folder / "part"), whole.output)
            time.sleep(random_.uniform(0, whole.seconds))
            sent.append(random_.choice(numbers))
            os.kill(child, sent[-1])
            code = ended(child)
            allowed = {0, 130, -sent[-1]}
            if code not in allowed:
                break
        what = f"case {number}, signals {[one.name for one in sent]}"
        if code not in allowed:
            yield Failure("", what, f"exit code {code}: {whole.output.read_text()[-600:]}")
            shutil.rmtree(folder / "part", ignore_errors=True)
        else:
            yield whole.failure_of(folder / "part", what)


def closed_outputs(folder: Path) -> Cases:
    """Progress that goes to a full disk, a pipe that nobody reads, a terminal that is closed, or nowhere."""
    whole = Undisturbed(folder)

    def full() -> None:
        os.dup2(os.open("/dev/full", os.O_WRONLY), 2)

    def pipe() -> None:
        reading, writing = os.pipe()
        os.close(reading)
        os.dup2(writing, 2)

    def terminal() -> None:
        master, slave = os.openpty()
        os.dup2(slave, 2)
        os.close(slave)
        os.close(master)

    def nowhere() -> None:
        os.close(2)

    for spoil, is_terminal in itertools.product((full, pipe, terminal, nowhere), (False, True)):

        def training(spoil: Callable[[], None] = spoil, is_terminal: bool = is_terminal) -> None:
            spoil()
            train(folder / "part", console=Console(file=os.fdopen(2, "w"), force_terminal=is_terminal))

        code = ended(start(training, whole.output))
        what = f"{spoil.__name__}, {'a bar' if is_terminal else 'lines'}"
        if code != 0 or load_tensors(folder / "part" / CHECKPOINT)[1]["step"] != _SETTINGS.num_steps:
            yield Failure("", what, f"exit code {code}: {whole.output.read_text()[-600:]}")
        yield whole.failure_of(folder / "part", what)


def full_disk(folder: Path, seed: int) -> Cases:
    """A disk that takes no file above a size, until there is room again."""
    whole, random_ = Undisturbed(folder), random.Random(seed)
    largest = 2 * max(path.stat().st_size for path in whole.folder.rglob("*") if path.is_file())
    for number in itertools.count():
        limit = random_.randrange(largest)

        def training(limit: int = limit) -> None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
            train(folder / "part")

        output = folder / "told"
        output.unlink(missing_ok=True)
        code = ended(start(training, output))
        what = f"case {number}, no file above {limit} bytes"
        if code not in (0, _REFUSED):
            yield Failure("", what, f"exit code {code}: {output.read_text()[-600:]}")
            shutil.rmtree(folder / "part", ignore_errors=True)
        else:
            yield whole.failure_of(folder / "part", what)


def two_in_one_folder(folder: Path, seed: int) -> Cases:
    """A second training in a folder is refused, and may go on once the first has been killed."""
    whole, random_ = Undisturbed(folder), random.Random(seed)
    for number in itertools.count():
        first = start(lambda: train(folder / "part"), whole.output)
        _wait_for(folder / "part" / METRICS)
        time.sleep(random_.uniform(0, whole.seconds / 4))
        os.kill(first, signal.SIGSTOP)
        told = folder / "told"
        told.unlink(missing_ok=True)
        code = ended(start(lambda: train(folder / "part"), told))
        finished = code == 0
        os.kill(first, signal.SIGKILL)
        ended(first)
        if not finished and (code != _REFUSED or "another training is running in" not in told.read_text()):
            yield Failure("", f"case {number}", f"exit code {code}: {told.read_text()[-600:]}")
        yield whole.failure_of(folder / "part", f"case {number}")


def _wait_for(path: Path, seconds: float = 300) -> None:
    end = time.monotonic() + seconds
    while not path.exists() and time.monotonic() < end:
        time.sleep(0.02)


def launcher_killed(folder: Path) -> Cases:
    """The process that started two others for a training is killed: they save and end."""
    command = ["-m", "ibaml.cli", "train", "sinusoid_5shot_maml", "--run-folder", str(folder), "--device", "cpu"]
    options = "--devices 2 --steps 1000000 --trainer.tasks-per-step 2 --trainer.no-fast --trainer.checkpoint-every 1"
    with subprocess.Popen(
        [sys.executable, *command, *options.split(), "--trainer.num-validation-tasks", "2"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as launcher:
        _wait_for(folder / CHECKPOINT)
        children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
        launcher.kill()
    end = time.monotonic() + 120
    while (left := [one for one in children if _trains(one)]) and time.monotonic() < end:
        time.sleep(0.1)
    for one in left:
        os.kill(int(one), signal.SIGKILL)
    if left or len(children) < 2:
        yield Failure("", "kill -9 of the launcher", f"{len(left)} of {len(children)} processes train on")
        return
    with only_training_in(folder):
        load_tensors(folder / CHECKPOINT)
    yield None


def _trains(process: str) -> bool:
    with contextlib.suppress(OSError):
        status = Path(f"/proc/{process}/status").read_text()
        return re.search(r"^State:\s+Z", status, re.MULTILINE) is None
    return False
