"""Straight-line programs for a loss, its gradient and its curvature.

``torch.func`` interprets a function anew at every call: a gradient of a small network spends most of its time there,
and a Hessian-vector product repeats all that depends on the point alone. Here a loss is differentiated once,
symbolically. What remains are three ``torch.fx`` programs without Python control flow, which can be replayed, compiled,
or captured in a CUDA graph:

- ``gradient``: value and gradient;
- ``linearize``: value, gradient, and the residuals, on which alone the Hessian-vector product depends beside its
  direction;
- ``product``: the Hessian-vector product from residuals and a direction, forward-over-reverse.
"""

import logging
import operator
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeAlias, cast

import torch
from torch import fx
from torch._guards import TracingContext, tracing
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from ibaml.fast.batch_norm import fused_batch_norm
from ibaml.types import Tensor

Loss: TypeAlias = Callable[[list[Tensor], list[Tensor]], Tensor]
"""``(point, constants) -> scalar``, both lists of tensors."""

Program: TypeAlias = Callable[..., list[Tensor]]
"""A straight-line program on tensors."""


_aten: Any = torch.ops.aten
_ZEROS = {_aten.zeros.default, _aten.zeros_like.default, _aten.new_zeros.default}
_LINEAR = {
    getattr(_aten, name).default
    for name in ("alias", "clone", "detach", "expand", "neg", "permute", "t", "view", "_to_copy", "_unsafe_view")
}
_BILINEAR = {_aten.mm.default, _aten.bmm.default, _aten.mul.Tensor}

_logger = logging.getLogger(__name__)


class UntraceableError(RuntimeError):
    """The function cannot be written as a straight-line program."""


def trace_gradient(loss: Loss, point: Sequence[Tensor], constants: Sequence[Tensor], *, num_axes: int = 0) -> Program:
    """Writes down ``(*point, *constants) -> [value, *gradient]``.

    Args:
        loss: A scalar loss that draws no random numbers; tensors that it closes over are kept by reference.
        point: Values to differentiate in. The program is for their shapes, dtypes and devices.
        constants: Other tensors that the loss depends on.
        num_axes: Leading axes of every tensor over which the program maps; its outputs have them as well.

    Raises:
        UntraceableError: If Python control flow depends on values, or an operation has no derivative.
    """
    num_point = len(point)

    def value_and_gradient(*leaves: Tensor) -> list[Tensor]:
        gradient, value = torch.func.grad_and_value(loss)(list(leaves[:num_point]), list(leaves[num_point:]))
        return [value, *gradient]

    return _write_down(value_and_gradient, [*point, *constants], num_axes)


def trace_product(
    loss: Loss, point: Sequence[Tensor], constants: Sequence[Tensor], *, num_axes: int = 0
) -> tuple[Program, Program]:
    """Writes down the two programs of a Hessian-vector product.

    The first is ``(*point, *constants) -> [value, *gradient, *residuals]``, the second
    ``(*residuals, *direction) -> Hessian times direction``.

    Batch normalisation with the statistics of the batch gets derivatives that keep its fused kernels
    (``ibaml.fast.batch_norm``); all other operations are differentiated by torch.

    Args:
        loss: As in ``trace_gradient``, and twice differentiable.
        point: As in ``trace_gradient``.
        constants: As in ``trace_gradient``.
        num_axes: As in ``trace_gradient``.

    Raises:
        UntraceableError: As in ``trace_gradient``.
    """
    num_point = len(point)

    def product(*leaves: Tensor) -> list[Tensor]:
        at, direction, fixed = leaves[:num_point], leaves[num_point : 2 * num_point], leaves[2 * num_point :]

        def gradient_and_value_at(values: list[Tensor]) -> tuple[list[Tensor], Tensor]:
            return torch.func.grad_and_value(loss)(values, list(fixed))

        # torch does not say that has_aux adds a third result.
        results: Any = torch.func.jvp(gradient_and_value_at, (list(at),), (list(direction),), has_aux=True)
        gradient, tangent, value = results
        return [value, *gradient, *tangent]

    leaves = [*point, *map(torch.zeros_like, point), *constants]
    return _split(_write_down(product, leaves, num_axes), num_point)


def compiled(program: Program, example: Sequence[Tensor]) -> Program:
    """Returns the program with its elementwise operations fused by TorchInductor.

    If there is no compiler, which is logged, the program is returned as it is.

    Args:
        program: What ``trace_gradient`` or ``trace_product`` returned.
        example: Arguments of the shapes, dtypes, devices and strides that it will be called with.
    """
    try:
        from torch import _inductor

        return cast(Program, _inductor.compile(cast(fx.GraphModule, program), list(example)))
    except Exception as error:
        # Inductor needs a compiler of the machine, and reports its absence in many ways.
        _logger.warning("programs are replayed without fusing: TorchInductor failed (%s).", str(error).splitlines()[:1])
        return program


def _write_down(function: Program, leaves: Sequence[Tensor], num_axes: int) -> fx.GraphModule:
    """Returns the operations that a function performs as a program without in-place operations."""
    for _ in range(num_axes):
        function = torch.func.vmap(function)
    # make_fx notes the shape of each result by a mode of its own, and a mode records the Python stack; that takes more
    # time than all else. Here is one mode for all results.
    one_mode = TracingContext(FakeTensorMode(allow_fallback_kernels=True))
    try:
        with tracing(one_mode):
            # Under vmap the fused normalisation would have to be mapped too, and it gains nothing for small networks.
            with fused_batch_norm(enabled=num_axes == 0):
                program = make_fx(function)(*leaves)
            _drop_copies(program.graph)
            if any(_is_in_place(node) for node in program.graph.nodes):
                # Not at once: functionalisation has no rule for an autograd.Function; the first pass leaves none.
                program = make_fx(torch.func.functionalize(program))(*leaves)
    except Exception as error:
        # Whatever torch raises in the middle of a user's network: the caller goes on without a program.
        raise UntraceableError(f"{type(error).__name__}: {error}") from error
    _drop_zeros(program.graph)
    _merge_equal(program.graph)
    program.graph.eliminate_dead_code()
    program.recompile()
    return program


