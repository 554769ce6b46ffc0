"""Multilayer perceptron for inputs of any shape."""

import math
from collections.abc import Sequence
from typing import Any, Literal, TypeAlias

import torch
from jaxtyping import Float
from torch import nn

from ibaml.checks import require_positive_int
from ibaml.networks.layers import Nonlinearity, NormPolicy, check_input, check_norm, initialize_weights, vector_norm
from ibaml.types import Tensor

Activation: TypeAlias = Literal["relu", "tanh", "gelu", "silu"]
"""Activation of the hidden layers."""

# GELU and SiLU approach ReLU and have no gain of their own in torch.
_ACTIVATIONS: dict[Activation, tuple[type[nn.Module], Nonlinearity]] = {
    "relu": (nn.ReLU, "relu"),
    "tanh": (nn.Tanh, "tanh"),
    "gelu": (nn.GELU, "relu"),
    "silu": (nn.SiLU, "relu"),
}


class MLP(nn.Module):
    """Fully connected layers, each followed by normalisation and an activation, and a linear head.

    Inputs of any shape are flattened. ``"relu"`` has no curvature of its own; the other activations are smooth and
    give a loss whose Hessian exists everywhere.

    Attributes:
        norm: Normalisation policy; ``"batch"`` makes predictions transductive, see
            [`NormPolicy`][ibaml.networks.NormPolicy]. ``"group"`` is layer normalisation here.
        input_shape: Shape of one input.
        num_outputs: Number of outputs.

    Args:
        num_outputs: Number of outputs: ways for classification, target dimensions for regression.
        input_shape: Shape of one input, or its number of features.
        hidden_sizes: Widths of the hidden layers; empty for a linear model.
        activation: Activation after every hidden layer.
        norm: Normalisation policy.
        zero_head: Whether the last layer starts at zero, so that all classes are equal before adaptation.
        skip_inputs: Whether the head sees the inputs beside the last features, so that adapting the head alone can
            learn any linear function.
        generator: Source of the initial weights; ``None`` uses torch's global one.

    Raises:
        TypeError: If a count is not an int.
        ValueError: If a count is below one, or ``activation`` or ``norm`` is unknown.

    Examples:
        >>> network = MLP(1, input_shape=1, hidden_sizes=(40, 40), activation="tanh")
        >>> network(torch.zeros(10, 1)).shape
        torch.Size([10, 1])
    """

    def __init__(
        self,
        num_outputs: int,
        *,
        input_shape: int | Sequence[int],
        hidden_sizes: Sequence[int] = (40, 40),
        activation: Activation = "relu",
        norm: NormPolicy = "none",
        zero_head: bool = False,
        skip_inputs: bool = False,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        require_positive_int("num_outputs", num_outputs)
        check_norm(norm)
        if activation not in _ACTIVATIONS:
            raise ValueError(f"activation must be one of {', '.join(map(repr, _ACTIVATIONS))}, got {activation!r}.")
        self.norm: NormPolicy = norm
        self.input_shape = (input_shape,) if isinstance(input_shape, int) else tuple(input_shape)
        self.num_outputs = num_outputs
        self.constructor_arguments: dict[str, Any] = {
            "num_outputs": num_outputs,
            "input_shape": self.input_shape,
            "hidden_sizes": tuple(hidden_sizes),
            "activation": activation,
            "norm": norm,
            "zero_head": zero_head,
            "skip_inputs": skip_inputs,
        }
        for size in self.input_shape:
            require_positive_int("input_shape", size)
        for size in hidden_sizes:
            require_positive_int("hidden_sizes", size)

        activation_type, nonlinearity = _ACTIVATIONS[activation]
        layers: list[nn.Module] = []
        width = math.prod(self.input_shape)
        for size in hidden_sizes:
            layers += [nn.Linear(width, size), vector_norm(norm, size), activation_type()]
            width = size
        self._min_examples = 2 if norm == "batch" and hidden_sizes else 1
        self.features = nn.Sequential(*layers)
        self.skip_inputs = skip_inputs
        self.head = nn.Linear(width + (math.prod(self.input_shape) if skip_inputs else 0), num_outputs)
        initialize_weights(self, self.head, nonlinearity=nonlinearity, generator=generator, zero_head=zero_head)

    def forward(self, x: Float[Tensor, "examples ..."]) -> Float[Tensor, "examples outputs"]:
        """Computes logits or regression outputs.

        Args:
            x: Inputs, shape ``[examples, *input_shape]``.

        Returns:
            Outputs, shape ``[examples, num_outputs]``.

        Raises:
            ValueError: If the inputs have another shape than the network was built for, or if ``norm="batch"`` is
                asked for statistics of a single example.
        """
        check_input(x, self.input_shape, min_examples=self._min_examples)
        flat = x.reshape(x.shape[0], -1)
        features = self.features(flat)
        return self.head(torch.cat([flat, features], 1) if self.skip_inputs else features)
