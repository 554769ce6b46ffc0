"""The hypergradients of one step's tasks: the part of training that costs, computed the fastest way that is known.

Without any setting:

- a body that no task adapts is passed once, by all tasks together if examples stand alone, and differentiated once;
- adapted parameters are one flat vector, so that a solver's step is one operation;
- gradients and Hessian-vector products of networks with convolutions are programs (``ibaml.fast``);
- small networks without convolutions compute all tasks at once by ``torch.func.vmap``, others task after task;
- on CUDA the whole step is captured once as a CUDA graph and replayed.

``fast=False`` switches all of it off. Both ways agree up to rounding, which the tests check for every algorithm.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from ibaml import tree
from ibaml.algorithms import Algorithm, MetaParameters, TaskNoise
from ibaml.algorithms.heads.base import Head, solved_exactly
from ibaml.algorithms.model import Model
from ibaml.algorithms.nll import Nll
from ibaml.algorithms.tail import FEATURES
from ibaml.fast import FlatNll, NllInParts, ProgramNll, channels_last, flatten, replayed, unflatten
from ibaml.train.settings import Precision
from ibaml.types import Batch, Episode, HypergradientInfo, Params, Tensor

NUM_CALLS_THAT_PAY = 50
"""Steps of training, or tasks of an evaluation, from which on writing programs is worth its time."""


class TaskHypergradients(NamedTuple):
    """Hypergradients of several tasks.

    Attributes:
        total: Sum over the tasks.
        info: Diagnostics, each with a leading axis of tasks; without the adapted parameters.
        scores: Query accuracy, or mean squared error, of each task at the adapted weights or the posterior mean.
        moved: By how much the tasks move running averages among the shared parameters, times the number of tasks.
    """

    total: MetaParameters
    info: HypergradientInfo
    scores: Tensor
    moved: Params


class HypergradientStep:
    """Computes the hypergradients of tasks.

    Args:
        model: Network and likelihood.
        algorithm: What adapts, and computes a hypergradient.
        tasks_per_chunk: Tasks computed at once by ``torch.func.vmap``. None: one if ``fast`` and the network is
            large or has convolutions, else all. 1: a plain loop.
        fast: False differentiates the network by ``torch.func`` and nothing else, features of a head aside.
        programs: With ``fast``: whether programs are written. None: if the network has convolutions and shares no
            parameters between tasks; others gain less than writing takes.
        compile: Fuse the programs' elementwise operations by TorchInductor.
        max_examples_per_pass: With ``fast``: pass at most so many examples through the network at a time and add up
            gradients and products, so that a support or query set may be larger than memory. The predictive nll as
            outer loss takes its query set at once. None: no limit.
        precision: What the features of a head are computed in; see ``TrainerSettings``.

    Raises:
        ValueError: If ``max_examples_per_pass`` is given without ``fast``, is below 1, or the network has batch
            normalisation, under which examples do not stand alone; if a lower ``precision`` is asked for another
            algorithm than a head.

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
        precision: Precision = "float32",
    ) -> None:
        if precision != "float32" and not algorithm.uses_features:
            raise ValueError(
                f"precision={precision!r} is for heads, whose features alone are computed in it; {algorithm.name} "
                "differentiates the whole network, twice, and needs precision='float32'."
            )
        if max_examples_per_pass is not None and not fast:
            raise ValueError("max_examples_per_pass needs fast=True: without programs every part keeps its graph.")
        if max_examples_per_pass is not None and (algorithm.uses_features or model.statistics):
            raise ValueError(
                "max_examples_per_pass does not apply to heads and to running statistics, where the features of all "
                "examples of a step are computed at once: take fewer tasks_per_step."
            )
        self._model = model
        self._algorithm = algorithm
        self._precision: Precision = precision
        self._once = algorithm.uses_features or bool(model.statistics) or (fast and max_examples_per_pass is None)
        self._make = functools.partial(
            _Tasks,
            algorithm=algorithm,
            tasks_per_chunk=tasks_per_chunk,
            fast=fast,
            programs=programs,
            compile=compile,
            max_examples_per_pass=max_examples_per_pass,
        )
        self._replayed = replayed if fast else lambda function: function
        # Before the first call, so that settings are refused early.
        self._whole = None if algorithm.uses_features else self._make(model)
        self._functions: dict[tuple[int, bool, bool], Callable[..., TaskHypergradients]] = {}

    def __call__(
        self, meta: MetaParameters, episodes: Episode, noises: Sequence[TaskNoise], *, with_scores: bool = True
    ) -> TaskHypergradients:
        """Returns the hypergradients of some tasks.

        Args:
            meta: Meta-parameters.
            episodes: Tasks, with a leading axis, on the device of the meta-parameters.
            noises: Noise of each task.
            with_scores: False spares a pass of each query set, and the norm of the inner gradient where nothing else
                needs that gradient; what is spared is NaN.

        Raises:
            DeviceLostError: If a kernel fails on a CUDA device.
        """
        noise = _stacked(noises)
        groups = self._by_number_of_outputs(episodes)
        if len(groups) == 1:
            return self._function(next(iter(groups)), episodes, with_scores)(meta, episodes, noise)
        found = [
            self._function(number, episodes, with_scores)(
                meta, *tree.map(lambda leaf, i=index: leaf[i], (episodes, noise))
            )
            for number, index in groups.items()
        ]
        order = torch.cat(list(groups.values())).argsort()
        info, scores = tree.map(lambda *leaves: torch.cat(leaves)[order], *((one.info, one.scores) for one in found))
        total, moved = (
            functools.reduce(tree.add, parts) for parts in zip(*((one.total, one.moved) for one in found), strict=True)
        )
        return TaskHypergradients(total, info, scores, moved)

    def _by_number_of_outputs(self, episodes: Episode) -> dict[int, Tensor]:
        """Returns the positions of the tasks with each number of classes, which shapes what a head computes."""
        num_tasks = len(episodes.support.y)
        if not self._algorithm.serves_any_number_of_outputs:
            return {self._model.num_outputs: torch.arange(num_tasks)}
        targets = (part.y for part in episodes)
        numbers = [self._model.of_task(self._algorithm, *of_task).num_outputs for of_task in zip(*targets, strict=True)]
        return {
            number: torch.tensor([position for position, own in enumerate(numbers) if own == number])
            for number in sorted(set(numbers))
        }

    def _function(self, num_outputs: int, episodes: Episode, with_scores: bool) -> Callable[..., TaskHypergradients]:
        once = self._once and self._model.splits(episodes.support.x[0])
        key = (num_outputs, once, with_scores)
        if key not in self._functions:
            model = dataclasses.replace(self._model, num_outputs=num_outputs)
            if once:
                function = functools.partial(self._with_features_once, model, self._make(model.on_features))
            else:
                assert self._whole is not None, f"{self._algorithm.name} needs a network with features"
                function = self._whole
            self._functions[key] = self._replayed(functools.partial(function, with_scores=with_scores))
        return self._functions[key]

    def _with_features_once(
        self,
        model: Model,
        tail: "_Tasks",
        meta: MetaParameters,
        episodes: Episode,
        noises: TaskNoise,
        *,
        with_scores: bool,
    ) -> TaskHypergradients:
        """Passes all examples through the body once, and back once, with the tail's tasks in between."""
        of_tail = model.with_features(meta.shared, torch.empty(0))
        of_body = {
            name: leaf.detach().requires_grad_()
            for name, leaf in meta.shared.items()
            if name not in of_tail and name not in model.statistics
        }
        with torch.enable_grad():
            with _computing_in(self._precision, episodes.query.x.device):
                features, averages = _features(model, {**meta.shared, **of_body}, episodes)
            # Heads solve in what the weights are stored in, at least.
            features = features.to(tree.leaves(meta)[0].dtype)
        num_support = episodes.support.y.shape[1]
        positions = torch.arange(features.shape[1], device=features.device).expand(features.shape[:2])
        tasks = Episode(
            Batch(positions[:, :num_support], episodes.support.y), Batch(positions[:, num_support:], episodes.query.y)
        )
        del of_tail[FEATURES]
        found, of_features = tail.compute(
            MetaParameters(meta.prior, of_tail), tasks, noises, {FEATURES: features.detach()}, with_scores=with_scores
        )
        back: Sequence[Tensor | None] = ()
        if of_body:
            leaves = tuple(of_body.values())
            back = torch.autograd.grad(features, leaves, of_features[FEATURES], materialize_grads=True)
        still = {name: torch.zeros_like(value) for name, value in averages.items()}
        shared = {**found.total.shared, **dict(zip(of_body, back, strict=True)), **still}
        total = MetaParameters(found.total.prior, {name: shared[name] for name in meta.shared})
        moved = {name: len(positions) * (value - meta.shared[name]) for name, value in averages.items()}
        return found._replace(total=total, moved=moved)


