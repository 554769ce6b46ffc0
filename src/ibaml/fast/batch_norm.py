"""Batch normalisation whose second derivatives keep the fused kernels.

torch has one kernel for batch normalisation and one for its derivative, but writes the derivative of the derivative out
as some twenty elementwise operations, which take most of the time of a Hessian-vector product of a convolutional
network. With ``x' = (x - mean) s`` for the normalised input, ``s`` for the inverse standard deviation and ``n`` for the
values per channel, the derivative of ``x'`` in a direction ``a`` is

    D(a) = s (a - mean(a) - x' mean(x' a)),

which is the kernel of the first derivative once more. For an output ``w x' + b`` and an upstream gradient ``g`` the
input has the gradient ``w D(g)``, and along ``(dg, dx, dw)`` that changes by

    w D(dg) + (dw - w s mean(x' dx)) D(g) - w s (t mean(x' g) + x' mean(t g)),    t = D(dx),

in which the last two terms are linear in ``g``, ``t`` and ``x`` with one coefficient per channel.
"""

import contextlib
from collections.abc import Generator, Sequence
from typing import Any

import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from ibaml.types import Tensor

_aten: Any = torch.ops.aten


@contextlib.contextmanager
def fused_batch_norm(*, enabled: bool = True) -> Generator[None, None, None]:
    """Makes ``torch.nn.functional.batch_norm`` with batch statistics the one of this module.

    Args:
        enabled: False changes nothing.
    """
    with _Replaced() if enabled else contextlib.nullcontext():
        yield


class _Replaced(TorchFunctionMode):
    def __torch_function__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        del types
        chosen = _batch_norm if func is functional.batch_norm else func
        return chosen(*args, **(kwargs or {}))


def _batch_norm(
    input: Tensor,  # noqa: A002 - the signature of torch.nn.functional.batch_norm
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """Takes over where weight and bias are given and no statistics are kept."""
    if training and running_mean is None and weight is not None and bias is not None:
        return _BatchNorm.apply(input, weight, bias, eps)[0]
    return functional.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)


class _BatchNorm(torch.autograd.Function):
    """``(x, weight, bias, epsilon) -> (output, mean, s)``; the last two are auxiliary."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor, epsilon: float) -> tuple[Tensor, Tensor, Tensor]:
        return _aten.native_batch_norm(x, weight, bias, None, None, True, 0.0, epsilon)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        x, weight, _, ctx.epsilon = inputs
        _, mean, scale = output
        ctx.mark_non_differentiable(mean, scale)
        ctx.save_for_backward(x, weight, mean, scale)
        ctx.save_for_forward(x, weight, mean, scale)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        x, weight, mean, scale = ctx.saved_tensors
        return (*_BatchNormGradient.apply(gradients[0], x, weight, mean, scale, ctx.epsilon), None)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        x, weight, mean, scale = ctx.saved_tensors
        x_tangent, weight_tangent, bias_tangent = tangents[:3]
        output = _affine(x, mean, scale, weight_tangent, bias_tangent)
        if x_tangent is not None:
            normalised = _derivative(x_tangent, x, mean, scale, ctx.epsilon)[0]
            output = output.addcmul(normalised, _per_channel(weight, x))
        return output, None, None


class _BatchNormGradient(torch.autograd.Function):
    """``(g, x, weight, mean, s, epsilon) -> (gradient of x, of weight, of bias)``; ``mean`` and ``s`` are x's."""

    @staticmethod
    def forward(
        gradient: Tensor, x: Tensor, weight: Tensor, mean: Tensor, scale: Tensor, epsilon: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        return _derivative(gradient, x, mean, scale, epsilon, weight)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        gradient, x, weight, mean, scale, ctx.epsilon = inputs
        _, weight_gradient, bias_gradient = output
        ctx.save_for_forward(gradient, x, weight, mean, scale, weight_gradient, bias_gradient)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        g, x, weight, mean, s, weight_gradient, bias_gradient = ctx.saved_tensors
        g_tangent, x_tangent, weight_tangent = tangents[:3]
        n = x.numel() // x.shape[1]
        mean_g, correlation = bias_gradient / n, weight_gradient / n  # mean(g), mean(x' g)

        result, weight_result, bias_result = _derivative(g_tangent, x, mean, s, ctx.epsilon, weight)
        factor = weight_tangent  # of D(g)
        along_x = torch.zeros_like(mean)  # further multiples of x'
        if x_tangent is not None:
            t, scaled, _ = _derivative(x_tangent, x, mean, s, ctx.epsilon)  # D(dx), n mean(x' dx)
            overlap = _sum(t * g)
            factor = factor - weight * s * (scaled / n)
            along_x = weight * s * (overlap / n)
            result = result.addcmul(t, _per_channel(-weight * s * correlation, x))
            weight_result = weight_result + overlap
        # factor D(g) = factor s (g - mean(g) - x' mean(x' g))
        factor = factor * s
        result = result.addcmul(g, _per_channel(factor, x))
        result = result + _affine(x, mean, s, -factor * correlation - along_x, -factor * mean_g)
        return result, weight_result, bias_result


def _derivative(
    direction: Tensor, x: Tensor, mean: Tensor, scale: Tensor, epsilon: float, weight: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns ``weight D(direction)``, ``n mean(x' direction)`` and ``n mean(direction)``."""
    unit = torch.ones_like(mean) if weight is None else weight
    return _aten.native_batch_norm_backward(
        direction, x, unit, None, None, mean, scale, True, epsilon, [True, True, True]
    )


def _affine(x: Tensor, mean: Tensor, scale: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Returns ``weight x' + bias`` by channel."""
    slope = weight * scale
    return torch.addcmul(_per_channel(bias - slope * mean, x), x, _per_channel(slope, x))


def _sum(x: Tensor) -> Tensor:
    """Returns the sum over all axes but that of channels."""
    return x.sum([axis for axis in range(x.ndim) if axis != 1])


def _per_channel(values: Tensor, like: Tensor) -> Tensor:
    return values.reshape([1, -1] + [1] * (like.ndim - 2))
