"""What several processes do in tests/test_processes.py: ``torchrun ... two_processes.py FOLDER``.

Each process writes what it found to ``FOLDER/found_RANK.pt``; the tests compare.
"""

import dataclasses
import os
import signal
import sys
from datetime import timedelta
from pathlib import Path

import torch
from torch import distributed

from ibaml import tree
from ibaml.algorithms import MetaParameters, make_algorithm
from ibaml.algorithms.model import build_model
from ibaml.data import SinusoidTasks
from ibaml.learner import MetaLearner
from ibaml.likelihoods import make_likelihood
from ibaml.networks import MLP
from ibaml.posterior import FittedModel
from ibaml.solvers.inner import GradientDescent
from ibaml.solvers.linear import CG
from ibaml.train import Trainer, TrainerSettings, TrainingResult, processes
from ibaml.train.evaluate import evaluate
from ibaml.train.processes import Processes, ProcessLostError
from ibaml.types import Episode

ALGORITHMS = {
    "maml": make_algorithm("maml", inner=GradientDescent(num_steps=2, learning_rate=0.05)),
    "ibaml": make_algorithm(
        "ibaml",
        inner=GradientDescent(num_steps=2, learning_rate=0.01),
        num_samples=2,
        linear=CG(max_steps=2),
        temperature=0.1,
    ),
    "head": make_algorithm("linear_gaussian"),
    "running": make_algorithm("linear_gaussian"),  # on features with running statistics
}
SETTINGS = TrainerSettings(
    num_steps=6,
    tasks_per_step=5,  # not a multiple of the number of processes
    learning_rate=1e-2,
    validate_every=2,
    num_validation_tasks=3,
    checkpoint_every=1,
    log_every=1,
)
CASES = {
    "maml": ("maml", {}),
    "ibaml": ("ibaml", {}),
    "loop": ("ibaml", {"tasks_per_chunk": 1}),
    "chunks": ("maml", {"tasks_per_chunk": 2, "schedule": "cosine"}),
    "per_task": ("ibaml", {"draws": "per_task"}),
    "head": ("head", {}),
    "head_per_task": ("head", {"draws": "per_task"}),
    "few": ("maml", {"tasks_per_step": 2, "num_validation_tasks": 1}),
}


class Tasks:
    """Sinusoids in float64."""

    input_shape, num_outputs, has_equal_sizes = (1,), 1, True

    def sample(self, num_tasks: int, *, generator: torch.Generator) -> Episode:
        episodes = SinusoidTasks(num_shots=4, num_queries=3).sample(num_tasks, generator=generator)
        return tree.map(lambda leaf: leaf.double(), episodes)


class Spoilt(Tasks):
    """Their fourth batch has inputs that are not finite in one task."""

    count = 0

    def sample(self, num_tasks: int, *, generator: torch.Generator) -> Episode:
        episodes = super().sample(num_tasks, generator=generator)
        self.count += num_tasks > 1
        if self.count == 4:
            episodes.support.x[1] = 1e200
        return episodes


class SpoiltShare(Tasks):
    """One of the tasks that only the last process draws, in step 3, is not finite."""

    count = 0

    def sample(self, num_tasks: int, *, generator: torch.Generator) -> Episode:
        episodes = super().sample(num_tasks, generator=generator)
        self.count += 1
        # One draw to check a task before training, then three of five tasks in each step.
        if processes.launched_rank() == 1 and self.count == 1 + 2 * 3 + 2:
            episodes.support.x[0] = float("nan")
        return episodes


def model(name: str = "maml"):
    norm = "running" if name == "running" else "none"
    generator = torch.Generator().manual_seed(0)
    network = MLP(1, input_shape=1, hidden_sizes=(8, 8), norm=norm, generator=generator).double()
    adapt = "head.*" if ALGORITHMS[name].uses_features else "*"
    float32 = build_model(network, make_likelihood("gaussian", 1), adapt=adapt)  # its noise variance is
    return dataclasses.replace(float32, shared=tree.map(lambda leaf: leaf.double(), float32.shared))


def learner_meta(group: Processes | None):
    network = MLP(1, input_shape=1, hidden_sizes=(8, 8), generator=torch.Generator().manual_seed(0)).double()
    learner = MetaLearner(network, algorithm=ALGORITHMS["ibaml"], likelihood="gaussian")
    return learner.fit(Tasks(), settings=SETTINGS, processes=group).meta_parameters


def trainer(folder: Path | None, group: Processes | None, kind=Trainer, name: str = "maml", **changes) -> Trainer:
    settings = dataclasses.replace(SETTINGS, **changes)
    return kind(model(name), ALGORITHMS[name], settings, run_folder=folder, processes=group)


def train(folder: Path | None, group: Processes | None, name: str = "maml", **changes) -> TrainingResult:
    return trainer(folder, group, name=name, **changes).fit(Tasks(), Tasks())


class Interrupted(Trainer):
    """The last process gets a signal during step 3."""

    def _train_step(self, tasks):
        if self._step == 2 and self.processes.rank == self.processes.size - 1:
            signal.raise_signal(signal.SIGTERM)
        return super()._train_step(tasks)


class Counted(Trainer):
    """Counts collective operations of each step."""

    def _train_step(self, tasks):
        counts = self.counts = getattr(self, "counts", [])
        names = [name for name in ("all_reduce", "barrier", "broadcast", "all_gather", "all_gather_object")]
        originals = {name: getattr(distributed, name) for name in names}
        called: list[str] = []
        for name, original in originals.items():
            setattr(distributed, name, lambda *a, n=name, f=original, **k: (called.append(n), f(*a, **k))[1])
        try:
            return super()._train_step(tasks)
        finally:
            counts.append(called)
            for name, original in originals.items():
                setattr(distributed, name, original)


