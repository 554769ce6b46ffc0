"""A mean nll with programs for its derivatives, to be used like any other function under ``torch.func``.

``TracedNll.mean`` is differentiable twice. Its value and first derivative come from one program, run once: the forward
pass computes the gradient, which the backward pass multiplies by a scalar. A product with its second derivative runs
the programs of ``trace_product``. The residuals of a point, which the forward pass computes along with the gradient
where a second derivative is announced, are kept for further products with it, for so many points at a time as were
asked for, and computed anew for older ones. Memory therefore grows neither with the number of inner steps that are
unrolled nor with that of weight samples beyond that number.
"""

import logging
import weakref
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, cast

import torch
from torch import nn

from ibaml.model import Model
from ibaml.traced.program import Loss, Program, UntraceableError, compiled, trace_gradient, trace_product
from ibaml.types import Batch, Params, Tensor

_logger = logging.getLogger(__name__)


FLAT = "flat"
"""The one name of adapted parameters that have been flattened."""


def flatten(parameters: Params, *, num_axes: int = 0) -> Params:
    """Concatenates parameters to one vector: solvers then do one operation where they would do one for each parameter.

    Args:
        parameters: Tensors by name.
        num_axes: Leading axes that all of them have in common (weight samples), which are kept.

    Returns:
        The vector, under the name ``"flat"``; no parameters stay none.
    """
    if not parameters:
        return {}
    return {FLAT: torch.cat([value.reshape(*value.shape[:num_axes], -1) for value in parameters.values()], dim=-1)}


def unflatten(flat: Params, like: Params) -> Params:
    """Returns the parameters that ``flatten`` concatenated; names and shapes are those of ``like``."""
    pieces = flat[FLAT].split([value.numel() for value in like.values()])
    return {name: piece.view(value.shape) for piece, (name, value) in zip(pieces, like.items(), strict=True)}


class TracedNll:
    """The nll of a model as a function of flat adapted parameters; its mean over examples is computed by programs.

    The programs are written at the first use for shapes, dtypes and devices, and kept. A network that cannot be traced
    (control flow that depends on values), or one that shares parameters of its own between tasks, is differentiated by
    ``torch.func`` as if there were no programs; the former is logged.

    Args:
        model: Network and likelihood.
        num_kept: Points whose residuals are kept at a time; at least the number of weight samples avoids computing them
            anew for every product.
        compile: Fuse the programs' elementwise operations by TorchInductor, which takes some ten seconds a program.
        max_examples: Pass at most so many examples through the network at a time and add up: a batch of any size then
            needs the memory of so many examples. None: all at once.

    Raises:
        ValueError: If ``max_examples`` is below 1, or examples of the network do not stand alone, as under batch
            normalisation.
    """

    def __init__(
        self,
        model: Model,
        *,
        num_kept: int = 1,
        compile: bool = False,  # noqa: A002 - torch's word
        max_examples: int | None = None,
    ) -> None:
        if max_examples is not None:
            _check_max_examples(max_examples, model.network)
        self._model = model
        self._num_kept = num_kept
        self._compile = compile
        self._max_examples = max_examples
        self._losses: dict[Any, _TracedLoss] = {}
        self._kept: list[weakref.ref[_Point]] = []
        self._is_traceable = not model.shared_names
        self.is_convolutional = any(isinstance(each, _CONVOLUTIONS) for each in model.network.modules())

    def __call__(self, adapted: Params, shared: Params, batch: Batch) -> Tensor:
        """Returns the nll per example, ``[num_examples]``, without programs."""
        return self._model.nll(unflatten(adapted, self._model.adapted), shared, batch)

    def mean(self, adapted: Params, shared: Params, batch: Batch, *, twice: bool = False) -> Tensor:
        """Returns the mean nll over the examples, a scalar; twice differentiable in ``adapted`` and ``shared``.

        Args:
            adapted: Flat adapted parameters.
            shared: Shared parameters.
            batch: Examples.
            twice: Announces that the value will be differentiated twice, which spares one pass of the first product.
        """
        num_examples = len(batch.y)
        if self._max_examples is None or num_examples <= self._max_examples:
            return self._mean_of_one_pass(adapted, shared, batch, twice)
        parts = zip(batch.x.split(self._max_examples), batch.y.split(self._max_examples), strict=True)
        means = [len(y) / num_examples * self._mean_of_one_pass(adapted, shared, Batch(x, y), twice) for x, y in parts]
        return torch.stack(means).sum()

    def _mean_of_one_pass(self, adapted: Params, shared: Params, batch: Batch, twice: bool) -> Tensor:
        if self._is_traceable:
            leaves = (adapted[FLAT], *shared.values(), batch.x, batch.y)
            loss = self._loss(tuple(shared), leaves)
            try:
                return cast(Tensor, _ValueAndGradient.apply(loss, _Point(), twice, *leaves)[0])
            except UntraceableError as error:
                self._is_traceable = False
                _logger.warning(
                    "%s is differentiated step by step, which is slower: it cannot be traced (%s).",
                    type(self._model.network).__name__,
                    str(error).splitlines()[0],
                )
        return self(adapted, shared, batch).mean()

    def _loss(self, shared_names: tuple[str, ...], leaves: Sequence[Tensor]) -> "_TracedLoss":
        key = (shared_names, *((leaf.shape, leaf.dtype, leaf.device) for leaf in leaves), _autocast_state())
        if key not in self._losses:

            def mean_nll(layout: Callable[[Tensor], Tensor], point: list[Tensor], constants: list[Tensor]) -> Tensor:
                adapted = unflatten({FLAT: point[0]}, self._model.adapted)
                weights = {name: layout(value) for name, value in adapted.items()}
                batch = Batch(layout(constants[0]), constants[1])
                return self._model.nll(weights, dict(zip(shared_names, point[1:], strict=True)), batch).mean()

            layout = channels_last if self.is_convolutional else _as_it_is
            losses = (partial(mean_nll, layout), partial(mean_nll, _as_it_is))
            self._losses[key] = _TracedLoss(losses, 1 + len(shared_names), self._keep, self._finish)
        return self._losses[key]

    def _finish(self, program: Program, example: Sequence[Tensor]) -> Program:
        return compiled(program, example) if self._compile else program

    def _keep(self, point: "_Point") -> None:
        """Drops the residuals of the oldest points, so that there is room for those of one more."""
        alive = [old for each in self._kept if (old := each()) is not None and old.residuals is not None]
        for old in alive[: max(0, len(alive) + 1 - self._num_kept)]:
            old.residuals = None
        self._kept = [weakref.ref(each) for each in [*alive, point] if each.residuals is not None or each is point]


