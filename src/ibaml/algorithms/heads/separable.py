"""Inner problems of any nll that is a sum over targets and examples, each a function of one output that tasks adapt.

The outputs of target ``k`` are ``f_k = Z m_k + X_k e_k`` with whitened inputs ``X_k = Z C_k`` and weights ``e_k``, and
where the nll has the second derivatives ``h`` the Newton matrix is ``A_k = I + X_k^T diag(h_k) X_k``, one for each
target. For fewer examples than weights it is solved in as many dimensions as there are examples,

    A^-1 = I - V^T (I + V V^T)^-1 V        V = diag(h)^1/2 X

which is Bayesian linear regression with a noise of variance ``1 / h`` for each example.
"""

import dataclasses
from collections.abc import Sequence

import torch

from ibaml.algorithms.heads.least_squares import cholesky_or_nan, is_dual, plus_identity
from ibaml.algorithms.heads.newton import Local, WhitenedWeights, newton
from ibaml.likelihoods.mixture import NumberLikelihood
from ibaml.types import Params, Tensor

_SAFE_STEPS = 10


@dataclasses.dataclass(frozen=True)
class SeparableLoss:
    """The nll of a likelihood in one output for each target, summed over examples and targets; a ``Loss``.

    Its parameters are the outputs that tasks do not adapt, none for most likelihoods, and those of the likelihood, each
    ``[num_targets]``, in the order of its ``initial_parameters``.

    Attributes:
        likelihood: The likelihood.
        majorized: Whether the curvature of real targets is no less than ``slope / (f - y)``. A step then minimises a
            parabola that lies above an nll such as Student's, so that outliers, which pull by ever less the further
            they are, are left out step by step (Lange et al. 1989): safe, but slow near the solution.
    """

    likelihood: NumberLikelihood
    majorized: bool = False

    def __call__(self, outputs: Tensor, targets: Tensor, *parameters: Tensor) -> Local:
        """Returns the nll, its slope, and a curvature for steps, which is not negative.

        Args:
            outputs: ``[..., num_targets, num_examples]``.
            targets: In a shape that ``outputs`` expands.
            *parameters: ``[..., num_given, num_examples]``, then ``[..., num_targets]`` each.
        """
        targets = targets.expand_as(outputs)
        slope, curvature = self.derivatives(outputs, targets, *parameters)
        if self.majorized:
            error = outputs - targets
            is_apart = error.abs() > torch.finfo(error.dtype).eps * targets.abs()
            above = slope / torch.where(is_apart, error, 1.0)
            curvature = torch.where(is_apart, torch.maximum(curvature, above), curvature)
        return Local(self.total(outputs, targets, *parameters), -slope, curvature.clamp_min(0))

    def total(self, outputs: Tensor, targets: Tensor, *parameters: Tensor) -> Tensor:
        """Returns the nll, summed over the last two axes; arguments as of a call."""
        return self.likelihood.nll(*self._arguments(outputs, targets, parameters)).sum(-1)

    def derivatives(self, outputs: Tensor, targets: Tensor, *parameters: Tensor) -> tuple[Tensor, Tensor]:
        """Returns first and second derivatives in the outputs, of any sign; arguments as of a call."""
        slope, curvature = self.likelihood.derivatives(*self._arguments(outputs, targets, parameters))
        return slope.mT, curvature.mT

    def start(self, problem: "OfWeights", offset: Tensor, targets: Tensor, *parameters: Tensor) -> Tensor:
        """Returns weights to start Newton's method from.

        Regularised least squares to the outputs that make the targets likeliest, with the curvature there. For real
        targets a few safe steps from there leave out outliers: from far away all targets would look like them.
        """
        likeliest = self.likelihood.likeliest(targets)
        start = targets.new_zeros(*targets.shape[:-1], problem.features.shape[-1])
        curvature = self.derivatives(likeliest, targets, *parameters)[1].clamp_min(0)
        residual = problem.residual(start, curvature * (likeliest - offset))
        start = start - problem.solve(problem.factorize(curvature), residual)
        if self.likelihood.target_kind != "real":
            return start
        safe = dataclasses.replace(self, majorized=True)
        return newton(problem, safe, offset, targets, *parameters, max_steps=_SAFE_STEPS, tolerance=1e-3, start=start)[
            0
        ]

    def _arguments(
        self, outputs: Tensor, targets: Tensor, parameters: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor, Params]:
        """Returns all outputs, the targets and the likelihood's parameters as a likelihood takes them."""
        # All have the leading axes of tasks, and outputs maybe one more.
        given, *values = parameters
        given = given if given.ndim == outputs.ndim else given.unsqueeze(-3)
        both = torch.cat([outputs, given.expand(*outputs.shape[:-2], *given.shape[-2:])], -2)
        own = {
            name: value.reshape(*value.shape[:-1], *(1 for _ in range(outputs.ndim - value.ndim)), value.shape[-1])
            for name, value in zip(self.likelihood.initial_parameters(), values, strict=True)
        }
        return both.mT, targets.mT, own


class OfWeights(WhitenedWeights):
    """A ``Problem`` whose Newton matrix has a block for each target."""

    __slots__ = ()

    def factorize(self, curvature: Tensor) -> tuple[Tensor, Tensor]:
        """Returns ``V``, and the factor of ``I + V V^T`` or of ``I + V^T V``, whichever is smaller; ``h >= 0``."""
        # A root has no derivative at zero, where that of V does not matter.
        is_curved = curvature > 0
        root = torch.where(is_curved, torch.where(is_curved, curvature, 1.0).sqrt(), 0.0)
        rows = root.unsqueeze(-1) * self.features
        return rows, cholesky_or_nan(plus_identity(rows @ rows.mT if is_dual(rows) else rows.mT @ rows))

    def solve(self, factors: Sequence[Tensor], right: Tensor) -> Tensor:
        """See ``Problem``."""
        rows, factor = factors
        right = right.unsqueeze(-1)
        if is_dual(rows):
            right = right - rows.mT @ torch.cholesky_solve(rows @ right, factor)
        else:
            right = torch.cholesky_solve(right, factor)
        return right.squeeze(-1)

    def solve_at(self, curvature: Tensor, right: Tensor) -> Tensor:
        """Returns ``A^-1 right`` for curvatures of any sign: at a minimum of the inner loss ``A`` is positive.

        Args:
            curvature: ``h``, ``[num_targets, num_examples]``.
            right: ``[num_targets, rank]``.
        """
        weighted, right = curvature.unsqueeze(-1) * self.features, right.unsqueeze(-1)
        if is_dual(weighted):
            matrix = plus_identity(weighted @ self.features.mT)
            return (right - self.features.mT @ torch.linalg.solve(matrix, weighted @ right)).squeeze(-1)
        return torch.linalg.solve(plus_identity(self.features.mT @ weighted), right).squeeze(-1)
