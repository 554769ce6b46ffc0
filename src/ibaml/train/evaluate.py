"""Evaluation over a fixed, seeded set of tasks, by one way for training, learners, command line and experiments.

Each task is adapted to and predicted with the functions and seeds of ``MetaLearner.adapt`` and ``predict``: see
``ibaml.seeds``. Tasks may differ in size, and each has the same weight. Heads on features take neighbouring tasks of
one shape at once, which changes nothing but rounding.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch

from ibaml import metrics, tree
from ibaml.algorithms.checks import check_labels, check_targets
from ibaml.likelihoods import ClassPrediction, Likelihood, Prediction
from ibaml.likelihoods.categorical import class_scores
from ibaml.metrics import Estimate
from ibaml.posterior import FittedModel
from ibaml.seeds import task_generator, task_seed
from ibaml.train.images_once import images_once
from ibaml.train.processes import Processes
from ibaml.train.progress import ProgressBar
from ibaml.train.together import Asked, in_groups, outputs_together
from ibaml.types import Episode, TaskSampler, Tensor

if TYPE_CHECKING:
    from rich.console import Console


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Results over a set of tasks.

    Attributes:
        report: Each score with its 95% interval over tasks.
        per_task: Each score of each task, float64 vectors of length ``num_tasks``.
        predictions: Prediction of each task's query set, as tensors on the CPU.
        query_targets: Targets of each task's query set, on the CPU.
        num_support: Number of support examples of each task.
        sources: Which of the tasks that there are each one is a draw of. A sampler over given tasks may draw one twice;
            of one that does not say what it draws, all count as different.
        left_out: Tasks that were given and could not be used, by name, and why.
    """

    report: Mapping[str, Estimate]
    per_task: Mapping[str, Tensor]
    predictions: tuple[Prediction, ...]
    query_targets: tuple[Tensor, ...]
    num_support: tuple[int, ...] = ()
    sources: tuple[int, ...] = ()
    left_out: Mapping[str, str] = dataclasses.field(default_factory=dict[str, str])

    @property
    def targets(self) -> Tensor:
        """Query targets of all tasks, ``[num_tasks, num_query]`` (classes) or with a last axis of targets.

        Raises:
            ValueError: If query sets differ in size.
        """
        return self._stacked(self.query_targets)

    @property
    def log_probs(self) -> Tensor | None:
        """Log-probabilities, float64 ``[num_tasks, num_query, num_classes]``; None for numbers.

        Raises:
            ValueError: If query sets differ in size.
        """
        return self.tensors().get("log_probs")

    @property
    def mean(self) -> Tensor | None:
        """Predictive means, float64 ``[num_tasks, num_query, num_targets]``; None for classes.

        Raises:
            ValueError: If query sets differ in size.
        """
        return self.tensors().get("mean")

    @property
    def variance(self) -> Tensor | None:
        """Predictive variances, as ``mean``; None for classes.

        Raises:
            ValueError: If query sets differ in size.
        """
        return self.tensors().get("variance")

    def tensors(self) -> dict[str, Tensor]:
        """Returns what describes the predictions in short, stacked over tasks, by name.

        Raises:
            ValueError: If query sets differ in size.
        """
        of_tasks = [prediction.tensors() for prediction in self.predictions]
        return {name: self._stacked([one[name] for one in of_tasks]) for name in of_tasks[0]}

    def _stacked(self, of_tasks: Sequence[Tensor]) -> Tensor:
        sizes = sorted({len(one) for one in of_tasks})
        if len(sizes) > 1:
            raise ValueError(
                f"tasks have query sets of {', '.join(map(str, sizes))} examples, which cannot be stacked: go through "
                "predictions and query_targets task by task."
            )
        return torch.stack(list(of_tasks))


