"""Learners that are asked from many sides, and what they write when they are killed or the disk is full."""

import copy
import errno
import itertools
import os
import pickle
import random
import shutil
import signal
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from ibaml import MetaLearner, TrainerSettings
from ibaml.backbones import Backbone
from ibaml.data import ClassImages, EpisodeSampler
from ibaml.learner.evaluations import read_evaluation, write_evaluation
from ibaml.learner.folder import MODEL
from ibaml.networks import MLP
from ibaml.train.checkpoint import load_tensors

from .damage import Failure
from .disturb import Cases, ended, start

Task = tuple[np.ndarray, np.ndarray]


class Asked:
    """A fitted learner, tasks, and its answers to them one after the other."""

    def __init__(self, seed: int) -> None:
        rng = np.random.default_rng(seed)
        self.tasks = [(x, x.sum(1) + rng.normal(size=len(x))) for x in rng.normal(size=(24, 12, 3))]
        network = MLP(1, input_shape=3, hidden_sizes=(8,), generator=torch.Generator().manual_seed(seed))
        self.learner = MetaLearner(network, algorithm="ibaml", likelihood="gaussian")
        self.learner.fit(self.tasks, settings=TrainerSettings(num_steps=3, tasks_per_step=2))
        self.alone = [self.answer(self.learner, task) for task in self.tasks]

    def answer(self, learner: MetaLearner, task: Task) -> np.ndarray:
        """Adapts to a task and predicts its own rows."""
        return learner.adapt(*task).predict(task[0]).mean

    def scores(self, learner: MetaLearner) -> dict[str, float]:
        """Evaluates a learner on some tasks."""
        return {name: value.mean for name, value in learner.evaluate(self.tasks[:4]).items()}

    def failure_of(self, answers: list[np.ndarray], what: str) -> Failure | None:
        """Compares answers with those that were given one after the other."""
        different = sum(not np.array_equal(*pair) for pair in zip(self.alone, answers, strict=True))
        return Failure("", what, f"{different} of {len(answers)} tasks answered otherwise") if different else None


def threads(seed: int) -> Cases:
    """Two to eight threads ask one learner at the same time."""
    asked, random_ = Asked(seed), random.Random(seed)
    for number in itertools.count():
        count = random_.randrange(2, 9)
        with ThreadPoolExecutor(count) as pool:
            answers = list(pool.map(lambda task: asked.answer(asked.learner, task), asked.tasks))
        yield asked.failure_of(answers, f"case {number}, {count} threads")


def together(seed: int) -> Cases:
    """Eight threads adapt, predict, update, evaluate, copy and pickle one learner in an order that changes."""
    asked, random_ = Asked(seed), random.Random(seed)
    expected = asked.scores(asked.learner)
    x, y = asked.tasks[0]
    updated = asked.learner.adapt(x[:6], y[:6]).update(x[6:], y[6:]).predict(x).mean

    def ask(task: Task) -> np.ndarray:
        return asked.answer(asked.learner, task)

    def again(_: Task) -> bool:
        return bool(np.array_equal(asked.learner.adapt(x[:6], y[:6]).update(x[6:], y[6:]).predict(x).mean, updated))

    def evaluate(_: Task) -> bool:
        return asked.scores(asked.learner) == expected

    def pickled(task: Task) -> np.ndarray:
        return asked.answer(pickle.loads(pickle.dumps(asked.learner)), task)

    def copied(task: Task) -> np.ndarray:
        return asked.answer(copy.deepcopy(asked.learner), task)

    for number in itertools.count():
        jobs = [(random_.choice([ask, ask, pickled, copied, again, evaluate]), index) for index in range(24)]
        with ThreadPoolExecutor(8) as pool:
            found: list[Any] = list(pool.map(lambda job: job[0](asked.tasks[job[1]]), jobs))
        wrong = sorted(
            {
                job.__name__
                for (job, index), one in zip(jobs, found, strict=True)
                if not (one if isinstance(one, bool) else np.array_equal(one, asked.alone[index]))
            }
        )
        yield Failure("", f"case {number}", f"other answers of {', '.join(wrong)}") if wrong else None


def copies(seed: int) -> Cases:
    """Copies, pickles and forked processes answer as the original does."""
    asked = Asked(seed)
    ways: dict[str, Callable[[MetaLearner], MetaLearner]] = {
        "deepcopy": copy.deepcopy,
        "pickle": lambda learner: pickle.loads(pickle.dumps(learner)),
    }
    for number in itertools.count():
        for name, way in ways.items():
            one = way(asked.learner)
            yield asked.failure_of([asked.answer(one, task) for task in asked.tasks], f"case {number}, {name}")
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            with os.fdopen(writing, "wb") as pipe:
                pickle.dump([asked.answer(asked.learner, task) for task in asked.tasks], pipe)
            os._exit(0)
        os.close(writing)
        with os.fdopen(reading, "rb") as pipe:
            answers = pickle.load(pipe)
        os.waitpid(child, 0)
        yield asked.failure_of(answers, f"case {number}, fork")


