"""Records and function shapes that every layer shares.

Records that pass through ``torch.func`` transforms are NamedTuples, so that they are pytrees without registration.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, Protocol, TypeAlias

import torch

Tensor: TypeAlias = torch.Tensor
Params: TypeAlias = dict[str, Tensor]
"""Parameters of a network by their dotted name, as in ``dict(module.named_parameters())``."""

PyTree: TypeAlias = Any
"""A tensor, or nested dicts, lists, tuples and NamedTuples of tensors."""

MatVec: TypeAlias = Callable[[PyTree], PyTree]
"""A linear map from a pytree to a pytree of the same structure."""

Loss: TypeAlias = Callable[[PyTree], Tensor]
"""A scalar function of a pytree."""


ClassScope: TypeAlias = Literal["shared", "per_task"]
"""Whether class labels mean the same in all tasks, or each task has classes of its own. A sampler may say which by an
attribute ``class_scope``."""

ColumnName: TypeAlias = str | int
"""A column of a table, as its owner calls it."""


class Batch(NamedTuple):
    """Inputs and targets of one set of examples.

    Attributes:
        x: Inputs, shape ``[..., num_examples, *input_shape]``.
        y: Class indices (int64) of shape ``[..., num_examples]``, or regression targets
            of shape ``[..., num_examples, num_outputs]``.
    """

    x: Tensor
    y: Tensor


class Episode(NamedTuple):
    """One task: a support set to adapt on and a query set to be judged on.

    Samplers return a batch of tasks as one Episode whose tensors carry a leading task axis.
    """

    support: Batch
    query: Batch


class LinearSolution(NamedTuple):
    """What a linear solver returns for ``A x = b``.

    Attributes:
        value: The solution, or the best iterate if there is none, in the structure of ``b``.
        residual_norm: Euclidean norm of ``b - A value`` (absolute), scalar tensor.
        num_steps: Number of matrix-vector products that the iteration used, scalar int64 tensor.
        converged: Whether ``value`` meets the tolerance, scalar bool tensor.
        negative_curvature: Whether a direction with ``p^T A p <= 0`` was met (only ``cg`` looks), scalar bool tensor.
    """

    value: PyTree
    residual_norm: Tensor
    num_steps: Tensor
    converged: Tensor
    negative_curvature: Tensor


class InnerSolution(NamedTuple):
    """What an inner solver returns.

    Attributes:
        value: The last iterate.
        grad_norm: Euclidean norm of the gradient of the inner loss at ``value``, scalar tensor, detached; NaN if it was
            not asked for.
        num_steps: Number of optimiser steps taken.
    """

    value: PyTree
    grad_norm: Tensor
    num_steps: int


class HypergradientInfo(NamedTuple):
    """How far a hypergradient can be trusted; returned beside every hypergradient.

    Attributes:
        outer_loss: Outer loss at the adapted parameters, in nats.
        inner_grad_norm: Euclidean norm of the inner loss's gradient there: 0 at a stationary point.
        linear_residual: ``||b - A u|| / ||b||`` of the linear system; 0 for estimators that solve none.
        linear_converged: Whether the linear solver met its tolerance; true for estimators that solve none.
        inner_params: The adapted inner parameters at which the outer loss was taken, detached.
    """

    outer_loss: Tensor
    inner_grad_norm: Tensor
    linear_residual: Tensor
    linear_converged: Tensor
    inner_params: PyTree


class TaskSampler(Protocol):
    """A distribution over tasks. Stateless: all randomness comes from the generator."""

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one input, for example ``(1, 28, 28)``."""
        ...

    @property
    def num_outputs(self) -> int:
        """Number of network outputs: ways for classification, target dimensions for regression."""
        ...

    @property
    def has_equal_sizes(self) -> bool:
        """Whether all draws have the same support and query sizes, so that tasks drawn one by one can be stacked."""
        ...

    def sample(self, num_tasks: int, *, generator: torch.Generator) -> Episode:
        """Draws tasks; every tensor of the result has a leading axis of length ``num_tasks``."""
        ...
