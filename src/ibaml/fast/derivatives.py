"""Losses whose value, gradient and Hessian-vector products are computed by programs, for ``torch.autograd``.

``value_and_gradient`` makes a loss a function like any other under ``torch.func``. Its forward pass computes the
gradient as well, which the backward pass of the value multiplies by a scalar; the backward pass of the gradient runs
the program of the product.
"""

import logging
from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeAlias, cast

import torch

from ibaml.fast.programs import Loss, Program, UntraceableError, trace_gradient, trace_product
from ibaml.types import Tensor

_logger = logging.getLogger(__name__)

Leaves: TypeAlias = Callable[[], Sequence[Tensor]]
"""Where curvature is wanted, computed if it is needed at all."""


class Point:
    """Where curvature is wanted: the residuals, once they have been computed, and the loss whose product takes them.

    The residuals of a mean over weight samples are points themselves.
    """

    residuals: list[Tensor] | None = None
    owner: "TwiceDifferentiable | None" = None
    samples: "Sequence[Point]" = ()


class TwiceDifferentiable(Protocol):
    """A loss of some tensors, the leaves, with derivatives in the first ``num_point`` of them."""

    num_point: int

    def mapped(self, size: int) -> "TwiceDifferentiable":
        """Returns the losses of ``size`` members at once; every tensor has one more leading axis."""
        ...

    def gradient(self, leaves: Sequence[Tensor]) -> list[Tensor]:
        """Returns the value and the gradient."""
        ...

    def linearize(self, point: Point, leaves: Sequence[Tensor]) -> list[Tensor]:
        """Returns value and gradient, and makes the residuals the point's."""
        ...

    def product(self, point: Point, leaves: Leaves, direction: Sequence[Tensor]) -> list[Tensor]:
        """Returns the product of the Hessian at a point with a direction."""
        ...


def value_and_gradient(loss: TwiceDifferentiable, leaves: Sequence[Tensor], *, twice: bool) -> list[Tensor]:
    """Returns the value of a loss, differentiable twice, and its gradient, differentiable once.

    Args:
        loss: The loss.
        leaves: What it depends on.
        twice: Announces that the gradient will be differentiated, which spares one pass of the first product.

    Raises:
        UntraceableError: If the loss cannot be written as a program.
    """
    return list(cast(Sequence[Tensor], _ValueAndGradient.apply(loss, Point(), twice, *leaves)))