def summarise(likelihood: Likelihood, predictions: Sequence[Prediction], targets: Sequence[Tensor]) -> Evaluation:
    """Scores the predictions of some tasks, each task of the same weight.

    Args:
        likelihood: The likelihood of the predictions.
        predictions: Prediction of each task, as tensors.
        targets: Targets of each task, in the same units.
    """
    predictions = [one.to(torch.device("cpu")) for one in predictions]
    targets = [one.cpu() for one in targets]
    per_task = _scores(predictions, targets)
    report = {name: metrics.estimate(values) for name, values in per_task.items()}
    return Evaluation(
        report={**report, **likelihood.pooled_scores(predictions, targets)},
        per_task=per_task,
        predictions=tuple(predictions),
        query_targets=tuple(targets),
    )


def _scores(predictions: Sequence[Prediction], targets: Sequence[Tensor]) -> dict[str, Tensor]:
    """Returns the scores of each task by name; of classes they are computed together, if tasks have one shape."""
    log_probs = [one.tensors()["log_probs"] for one in predictions if isinstance(one, ClassPrediction)]
    if len(log_probs) == len(predictions) and len({one.shape for one in log_probs}) == 1:
        return class_scores(torch.stack(log_probs), torch.stack(list(targets)))
    scores = [prediction.scores(target) for prediction, target in zip(predictions, targets, strict=True)]
    return {name: torch.stack([of_task[name] for of_task in scores]) for name in scores[0]}


def tempered(likelihood: Likelihood, evaluation: Evaluation, temperature: float) -> Evaluation:
    """Scores the same predictions made less sure (above 1) or surer (below 1)."""
    predictions = [prediction.tempered(temperature) for prediction in evaluation.predictions]
    found = summarise(likelihood, predictions, evaluation.query_targets)
    return dataclasses.replace(evaluation, report=found.report, per_task=found.per_task, predictions=found.predictions)


def draw_tasks(sampler: TaskSampler, start: int, stop: int, *, seed: int) -> Episode:
    """Draws tasks ``start .. stop - 1`` of the fixed set named by ``seed``, with a leading task axis."""
    episodes = [sampler.sample(1, generator=task_generator(seed, index)) for index in range(start, stop)]
    shapes = [[tuple(leaf.shape[1:]) for leaf in tree.leaves(episode)] for episode in episodes]
    for index, shape in enumerate(shapes):
        if shape != shapes[0]:
            raise ValueError(
                f"tasks {start} and {start + index} have tensors of different shapes, {shapes[0]} and {shape}, and "
                "cannot be stacked: compute one at a time with tasks_per_chunk=1."
            )
    return tree.map(lambda *leaves: torch.cat(leaves), *episodes)


def draw_task(tasks: TaskSampler | Sequence[Episode], index: int, *, seed: int) -> Episode:
    """Returns one task, without a task axis: of a sequence the one at ``index``, of a sampler a draw."""
    if isinstance(tasks, Sequence):
        return tasks[index]
    return tree.map(lambda leaf: leaf[0], draw_tasks(tasks, index, index + 1, seed=seed))


def source_of(tasks: TaskSampler | Sequence[Episode], index: int, *, seed: int) -> int:
    """Returns which of the tasks that there are ``draw_task`` draws; ``index`` itself if that is not known."""
    which = None if isinstance(tasks, Sequence) else getattr(tasks, "sample_indices", None)
    return index if which is None else which(1, generator=task_generator(seed, index))[0]