def _check_max_examples(max_examples: int, network: nn.Module) -> None:
    if max_examples < 1:
        raise ValueError(f"max_examples_per_pass must be at least 1 or None, but is {max_examples}.")
    for name, module in network.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):  # pyright: ignore[reportPrivateUsage]
            raise ValueError(
                f"max_examples_per_pass is {max_examples}, but {name or 'the network'} ({type(module).__name__}) "
                "normalises all examples of a batch together, so they cannot be passed in parts: use GroupNorm "
                "(norm='group'), or leave max_examples_per_pass at None."
            )


def channels_last(leaf: Tensor) -> Tensor:
    """Stores images and filters with channels last: convolutions and pooling are up to twice as fast."""
    return leaf.contiguous(memory_format=torch.channels_last) if leaf.ndim == 4 else leaf


def _as_it_is(leaf: Tensor) -> Tensor:
    return leaf


_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


class _Point:
    """Where curvature is wanted: the residuals, once they have been computed, and the loss whose product takes them."""

    residuals: list[Tensor] | None = None
    owner: "_TracedLoss | None" = None


class _TracedLoss:
    """A loss for tensors of given shapes, with programs that are written when they are first needed."""

    def __init__(
        self,
        losses: tuple[Loss, Loss],
        num_point: int,
        keep: Callable[[_Point], None],
        finish: Callable[[Program, Sequence[Tensor]], Program],
        num_axes: int = 0,
    ) -> None:
        self.num_point = num_point
        # torch.func.vmap does not know memory formats.
        self._losses = losses
        self._loss = losses[0 if num_axes == 0 else 1]
        self._keep = keep
        self._finish = finish
        self._num_axes = num_axes
        self._gradient: Program | None = None
        self._product: tuple[Program, Program] | None = None
        self._mapped: dict[int, _TracedLoss] = {}

    def mapped(self, size: int) -> "_TracedLoss":
        """Returns the losses of ``size`` members at once; every tensor has one more leading axis."""
        if size not in self._mapped:
            self._mapped[size] = _TracedLoss(self._losses, self.num_point, self._keep, self._finish, self._num_axes + 1)
        return self._mapped[size]

    def gradient(self, leaves: Sequence[Tensor]) -> list[Tensor]:
        """Returns the value and the gradient in the first ``num_point`` leaves."""
        if self._gradient is None:
            program = trace_gradient(self._loss, *self._split(leaves), num_axes=self._num_axes)
            self._gradient = self._finish(program, leaves)
        return self._gradient(*leaves)

    def linearize(self, point: _Point, leaves: Sequence[Tensor]) -> list[Tensor]:
        """Returns value and gradient, and makes the residuals the point's."""
        linearize, _ = self._product_programs(leaves)
        self._keep(point)
        results = linearize(*leaves)
        point.owner, point.residuals = self, results[1 + self.num_point :]
        return results[: 1 + self.num_point]

    def product(self, point: _Point, leaves: Sequence[Tensor], direction: Sequence[Tensor]) -> list[Tensor]:
        """Returns the product of the Hessian at a point with a direction."""
        # Residuals without an axis of members are of no use for directions that have one.
        if point.residuals is None or point.owner is not self:
            self.linearize(point, leaves)
        assert point.residuals is not None
        return self._product_programs(leaves)[1](*point.residuals, *direction)

    def _product_programs(self, leaves: Sequence[Tensor]) -> tuple[Program, Program]:
        if self._product is None:
            linearize, product = self._trace_product(leaves)
            linearize = self._finish(linearize, leaves)
            residuals = linearize(*leaves)[1 + self.num_point :]
            self._product = linearize, self._finish(product, [*residuals, *leaves[: self.num_point]])
        return self._product

    def _trace_product(self, leaves: Sequence[Tensor]) -> tuple[Program, Program]:
        reason = ""
        # torch 2.13: the derivative of group_norm has a tangent for contiguous tensors only.
        for loss in dict.fromkeys((self._loss, self._losses[1])):
            try:
                return trace_product(loss, *self._split(leaves), num_axes=self._num_axes)
            except UntraceableError as error:
                reason = str(error).splitlines()[0]
        self.gradient(leaves)  # Raises if there is no program for it either.
        _logger.warning("Hessian-vector products are computed step by step, which is slower: %s.", reason)
        return lambda *leaves: [*self.gradient(leaves), *leaves], self._plain_product

    def _plain_product(self, *tensors: Tensor) -> list[Tensor]:
        """Returns the product from leaves and direction by reverse over reverse, for operations without a tangent."""
        leaves, direction = tensors[: -self.num_point], tensors[-self.num_point :]
        num_leaves = len(leaves)

        def product(*values: Tensor) -> list[Tensor]:
            point, constants = self._split(values[:num_leaves])
            pullback = torch.func.vjp(lambda at: torch.func.grad(self._loss)(at, constants), point)[1]
            return pullback(list(values[num_leaves:]))[0]

        for _ in range(self._num_axes):
            product = torch.func.vmap(product)
        return product(*leaves, *direction)

    def _split(self, leaves: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        return list(leaves[: self.num_point]), list(leaves[self.num_point :])


class _ValueAndGradient(torch.autograd.Function):
    """``(loss, point, twice, *leaves) -> (value, *gradient)``: differentiating the value needs no computation."""

    @staticmethod
    def forward(loss: _TracedLoss, point: _Point, twice: bool, *leaves: Tensor) -> tuple[Tensor, ...]:
        return tuple(loss.linearize(point, leaves) if twice else loss.gradient(leaves))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.loss, ctx.point, _, *leaves = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*leaves, *output[1:])

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        loss: _TracedLoss = ctx.loss
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
    def forward(loss: _TracedLoss, point: _Point, *tensors: Tensor) -> tuple[Tensor, ...]:
        num_leaves = len(tensors) - loss.num_point
        return tuple(loss.product(point, tensors[:num_leaves], tensors[num_leaves:]))

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


def _autocast_state() -> tuple[Any, ...]:
    """Returns what of the surroundings changes the operations of a network."""
    return tuple(torch.is_autocast_enabled(kind) for kind in ("cpu", "cuda"))