class _Tasks:
    """Computes the hypergradients of tasks by passes of a model; arguments as of ``HypergradientStep``."""

    def __init__(
        self,
        model: Model,
        *,
        algorithm: Algorithm,
        tasks_per_chunk: int | None,
        fast: bool,
        programs: bool | None,
        compile: bool,  # noqa: A002 - torch's word
        max_examples_per_pass: int | None,
    ) -> None:
        self._model = model
        self._algorithm = algorithm
        self._has_programs = (
            fast
            and not algorithm.uses_features
            and not model.shared_names
            and bool(max_examples_per_pass or (model.is_convolutional if programs is None else programs))
        )
        # Where plain weights are many, one operation for all of them saves less than joining their gradients costs.
        is_large_point = not (model.is_small or model.is_convolutional or algorithm.is_bayesian)
        self._is_flat = fast and not algorithm.uses_features and (self._has_programs or not is_large_point)
        self._nll: Nll = FlatNll(model) if self._is_flat else model
        if self._has_programs:
            # A limit on examples is a limit on memory.
            num_kept = algorithm.num_curvature_points if max_examples_per_pass is None else 1
            self._nll = ProgramNll(model, num_kept=num_kept, compile=compile)
        if max_examples_per_pass is not None:
            self._nll = NllInParts(self._nll, max_examples_per_pass, model.network)
        if tasks_per_chunk is None and fast and not model.is_small:
            tasks_per_chunk = 1
        self._tasks_per_chunk = tasks_per_chunk

    def __call__(
        self, meta: MetaParameters, episodes: Episode, noises: TaskNoise, *, with_scores: bool
    ) -> TaskHypergradients:
        """Returns the hypergradients of tasks whose shared parameters are the same."""
        return self.compute(meta, episodes, noises, {}, with_scores=with_scores)[0]

    def compute(
        self, meta: MetaParameters, episodes: Episode, noises: TaskNoise, own: Params, *, with_scores: bool
    ) -> tuple[TaskHypergradients, Params]:
        """Returns the hypergradients of tasks, and those in shared parameters that each task has for itself.

        Args:
            meta: Meta-parameters of all tasks.
            episodes: Tasks, with a leading axis.
            noises: Noise, likewise.
            own: Further shared parameters, likewise.
            with_scores: Whether to compute the scores.
        """
        if isinstance(self._algorithm, Head) and self._tasks_per_chunk is None:
            return self._of_head(self._algorithm, meta, episodes, own, with_scores=with_scores)
        meta, noises = self._flat(meta), self._flat_task_noise(noises)

        def of_task(
            episode: Episode, noise: TaskNoise, own: Params
        ) -> tuple[MetaParameters, HypergradientInfo, Tensor, Params]:
            shared = {**meta.shared, **own}
            gradient, info = self._algorithm.hypergradient(
                self._nll, MetaParameters(meta.prior, shared), episode, noise, with_grad_norm=with_scores
            )
            score = torch.full_like(info.outer_loss, math.nan)
            if with_scores:
                found = self._algorithm.mean_outputs(self, shared, info.inner_params, episode.query.x)
                score = self._model.likelihood.step_score(found, episode.query.y)
            of_own = {name: gradient.shared.pop(name) for name in own}
            return gradient, info._replace(inner_params={}), score, of_own

        chunks = self._in_chunks(of_task, episodes, noises, own)
        total: MetaParameters = functools.reduce(tree.add, (_sum_over_tasks(gradient) for gradient, *_ in chunks))
        info, scores, of_own = tree.map(lambda *leaves: torch.cat(leaves), *(rest for _, *rest in chunks))
        if self._is_flat:
            prior = self._algorithm.map_weights(lambda flat: unflatten(flat, self._model.adapted), total.prior)
            total = MetaParameters(prior, total.shared)
        return TaskHypergradients(total, info, scores, {}), of_own

    def _of_head(
        self, head: Head, meta: MetaParameters, episodes: Episode, own: Params, *, with_scores: bool
    ) -> tuple[TaskHypergradients, Params]:
        """Does what ``compute`` does by one derivative of the sum over tasks: a gradient for each is never needed."""
        meta, own = tree.map(lambda leaf: leaf.detach().requires_grad_(), (meta, own))

        def of_task(episode: Episode, own: Params) -> tuple[Tensor, Tensor, Tensor]:
            shared = {**meta.shared, **own}
            loss, (posterior, residual) = head.objective(self._nll, MetaParameters(meta.prior, shared), episode)
            score = torch.full_like(loss, math.nan)
            if with_scores:
                found = head.mean_outputs(self, shared, tree.detach(posterior), episode.query.x)
                score = self._model.likelihood.step_score(found, episode.query.y)
            return loss, residual, score

        with torch.enable_grad():
            losses, residuals, scores = torch.func.vmap(of_task)(episodes, own)
        leaves, of_leaves = tree.flatten((meta, own))
        total, of_own = of_leaves(torch.autograd.grad(losses.sum(), leaves, materialize_grads=True))
        info = solved_exactly(losses.detach(), residuals, {})
        return TaskHypergradients(total, info, scores.detach(), {}), of_own

    def features(self, shared: Params, x: Tensor) -> Tensor:
        """See ``ibaml.algorithms.base.Network``."""
        return self._model.features(shared, x)

    def outputs(self, adapted: Params, shared: Params, x: Tensor) -> Tensor:
        """See ``ibaml.algorithms.base.Network``; of flat weights if they are."""
        if self._is_flat:
            adapted = unflatten(adapted, self._model.adapted)
        if self._has_programs and self._model.is_convolutional and self._tasks_per_chunk == 1:
            adapted, x = tree.map(channels_last, (adapted, x))
        return self._model.outputs(adapted, shared, x)

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
        return MetaParameters(self._algorithm.map_weights(flatten, meta.prior), meta.shared) if self._is_flat else meta

    def _flat_noise(self, noise: Params) -> Params:
        # Leading axes: tasks and weight samples.
        return flatten(noise, num_axes=2) if self._is_flat else noise

    def _flat_task_noise(self, noises: TaskNoise) -> TaskNoise:
        return TaskNoise(*map(self._flat_noise, noises))


