"""The hypergradients of one step's tasks: the part of training that costs, computed the fastest way that is known.

Without any setting:

- adapted parameters are one flat vector, so that a solver's step is one operation;
- gradients and Hessian-vector products of networks with convolutions are programs (``ibaml.fast``);
- small networks without convolutions compute all tasks at once by ``torch.func.vmap``, others task after task;
- on CUDA the whole step is captured once as a CUDA graph and replayed.

``fast=False`` switches all of it off. Both ways agree up to rounding, which the tests check for every algorithm.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from ibaml import tree
from ibaml.algorithms import Algorithm, MetaParameters, TaskNoise
from ibaml.algorithms.model import Model
from ibaml.algorithms.nll import Nll
from ibaml.fast import FlatNll, NllInParts, ProgramNll, channels_last, flatten, replayed, unflatten
from ibaml.types import Episode, HypergradientInfo, Params, Tensor

NUM_CALLS_THAT_PAY = 50
"""Steps of training, or tasks of an evaluation, from which on writing programs is worth its time."""

_MOST_AT_ONCE = 2_000_000  # Weights of a network whose unrolled tasks may all be in memory.


class TaskHypergradients(NamedTuple):
    """Hypergradients of several tasks.

    Attributes:
        total: Sum over the tasks.
        info: Diagnostics, each with a leading axis of tasks; without the adapted parameters.
        scores: Query accuracy, or mean squared error, of each task at the adapted weights or the posterior mean.
    """

    total: MetaParameters
    info: HypergradientInfo
    scores: Tensor


class HypergradientStep:
    """Computes the hypergradients of tasks.

    Args:
        model: Network and likelihood.
        algorithm: What adapts, and computes a hypergradient.
        tasks_per_chunk: Tasks computed at once by ``torch.func.vmap``. None: one if ``fast`` and the network is
            large or has convolutions, else all. 1: a plain loop.
        fast: False differentiates the network by ``torch.func`` and nothing else.
        programs: With ``fast``: whether programs are written. None: if the network has convolutions and shares no
            parameters between tasks; others gain less than writing takes.
        compile: Fuse the programs' elementwise operations by TorchInductor.
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
        self._has_programs = (
            fast
            and not model.shared_names
            and bool(max_examples_per_pass or (model.is_convolutional if programs is None else programs))
        )
        # Where plain weights are many, one operation for all of them saves less than joining their gradients costs.
        is_large_point = not (model.is_small or model.is_convolutional or algorithm.prior.is_distribution)
        self._is_flat = fast and (self._has_programs or not is_large_point)
        self._nll: Nll = FlatNll(model) if self._is_flat else model
        if self._has_programs:
            # A limit on examples is a limit on memory.
            num_kept = algorithm.num_curvature_points if max_examples_per_pass is None else 1
            self._nll = ProgramNll(model, num_kept=num_kept, compile=compile)
        if max_examples_per_pass is not None:
            self._nll = NllInParts(self._nll, max_examples_per_pass, model.network)
        if tasks_per_chunk is None and fast and not _tasks_at_once(model, algorithm):
            tasks_per_chunk = 1
        self._tasks_per_chunk = tasks_per_chunk
        without_scores = functools.partial(self._hypergradients_of, with_scores=False)
        self._hypergradients = replayed(self._hypergradients_of) if fast else self._hypergradients_of
        self._hypergradients_without_scores = replayed(without_scores) if fast else without_scores

    def __call__(
        self, meta: MetaParameters, episodes: Episode, noises: Sequence[TaskNoise], *, with_scores: bool = True
    ) -> TaskHypergradients:
        """Returns the hypergradients of some tasks.

        Args:
            meta: Meta-parameters.
            episodes: Tasks, with a leading axis, on the device of the meta-parameters.
            noises: Noise of each task.
            with_scores: False spares a pass of each query set; the scores are then NaN.

        Raises:
            DeviceLostError: If a kernel fails on a CUDA device.
        """
        compute = self._hypergradients if with_scores else self._hypergradients_without_scores
        return compute(meta, episodes, _stacked(noises))

    def _hypergradients_of(
        self, meta: MetaParameters, episodes: Episode, noises: TaskNoise, *, with_scores: bool = True
    ) -> TaskHypergradients:
        meta, noises = self._flat(meta), self._flat_task_noise(noises)
        family = self._algorithm.prior

        def of_task(episode: Episode, noise: TaskNoise) -> tuple[MetaParameters, HypergradientInfo, Tensor]:
            gradient, info = self._algorithm.hypergradient(self._nll, meta, episode, noise)
            score = torch.full_like(info.outer_loss, math.nan)
            if with_scores:
                weights = family.mean(info.inner_params)
                score = self._score(self._network_outputs(weights, meta.shared, episode.query.x), episode.query.y)
            return gradient, info._replace(inner_params={}), score

        chunks = self._in_chunks(of_task, episodes, noises)
        total: MetaParameters = functools.reduce(tree.add, (_sum_over_tasks(gradient) for gradient, _, _ in chunks))
        info, scores = tree.map(lambda *leaves: torch.cat(leaves), *((info, score) for _, info, score in chunks))
        if self._is_flat:
            prior = family.map(lambda flat: unflatten(flat, self._model.adapted), total.prior)
            total = MetaParameters(prior, total.shared)
        return TaskHypergradients(total, info, scores)

    def _in_chunks(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """Calls a function of one task for all of them, chunk by chunk; arguments and results have a leading axis."""

        def of_chunk(start: int) -> Any:
            selected = tree.map(lambda leaf: leaf[start : start + chunk], arguments)
            if len(tree.leaves(selected)[0]) > 1:
                return torch.func.vmap(function)(*selected)
            return tree.map(lambda leaf: leaf.unsqueeze(0), function(*tree.map(lambda leaf: leaf[0], selected)))

        num_tasks = len(tree.leaves(arguments)[0])
        chunk = self._tasks_per_chunk or num_tasks
        return [of_chunk(start) for start in range(0, num_tasks, chunk)]

    def _flat(self, meta: MetaParameters) -> MetaParameters:
        return MetaParameters(self._algorithm.prior.map(flatten, meta.prior), meta.shared) if self._is_flat else meta

    def _flat_noise(self, noise: Params) -> Params:
        # Leading axes: tasks and weight samples.
        return flatten(noise, num_axes=2) if self._is_flat else noise

    def _flat_task_noise(self, noises: TaskNoise) -> TaskNoise:
        return TaskNoise(*map(self._flat_noise, noises))

    def _network_outputs(self, weights: Params, shared: Params, x: Tensor) -> Tensor:
        if self._is_flat:
            weights = unflatten(weights, self._model.adapted)
        if self._has_programs and self._model.is_convolutional and self._tasks_per_chunk == 1:
            weights, x = tree.map(channels_last, (weights, x))
        return self._model.outputs(weights, shared, x)

    def _score(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return self._model.likelihood.step_score(outputs, targets)


def _tasks_at_once(model: Model, algorithm: Algorithm) -> bool:
    """Whether all tasks of a step are sooner done at once (measured on a CPU), though they hold memory at once."""
    num_weights = sum(leaf.numel() for leaf in model.adapted.values())
    unrolls = algorithm.estimator == "unrolled" and num_weights <= _MOST_AT_ONCE
    return model.is_small or (unrolls and not model.is_convolutional)


def _stacked(trees: Sequence[Any]) -> Any:
    return tree.map(lambda *leaves: torch.stack(leaves), *trees)


def _sum_over_tasks(gradient: MetaParameters) -> MetaParameters:
    return tree.map(lambda leaf: leaf.sum(0) if len(leaf) > 1 else leaf[0], gradient)