def evaluate(
    fitted: FittedModel,
    tasks: TaskSampler | Sequence[Episode],
    *,
    num_tasks: int | None = None,
    seed: int,
    on_progress: Callable[[int], None] | None = None,
    console: "Console | None" = None,
    processes: Processes | None = None,
    out_of_task: bool = False,
) -> Evaluation:
    """Adapts to each of a fixed set of tasks and scores the predictions on its query set.

    Args:
        fitted: Network, likelihood, algorithm and meta-parameters.
        tasks: Source of the tasks, or the tasks themselves, encoded as tensors.
        num_tasks: Number of tasks, at least 1. None: all of a sequence.
        seed: Names the set of tasks, and their noise.
        on_progress: Called with the number of finished tasks.
        console: Where progress is shown, if anywhere.
        processes: The processes that share the tasks; each returns the evaluation of all.
        out_of_task: Whether queries of another task, see ``draw_foreign``, are predicted as well, for the score
            ``out_of_task_auroc``: the probability that one of them has a larger ``prediction.out_of_task`` than a
            query of the task's own. For tasks that each have classes of their own.

    Raises:
        ValueError: If ``num_tasks`` is not positive, or a task does not fit the model, or has no support where the
            model has no prior; with ``out_of_task`` if targets
            are numbers, or no other task has classes that a task has not.
        FloatingPointError: If predictions are not finite, naming the task.
        ProcessLostError: If another process has died or hangs.

    Cost:
        Per task the inner solver's ``num_steps`` gradients, and ``num_evaluation_samples`` forward passes; with
        ``out_of_task`` as many passes of another task's queries. Layers that no task adapts pass each image of an
        ``EpisodeSampler`` once, in however many tasks it comes.
    """
    if num_tasks is None:
        num_tasks = len(tasks) if isinstance(tasks, Sequence) else 0
    if num_tasks < 1:
        raise ValueError(f"num_tasks must be at least 1, but is {num_tasks}.")
    if out_of_task and fitted.model.likelihood.target_kind != "classes":
        raise ValueError(f"out_of_task is for classes, but the likelihood is {fitted.model.likelihood.name!r}.")
    processes = processes or Processes()

    share = processes.share(num_tasks)

    def asked() -> Iterator[Asked]:
        num_outputs, here, source = 0, fitted, tasks
        for index in share:
            task = _draw_on_device(fitted, source, index, seed=seed)
            if not len(task.support.y):
                fitted.require_prior()
            if index == share.start:
                # One forward pass tells whether the network fits and its outputs; the rest is checked by value.
                num_outputs = fitted.model.check_task(
                    task,
                    task=f"test task {index}",
                    algorithm=fitted.algorithm,
                    needs_support=False,
                )
                here, source = images_once(fitted, tasks, task.query.x)
                if source is not tasks:
                    task = _draw_on_device(fitted, source, index, seed=seed)
            for part, batch in (("support", task.support), ("query", task.query)):
                fitted.model.check_inputs(f"test task {index} {part}.x", batch.x)
                check_labels(fitted.model.likelihood, f"test task {index} {part}.y", batch.y)
            classes = fitted.num_outputs(num_outputs, task.support.y, task.query.y)
            for part, targets in (("support", task.support.y), ("query", task.query.y)):
                if len(targets):
                    argument = f"test task {index} {part}.y"
                    check_targets(fitted.algorithm, fitted.model.likelihood, argument, targets, classes)
            classes = fitted.num_outputs(fitted.model.num_outputs, task.support.y, task.query.y)
            foreign = draw_foreign(source, index, num_tasks=num_tasks, seed=seed) if out_of_task else None
            yield Asked(here, index, task, classes, foreign)

    def own_share(bar: ProgressBar) -> list[_Predicted]:
        found: list[_Predicted] = []
        for group in in_groups(asked()):
            together = _predict_together(group) if len(group) > 1 else None
            alone = (_predict_task(one, seed=task_seed(seed, one.number)) for one in group)
            for one, predicted in zip(group, together or alone, strict=True):
                found.append(predicted._replace(source=source_of(tasks, one.number, seed=seed)))
                bar.update(len(found))
                if on_progress is not None:
                    on_progress(one.number + 1)
        return found

    with ProgressBar(console if processes.is_first else None, "evaluate", len(share)) as bar:
        predicted = [task for share in processes.gather(lambda: own_share(bar)) for task in share]
    predictions, targets, foreign, num_support, sources = zip(*predicted, strict=True)
    evaluation = dataclasses.replace(
        summarise(fitted.model.likelihood, predictions, targets), num_support=num_support, sources=sources
    )
    if not out_of_task:
        return evaluation
    own = (one.tensors()["out_of_task"] for one in evaluation.predictions)
    areas = [metrics.ood_auroc(*task).mean for task in zip(own, foreign, strict=True)]
    values = torch.tensor(areas, dtype=torch.float64)
    return dataclasses.replace(
        evaluation,
        report={**evaluation.report, "out_of_task_auroc": metrics.estimate(values)},
        per_task={**evaluation.per_task, "out_of_task_auroc": values},
    )