def message_of(function) -> tuple[str, str, bool]:
    try:
        function()
    except Exception as error:
        return type(error).__name__, str(error), processes.is_told_by_first(error)
    return "", "", False


def primitives(group: Processes) -> dict:
    rank = group.rank

    def fail_on_last():
        if rank == group.size - 1:
            raise ValueError(f"raised in process {rank}")
        return rank

    calls: list[int] = []
    mixed = {
        "float32": torch.tensor([1.0, 1 + rank]),
        "float64": torch.tensor(1 / 3 * (rank + 1), dtype=torch.float64),
        "bfloat16": torch.tensor([1.5, rank], dtype=torch.bfloat16),
        "bool": torch.tensor([rank == 0, False]),
        "nan": torch.tensor(float("nan") if rank else 1.0),
        "empty": {},
    }
    return {
        "sum": group.sum(mixed),
        "half": group.sum(torch.tensor([257.0 + rank, 1.0], dtype=torch.bfloat16)),
        "gather": group.gather(lambda: {"rank": rank, "value": torch.arange(rank)}),
        "gather_error": message_of(lambda: group.gather(fail_on_last)),
        "together": group.together(lambda: rank + 5),
        "together_error": message_of(lambda: group.together(fail_on_last)),
        "on_first": group.on_first(lambda: calls.append(rank) or f"from {rank}"),
        "on_first_error": message_of(lambda: group.on_first(lambda: open("/nowhere/at/all"))),
        "first_then_others": (group.first_then_others(lambda: calls.append(rank) or rank), calls),
    }


def fitted(meta: MetaParameters) -> FittedModel:
    return FittedModel(
        model=model(), algorithm=ALGORITHMS["ibaml"], meta=meta, preprocessing=None, device=torch.device("cpu")
    )


def unequal_weights(group: Processes) -> None:
    network = MLP(1, input_shape=1, generator=torch.Generator().manual_seed(group.rank)).double()
    float32 = build_model(network, make_likelihood("gaussian", 1))
    Trainer(float32, ALGORITHMS["maml"], SETTINGS, processes=group).fit(Tasks())


def everything(folder: Path, group: Processes) -> dict:
    own = folder / f"own_{group.rank}"  # of other processes than the first these must stay absent
    found: dict = {"rank": group.rank, "size": group.size, **primitives(group)}
    found["results"] = {
        case: tuple(train(own / case, group, name, **changes)) for case, (name, changes) in CASES.items()
    }
    found["running"] = tuple(train(own / "running", group, "running"))
    # One process has taken three steps in this folder; and here some that one process will finish.
    found["resumed"] = tuple(train(own / "begun_by_one", group, "ibaml"))
    found["begun"] = tuple(train(own / "begun_by_two", group, "ibaml", num_steps=3))

    counted = trainer(None, group, Counted)
    counted.fit(Tasks())
    found["collectives"] = counted.counts
    interrupted = trainer(own / "interrupted", group, Interrupted, "ibaml").fit(Tasks(), Tasks())
    found["interrupted"] = (interrupted.stop_reason, interrupted.num_steps)
    limit = 1e-9 if group.rank == 1 else None
    late = trainer(None, group).fit(Tasks(), max_minutes=limit)
    found["late"] = (late.stop_reason, late.num_steps)
    found["diverged"] = message_of(lambda: trainer(own / "diverged", group).fit(Spoilt(), Tasks()))
    found["evaluation"] = dict(
        evaluate(
            fitted(trainer(None, None, name="ibaml")._meta), Tasks(), num_tasks=7, seed=3, processes=group
        ).per_task
    )
    shares = trainer(own / "per_task_diverged", group, draws="per_task")
    found["per_task_diverged"] = message_of(lambda: shares.fit(SpoiltShare(), Tasks()))
    found["unequal"] = message_of(lambda: trainer(None, group, learning_rate=0.1 * (1 + group.rank)).fit(Tasks()))
    found["unequal_weights"] = message_of(lambda: unequal_weights(group))
    found["learner"] = learner_meta(group)
    found["too_many"] = message_of(lambda: trainer(None, group, tasks_per_step=1))
    blocked = folder / "blocked"
    group.on_first(lambda: blocked.write_text("a file"))
    found["unwritable"] = message_of(lambda: train(blocked / "run", group))
    return found


class Endless(Trainer):
    """Tells its process id and steps, so that a test can kill it."""

    def _train_step(self, tasks):
        row = super()._train_step(tasks)
        if self._step == 3:
            (self.run_folder.parent / f"pid_{self.processes.rank}").write_text(str(os.getpid()))
        return row


def until_killed(folder: Path, group: Processes) -> None:
    try:
        trainer(folder / "run", group, Endless, "ibaml", num_steps=10**6, checkpoint_every=2, validate_every=10**6).fit(
            Tasks()
        )
    except ProcessLostError as error:
        (folder / f"told_{group.rank}").write_text(str(error))
        sys.exit(2)


def main() -> None:
    torch.set_num_threads(1)
    what, folder = sys.argv[1], Path(sys.argv[2])
    if what == "launch":
        try:
            sys.exit(processes.launch([__file__, "until_killed", str(folder)], 2))
        except ProcessLostError as error:
            print(error)
            sys.exit(3)
    with processes.connect(timeout=timedelta(seconds=60)) as group:
        if what == "until_killed":
            until_killed(folder, group)
        else:
            torch.save(everything(folder, group), folder / f"found_{group.rank}.pt")


if __name__ == "__main__":
    main()