class TracedLoss:
    """A loss for tensors of given shapes, with programs that are written when they are first needed.

    Args:
        losses: The loss in the memory format that its programs shall have, and in that of ``torch.func.vmap``, which
            knows but one.
        num_point: Leaves that are differentiated.
        keep: Called before the residuals of a point are computed.
        finish: Compiles a program for example arguments, or returns it as it is.
        programs: Where programs are kept, and found if they have been written before.
        axes: Sizes of the leading axes that every tensor has.
    """

    def __init__(
        self,
        losses: tuple[Loss, Loss],
        num_point: int,
        keep: Callable[[Point], None],
        finish: Callable[[Program, Sequence[Tensor]], Program],
        programs: dict[Any, Any],
        axes: tuple[int, ...] = (),
    ) -> None:
        self.num_point = num_point
        self._losses = losses
        self._loss = losses[1 if axes else 0]
        self._keep = keep
        self._finish = finish
        self._programs = programs
        self._axes = axes
        self._mapped: dict[int, TracedLoss] = {}

    def mapped(self, size: int) -> "TracedLoss":
        """See ``TwiceDifferentiable``."""
        if size not in self._mapped:
            shared = (self._losses, self.num_point, self._keep, self._finish, self._programs)
            self._mapped[size] = TracedLoss(*shared, (*self._axes, size))
        return self._mapped[size]

    def gradient(self, leaves: Sequence[Tensor]) -> list[Tensor]:
        """See ``TwiceDifferentiable``."""
        key = ("gradient", self._axes)
        if key not in self._programs:
            program = trace_gradient(self._loss, *self._split(leaves), num_axes=len(self._axes))
            self._programs[key] = self._finish(program, leaves)
        return self._programs[key](*leaves)

    def linearize(self, point: Point, leaves: Sequence[Tensor]) -> list[Tensor]:
        """See ``TwiceDifferentiable``."""
        linearize, _ = self._product_programs(leaves)
        self._keep(point)
        results = linearize(*leaves)
        point.owner, point.residuals = self, results[1 + self.num_point :]
        return results[: 1 + self.num_point]

    def product(self, point: Point, leaves: Leaves, direction: Sequence[Tensor]) -> list[Tensor]:
        """See ``TwiceDifferentiable``."""
        # Residuals without an axis of members are of no use for directions that have one.
        if point.residuals is None or point.owner is not self:
            self.linearize(point, leaves())
        assert point.residuals is not None
        return self._product_programs(leaves)[1](*point.residuals, *direction)

    def _product_programs(self, leaves: Sequence[Tensor] | Leaves) -> tuple[Program, Program]:
        key = ("product", self._axes)
        if key not in self._programs:
            leaves = leaves() if callable(leaves) else leaves
            programs = self._trace_product(leaves)
            if programs is not None:
                linearize = self._finish(programs[0], leaves)
                residuals = linearize(*leaves)[1 + self.num_point :]
                programs = linearize, self._finish(programs[1], [*residuals, *leaves[: self.num_point]])
            self._programs[key] = programs
        return self._programs[key] or (lambda *leaves: [*self.gradient(leaves), *leaves], self._plain_product)

    def _trace_product(self, leaves: Sequence[Tensor]) -> tuple[Program, Program] | None:
        reason = ""
        # torch 2.13: the derivative of group_norm has a tangent for contiguous tensors only.
        for loss in dict.fromkeys((self._loss, self._losses[1])):
            try:
                return trace_product(loss, *self._split(leaves), num_axes=len(self._axes))
            except UntraceableError as error:
                reason = str(error).splitlines()[0]
        self.gradient(leaves)  # Raises if there is no program for it either.
        _logger.warning("Hessian-vector products are computed step by step, which is slower: %s.", reason)
        return None

    def _plain_product(self, *tensors: Tensor) -> list[Tensor]:
        """Returns the product from leaves and direction by reverse over reverse, for operations without a tangent."""
        leaves, direction = tensors[: -self.num_point], tensors[-self.num_point :]
        num_leaves = len(leaves)

        def product(*values: Tensor) -> list[Tensor]:
            point, constants = self._split(values[:num_leaves])
            pullback = torch.func.vjp(lambda at: torch.func.grad(self._loss)(at, constants), point)[1]
            return pullback(list(values[num_leaves:]))[0]

        for _ in self._axes:
            product = torch.func.vmap(product)
        return product(*leaves, *direction)

    def _split(self, leaves: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        return list(leaves[: self.num_point]), list(leaves[self.num_point :])


class _ValueAndGradient(torch.autograd.Function):
    """``(loss, point, twice, *leaves) -> (value, *gradient)``: differentiating the value needs no computation."""

    @staticmethod
    def forward(loss: TwiceDifferentiable, point: Point, twice: bool, *leaves: Tensor) -> tuple[Tensor, ...]:
        return tuple(loss.linearize(point, leaves) if twice else loss.gradient(leaves))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.loss, ctx.point, _, *leaves = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*leaves, *output[1:])

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        loss: TwiceDifferentiable = ctx.loss
        num_leaves = len(ctx.saved_tensors) - loss.num_point
        leaves, gradient = ctx.saved_tensors[:num_leaves], ctx.saved_tensors[num_leaves:]
        by_value, by_gradient = gradients[0], gradients[1:]
        result: list[Tensor | None] = [None] * loss.num_point
        if by_value is not None:
            # One value for each member of a batch, if the loss is mapped.
            result = [by_value.reshape(*by_value.shape, *[1] * (each.ndim - by_value.ndim)) * each for each in gradient]
        if any(each is not None for each in by_gradient):
            direction = [
                torch.zeros_like(leaf) if each is None else each
                for leaf, each in zip(leaves, by_gradient, strict=False)
            ]
            product = _Product.apply(loss, ctx.point, *leaves, *direction)
            result = [b if a is None else a + b for a, b in zip(result, product, strict=True)]
        return (None, None, None, *result, *[None] * (num_leaves - loss.num_point))

    @staticmethod
    def vmap(info: Any, in_dims: Any, *arguments: Any) -> Any:
        loss, point, twice, *leaves = arguments
        mapped = loss.mapped(info.batch_size)
        output = _ValueAndGradient.apply(mapped, point, twice, *_with_axis(info.batch_size, in_dims[3:], leaves))
        return output, (0,) * len(output)


class _Product(torch.autograd.Function):
    """``(loss, point, *leaves, *direction) -> Hessian at the point times direction``."""

    @staticmethod
    def forward(loss: TwiceDifferentiable, point: Point, *tensors: Tensor) -> tuple[Tensor, ...]:
        num_leaves = len(tensors) - loss.num_point
        return tuple(loss.product(point, lambda: tensors[:num_leaves], tensors[num_leaves:]))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        raise RuntimeError(
            "a traced nll has two derivatives, and the third was asked for: switch the programs off with fast=False."
        )

    @staticmethod
    def vmap(info: Any, in_dims: Any, *arguments: Any) -> Any:
        loss, point, *tensors = arguments
        mapped = loss.mapped(info.batch_size)
        output = _Product.apply(mapped, point, *_with_axis(info.batch_size, in_dims[2:], tensors))
        return output, (0,) * len(output)


def _with_axis(size: int, axes: Sequence[int | None], tensors: Sequence[Tensor]) -> list[Tensor]:
    """Moves the axis of batch members to the front; a tensor without one counts for every member."""
    return [
        tensor.expand(size, *tensor.shape) if axis is None else tensor.movedim(axis, 0)
        for tensor, axis in zip(tensors, axes, strict=True)
    ]
