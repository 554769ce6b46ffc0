"""The nll of a model as a function of flat adapted parameters, by ``torch.func`` or by programs."""

import dataclasses
import functools
import logging
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import nn

from ibaml.algorithms.model import Model
from ibaml.algorithms.nll import PlainNll
from ibaml.fast.derivatives import Point, TracedLoss, value_and_gradient
from ibaml.fast.flat import FLAT, unflatten
from ibaml.fast.programs import Program, UntraceableError, compiled
from ibaml.fast.samples import SampledLoss
from ibaml.priors import DiagonalGaussian, DiagonalPrior, Prior
from ibaml.solvers.curvature import DifferentiatedLoss
from ibaml.types import Batch, Params, Tensor

_logger = logging.getLogger(__name__)

_MOST_SHAPES = 8
"""Sets of shapes that programs are written for. Tasks of many sizes would spend their time on writing."""

_written: weakref.WeakKeyDictionary[nn.Module, dict[Any, Any]] = weakref.WeakKeyDictionary()
"""The programs of each network, for the rest of the process: a network is trained, evaluated, and trained again."""

Results: TypeAlias = Callable[..., list[Tensor]]


class FlatNll(PlainNll):
    """The nll of a model as a function of flat adapted parameters, by ``torch.func``.

    Args:
        model: Network and likelihood.
    """

    def __init__(self, model: Model) -> None:
        self.model = model

    @property
    def is_small(self) -> bool:
        """See ``PlainNll``."""
        return self.model.is_small

    def per_example(self, weights: Params, shared: Params, batch: Batch, /) -> Tensor:
        """See ``Nll``."""
        return self.model.per_example(unflatten(weights, self.model.adapted), shared, batch)


