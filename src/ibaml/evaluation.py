"""Evaluation over a fixed, seeded set of tasks.

Task ``i`` is drawn from a generator seeded with ``(seed, i)`` alone. The set is therefore the same for every algorithm
and independent of how many tasks are computed at a time, which is what paired comparisons need.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import torch

from ibaml import metrics, tree
from ibaml.algorithms import Algorithm, MetaParameters
from ibaml.algorithms.model import Model
from ibaml.likelihoods import Likelihood, Prediction
from ibaml.metrics import Estimate
from ibaml.priors import DiagonalGaussian
from ibaml.processes import Processes
from ibaml.step import NUM_CALLS_THAT_PAY, HypergradientStep
from ibaml.types import Episode, Params, TaskSampler, Tensor

_SEED_STRIDE = 1_000_003


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


def task_generator(seed: int, index: int) -> torch.Generator:
    """Returns the generator of task ``index`` in the fixed set of tasks named by ``seed``."""
    return torch.Generator().manual_seed(seed * _SEED_STRIDE + index)


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


def predict(
    model: Model,
    algorithm: Algorithm,
    meta: MetaParameters,
    posterior: Params | DiagonalGaussian,
    x: Tensor,
    noise: Params,
) -> Prediction:
    """Predicts at ``x`` with weight samples of an adapted posterior.

    Args:
        model: Network and likelihood.
        algorithm: The algorithm that adapted.
        meta: Meta-parameters.
        posterior: What ``algorithm.adapt`` returned as its value.
        x: Inputs of one task, ``[num_examples, *input_shape]``.
        noise: From ``algorithm.draw_evaluation_noise``.
    """
    outputs = algorithm.outputs(lambda weights: model.outputs(weights, meta.shared, x), posterior, noise)
    return _prediction(model, meta, outputs)


def _prediction(model: Model, meta: MetaParameters, outputs: dict[str, Tensor]) -> Prediction:
    """Returns what the likelihood makes of ``Algorithm.outputs``."""
    known = {name: value for name, value in outputs.items() if name != "outputs"}
    return model.likelihood.predict(outputs["outputs"], meta.shared, **known)


def evaluate(
    model: Model,
    algorithm: Algorithm,
    meta: MetaParameters,
    sampler: TaskSampler,
    *,
    num_tasks: int,
    seed: int,
    temperature: float = 1.0,
    tasks_per_chunk: int | None = None,
    passes: HypergradientStep | None = None,
    on_progress: Callable[[int], None] | None = None,
    processes: Processes | None = None,
) -> Evaluation:
    """Adapts to each of a fixed set of tasks and scores the predictions on its query set.

    Args:
        model: Network and likelihood.
        algorithm: Algorithm whose ``adapt`` is used.
        meta: Meta-parameters.
        sampler: Source of the tasks.
        num_tasks: Number of tasks, at least 1.
        seed: Names the set of tasks.
        temperature: Makes the predictions less sure (above 1) or surer.
        tasks_per_chunk: Tasks that are drawn, and sent to the device, at a time (None: 8).
        passes: What adapts; one that has been used before has its programs. None: a new one.
        on_progress: Called with the number of finished tasks.
        processes: The processes that share the tasks; each returns the evaluation of all.

    Raises:
        ValueError: If ``num_tasks`` is not positive, or a task does not fit the model.
        FloatingPointError: If predictions are not finite, naming the task.
        ProcessLostError: If another process has died or hangs.

    Cost:
        Per task the inner solver's ``num_steps + 1`` gradients, and ``num_evaluation_samples`` forward passes.
    """
    if num_tasks < 1:
        raise ValueError(f"num_tasks must be at least 1, but is {num_tasks}.")
    processes = processes or Processes()

    def own_share() -> list[tuple[Prediction, Tensor]]:
        share = processes.share(num_tasks)
        programs = None if num_tasks >= NUM_CALLS_THAT_PAY else False
        computing = passes or HypergradientStep(model, algorithm, programs=programs)
        return _score_tasks(model, algorithm, meta, sampler, share, seed, tasks_per_chunk, computing, on_progress)

    scored = [task for share in processes.gather(own_share) for task in share]
    predictions = [prediction if temperature == 1 else prediction.tempered(temperature) for prediction, _ in scored]
    return summarise(model.likelihood, predictions, [target for _, target in scored])


def _score_tasks(
    model: Model,
    algorithm: Algorithm,
    meta: MetaParameters,
    sampler: TaskSampler,
    indices: range,
    seed: int,
    tasks_per_chunk: int | None,
    passes: HypergradientStep,
    on_progress: Callable[[int], None] | None,
) -> list[tuple[Prediction, Tensor]]:
    num_tasks = len(indices)
    # Support sets of unequal sizes, as a list of episodes may have, cannot be stacked.
    chunk = min(tasks_per_chunk or 8, num_tasks) if sampler.has_equal_sizes else 1
    device = tree.leaves(meta.prior)[0].device

    scored: list[tuple[Prediction, Tensor]] = []
    num_outputs = 0
    for start in range(indices.start, indices.stop, chunk or 1):
        stop = min(start + chunk, indices.stop)
        episodes = tree.map(lambda leaf: leaf.to(device), draw_tasks(sampler, start, stop, seed=seed))
        for index in range(stop - start):
            # One forward pass tells whether the network fits and its outputs; the rest is checked by value.
            task = tree.map(lambda leaf, i=index: leaf[i], episodes)
            if start + index == indices.start:
                num_outputs = model.check_task(task, task=f"test task {start}")
            model.check_inputs(f"test task {start + index} support.x", task.support.x)
            model.likelihood.check_targets(f"test task {start + index} query.y", task.query.y, num_outputs)
        generators = [torch.Generator().manual_seed(2**40 + seed * _SEED_STRIDE + i) for i in range(start, stop)]
        noises = [
            (algorithm.draw_noise(meta, generator=g), algorithm.draw_evaluation_noise(meta, generator=g))
            for g in generators
        ]
        stacked = passes.outputs(meta, episodes, *zip(*noises, strict=True))
        outputs = [tree.map(lambda leaf, i=index: leaf[i], stacked) for index in range(stop - start)]
        for index, value in enumerate(outputs, start=start):
            if not bool(tree.all_finite(value)):
                raise FloatingPointError(
                    f"test task {index} gives predictions that are not finite. Likely causes: inner steps "
                    f"too large ({algorithm.describe()}), or inputs far from unit scale."
                )
        scored += [
            (_prediction(model, meta, value).to(torch.device("cpu")), y.cpu())
            for value, y in zip(outputs, episodes.query.y, strict=True)
        ]
        if on_progress is not None:
            on_progress(stop)
    return scored
