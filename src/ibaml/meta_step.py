"""The hypergradients of one step's tasks: the part of training that costs, computed the fastest way that is known.

Without any setting:

- small networks without convolutions compute all tasks at once by ``torch.func.vmap``, others task after task;
- gradients and Hessian-vector products of networks with convolutions are programs (``ibaml.traced``), in flat adapted
  parameters, so that a solver's step is one operation;
- on CUDA the whole step is captured once as a CUDA graph and replayed.

``fast=False`` switches all of it off. Both ways agree up to rounding, which the tests check for every algorithm.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch

from ibaml import tree
from ibaml.algorithms import Algorithm, MetaParameters, TaskNll, TaskNoise
from ibaml.cuda_graph import replayed
from ibaml.model import Model
from ibaml.traced import TracedNll, channels_last, flatten, is_convolutional, is_small, unflatten
from ibaml.types import Episode, HypergradientInfo, Params, Tensor

NUM_CALLS_THAT_PAY = 50
"""Steps of training, or tasks of an evaluation, from which on writing programs is worth its time."""


class TaskGradients(NamedTuple):
    """Hypergradients of several tasks.

    Attributes:
        total: Sum over the tasks.
        info: Diagnostics, each with a leading axis of tasks; without the adapted parameters.
        scores: Query accuracy, or mean squared error, of each task at the adapted weights or the posterior mean.
    """

    total: MetaParameters
    info: HypergradientInfo
    scores: Tensor


class MetaGradient:
    """Computes the hypergradients of tasks, and the outputs of networks that were adapted to them.

    Args:
        model: Network and likelihood.
        algorithm: What adapts, and computes a hypergradient.
        tasks_per_chunk: Tasks computed at once by ``torch.func.vmap``. None: one if ``fast`` and the network is
            large or has convolutions, else all. 1: a plain loop.
        fast: False differentiates the network by ``torch.func`` and nothing else.
        programs: With ``fast``: whether programs are written. None: if the network has convolutions; others gain less
            than writing takes.
        compile: With ``fast``: fuse the programs' elementwise operations by TorchInductor.
        max_examples_per_pass: With ``fast``: pass at most so many examples through the network at a time and add up
            gradients and products, so that a support or query set may be larger than memory. The predictive nll as
            outer loss takes its query set at once. None: no limit.

    Raises:
        ValueError: If ``max_examples_per_pass`` is given without ``fast``, is below 1, or the network has batch
            normalisation, under which examples do not stand alone.

    Cost:
        For each task what its algorithm costs. The first call for new shapes also writes the programs, a second or
        two, compiles them if asked for, some ten seconds each, and on CUDA captures the graph.
    """

    def __init__(
        self,
        model: Model,
        algorithm: Algorithm,
        *,
        tasks_per_chunk: int | None = None,
        fast: bool = True,
        programs: bool | None = None,
        compile: bool = False,  # noqa: A002 - torch's word
        max_examples_per_pass: int | None = None,
    ) -> None:
        if max_examples_per_pass is not None and not fast:
            raise ValueError("max_examples_per_pass needs fast=True: without programs every part keeps its graph.")
        self._model = model
        self._algorithm = algorithm
        self._traced = None
        if fast and (max_examples_per_pass or (is_convolutional(model) if programs is None else programs)):
            self._traced = TracedNll(
                model,
                # A limit on examples is a limit on memory.
                num_kept=algorithm.num_curvature_points if max_examples_per_pass is None else 1,
                compile=compile,
                max_examples=max_examples_per_pass,
            )
        if tasks_per_chunk is None and fast and not is_small(model):
            tasks_per_chunk = 1
        self._tasks_per_chunk = tasks_per_chunk
        without_scores = partial(self._gradients_of, with_scores=False)
        self._gradients = replayed(self._gradients_of) if fast else self._gradients_of
        self._gradients_without_scores = replayed(without_scores) if fast else without_scores
        self._outputs = replayed(self._outputs_of) if fast else self._outputs_of

    def __call__(
        self, meta: MetaParameters, episodes: Episode, noises: Sequence[TaskNoise], *, with_scores: bool = True
    ) -> TaskGradients:
        """Returns the gradients of some tasks.

        Args:
            meta: Meta-parameters.
            episodes: Tasks, with a leading axis, on the device of the meta-parameters.
            noises: Noise of each task.
            with_scores: False spares a pass of each query set; the scores are then NaN.
        """
        compute = self._gradients if with_scores else self._gradients_without_scores
        return compute(meta, episodes, _stacked(noises))

    def outputs(
        self,
        meta: MetaParameters,
        episodes: Episode,
        noises: Sequence[TaskNoise],
        evaluation_noises: Sequence[Params],
    ) -> Tensor:
        """Adapts to each task and returns outputs at its query inputs, ``[num_tasks, num_samples, num_query, ...]``.

        Args:
            meta: Meta-parameters.
            episodes: Tasks, with a leading axis, on the device of the meta-parameters.
            noises: Noise of the inner problem of each task.
            evaluation_noises: For each task the noise of its weight samples, from ``draw_evaluation_noise``.
        """
        return self._outputs(meta, episodes, _stacked(noises), _stacked(evaluation_noises))

    def _gradients_of(
        self, meta: MetaParameters, episodes: Episode, noises: TaskNoise, *, with_scores: bool = True
    ) -> TaskGradients:
        meta, noises = self._flat(meta), self._flat_noise(noises)

        def of_task(episode: Episode, noise: TaskNoise) -> tuple[MetaParameters, HypergradientInfo, Tensor]:
            gradient, info = self._algorithm.hypergradient(self._nll, meta, episode, noise)
            score = torch.full_like(info.outer_loss, math.nan)
            if with_scores:
                weights = self._algorithm.prior.mean(info.inner_params)
                score = self._score(self._network_outputs(weights, meta.shared, episode.query.x), episode.query.y)
            return gradient, info._replace(inner_params={}), score

        gradients, info, scores = self._for_each_task(of_task, episodes, noises)
        total = tree.map(lambda leaf: leaf.sum(0), gradients)
        if self._traced is not None:
            prior = self._algorithm.prior.map(lambda flat: unflatten(flat, self._model.adapted), total.prior)
            total = MetaParameters(prior, total.shared)
        return TaskGradients(total, info, scores)

    def _outputs_of(
        self, meta: MetaParameters, episodes: Episode, noises: TaskNoise, evaluation_noises: Params
    ) -> Tensor:
        meta, noises = self._flat(meta), self._flat_noise(noises)
        if self._traced is not None:
            evaluation_noises = flatten(evaluation_noises, num_axes=2)

        def of_task(episode: Episode, noise: TaskNoise, evaluation_noise: Params) -> Tensor:
            adapted = self._algorithm.adapt(self._nll, meta, episode.support, noise, with_grad_norm=False).value
            samples = self._algorithm.weight_samples(adapted, evaluation_noise)
            return torch.stack([self._network_outputs(weights, meta.shared, episode.query.x) for weights in samples])

        return self._for_each_task(of_task, episodes, noises, evaluation_noises)

    def _for_each_task(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Calls a function of one task for all of them, chunk by chunk; arguments and result have a leading axis."""

        def of_chunk(start: int) -> Any:
            selected = tree.map(lambda leaf: leaf[start : start + chunk], arguments)
            if len(tree.leaves(selected)[0]) > 1:
                return torch.func.vmap(function)(*selected)
            return tree.map(lambda leaf: leaf.unsqueeze(0), function(*tree.map(lambda leaf: leaf[0], selected)))

        num_tasks = len(tree.leaves(arguments)[0])
        chunk = self._tasks_per_chunk or num_tasks
        results = [of_chunk(start) for start in range(0, num_tasks, chunk)]
        return tree.map(lambda *leaves: torch.cat(leaves), *results)

    @property
    def _nll(self) -> TaskNll:
        return self._model.nll if self._traced is None else self._traced

    def _flat(self, meta: MetaParameters) -> MetaParameters:
        return (
            meta
            if self._traced is None
            else MetaParameters(self._algorithm.prior.map(flatten, meta.prior), meta.shared)
        )

    def _flat_noise(self, noises: TaskNoise) -> TaskNoise:
        if self._traced is None:
            return noises
        # Leading axes: tasks and weight samples.
        return TaskNoise(flatten(noises.inner, num_axes=2), flatten(noises.outer, num_axes=2))

    def _network_outputs(self, weights: Params, shared: Params, x: Tensor) -> Tensor:
        if self._traced is not None:
            weights = unflatten(weights, self._model.adapted)
            if self._traced.is_convolutional and self._tasks_per_chunk == 1:
                weights, x = tree.map(channels_last, (weights, x))
        return self._model.outputs(weights, shared, x)

    def _score(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return self._model.likelihood.step_score(outputs, targets)


def _stacked(trees: Sequence[Any]) -> Any:
    return tree.map(lambda *leaves: torch.stack(leaves), *trees)
