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
from typing import Any

import torch
from torch import nn

from ibaml.gaussian import DiagonalGaussian
from ibaml.model import Model
from ibaml.objectives import expected_nll
from ibaml.traced.derivatives import Point, TracedLoss, value
from ibaml.traced.program import Program, UntraceableError, compiled
from ibaml.traced.samples import SampledLoss
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
        self._losses: dict[Any, TracedLoss] = {}
        self._sampled_losses: dict[TracedLoss, SampledLoss] = {}
        self._kept: list[weakref.ref[Point]] = []
        self._is_traceable = not model.shared_names
        self.is_convolutional = any(isinstance(each, _CONVOLUTIONS) for each in model.network.modules())
        num_weights = sum(value.numel() for value in model.adapted.values())
        self.is_small = not self.is_convolutional and num_weights <= _LARGEST_SMALL

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

        def mean(part: Batch) -> Tensor:
            leaves = (adapted[FLAT], *shared.values(), part.x, part.y)
            return value(self._loss(tuple(shared), leaves), leaves, twice=twice)

        return self._in_parts(mean, lambda part: self(adapted, shared, part).mean(), batch)

    def expected(
        self, posterior: DiagonalGaussian, shared: Params, noise: Params, batch: Batch, *, twice: bool = False
    ) -> Tensor:
        """Returns the mean nll over examples and weight samples, a scalar; twice differentiable as ``mean`` is.

        Args:
            posterior: Distribution of the flat adapted parameters.
            shared: Shared parameters.
            noise: Standard normal values, with a leading axis of samples.
            batch: Examples.
            twice: As in ``mean``.
        """

        def mean(part: Batch) -> Tensor:
            leaves = (posterior.mean[FLAT], *shared.values(), part.x, part.y)
            loss = self._loss(tuple(shared), leaves)
            if loss not in self._sampled_losses:
                self._sampled_losses[loss] = SampledLoss(loss, at_once=self.is_small)
            leaves = (leaves[0], posterior.log_var[FLAT], *shared.values(), noise[FLAT], part.x, part.y)
            return value(self._sampled_losses[loss], leaves, twice=twice)

        def plain(part: Batch) -> Tensor:
            return expected_nll(
                lambda weights, examples: self(weights, shared, examples),
                posterior,
                noise,
                part,
                vectorize=self.is_small,
            )

        return self._in_parts(mean, plain, batch)

    def _in_parts(self, mean: Callable[[Batch], Tensor], plain: Callable[[Batch], Tensor], batch: Batch) -> Tensor:
        """Returns a mean over examples from means over as many as may be passed through the network at a time."""
        size = self._max_examples or len(batch.y)
        parts = [Batch(*part) for part in zip(batch.x.split(size), batch.y.split(size), strict=True)]
        means = [self._or_plain(mean, plain, part) for part in parts]
        if len(means) == 1:
            return means[0]
        return torch.stack([len(part.y) / len(batch.y) * each for part, each in zip(parts, means, strict=True)]).sum()

    def _or_plain(self, mean: Callable[[Batch], Tensor], plain: Callable[[Batch], Tensor], part: Batch) -> Tensor:
        if self._is_traceable:
            try:
                return mean(part)
            except UntraceableError as error:
                self._is_traceable = False
                _logger.warning(
                    "%s is differentiated step by step, which is slower: it cannot be traced (%s).",
                    type(self._model.network).__name__,
                    str(error).splitlines()[0],
                )
        return plain(part)

    def _loss(self, shared_names: tuple[str, ...], leaves: Sequence[Tensor]) -> "TracedLoss":
        key = (shared_names, *((leaf.shape, leaf.dtype, leaf.device) for leaf in leaves), _autocast_state())
        if key not in self._losses:

            def mean_nll(layout: Callable[[Tensor], Tensor], point: list[Tensor], constants: list[Tensor]) -> Tensor:
                adapted = unflatten({FLAT: point[0]}, self._model.adapted)
                weights = {name: layout(value) for name, value in adapted.items()}
                batch = Batch(layout(constants[0]), constants[1])
                return self._model.nll(weights, dict(zip(shared_names, point[1:], strict=True)), batch).mean()

            layout = channels_last if self.is_convolutional else _as_it_is
            losses = (partial(mean_nll, layout), partial(mean_nll, _as_it_is))
            self._losses[key] = TracedLoss(losses, 1 + len(shared_names), self._keep, self._finish)
        return self._losses[key]

    def _finish(self, program: Program, example: Sequence[Tensor]) -> Program:
        return compiled(program, example) if self._compile else program

    def _keep(self, point: "Point") -> None:
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
    """Stores images and filters with channels last: convolutions and pooling are up to twice as fast.

    A single channel fits both memory formats, and ``contiguous`` leaves it in the other one, which all that is computed
    from it then inherits: a copy with the channels in the last place has the right strides.
    """
    if leaf.ndim != 4:
        return leaf
    return leaf.permute(0, 2, 3, 1).clone(memory_format=torch.contiguous_format).permute(0, 3, 1, 2)


def _as_it_is(leaf: Tensor) -> Tensor:
    return leaf


# Weights of a network for which several tasks or weight samples at once are faster than one after the other (CPU).
_LARGEST_SMALL = 50_000
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def _autocast_state() -> tuple[Any, ...]:
    """Returns what of the surroundings changes the operations of a network."""
    return tuple(torch.is_autocast_enabled(kind) for kind in ("cpu", "cuda"))
