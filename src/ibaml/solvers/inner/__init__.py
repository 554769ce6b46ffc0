"""Inner solvers: ``(loss, init) -> InnerSolution``.

Each is a fixed number of steps of a first-order method on a pytree, written so that reverse-mode differentiation
passes through it (unrolled hypergradients) and so that it runs under ``torch.func.vmap``. Outside a differentiation
transform no graph is kept, so memory does not grow with the number of steps.
"""

from collections.abc import Mapping

from ibaml.solvers.inner.adam import Adam, RelativeAdam, adam
from ibaml.solvers.inner.base import Geometry, InnerSolver
from ibaml.solvers.inner.gradient_descent import GradientDescent, gradient_descent
from ibaml.solvers.inner.newton import Newton
from ibaml.solvers.inner.preconditioned import NaturalGradient, preconditioned_gradient_descent

INNER_SOLVERS: Mapping[str, type[InnerSolver]] = {
    "gradient_descent": GradientDescent,
    "adam": Adam,
    "natural_gradient": NaturalGradient,
    "relative_adam": RelativeAdam,
    "newton": Newton,
}

__all__ = [
    "INNER_SOLVERS",
    "Adam",
    "Geometry",
    "GradientDescent",
    "InnerSolver",
    "NaturalGradient",
    "Newton",
    "RelativeAdam",
    "adam",
    "gradient_descent",
    "preconditioned_gradient_descent",
]
