"""Empirical Bayes on whole tasks: the prior of a head on given features, by the marginal likelihood of all their rows.

A head on given features has few meta-parameters ``theta``: its prior, and what the likelihood learns. Their estimate

    argmin_theta sum_t -log p(y_t | X_t, theta) + sum_i ((theta_i - theta0_i) / s_i)^2 / 2

needs no split into support and query, and no learning rate: L-BFGS takes some dozens of passes through all tasks, where
stochastic gradients take a hundred steps of sixteen and end less near. The marginal likelihood is the head's, by
Laplace's approximation unless it is exact (two-stage estimates of generalised linear mixed models are a relative). The
weak prior about where training would start decides what the tasks leave open.

Tasks are filled up to one size with rows of zeros, the constant too. Such a row says nothing of the weights: its share
of the marginal likelihood is that of a task of one row of zeros, which is subtracted.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch

from ibaml import tree
from ibaml.algorithms import MetaParameters
from ibaml.algorithms.model import Model
from ibaml.priors import ColumnPrior
from ibaml.train.hierarchical import minimise, wider
from ibaml.types import Batch, Params, Tensor

_MOST_ENTRIES = 2**16
"""Rows of all tasks, filled up to those of the largest one: hyper-parameters are few, and some rows tell them."""
_LEAST_ROWS = 32
_DEVIATION, _DEVIATION_OF_WIDTHS = 5.0, 2.0
"""Of the weak prior: of means and of what the likelihood learns, and of logarithms and relations of widths."""


@runtime_checkable
class HasMarginal(Protocol):
    """A head with a prior over columns of weights and a marginal likelihood."""

    @property
    def prior(self) -> ColumnPrior:
        """Family of the prior."""
        ...

    def parameter_groups(self, prior: Any, /) -> tuple[list[Tensor], list[Tensor]]:
        """Returns the tensors of a prior that say where, and those that say how wide."""
        ...

    def marginal_nll(self, prior: Any, shared: Params, examples: Batch, num_outputs: int, /) -> Tensor:
        """Returns minus the log marginal likelihood of the examples of a task, a scalar.

        Args:
            prior: Meta-parameters of the head.
            shared: Holds the likelihood's parameters.
            examples: Inputs ``z``, a constant 1 as the last, and targets.
            num_outputs: Classes, or outputs of the network.
        """
        ...


class WholeTasks(NamedTuple):
    """All rows of some tasks, filled up to one size.

    Attributes:
        x: Inputs and a constant 1, zeros in rows that do not count, ``[num_tasks, num_rows, num_inputs + 1]``.
        y: Targets, zero there, ``[num_tasks, num_rows]`` (classes) or ``[num_tasks, num_rows, num_targets]``.
        num_empty: Rows that do not count.
    """

    x: Tensor
    y: Tensor
    num_empty: int


def in_whole(tasks: Sequence[Batch], *, generator: torch.Generator) -> WholeTasks:
    """Returns tasks of unequal size as one record, of large ones some rows at random; inputs are flattened.

    Args:
        tasks: Inputs ``[num_rows, *input_shape]`` and targets of each.
        generator: CPU generator.
    """
    most = max(_LEAST_ROWS, _MOST_ENTRIES // len(tasks))
    rows = [torch.randperm(len(task.y), generator=generator)[:most] for task in tasks]
    inputs = [task.x[index].flatten(1).double() for task, index in zip(tasks, rows, strict=True)]
    inputs = [torch.cat([x, torch.ones_like(x[:, :1])], -1) for x in inputs]
    targets = [task.y[index] for task, index in zip(tasks, rows, strict=True)]
    x, y = (torch.nn.utils.rnn.pad_sequence(part, batch_first=True) for part in (inputs, targets))
    return WholeTasks(x, y.double() if y.is_floating_point() else y, x.shape[0] * x.shape[1] - sum(map(len, targets)))


class Estimated(NamedTuple):
    """What the tasks tell of a prior.

    Attributes:
        meta: Meta-parameters, in the dtypes they had.
        num_steps: Steps of L-BFGS.
        is_late: Whether the time ended it.
    """

    meta: MetaParameters
    num_steps: int
    is_late: bool


def estimate_prior(
    model: Model,
    head: HasMarginal,
    tasks: WholeTasks,
    *,
    start: MetaParameters,
    middle: MetaParameters,
    most_steps: int,
    deadline: float | None = None,
) -> Estimated:
    """Estimates the prior and the likelihood's parameters of a head whose features are the inputs.

    Args:
        model: Its likelihood and number of outputs.
        head: The head.
        tasks: All their rows.
        start: Where to start.
        middle: The middle of the weak prior; which has the tensors of ``start``.
        most_steps: Number of steps at the most.
        deadline: When to stop, by ``time.monotonic``. None: no limit.

    Cost:
        Some dozens of times the marginal likelihood of all tasks and its derivative.
    """
    if hasattr(head, "likelihood"):
        head = dataclasses.replace(head, likelihood=model.likelihood)  # pyright: ignore[reportArgumentType, reportCallIssue]
    num_outputs = model.num_outputs
    widths = {id(leaf) for leaf in head.parameter_groups(middle.prior)[1]}
    deviations = [_DEVIATION_OF_WIDTHS if id(leaf) in widths else _DEVIATION for leaf in tree.leaves(middle)]
    middles, firsts = ([leaf.cpu().double() for leaf in tree.leaves(meta)] for meta in (middle, start))
    names, as_meta = [str(index) for index in range(len(firsts))], tree.flatten(start)[1]
    empty = Batch(torch.zeros_like(tasks.x[0, :1]), torch.zeros_like(tasks.y[0, :1]))

    def loss(p: Params) -> Tensor:
        values = [p[name] for name in names]
        meta = as_meta(values)

        def of_task(x: Tensor, y: Tensor) -> Tensor:
            return head.marginal_nll(meta.prior, meta.shared, Batch(x, y), num_outputs)

        nll = torch.func.vmap(of_task)(tasks.x, tasks.y).sum() - tasks.num_empty * of_task(*empty)
        terms = zip(values, middles, deviations, strict=True)
        return nll + 0.5 * torch.stack([(((value - at) / by) ** 2).sum() for value, at, by in terms]).sum()

    found = minimise(loss, dict(zip(names, firsts, strict=True)), most_steps=most_steps, deadline=deadline)
    meta: MetaParameters = as_meta([found.parameters[name] for name in names])
    prior = widened(head.prior, meta.prior, num_tasks=len(tasks.x))
    meta = tree.map(lambda leaf, like: leaf.to(like), MetaParameters(prior, meta.shared), start)
    return Estimated(meta, found.num_steps, found.is_late)


def widened(family: ColumnPrior, prior: Any, *, num_tasks: int) -> Any:
    """Returns the prior of a new task's weights, which is wider than their spread among a few tasks.

    Their mean is uncertain by ``1 / num_tasks`` of the covariance at least, and that has ``num_tasks - 1`` degrees of
    freedom; see ``wider``.

    Args:
        family: Family of the prior; one without a closed form for moments leaves it as it is.
        prior: Its member, float64.
        num_tasks: Tasks that it was estimated from.
    """
    mean = family.mean(prior)
    identity = torch.eye(mean.shape[-1], dtype=mean.dtype, device=mean.device)
    factor = family.whiten(prior, identity)
    covariance = (wider(num_tasks - 1) + 1 / num_tasks) * factor @ factor.mT
    found = family.from_moments(mean, covariance, like=prior)
    return prior if found is None else found