def _computing_in(precision: Precision, device: torch.device) -> torch.autocast:
    """Returns a context in which convolutions and matrix products round their arguments to a precision.

    Without a cache of rounded weights, which a captured graph would keep from the step that it was captured in.
    """
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bfloat16", cache_enabled=False)


def _features(model: Model, shared: Params, episodes: Episode) -> tuple[Tensor, Params]:
    """Returns the features of support and query of each task, ``[num_tasks, num_support + num_query, ...]``.

    And the running averages that they move.
    """
    if model.examples_stand_alone:
        x = torch.cat([episodes.support.x, episodes.query.x], dim=1)
        features, averages = model.training_features(shared, channels_last(x.flatten(0, 1)))
        return features.unflatten(0, x.shape[:2]), averages
    of_tasks = zip(episodes.support.x, episodes.query.x, strict=True)
    return torch.stack([torch.cat([model.features(shared, x) for x in of_task]) for of_task in of_tasks]), {}


def _stacked(trees: Sequence[Any]) -> Any:
    return tree.map(lambda *leaves: torch.stack(leaves), *trees)


def _sum_over_tasks(gradient: MetaParameters) -> MetaParameters:
    return tree.map(lambda leaf: leaf.sum(0) if len(leaf) > 1 else leaf[0], gradient)
