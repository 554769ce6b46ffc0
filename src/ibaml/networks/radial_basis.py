"""Curves through a few centres: the features of a Gaussian process that few inputs span."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import nn

from ibaml.checks import require_positive_int
from ibaml.networks.layers import check_input, initialize_weights
from ibaml.types import Tensor

_NUGGET = 1e-4
"""Added to the variance at each centre, so that near centres leave the factor well conditioned in float32."""


class RadialBasis(nn.Module):
    """Smooth functions of the inputs around a few centres, the inputs themselves, and a linear head on both.

    With the Matern kernel ``k`` of smoothness 5/2, a length-scale for each input, and ``L L^T = k(C, C) + 1e-4 I`` at
    the centres ``C``, the functions are ``L^-1 k(C, x)``. With independent weights of unit variance their sum has the
    covariance ``k(x, C) (k(C, C) + 1e-4 I)^-1 k(C, x')``: Nystroem's approximation of the Gaussian process with kernel
    ``k`` (Rasmussen and Williams 2006, section 8.1). So a linear-Gaussian head on them is a Gaussian process whose cost
    grows with the number of centres only.

    Attributes:
        norm: ``"none"``.
        input_shape: Shape of one input.
        num_outputs: Number of outputs.
        centres: ``[num_centres, num_inputs]``; drawn at random, to be placed among the data.
        log_length_scale: Natural logarithm of the length-scale of each input, ``[num_inputs]``; starts at zero.

    Args:
        num_outputs: Number of outputs.
        input_shape: Shape of one input, or its number of features.
        num_centres: Number of centres.
        zero_head: Whether the last layer starts at zero.
        generator: Source of the initial weights; ``None`` uses torch's global one.

    Raises:
        TypeError: If a count is not an int.
        ValueError: If a count is below one.

    Examples:
        >>> network = RadialBasis(1, input_shape=2, num_centres=8)
        >>> network(torch.zeros(10, 2)).shape
        torch.Size([10, 1])
    """

    def __init__(
        self,
        num_outputs: int,
        *,
        input_shape: int | Sequence[int],
        num_centres: int,
        zero_head: bool = True,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        require_positive_int("num_outputs", num_outputs)
        require_positive_int("num_centres", num_centres)
        self.norm = "none"
        self.input_shape = (input_shape,) if isinstance(input_shape, int) else tuple(input_shape)
        self.num_outputs = num_outputs
        self.constructor_arguments: dict[str, Any] = {
            "num_outputs": num_outputs,
            "input_shape": self.input_shape,
            "num_centres": num_centres,
            "zero_head": zero_head,
        }
        for size in self.input_shape:
            require_positive_int("input_shape", size)
        num_inputs = torch.Size(self.input_shape).numel()
        self.centres = nn.Parameter(torch.randn(num_centres, num_inputs, generator=generator))
        self.log_length_scale = nn.Parameter(torch.zeros(num_inputs))
        self.head = nn.Linear(num_centres + num_inputs, num_outputs)
        self._inverse: Tensor | None
        self.register_buffer("_inverse", None)
        initialize_weights(self, self.head, nonlinearity="tanh", generator=generator, zero_head=zero_head)

    def forward(self, x: Float[Tensor, "examples ..."]) -> Float[Tensor, "examples outputs"]:
        """Computes outputs.

        Args:
            x: Inputs, shape ``[examples, *input_shape]``.

        Returns:
            Outputs, shape ``[examples, num_outputs]``.

        Raises:
            ValueError: If the inputs have another shape than the network was built for.
        """
        check_input(x, self.input_shape, min_examples=1)
        flat = x.reshape(x.shape[0], -1)
        features = radial_features(flat, self.centres, self.log_length_scale, inverse=self._inverse)
        return self.head(torch.cat([features, flat], 1))

    def fix_features(self) -> None:
        """Keeps ``L^-1`` at the present centres and lengths, so that features take products alone, for an export."""
        scaled = self.centres.detach() * torch.exp(-self.log_length_scale.detach())
        factor = _factor(scaled.double())
        identity = torch.eye(len(factor), dtype=factor.dtype, device=factor.device)
        self.register_buffer("_inverse", torch.linalg.solve_triangular(factor, identity, upper=False))


def radial_features(x: Tensor, centres: Tensor, log_length_scale: Tensor, *, inverse: Tensor | None = None) -> Tensor:
    """Returns ``L^-1 k(C, x)`` for each input, ``[num_examples, num_centres]``; see ``RadialBasis``.

    Args:
        x: Inputs, ``[num_examples, num_inputs]``.
        centres: ``[num_centres, num_inputs]``.
        log_length_scale: Natural logarithm of a length for each input, ``[num_inputs]``.
        inverse: ``L^-1``, float64, if it is known.
    """
    shrink = torch.exp(-log_length_scale)
    scaled, centres = x * shrink, centres * shrink
    kernel = _kernel(centres, scaled)
    if inverse is not None:
        return (inverse @ kernel.double()).mT.to(x.dtype)
    return torch.linalg.solve_triangular(_factor(centres), kernel, upper=False).mT


def _factor(centres: Tensor) -> Tensor:
    nugget = _NUGGET * torch.eye(len(centres), dtype=centres.dtype, device=centres.device)
    return torch.linalg.cholesky(_kernel(centres, centres) + nugget)


def _kernel(left: Tensor, right: Tensor) -> Tensor:
    """Returns ``(1 + u + u^2 / 3) exp(-u)``, ``u = sqrt(5) ||x - x'||``, ``[num_left, num_right]``."""
    # Differences, not the expanded square: it cancels where inputs are near each other in float32.
    squares = ((left.unsqueeze(1) - right.unsqueeze(0)) ** 2).sum(-1)
    # The root has no derivative at zero, where that of the whole by any parameter is zero.
    positive = squares > 0
    u = torch.sqrt(5 * torch.where(positive, squares, 1.0))
    return torch.where(positive, (1 + u + u**2 / 3) * torch.exp(-u), 1.0)


def spread_out(x: Tensor, num_centres: int, log_length_scale: Tensor) -> Tensor:
    """Chooses centres among inputs: each time the one of which those before say least.

    That is the order of pivots in the Cholesky factorisation of ``k(x, x)``, with which Nystroem's approximation has
    the smallest error that a greedy choice gives (Fine and Scheinberg 2001). It stops where nothing is left to say.

    Args:
        x: Inputs, ``[num_examples, num_inputs]``.
        num_centres: How many at the most.
        log_length_scale: Natural logarithm of a length for each input, ``[num_inputs]``.

    Returns:
        ``[num_chosen, num_inputs]``, at least one of them.

    Examples:
        >>> spread_out(torch.linspace(0, 1, 5).unsqueeze(1), 2, torch.zeros(1)).flatten()
        tensor([0., 1.])
    """
    scaled = x * torch.exp(-log_length_scale)
    left = torch.ones(x.shape[0], dtype=x.dtype, device=x.device)
    columns: list[Tensor] = []
    chosen: list[int] = []
    while len(chosen) < num_centres:
        pivot = int(left.argmax())
        if chosen and float(left[pivot]) < 10 * _NUGGET:
            break
        column = _kernel(scaled, scaled[pivot : pivot + 1])[:, 0]
        column = (column - sum((known * known[pivot] for known in columns), torch.zeros_like(column))) / torch.sqrt(
            left[pivot]
        )
        columns.append(column)
        chosen.append(pivot)
        left = (left - column**2).clamp_min(0)
    return x[chosen]
