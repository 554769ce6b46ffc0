"""Predictions of several tasks of one shape at once, by heads on features: one pass of all their examples.

Where examples stand alone in the body of the network, those of several tasks may share a pass, and a head is solved for
all of them by the same operations (``torch.func.vmap``). What comes out is that of each task by itself up to rounding.
"""

import dataclasses
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch

from ibaml import tree
from ibaml.algorithms import MetaParameters
from ibaml.algorithms.base import TaskNoise
from ibaml.algorithms.heads.base import Head
from ibaml.algorithms.tail import FEATURES
from ibaml.fast import channels_last
from ibaml.posterior import FittedModel
from ibaml.types import Batch, Episode, Tensor

_MOST_EXAMPLES, _MOST_NUMBERS = 1024, 2**20
"""Examples, and numbers in their inputs, that share a pass: with more the intermediate results leave the cache."""


class Asked(NamedTuple):
    """A task of an evaluation.

    Attributes:
        fitted: Network, likelihood, algorithm and meta-parameters.
        number: Which of the tasks it is.
        task: The task, on the device.
        num_outputs: Its classes or outputs.
        foreign: Inputs that are predicted beside its queries, if there are any.
    """

    fitted: FittedModel
    number: int
    task: Episode
    num_outputs: int
    foreign: Tensor | None


def in_groups(tasks: Iterable[Asked]) -> Iterator[list[Asked]]:
    """Returns runs of tasks that ``outputs_together`` may take at once; single tasks where it may not.

    Args:
        tasks: The tasks, in their order, which are read as they are asked for.
    """

    def kind(asked: Asked) -> tuple[object, ...]:
        return id(asked.fitted), asked.num_outputs, *((leaf.shape, leaf.dtype) for leaf in tree.leaves(asked.task))

    group: list[Asked] = []
    for asked in tasks:
        if group and (kind(asked) != kind(group[0]) or len(group) == _most_at_once(asked)):
            yield group
            group = []
        group.append(asked)
    if group:
        yield group


def _most_at_once(asked: Asked) -> int:
    fitted, _, task, _, foreign = asked
    model = fitted.model
    if foreign is not None or not len(task.support.y):
        return 1
    shares_passes = fitted.max_examples_per_pass is None and model.examples_stand_alone
    if not (isinstance(fitted.algorithm, Head) and shares_passes and model.splits(task.query.x)):
        return 1
    num_examples, numbers = (sum(map(count, (task.support.x, task.query.x))) for count in (len, torch.numel))
    return max(1, min(_MOST_EXAMPLES // num_examples, _MOST_NUMBERS // max(1, numbers)))


def outputs_together(group: list[Asked]) -> list[dict[str, Tensor]]:
    """Returns what the prediction of each task's query set is made of; see ``Algorithm.outputs``.

    Args:
        group: Tasks of one shape, with support sets, from ``in_groups``.

    Cost:
        One pass of all examples through the network, and a head for each task.
    """
    fitted = group[0].fitted
    model, head, meta = fitted.model, fitted.algorithm, fitted.meta
    support, query = tree.map(lambda *leaves: torch.stack(leaves), *(asked.task for asked in group))
    x = torch.cat([support.x, query.x], 1)
    known, new = torch.arange(x.shape[1], device=x.device).split([support.y.shape[1], query.y.shape[1]])
    tail = dataclasses.replace(model.on_features, num_outputs=group[0].num_outputs)

    def of_task(features: Tensor, targets: Tensor) -> dict[str, Tensor]:
        shared = {**kept, FEATURES: features}
        found = head.adapt(tail, MetaParameters(meta.prior, shared), Batch(known, targets), TaskNoise({}, {}))
        return head.outputs(tail, shared, found.value, new, {})

    with torch.no_grad():
        features = model.features(meta.shared, channels_last(x.flatten(0, 1)))
        kept = model.with_features(meta.shared, features[:0])
        outputs = torch.func.vmap(of_task)(features.unflatten(0, x.shape[:2]), support.y)
    return [tree.map(lambda leaf, place=place: leaf[place], outputs) for place in range(len(group))]
