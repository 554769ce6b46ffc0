"""The contract of inner solvers accepts a foreign one and finds what is wrong with a broken one."""

import dataclasses
from typing import Any

import pytest

from ibaml import tree
from ibaml.solvers.inner import GradientDescent
from ibaml.solvers.inner.base import check_steps, iterate
from ibaml.testing import InnerSolverContract, failures
from ibaml.types import InnerSolution


@dataclasses.dataclass(frozen=True, kw_only=True)
class Nesterov:
    """An inner solver of one's own: accelerated gradient descent."""

    num_steps: int = 5
    learning_rate: float = 0.1

    def __post_init__(self) -> None:
        check_steps(self.num_steps, self.learning_rate)

    def __call__(
        self,
        loss: Any,
        init: Any,
        /,
        *,
        geometry: Any = None,
        num_differentiable_steps: int | None = None,
        with_grad_norm: bool = True,
    ) -> InnerSolution:
        def update(velocity: Any, gradient: Any, value: Any, step: int) -> tuple[Any, Any]:
            velocity = tree.axpy(0.3, velocity, gradient)
            return tree.axpy(-self.learning_rate, tree.axpy(0.3, velocity, gradient), value), velocity

        return iterate(
            loss,
            init,
            update,
            tree.zeros_like(init),
            num_steps=self.num_steps,
            learning_rate=self.learning_rate,
            num_differentiable_steps=num_differentiable_steps,
            with_grad_norm=with_grad_norm,
        )


def test_inner_solver_of_ones_own() -> None:
    class Mine(InnerSolverContract):
        make = Nesterov

    assert failures(Mine) == {}


@dataclasses.dataclass(frozen=True, kw_only=True)
class KeepsGraphs(GradientDescent):
    def __call__(self, loss: Any, init: Any, /, **options: Any) -> InnerSolution:
        return super().__call__(loss, init, **{**options, "num_differentiable_steps": None})


@dataclasses.dataclass(frozen=True, kw_only=True)
class StaleNorm(GradientDescent):
    def __call__(self, loss: Any, init: Any, /, **options: Any) -> InnerSolution:
        solution = super().__call__(loss, init, **options)
        return solution._replace(grad_norm=0.9 * solution.grad_norm)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Detached(GradientDescent):
    def __call__(self, loss: Any, init: Any, /, **options: Any) -> InnerSolution:
        solution = super().__call__(loss, init, **options)
        return solution._replace(value=tree.detach(solution.value))


@pytest.mark.parametrize(
    ("solver", "test"),
    [
        (KeepsGraphs, "test_memory_does_not_grow_with_the_steps_outside_a_derivative"),
        (KeepsGraphs, "test_no_differentiable_step_is_the_identity_in_the_start"),
        (StaleNorm, "test_gradient_norm_is_that_at_the_value"),
        (Detached, "test_derivatives_through_the_steps_equal_central_differences"),
        (lambda: GradientDescent(learning_rate=1e-6), "test_reaches_the_optimum_of_strictly_convex_quadratics"),
    ],
)
def test_broken_inner_solver_is_found(solver: Any, test: str) -> None:
    class Broken(InnerSolverContract):
        make = staticmethod(solver)

    assert failures(Broken, only=test)