def _drop_copies(graph: fx.Graph) -> None:
    """Takes tangents as they are: forward differentiation copies them to the strides of the value they belong to."""
    for node in list(graph.nodes):
        if node.target is _aten.copy_.default:
            target, source = node.args[:2]
            if target.target is _aten._new_zeros_with_same_feature_meta.default and len(target.users) == 1:
                node.replace_all_uses_with(source)
                graph.erase_node(node)


def _drop_zeros(graph: fx.Graph) -> None:
    """Leaves out what is zero whatever the inputs are: the tangent of a constant, and the first summand of many a sum.

    What follows from zeros is zero by rules that hold for finite numbers.
    """
    zeros: set[fx.Node] = set()
    for node in list(graph.nodes):
        if node.op != "call_function":
            continue
        if _is_zero(node, zeros):
            zeros.add(node)
        elif node.target is _aten.add.Tensor and len(node.args) == 2 and not node.kwargs:
            for one, other in (node.args, node.args[::-1]):
                if one in zeros and _same_kind(node, other):
                    node.replace_all_uses_with(other)
                    graph.erase_node(node)
                    break


def _is_zero(node: fx.Node, zeros: set[fx.Node]) -> bool:
    target, args = node.target, node.args
    if target in _ZEROS:
        return True
    if target in _LINEAR:
        return args[0] in zeros
    if target in _BILINEAR:
        return args[0] in zeros or args[1] in zeros
    if target is _aten.convolution.default:
        return args[2] is None and (args[0] in zeros or args[1] in zeros)
    if target is operator.getitem and getattr(args[0], "target", None) is _aten.convolution_backward.default:
        gradient, x, weight = cast(fx.Node, args[0]).args[:3]
        # The first result is the pullback of the gradient to x, the second that to the weights.
        return gradient in zeros or {0: weight, 1: x}.get(cast(int, args[1])) in zeros
    return False


def _same_kind(node: fx.Node, other: Any) -> bool:
    """Whether two results have the same shape, dtype and strides."""
    if not isinstance(other, fx.Node):
        return False
    one, two = node.meta["val"], other.meta["val"]
    return one.shape == two.shape and one.dtype == two.dtype and one.stride() == two.stride()


def _is_in_place(node: fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return schema is not None and schema.is_mutable


def _merge_equal(graph: fx.Graph) -> None:
    """Computes once what is computed twice: the tangent of a layer and that of its derivative share terms."""
    first: dict[Any, fx.Node] = {}
    for node in list(graph.nodes):
        if node.op != "call_function":
            continue
        key = (node.target, _hashable(node.args), _hashable(node.kwargs))
        if key in first:
            node.replace_all_uses_with(first[key])
            graph.erase_node(node)
        else:
            first[key] = node


def _hashable(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return (type(value).__name__, *map(_hashable, value))
    if isinstance(value, dict):
        return tuple((key, _hashable(item)) for key, item in sorted(value.items()))
    # 1, 1.0 and True are equal in Python, and different operations to torch.
    return (type(value).__name__, value)


def _split(whole: fx.GraphModule, num_point: int) -> tuple[fx.GraphModule, fx.GraphModule]:
    """Splits the program of a product into what depends on the point alone and what depends on the direction."""
    nodes = list(whole.graph.nodes)
    inputs = [node for node in nodes if node.op == "placeholder"]
    direction = inputs[num_point : 2 * num_point]
    varying = set(direction)
    for node in nodes:
        if node.op == "call_function" and any(each in varying for each in node.all_input_nodes):
            varying.add(node)
    (outputs,) = next(node for node in nodes if node.op == "output").args
    at_point, result = outputs[: 1 + num_point], outputs[1 + num_point :]
    fixed = [node for node in nodes if node.op == "call_function" and node not in varying]
    moving = [node for node in nodes if node.op == "call_function" and node in varying]
    attributes = [node for node in nodes if node.op == "get_attr"]
    constant_inputs = [node for node in inputs if node not in varying]
    # A parameter that the gradient does not depend on has a row of zeros, which is computed from the point alone.
    residuals = [
        node
        for node in [*constant_inputs, *fixed]
        if node in result or any(user in varying for user in node.users if user.op == "call_function")
    ]
    linearize = _program(whole, constant_inputs, [*attributes, *fixed], [*at_point, *residuals])
    return linearize, _program(whole, [*residuals, *direction], [*attributes, *moving], result)


def _program(
    owner: fx.GraphModule, inputs: Iterable[fx.Node], body: Iterable[fx.Node], outputs: Iterable[fx.Node]
) -> fx.GraphModule:
    """Copies some nodes of a program into one of their own."""
    graph = fx.Graph()
    copies = {node: graph.placeholder(f"input_{index}") for index, node in enumerate(inputs)}
    for node in body:
        copies[node] = graph.node_copy(node, lambda each: copies[each])
    graph.output([copies[node] for node in outputs])
    graph.eliminate_dead_code()
    return fx.GraphModule(owner, graph)