class Written:
    """A model and an evaluation of its own, and others that take their place in the same folder."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.old, self.new = Asked(seed), Asked(seed + 1)
        self.folder, self.output = folder, folder.with_name(f"{folder.name}.told")

    def write(self, asked: Asked) -> None:
        """Saves a model, then its evaluation."""
        asked.learner.save(self.folder)
        evaluation = asked.learner.evaluate_in_full(asked.tasks[:4])
        write_evaluation(self.folder, evaluation, tasks={"seed": 0}, step=None, algorithm={})

    def failure_of(self, what: str) -> Failure | None:
        """Reads what an interrupted writing left: the old or the new, or a refusal that names the file."""
        models = {name: asked.alone[0] for name, asked in (("old", self.old), ("new", self.new))}
        with warnings.catch_warnings():
            # Between its two files the text is told to be of the other model, whose settings are not taken.
            warnings.filterwarnings("ignore", ".*was saved with another model", RuntimeWarning)
            found = MetaLearner.load(self.folder)
        known = [name for name, answer in models.items() if self._answers(found, name, answer)]
        if len(known) != 1:
            return Failure("", what, "the model is neither the old nor the new one")
        try:
            scores = {name: one.mean for name, one in read_evaluation(self.folder).report.items()}
        except ValueError as error:
            named = "evaluation is damaged" in str(error)
            return None if named else Failure("", what, f"the refusal names no file: {error}")
        if scores not in (self.old.scores(self.old.learner), self.new.scores(self.new.learner)):
            return Failure("", what, "the evaluation is neither the old nor the new one")
        return None

    def _answers(self, found: MetaLearner, name: str, answer: np.ndarray) -> bool:
        asked = self.old if name == "old" else self.new
        return bool(np.array_equal(asked.answer(found, asked.tasks[0]), answer))


def killed_while_writing(folder: Path, seed: int) -> Cases:
    """SIGKILL before or after any file of a model or an evaluation takes the place of another."""
    return _disturbed_writes(folder, seed, "killed", lambda: os.kill(os.getpid(), signal.SIGKILL))


def full_while_writing(folder: Path, seed: int) -> Cases:
    """No space left for any file of a model or an evaluation that takes the place of another."""

    def full() -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    return _disturbed_writes(folder, seed, "full", full)


def _disturbed_writes(folder: Path, seed: int, name: str, disturb: Callable[[], None]) -> Iterator[Failure | None]:
    folder.mkdir(parents=True)
    written, random_, real = Written(folder / "model", seed), random.Random(seed), os.replace
    for number in itertools.count():
        when, after = random_.randrange(1, 7), random_.random() < 0.5
        shutil.rmtree(written.folder, ignore_errors=True)
        written.write(written.old)
        count = itertools.count(1)

        def replace(old: Path, new: Path, when: int = when, after: bool = after, count: Iterator[int] = count) -> None:
            is_now = next(count) == when
            if is_now and not after:
                disturb()
            real(old, new)
            if is_now and after:
                disturb()

        def writing(replace: Callable[..., None] = replace) -> None:
            os.replace = replace
            written.write(written.new)

        ended(start(writing, written.output))
        yield written.failure_of(f"case {number}, {name} {'after' if after else 'before'} write {when}")


def _backbone() -> Backbone:
    torch.manual_seed(0)
    return Backbone(module=nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU()), image_size=8, mean=(0.5,) * 3, std=(0.25,) * 3)


def _sampler() -> EpisodeSampler:
    pixels = np.random.default_rng(0).integers(0, 255, size=(120, 3, 8, 8)).astype(np.uint8)
    names = tuple(f"class {index}" for index in range(6))
    images = ClassImages(images=torch.from_numpy(pixels), class_start=torch.arange(0, 121, 20), class_names=names)
    return EpisodeSampler(images, num_ways=2, num_shots=2, num_queries=2)


def _extract(folder: Path) -> None:
    """Trains on features that lie in a folder, or are put there."""
    torch.set_num_threads(1)
    os.environ["IBAML_DATA"] = str(folder / "cache")
    settings = TrainerSettings(num_steps=3, tasks_per_step=2, fast=False)
    MetaLearner(backbone=_backbone()).fit(_sampler(), settings=settings).save(folder / "model")


def killed_while_extracting(folder: Path, seed: int) -> Cases:
    """SIGKILL at a uniform moment of a training on features that are extracted first; then it goes to its end."""
    folder.mkdir(parents=True)
    whole, part, output, random_ = folder / "whole", folder / "part", folder / "told", random.Random(seed)
    _extract(folder / "first")
    began = time.monotonic()
    if ended(start(lambda: _extract(whole), output)) != 0:
        raise RuntimeError(output.read_text())
    seconds, expected = time.monotonic() - began, load_tensors(whole / "model" / MODEL)[0]
    for number in itertools.count():
        moment = random_.uniform(0, seconds)
        child = start(lambda: _extract(part), output)
        time.sleep(moment)
        os.kill(child, signal.SIGKILL)
        ended(child)
        code = ended(start(lambda: _extract(part), output))
        what = f"case {number}, killed after {moment:.3f} s"
        if code != 0:
            yield Failure("", what, f"does not go on: {output.read_text()[-600:]}")
        else:
            found = load_tensors(part / "model" / MODEL)[0]
            other = [name for name, value in expected.items() if not torch.equal(value, found[name])]
            yield Failure("", what, f"other bits in {', '.join(other[:3])}") if other else None
        shutil.rmtree(part, ignore_errors=True)