class ProgramNll(FlatNll):
    """The same by programs, which are written at the first use for shapes, dtypes and devices.

    A loss is differentiable twice. Its value and first derivative come from one program, run once: the forward pass
    computes the gradient, which the backward pass multiplies by a scalar. A product with its second derivative runs the
    programs of ``trace_product``. The residuals of a point, which the forward pass computes along with the gradient
    where a second derivative is announced, are kept for further products with it, for so many points at a time as were
    asked for, and computed anew for older ones. Memory therefore grows neither with the number of inner steps that are
    unrolled nor with that of weight samples beyond that number.

    A network that cannot be traced (control flow that depends on values) is differentiated as if there were no
    programs, which is logged.

    Args:
        model: Network and likelihood; no parameter of the network may be shared, or every inner step would
            differentiate it as well.
        num_kept: Points whose residuals are kept at a time; at least the number of weight samples avoids computing them
            anew for every product.
        compile: Fuse the programs' elementwise operations by TorchInductor, which takes some ten seconds a program.
    """

    def __init__(self, model: Model, *, num_kept: int = 1, compile: bool = False) -> None:  # noqa: A002 - torch's word
        super().__init__(model)
        self._num_kept = num_kept
        self._compile = compile
        self._losses: dict[Any, TracedLoss] = {}
        self._sampled_losses: dict[TracedLoss, SampledLoss] = {}
        self._kept: list[weakref.ref[Point]] = []
        self._is_traceable = True
        # Arguments of the programs, which would otherwise be right for these values alone.
        self._fixed = {**model.frozen, **dict(model.network.named_buffers())}

    def mean(self, batch: Batch, /, *, twice: bool = False) -> DifferentiatedLoss:
        """See ``Nll``."""

        def results(weights: Params, shared: Params, *, twice: bool) -> list[Tensor]:
            leaves = (weights[FLAT], *shared.values(), *batch, *self._fixed.values())
            return value_and_gradient(self._loss(tuple(shared), leaves), leaves, twice=twice)

        return self._by_programs(results, lambda flat: {FLAT: flat[0]}, super().mean(batch), twice=twice)

    def expected(self, family: Prior, batch: Batch, noise: Params, /, *, twice: bool = False) -> DifferentiatedLoss:
        """See ``Nll``."""
        by_programs = _EXPECTED_BY_PROGRAMS.get(type(family))
        plain = super().expected(family, batch, noise)
        return by_programs(self, batch, noise, plain, twice=twice) if by_programs else plain

    def _expected_of_diagonal(
        self, batch: Batch, noise: Params, plain: DifferentiatedLoss, *, twice: bool
    ) -> DifferentiatedLoss:
        def results(posterior: DiagonalGaussian, shared: Params, *, twice: bool) -> list[Tensor]:
            mean, log_var, others = posterior.mean[FLAT], posterior.log_var[FLAT], shared.values()
            examples = (*batch, *self._fixed.values())
            loss = self._loss(tuple(shared), (mean, *others, *examples))
            if loss not in self._sampled_losses:
                self._sampled_losses[loss] = SampledLoss(loss, at_once=self.is_small)
            leaves = (mean, log_var, *others, noise[FLAT], *examples)
            return value_and_gradient(self._sampled_losses[loss], leaves, twice=twice)

        def rebuilt(flat: Sequence[Tensor]) -> DiagonalGaussian:
            return DiagonalGaussian({FLAT: flat[0]}, {FLAT: flat[1]})

        return self._by_programs(results, rebuilt, plain, twice=twice)

    def _by_programs(
        self, results: Results, rebuilt: Callable[[Sequence[Tensor]], Any], plain: DifferentiatedLoss, *, twice: bool
    ) -> DifferentiatedLoss:
        """Returns a loss from the function of its arguments that gives value and gradient as a list."""

        def traced_or(function: Callable[..., Any], traced: Callable[[list[Tensor]], Any], twice: bool) -> Any:
            def call(*arguments: Any) -> Any:
                if self._is_traceable:
                    try:
                        return traced(results(*arguments, twice=twice))
                    except UntraceableError as error:
                        self._is_traceable = False
                        _logger.warning(
                            "%s is differentiated step by step, which is slower: it cannot be traced (%s).",
                            type(self.model.network).__name__,
                            str(error).splitlines()[0],
                        )
                return function(*arguments)

            return call

        return DifferentiatedLoss(
            traced_or(plain.value_and_gradient, lambda found: (found[0], rebuilt(found[1:])), twice),
            traced_or(plain.gradient, lambda found: rebuilt(found[1:]), twice),
            traced_or(plain.value, lambda found: found[0], False),
        )

    def _loss(self, shared_names: tuple[str, ...], leaves: Sequence[Tensor]) -> TracedLoss:
        shapes = tuple((leaf.shape, leaf.dtype, leaf.device) for leaf in leaves)
        key = (shared_names, shapes, _autocast_state())
        if key not in self._losses:
            if len(self._losses) == _MOST_SHAPES:
                raise UntraceableError(f"its tasks have more than {_MOST_SHAPES} different shapes")

            def mean_nll(layout: Callable[[Tensor], Tensor], point: list[Tensor], constants: list[Tensor]) -> Tensor:
                adapted = unflatten({FLAT: point[0]}, self.model.adapted)
                weights = {name: layout(value) for name, value in adapted.items()}
                x, y, *fixed = constants
                model = dataclasses.replace(self.model, frozen=dict(zip(self._fixed, fixed, strict=True)))
                shared = dict(zip(shared_names, point[1:], strict=True))
                return model.per_example(weights, shared, Batch(layout(x), y)).mean()

            layout = channels_last if self.model.is_convolutional else _as_it_is
            losses = (functools.partial(mean_nll, layout), functools.partial(mean_nll, _as_it_is))
            adapted = tuple((name, value.shape) for name, value in self.model.adapted.items())
            # The network may have been changed in place since.
            of_model = (repr(self.model.network), adapted, tuple(self._fixed), _hashable(self.model.likelihood))
            programs = _written.setdefault(self.model.network, {}).setdefault((key, of_model, self._compile), {})
            self._losses[key] = TracedLoss(losses, 1 + len(shared_names), self._keep, self._finish, programs)
        return self._losses[key]

    def _finish(self, program: Program, example: Sequence[Tensor]) -> Program:
        return compiled(program, example) if self._compile else program

    def _keep(self, point: Point) -> None:
        """Drops the residuals of the oldest points, so that there is room for those of one more."""
        alive = [old for each in self._kept if (old := each()) is not None and old.residuals is not None]
        for old in alive[: max(0, len(alive) + 1 - self._num_kept)]:
            old.residuals = None
        self._kept = [weakref.ref(each) for each in [*alive, point] if each.residuals is not None or each is point]


_EXPECTED_BY_PROGRAMS: Mapping[type[Prior], Callable[..., DifferentiatedLoss]] = {
    DiagonalPrior: ProgramNll._expected_of_diagonal  # pyright: ignore[reportPrivateUsage]
}
"""Families whose sampling has written-out derivatives."""


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


def _hashable(value: Any) -> Any:
    """Returns a record itself, so that equal ones share programs, and the identity of what cannot be hashed."""
    try:
        hash(value)
    except TypeError:
        return id(value)
    return value


def _autocast_state() -> tuple[bool, ...]:
    """Returns what of the surroundings changes the operations of a network."""
    return tuple(torch.is_autocast_enabled(kind) for kind in ("cpu", "cuda"))
