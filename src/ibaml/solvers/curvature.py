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
    """Returns a scalar function with the gradient in its first argument: its own, or else that of autograd.

    The gradient can be differentiated in turn, by a transform of ``torch.func`` around it or, outside of those, where
    gradients are enabled; under ``torch.no_grad`` it keeps nothing.
    """
    if isinstance(function, DifferentiatedLoss):
        return function

    def value_and_gradient(point: PyTree, *rest: PyTree) -> tuple[Tensor, PyTree]:
        if is_transformed():
            derivative, value = torch.func.grad_and_value(function)(point, *rest)
            return value, derivative
        value, pullback = vjp(lambda at: function(at, *rest), point)
        return value, pullback(torch.ones_like(value))[0]

    return DifferentiatedLoss(value_and_gradient, lambda *arguments: value_and_gradient(*arguments)[1], function)


def vjp(function: Callable[..., Any], *arguments: PyTree, has_aux: bool = False) -> tuple[Any, ...]:
    """Does what ``torch.func.vjp`` does, outside of transforms by plain autograd, whose operations cost less.

    Args:
        function: From pytrees to a pytree, or to a pair of it and something else with ``has_aux``.
        *arguments: Its arguments.
        has_aux: Whether it returns more.

    Returns:
        The value, a map from cotangents to a tuple with a gradient for each argument, and what else the function
        returned. Where gradients are enabled and the function depends on tensors that ask for some, value and gradients
        are differentiable in turn.

    Examples:
        >>> value, pullback = vjp(lambda x: x**2, torch.tensor(3.0))
        >>> value, pullback(torch.tensor(1.0))
        (tensor(9.), (tensor(6.),))
    """
    if is_transformed():
        return torch.func.vjp(function, *arguments, has_aux=has_aux)
    is_enabled = torch.is_grad_enabled()

    def own(leaf: Tensor) -> Tensor:
        # A view is a tensor of its own: a derivative in it is none in whatever else depends on the leaf.
        return leaf.view_as(leaf) if is_enabled and leaf.requires_grad else leaf.detach().requires_grad_()

    inputs = tree.map(own, arguments)
    with torch.enable_grad():
        value, *aux = function(*inputs) if has_aux else (function(*inputs),)
    input_leaves, of_inputs = tree.flatten(inputs)
    value_leaves = tree.leaves(value)
    records = is_enabled and (
        any(leaf.requires_grad for leaf in tree.leaves(arguments)) or _depends_on_more(value_leaves, input_leaves)
    )

    def pullback(cotangent: PyTree) -> tuple[PyTree, ...]:
        pairs = [pair for pair in zip(value_leaves, tree.leaves(cotangent), strict=True) if pair[0].requires_grad]
        if not pairs:
            return tree.zeros_like(arguments)
        outputs, cotangents = zip(*pairs, strict=True)
        return of_inputs(
            torch.autograd.grad(
                outputs,
                input_leaves,
                cotangents,
                retain_graph=True,
                create_graph=torch.is_grad_enabled() and (records or any(each.requires_grad for each in cotangents)),
                materialize_grads=True,
            )
        )

    return value if records else tree.detach(value), pullback, *(aux if records else tree.detach(aux))


def _depends_on_more(values: list[Tensor], inputs: list[Tensor]) -> bool:
    """Whether the graph of some values has leaves that are none of the inputs."""
    own = {id(leaf) for leaf in (*inputs, None)}
    if any(leaf.requires_grad and leaf.is_leaf and id(leaf) not in own for leaf in values):
        return True
    nodes = [leaf.grad_fn for leaf in values if leaf.grad_fn is not None]
    seen = set(nodes)
    while nodes:
        node = nodes.pop()
        if id(getattr(node, "variable", None)) not in own:
            return True
        new = {following for following, _ in node.next_functions if following is not None} - seen
        seen |= new
        nodes.extend(new)
    return False


def is_transformed() -> bool:
    """Whether derivatives have to be those of ``torch.func``: inside its transforms, and in inference mode.

    In the former autograd's own functions fail; in the latter they record nothing.
    """
    if torch.is_inference_mode_enabled():
        return True
    try:
        torch.empty(0).requires_grad_()
    except RuntimeError:
        return True
    return False


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
        outputs: Any = vjp(lambda at: whole.value_and_gradient(at)[::-1], point, has_aux=True)
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
