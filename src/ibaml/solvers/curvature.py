"""Matrix-free curvature: a function goes in, a matrix-vector product comes out."""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import torch

from ibaml import tree
from ibaml.types import Loss, MatVec, PyTree, Tensor


@dataclasses.dataclass(frozen=True)
class DifferentiatedLoss:
    """A scalar function that brings its gradient along, for use wherever a function is expected.

    Attributes:
        value_and_gradient: The value and the gradient in the first argument; both differentiable.
        gradient: The gradient alone.
        value: The value alone.
    """

    value_and_gradient: Callable[..., tuple[Tensor, PyTree]]
    gradient: Callable[..., PyTree]
    value: Callable[..., Tensor]

    def __call__(self, *arguments: PyTree) -> Tensor:
        """Returns the value."""
        return self.value(*arguments)


def differentiated(function: Callable[..., Tensor]) -> DifferentiatedLoss:
    """Returns a scalar function with the gradient in its first argument: its own, or else that of ``torch.func``."""
    if isinstance(function, DifferentiatedLoss):
        return function

    def value_and_gradient(*arguments: PyTree) -> tuple[Tensor, PyTree]:
        derivative, value = torch.func.grad_and_value(function)(*arguments)
        return value, derivative

    return DifferentiatedLoss(value_and_gradient, torch.func.grad(function), function)


def gradient(function: Callable[..., Tensor]) -> Callable[..., PyTree]:
    """Returns the gradient of a scalar function in its first argument."""
    return differentiated(function).gradient


def at_fixed(function: Callable[..., Tensor], *rest: PyTree) -> DifferentiatedLoss:
    """Returns a function of its first argument alone, with its gradient.

    Args:
        function: Scalar function of several pytrees.
        *rest: The arguments after the first.
    """
    whole = differentiated(function)
    return DifferentiatedLoss(
        lambda point: whole.value_and_gradient(point, *rest),
        lambda point: whole.gradient(point, *rest),
        lambda point: whole.value(point, *rest),
    )


def value_gradient_and_hvp(
    function: Loss, point: PyTree, *, mode: Literal["reverse", "forward"] = "reverse"
) -> tuple[Tensor, PyTree, MatVec]:
    """Returns value, gradient and Hessian-vector product at a point, sharing one forward and backward pass.

    Args:
        function: Scalar function of a pytree, twice differentiable at ``point``.
        point: Where to expand.
        mode: ``"reverse"`` keeps the graph of the gradient and runs one backward pass through it per product
            (it uses that the Hessian is symmetric). ``"forward"`` keeps nothing and runs a forward-mode derivative of
            the gradient per product.

    Returns:
        The value, the gradient, in the structure of ``point``, and a map ``v -> H v``.

    Raises:
        ValueError: If ``mode`` is unknown.

    Cost:
        One gradient; then about two gradients per product in reverse mode, three in forward mode.
        Memory: reverse mode holds one gradient graph for as long as the map lives.
    """
    if mode == "reverse":
        whole = differentiated(function)
        # torch does not say that has_aux adds a third result.
        outputs: Any = torch.func.vjp(lambda at: whole.value_and_gradient(at)[::-1], point, has_aux=True)
    elif mode == "forward":
        derivative, value = torch.func.grad_and_value(function)(point)
        return value, derivative, lambda vector: torch.func.jvp(torch.func.grad(function), (point,), (vector,))[1]
    else:
        raise ValueError(f"mode must be 'reverse' or 'forward', but is {mode!r}.")
    derivative, pullback, value = outputs
    return value, derivative, lambda vector: pullback(vector)[0]


def hvp(function: Loss, point: PyTree, *, mode: Literal["reverse", "forward"] = "reverse") -> MatVec:
    """Returns the Hessian-vector product ``v -> H v`` of a scalar function at a point.

    See ``value_gradient_and_hvp`` for the arguments and the cost.

    Examples:
        >>> product = hvp(lambda x: (x**3).sum(), torch.tensor([1.0, 2.0]))
        >>> product(torch.tensor([1.0, 1.0]))
        tensor([ 6., 12.])
    """
    return value_gradient_and_hvp(function, point, mode=mode)[2]


def gauss_newton_vp(
    outputs: Callable[[PyTree], Tensor], loss: Callable[[Tensor], Tensor], point: PyTree, *, damping: float = 0.0
) -> MatVec:
    """Returns the generalised Gauss-Newton product ``v -> J^T H_loss J v + damping * v``.

    ``J`` is the Jacobian of ``outputs`` at ``point`` and ``H_loss`` the Hessian of ``loss`` in the outputs (Schraudolph
    2002). The matrix is positive semi-definite for a convex loss, and equals the Hessian when ``outputs`` is linear.

    Args:
        outputs: Network outputs as a function of the parameters.
        loss: Scalar loss as a function of the outputs.
        point: Where to expand.
        damping: Multiple of the identity to add, at least 0.

    Returns:
        The product, on pytrees of the structure of ``point``.

    Raises:
        ValueError: If ``damping`` is negative.

    Cost:
        One forward pass; then one forward-mode and one reverse-mode derivative of ``outputs`` per product.

    Examples:
        >>> design = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
        >>> product = gauss_newton_vp(lambda w: design @ w, lambda f: 0.5 * (f**2).sum(), torch.zeros(2))
        >>> product(torch.ones(2))
        tensor([1., 4.])
    """
    if damping < 0:
        raise ValueError(f"damping must be at least 0, but is {damping}.")
    value, pullback = torch.func.vjp(outputs, point)[:2]
    loss_curvature = hvp(loss, value, mode="forward")

    def product(vector: PyTree) -> PyTree:
        pushed = torch.func.jvp(outputs, (point,), (vector,))[1]
        return tree.axpy(damping, vector, pullback(loss_curvature(pushed))[0])

    return product
