"""Evaluation over a fixed, seeded set of tasks.

Task ``i`` is drawn from a generator seeded with ``(seed, i)`` alone. The set is therefore the same for every algorithm
and independent of how many tasks are computed at a time, which is what paired comparisons need.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch

from ibaml import metrics, tree
from ibaml.algorithms import Algorithm, MetaParameters
from ibaml.meta_step import NUM_CALLS_THAT_PAY, MetaGradient
from ibaml.metrics import Estimate, central_coverage, quantile_calibration_error, selective_area
from ibaml.model import Model
from ibaml.prediction import ClassPrediction, RegressionPrediction
from ibaml.priors import DiagonalGaussian
from ibaml.processes import Processes
from ibaml.types import Episode, Params, TaskSampler, Tensor

_SEED_STRIDE = 1_000_003


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Results over a set of test tasks.

    Attributes:
        report: Each metric with its 95% interval over tasks.
        per_task: Each metric for each task, float64 vectors of length ``num_tasks``.
        targets: Query targets, ``[num_tasks, num_query]`` (classes) or with a last axis of outputs.
        log_probs: Predictive log-probabilities, ``[num_tasks, num_query, num_classes]``; None for regression.
        mean: Predictive means; None for classification.
        variance: Predictive variances; None for classification.
        cdf: Predictive probability of a value at most the target, of the mixture over weight samples; None for
            classification.
    """

    report: Mapping[str, Estimate]
    per_task: Mapping[str, Tensor]
    targets: Tensor
    log_probs: Tensor | None = None
    mean: Tensor | None = None
    variance: Tensor | None = None
    cdf: Tensor | None = None


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
) -> ClassPrediction | RegressionPrediction:
    """Predicts at ``x`` with weight samples of an adapted posterior.

    Args:
        model: Network and likelihood.
        algorithm: The algorithm that adapted.
        meta: Meta-parameters.
        posterior: What ``algorithm.adapt`` returned as its value.
        x: Inputs of one task, ``[num_examples, *input_shape]``.
        noise: From ``algorithm.draw_evaluation_noise``.
    """
    outputs = [model.outputs(weights, meta.shared, x) for weights in algorithm.weight_samples(posterior, noise)]
    return model.likelihood.predict(torch.stack(outputs), meta.shared)


def evaluate(
    model: Model,
    algorithm: Algorithm,
    meta: MetaParameters,
    sampler: TaskSampler,
    *,
    num_tasks: int,
    seed: int,
    tasks_per_chunk: int | None = None,
    passes: MetaGradient | None = None,
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
        tasks_per_chunk: Tasks that are drawn, and sent to the device, at a time (None: 8).
        passes: What adapts; one that has been used before has its programs. None: a new one.
        on_progress: Called with the number of finished tasks.
        processes: The processes that share the tasks; each returns the evaluation of all.

    Raises:
        ValueError: If ``num_tasks`` is not positive, a task does not fit the model, or query sets differ in size.
        FloatingPointError: If predictions are not finite, naming the task.
        ProcessLostError: If another process has died or hangs.

    Cost:
        Per task the inner solver's ``num_steps + 1`` gradients, and ``num_evaluation_samples`` forward passes.
    """
    if num_tasks < 1:
        raise ValueError(f"num_tasks must be at least 1, but is {num_tasks}.")
    processes = processes or Processes()

    def own_share() -> list[_Scored]:
        share = processes.share(num_tasks)
        programs = None if num_tasks >= NUM_CALLS_THAT_PAY else False
        computing = passes or MetaGradient(model, algorithm, programs=programs)
        return _score_tasks(model, algorithm, meta, sampler, share, seed, tasks_per_chunk, computing, on_progress)

    scored = [task for share in processes.gather(own_share) for task in share]
    if len(sizes := sorted({len(task.targets) for task in scored})) > 1:
        raise ValueError(
            f"test tasks have query sets of {', '.join(map(str, sizes))} examples; expected one size, so that every "
            "task weighs the same: cut them to the smallest."
        )
    targets = torch.stack([task.targets for task in scored])
    values = [torch.stack(value) for value in zip(*(task.values for task in scored), strict=True)]
    if len(values) == 1:
        return _classification(torch.log_softmax(values[0], -1), targets)
    mean, variance, nll, cdf = values
    return _regression(mean, variance, nll, cdf, targets.double())


class _Scored(NamedTuple):
    """Targets and predictions of one task, on the CPU: log-probabilities, or mean, variance, nll, cdf; in float64."""

    targets: Tensor
    values: tuple[Tensor, ...]


def _score_tasks(
    model: Model,
    algorithm: Algorithm,
    meta: MetaParameters,
    sampler: TaskSampler,
    indices: range,
    seed: int,
    tasks_per_chunk: int | None,
    passes: MetaGradient,
    on_progress: Callable[[int], None] | None,
) -> list[_Scored]:
    num_tasks = len(indices)
    # Support sets of unequal sizes, as a list of episodes may have, cannot be stacked.
    chunk = min(tasks_per_chunk or 8, num_tasks) if sampler.has_equal_sizes else 1
    device = tree.leaves(meta.prior)[0].device

    scored: list[_Scored] = []
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
        outputs = list(passes.outputs(meta, episodes, *zip(*noises, strict=True)))
        for index, value in enumerate(outputs, start=start):
            if not bool(torch.isfinite(value).all()):
                raise FloatingPointError(
                    f"test task {index} gives predictions that are not finite. Likely causes: inner steps "
                    f"too large ({algorithm.describe()}), or inputs far from unit scale."
                )
        scored += [
            _scored(model.likelihood.predict(value, meta.shared), y)
            for value, y in zip(outputs, episodes.query.y, strict=True)
        ]
        if on_progress is not None:
            on_progress(stop)
    return scored


def _scored(prediction: ClassPrediction | RegressionPrediction, targets: Tensor) -> _Scored:
    if isinstance(prediction, ClassPrediction):
        values = (prediction.log_probs,)
    else:
        values = (prediction.mean, prediction.total_uncertainty, prediction.nll(targets), prediction.cdf(targets))
    return _Scored(targets.cpu(), tuple(value.double().cpu() for value in values))


def _classification(log_probs: Tensor, labels: Tensor) -> Evaluation:
    probs = log_probs.exp()
    entropy = torch.special.entr(probs).sum(-1)
    per_task = {
        "accuracy": metrics.accuracy(probs, labels),
        "nll": metrics.nll(log_probs, labels),
        "brier": metrics.brier(probs, labels),
        "ece": metrics.ece(probs, labels),
        "mce": metrics.mce(probs, labels),
        "selective_area": selective_area(entropy, probs.argmax(-1) == labels),
    }
    return Evaluation(
        report=metrics.classification_report(log_probs, labels), per_task=per_task, targets=labels, log_probs=log_probs
    )


def _regression(mean: Tensor, variance: Tensor, nll: Tensor, cdf: Tensor, targets: Tensor) -> Evaluation:
    per_task = {
        "mse": metrics.mse(mean, targets),
        "nll": nll.mean(-1),
        "coverage_90": central_coverage(cdf),
        "quantile_calibration_error": quantile_calibration_error(cdf),
    }
    report = metrics.regression_report(mean, variance, targets, log_density=-nll, cdf=cdf)
    return Evaluation(report=report, per_task=per_task, targets=targets, mean=mean, variance=variance, cdf=cdf)
