"""Regularised least squares, by Cholesky in as few dimensions as there are: what heads in closed form have in common.

With inputs ``X`` (``[num_rows, rank]``), targets ``Y`` and ``s2``, the minimiser of ``||Y - X W||^2 / s2 + ||W||^2`` is

    W = (I + X^T X / s2)^-1 X^T Y / s2   (rank x rank)   = X^T (I + X X^T / s2)^-1 Y / s2   (num_rows x num_rows)

and both matrices have one determinant. All is meant for float64: precisions of data and prior may differ by orders of
magnitude, and these matrices have a condition number of the order of their ratio.
"""

import math
from typing import NamedTuple

import torch

from ibaml.types import Tensor


class LeastSquares(NamedTuple):
    """The minimiser, and how it was found. Leading axes are problems.

    Attributes:
        weights: ``W``, ``[..., rank, num_columns]``.
        residual: ``Y - X W``, ``[..., num_rows, num_columns]``.
        cholesky: Factor of the smaller of the two matrices, ``[..., n, n]``.
    """

    weights: Tensor
    residual: Tensor
    cholesky: Tensor

    def nll(self, variance: Tensor) -> Tensor:
        """Returns ``-log N(Y; 0, X X^T + s2 I)``, summed over columns.

        The exponent is ``||Y - X W||^2 / s2 + ||W||^2``: sums of squares, without the cancellation of other forms.

        Args:
            variance: ``s2``, ``[...]``.
        """
        num_rows, num_columns = self.residual.shape[-2:]
        squares = (self.residual**2).sum((-2, -1)) / variance + (self.weights**2).sum((-2, -1))
        constant = num_rows * torch.log(2 * math.pi * variance)
        return 0.5 * (squares + num_columns * (log_determinant(self.cholesky) + constant))


def least_squares(inputs: Tensor, targets: Tensor, variance: Tensor) -> LeastSquares:
    """Solves one problem or several.

    Args:
        inputs: ``X``, ``[..., num_rows, rank]``.
        targets: ``Y``, ``[..., num_rows, num_columns]``.
        variance: ``s2``, ``[...]``.

    Cost:
        ``num_rows rank min(num_rows, rank)`` and a Cholesky factorisation of ``min(num_rows, rank)`` rows.
    """
    variance = variance[..., None, None]
    # Divided last: problems that differ in s2 alone share the product.
    if is_dual(inputs):
        cholesky = cholesky_or_nan(plus_identity(inputs @ inputs.mT / variance))
        weights = inputs.mT @ (torch.cholesky_solve(targets, cholesky) / variance)
    else:
        cholesky = cholesky_or_nan(plus_identity(inputs.mT @ inputs / variance))
        weights = torch.cholesky_solve(inputs.mT @ targets / variance, cholesky)
    return LeastSquares(weights, targets - inputs @ weights, cholesky)


def is_dual(inputs: Tensor) -> bool:
    """Whether there are fewer rows than dimensions."""
    return inputs.shape[-2] < inputs.shape[-1]


def stationarity(solution: LeastSquares, inputs: Tensor, targets: Tensor, variance: Tensor) -> Tensor:
    """Returns the norm of half the gradient, ``W - X^T (Y - X W) / s2``, relative to that at ``W = 0``, detached."""
    inputs, targets, variance = inputs.detach(), targets.detach(), variance.detach()[..., None, None]
    weights, residual = solution.weights.detach(), solution.residual.detach()
    norm = torch.linalg.vector_norm(weights - inputs.mT @ residual / variance)
    first = torch.linalg.vector_norm(inputs.mT @ targets / variance)
    # Targets of zero leave nothing to solve.
    return norm / first.clamp_min(torch.finfo(first.dtype).tiny)


def gaussian_nll(error: Tensor, covariance: Tensor) -> Tensor:
    """Returns ``-log N(error; 0, covariance)`` in nats.

    Args:
        error: ``[..., n]``.
        covariance: ``[..., n, n]``.
    """
    cholesky = cholesky_or_nan(covariance)
    whitened = torch.linalg.solve_triangular(cholesky, error.unsqueeze(-1), upper=False)
    constant = error.shape[-1] * math.log(2 * math.pi)
    return 0.5 * ((whitened**2).sum((-2, -1)) + log_determinant(cholesky) + constant)


def log_determinant(cholesky: Tensor) -> Tensor:
    """Returns the logarithm of the determinant of the matrix with some Cholesky factor."""
    return 2 * torch.log(torch.diagonal(cholesky, dim1=-2, dim2=-1)).sum(-1)


def plus_identity(matrix: Tensor) -> Tensor:
    """Returns ``I + matrix``."""
    return matrix + torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)


def inverse_of_factor(cholesky: Tensor) -> Tensor:
    """Returns the inverse of a lower triangular matrix, ``[..., n, n]``."""
    identity = torch.eye(cholesky.shape[-1], dtype=cholesky.dtype, device=cholesky.device)
    return torch.linalg.solve_triangular(cholesky, identity.expand_as(cholesky), upper=False)


def cholesky_in_products(matrix: Tensor) -> Tensor:
    """Returns the Cholesky factor of a small matrix by one product for each column; see ``Head.in_products``."""
    rows = torch.arange(matrix.shape[-1], device=matrix.device)
    columns: list[Tensor] = []
    for index in range(matrix.shape[-1]):
        column = matrix[..., index] * torch.rsqrt(matrix[..., index, index]).unsqueeze(-1)
        columns.append(torch.where(rows >= index, column, 0.0))
        matrix = matrix - columns[-1].unsqueeze(-1) * columns[-1].unsqueeze(-2)
    return torch.stack(columns, -1)


def cholesky_or_nan(matrix: Tensor) -> Tensor:
    """Returns the Cholesky factor; NaN for a matrix that is not positive definite, where torch would raise."""
    factor, info = torch.linalg.cholesky_ex(matrix)
    return torch.where((info == 0)[..., None, None], factor, math.nan)