def _draw_on_device(fitted: FittedModel, tasks: TaskSampler | Sequence[Episode], index: int, *, seed: int) -> Episode:
    return tree.map(lambda leaf: leaf.to(fitted.device), draw_task(tasks, index, seed=seed))


def draw_foreign(tasks: TaskSampler | Sequence[Episode], index: int, *, num_tasks: int, seed: int) -> Tensor:
    """Returns inputs that belong to none of the classes of one task: queries of the next task of a fixed set.

    A sampler that says which classes a task has (``sample_classes``, as ``EpisodeSampler`` does) lets queries of common
    classes be left out, and a task with none be passed over. Of other tasks it is not known, since each numbers its
    classes by itself: all queries of the next one are taken. The fewer classes there are, the more of them are of
    common classes, which pulls an AUROC towards 1/2.

    Args:
        tasks: Source of the tasks, or the tasks themselves.
        index: The task to which the inputs are foreign.
        num_tasks: Number of tasks in the set; after the last comes the first.
        seed: Names the set.

    Raises:
        ValueError: If there is no such task.
    """
    classes_of = None if isinstance(tasks, Sequence) else getattr(tasks, "sample_classes", None)
    for other in ((index + offset) % num_tasks for offset in range(1, num_tasks)):
        if classes_of is None:
            return draw_task(tasks, other, seed=seed).query.x
        own, others = (classes_of(1, generator=task_generator(seed, one))[0] for one in (index, other))
        is_foreign = ~torch.isin(others, own)
        if bool(is_foreign.any()):
            query = draw_task(tasks, other, seed=seed).query
            return query.x[is_foreign.to(query.y.device)[query.y]]
    raise ValueError(
        f"out_of_task needs queries of classes that test task {index} has not, but none of the {num_tasks} tasks has "
        "any: evaluate on more tasks or more classes."
    )


class _Predicted(NamedTuple):
    """Prediction of a task's query set, its targets, both in the units of the data, and scores of foreign inputs."""

    prediction: Prediction
    targets: Tensor
    foreign: Tensor | None
    num_support: int
    source: int


def _predict_together(group: list[Asked]) -> list[_Predicted] | None:
    """Returns what is found for tasks of one shape, on the CPU; None if there is something that is not finite."""
    outputs, fitted = outputs_together(group), group[0].fitted
    if not bool(tree.all_finite(outputs)):
        return None
    predictions = [fitted.prediction(of_task).to(torch.device("cpu")) for of_task in outputs]
    targets = [fitted.in_units(asked.task.query.y).cpu() for asked in group]
    return [
        _Predicted(prediction, target, None, len(asked.task.support.y), source=asked.number)
        for asked, prediction, target in zip(group, predictions, targets, strict=True)
    ]


def _predict_task(asked: Asked, *, seed: int) -> _Predicted:
    """Returns what is found for a task, on the CPU."""
    fitted, index, task, num_outputs, foreign = asked
    try:
        posterior = fitted.solve(task.support, None, seed=seed, with_grad_norm=False, num_outputs=num_outputs)
    except FloatingPointError as error:
        raise FloatingPointError(f"test task {index}: {error}") from error

    def predict(x: Tensor) -> Prediction:
        outputs = fitted.outputs(posterior.value, x, seed=seed)
        if not bool(tree.all_finite(outputs)):
            raise FloatingPointError(
                f"test task {index} gives predictions that are not finite. Likely causes: inner steps "
                f"too large ({fitted.algorithm.describe()}), or inputs far from unit scale."
            )
        return fitted.prediction(outputs).to(torch.device("cpu"))

    scores = None if foreign is None else predict(foreign.to(fitted.device)).tensors()["out_of_task"]
    targets = fitted.in_units(task.query.y).cpu()
    return _Predicted(predict(task.query.x), targets, scores, len(task.support.y), source=index)
