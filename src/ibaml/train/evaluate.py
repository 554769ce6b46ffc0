"""Evaluation over a fixed, seeded set of tasks, by one way for training, learners, command line and experiments.

Each task is adapted to and predicted by itself, with the functions and seeds of ``MetaLearner.adapt`` and ``predict``:
see ``ibaml.seeds``. Tasks may differ in size, and each has the same weight.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import torch

from ibaml import metrics, tree
from ibaml.likelihoods import Likelihood, Prediction
from ibaml.metrics import Estimate
from ibaml.posterior import FittedModel
from ibaml.seeds import task_generator, task_seed
from ibaml.train.processes import Processes
from ibaml.types import Episode, TaskSampler, Tensor


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Results over a set of tasks.

    Attributes:
        report: Each score with its 95% interval over tasks.
        per_task: Each score of each task, float64 vectors of length ``num_tasks``.
        predictions: Prediction of each task's query set, as tensors on the CPU.
        query_targets: Targets of each task's query set, on the CPU.
    """

    report: Mapping[str, Estimate]
    per_task: Mapping[str, Tensor]
    predictions: tuple[Prediction, ...]
    query_targets: tuple[Tensor, ...]

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
    scores = [prediction.scores(target) for prediction, target in zip(predictions, targets, strict=True)]
    per_task = {name: torch.stack([of_task[name] for of_task in scores]) for name in scores[0]}
    report = {name: metrics.estimate(values) for name, values in per_task.items()}
    return Evaluation(
        report={**report, **likelihood.pooled_scores(predictions, targets)},
        per_task=per_task,
        predictions=tuple(predictions),
        query_targets=tuple(targets),
    )


def tempered(likelihood: Likelihood, evaluation: Evaluation, temperature: float) -> Evaluation:
    """Scores the same predictions made less sure (above 1) or surer (below 1)."""
    predictions = [prediction.tempered(temperature) for prediction in evaluation.predictions]
    return summarise(likelihood, predictions, evaluation.query_targets)


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


def evaluate(
    fitted: FittedModel,
    tasks: TaskSampler | Sequence[Episode],
    *,
    num_tasks: int | None = None,
    seed: int,
    on_progress: Callable[[int], None] | None = None,
    processes: Processes | None = None,
) -> Evaluation:
    """Adapts to each of a fixed set of tasks and scores the predictions on its query set.

    Args:
        fitted: Network, likelihood, algorithm and meta-parameters.
        tasks: Source of the tasks, or the tasks themselves, encoded as tensors.
        num_tasks: Number of tasks, at least 1. None: all of a sequence.
        seed: Names the set of tasks, and their noise.
        on_progress: Called with the number of finished tasks.
        processes: The processes that share the tasks; each returns the evaluation of all.

    Raises:
        ValueError: If ``num_tasks`` is not positive, or a task does not fit the model.
        FloatingPointError: If predictions are not finite, naming the task.
        ProcessLostError: If another process has died or hangs.

    Cost:
        Per task the inner solver's ``num_steps`` gradients, and ``num_evaluation_samples`` forward passes.
    """
    if num_tasks is None:
        num_tasks = len(tasks) if isinstance(tasks, Sequence) else 0
    if num_tasks < 1:
        raise ValueError(f"num_tasks must be at least 1, but is {num_tasks}.")
    processes = processes or Processes()

    def own_share() -> list[tuple[Prediction, Tensor]]:
        found: list[tuple[Prediction, Tensor]] = []
        share = processes.share(num_tasks)
        num_outputs = 0
        for index in share:
            task = tree.map(lambda leaf: leaf.to(fitted.device), draw_task(tasks, index, seed=seed))
            # One forward pass tells whether the network fits and its outputs; the rest is checked by value.
            if index == share.start:
                num_outputs = fitted.model.check_task(
                    task,
                    task=f"test task {index}",
                    any_number_of_classes=fitted.algorithm.serves_any_number_of_outputs,
                )
            fitted.model.check_inputs(f"test task {index} support.x", task.support.x)
            classes = fitted.model.most_outputs(fitted.algorithm, num_outputs, task.support.y, task.query.y)
            fitted.model.likelihood.check_targets(f"test task {index} query.y", task.query.y, classes)
            found.append(_predict_task(fitted, task, index, seed=task_seed(seed, index)))
            if on_progress is not None:
                on_progress(index + 1)
        return found

    predicted = [task for share in processes.gather(own_share) for task in share]
    return summarise(fitted.model.likelihood, *zip(*predicted, strict=True))


def _predict_task(fitted: FittedModel, task: Episode, index: int, *, seed: int) -> tuple[Prediction, Tensor]:
    """Returns the prediction of a task's query set and its targets, both in the units of the data, on the CPU."""
    num_outputs = fitted.model.of_task(fitted.algorithm, task.support.y, task.query.y).num_outputs
    posterior = fitted.solve(task.support, None, seed=seed, with_grad_norm=False, num_outputs=num_outputs)
    outputs = fitted.outputs(posterior.value, task.query.x, seed=seed)
    if not bool(tree.all_finite(outputs)):
        raise FloatingPointError(
            f"test task {index} gives predictions that are not finite. Likely causes: inner steps "
            f"too large ({fitted.algorithm.describe()}), or inputs far from unit scale."
        )
    return fitted.prediction(outputs).to(torch.device("cpu")), fitted.in_units(task.query.y).cpu()
