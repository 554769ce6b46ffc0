"""A mean nll with programs for its derivatives, to be used like any other function under ``torch.func``.

``TracedNll.mean`` is differentiable twice. Its value and first derivative come from one program, run once: the forward
pass computes the gradient, which the backward pass multiplies by a scalar. A product with its second derivative runs
the programs of ``trace_product``. The residuals of a point, which the forward pass computes along with the gradient
where a second derivative is announced, are kept for further products with it, for so many points at a time as were
asked for, and computed anew for older ones. Memory therefore grows neither with the number of inner steps that are
unrolled nor with that of weight samples beyond that number.
"""

import functools
import logging
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from ibaml.model import Model
from ibaml.objectives import expected_nll
from ibaml.priors import DiagonalGaussian
from ibaml.traced.derivatives import Point, TracedLoss, value_and_gradient
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
        self.is_convolutional = is_convolutional(model)
        self.is_small = is_small(model)

    def __call__(self, adapted: Params, shared: Params, batch: Batch) -> Tensor:
        """Returns the nll per example, ``[num_examples]``, without programs."""
        return self._model.nll(unflatten(adapted, self._model.adapted), shared, batch)

    def mean(self, adapted: Params, shared: Params, batch: Batch) -> Tensor:
        """Returns the mean nll over the examples, a scalar; twice differentiable in ``adapted`` and ``shared``.

        Args:
            adapted: Flat adapted parameters.
            shared: Shared parameters.
            batch: Examples.
        """

        def plain(part: Batch) -> list[Tensor]:
            return [self(adapted, shared, part).mean()]

        return self._over_parts(functools.partial(self._mean, adapted, shared, False), plain, batch)[0]

    def mean_and_gradient(
        self, adapted: Params, shared: Params, batch: Batch, *, twice: bool = False
    ) -> tuple[Tensor, Params]:
        """Returns the mean nll and its gradient in ``adapted``, both differentiable.

        Args:
            adapted: As in ``mean``.
            shared: As in ``mean``.
            batch: As in ``mean``.
            twice: Announces that the gradient will be differentiated, which spares one pass of the first product.
        """

        def plain(part: Batch) -> list[Tensor]:
            gradient, mean = torch.func.grad_and_value(lambda at: self(at, shared, part).mean())(adapted)
            return [mean, gradient[FLAT]]

        mean, gradient, *_ = self._over_parts(functools.partial(self._mean, adapted, shared, twice), plain, batch)
        return mean, {FLAT: gradient}

    def expected(self, posterior: DiagonalGaussian, shared: Params, noise: Params, batch: Batch) -> Tensor:
        """Returns the mean nll over examples and weight samples, twice differentiable in ``posterior`` and ``shared``.

        Args:
            posterior: Distribution of the flat adapted parameters.
            shared: Shared parameters.
            noise: Standard normal values, with a leading axis of samples.
            batch: Examples.
        """

        def plain(part: Batch) -> list[Tensor]:
            return [self._plain_expected(shared, noise, part, posterior)]

        traced = functools.partial(self._expected, posterior, shared, noise, False)
        return self._over_parts(traced, plain, batch)[0]

    def expected_and_gradient(
        self, posterior: DiagonalGaussian, shared: Params, noise: Params, batch: Batch, *, twice: bool = False
    ) -> tuple[Tensor, DiagonalGaussian]:
        """Returns what ``expected`` returns and its gradient in the posterior, both differentiable.

        Args:
            posterior: As in ``expected``.
            shared: As in ``expected``.
            noise: As in ``expected``.
            batch: As in ``expected``.
            twice: As in ``mean_and_gradient``.
        """

        def plain(part: Batch) -> list[Tensor]:
            expected = functools.partial(self._plain_expected, shared, noise, part)
            gradient, mean = torch.func.grad_and_value(expected)(posterior)
            return [mean, gradient.mean[FLAT], gradient.log_var[FLAT]]

        traced = functools.partial(self._expected, posterior, shared, noise, twice)
        results = self._over_parts(traced, plain, batch)
        return results[0], DiagonalGaussian({FLAT: results[1]}, {FLAT: results[2]})

    def _plain_expected(self, shared: Params, noise: Params, batch: Batch, posterior: DiagonalGaussian) -> Tensor:
        return expected_nll(
            lambda weights, examples: self(weights, shared, examples), posterior, noise, batch, vectorize=self.is_small
        )

    def _mean(self, adapted: Params, shared: Params, twice: bool, batch: Batch) -> list[Tensor]:
        leaves = (adapted[FLAT], *shared.values(), batch.x, batch.y)
        return value_and_gradient(self._loss(tuple(shared), leaves), leaves, twice=twice)

    def _expected(
        self, posterior: DiagonalGaussian, shared: Params, noise: Params, twice: bool, batch: Batch
    ) -> list[Tensor]:
        mean, log_var, others, examples = posterior.mean[FLAT], posterior.log_var[FLAT], shared.values(), tuple(batch)
        loss = self._loss(tuple(shared), (mean, *others, *examples))
        if loss not in self._sampled_losses:
            self._sampled_losses[loss] = SampledLoss(loss, at_once=self.is_small)
        leaves = (mean, log_var, *others, noise[FLAT], *examples)
        return value_and_gradient(self._sampled_losses[loss], leaves, twice=twice)

    def _over_parts(
        self, traced: Callable[[Batch], list[Tensor]], plain: Callable[[Batch], list[Tensor]], batch: Batch
    ) -> list[Tensor]:
        """Averages results over parts of a batch that may be passed through the network at once."""
        size = self._max_examples or len(batch.y)
        parts = [Batch(*part) for part in zip(batch.x.split(size), batch.y.split(size), strict=True)]
        results = [self._traced_or_plain(traced, plain, part) for part in parts]
        if len(parts) == 1:
            return results[0]
        shares = [len(part.y) / len(batch.y) for part in parts]
        return [functools.reduce(torch.add, map(torch.mul, kind, shares)) for kind in zip(*results, strict=True)]

    def _traced_or_plain(
        self, traced: Callable[[Batch], list[Tensor]], plain: Callable[[Batch], list[Tensor]], batch: Batch
    ) -> list[Tensor]:
        if self._is_traceable:
            try:
                return traced(batch)
            except UntraceableError as error:
                self._is_traceable = False
                _logger.warning(
                    "%s is differentiated step by step, which is slower: it cannot be traced (%s).",
                    type(self._model.network).__name__,
                    str(error).splitlines()[0],
                )
        return plain(batch)

    def _loss(self, shared_names: tuple[str, ...], leaves: Sequence[Tensor]) -> "TracedLoss":
        key = (shared_names, *((leaf.shape, leaf.dtype, leaf.device) for leaf in leaves), _autocast_state())
        if key not in self._losses:

            def mean_nll(layout: Callable[[Tensor], Tensor], point: list[Tensor], constants: list[Tensor]) -> Tensor:
                adapted = unflatten({FLAT: point[0]}, self._model.adapted)
                weights = {name: layout(value) for name, value in adapted.items()}
                batch = Batch(layout(constants[0]), constants[1])
                return self._model.nll(weights, dict(zip(shared_names, point[1:], strict=True)), batch).mean()

            layout = channels_last if self.is_convolutional else _as_it_is
            losses = (functools.partial(mean_nll, layout), functools.partial(mean_nll, _as_it_is))
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


def is_convolutional(model: Model) -> bool:
    """Whether the network has convolutions, for which programs pay and passing several tasks at once does not."""
    return any(isinstance(each, _CONVOLUTIONS) for each in model.network.modules())


def is_small(model: Model) -> bool:
    """Whether several tasks or weight samples at once are faster than one after the other (on a CPU)."""
    num_weights = sum(value.numel() for value in model.adapted.values())
    return num_weights <= _LARGEST_SMALL and not is_convolutional(model)


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


# Weights; measured.
_LARGEST_SMALL = 50_000
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def _autocast_state() -> tuple[Any, ...]:
    """Returns what of the surroundings changes the operations of a network."""
    return tuple(torch.is_autocast_enabled(kind) for kind in ("cpu", "cuda"))
