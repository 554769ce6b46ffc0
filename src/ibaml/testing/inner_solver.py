"""What every inner solver promises."""

import dataclasses
import math
from typing import Any, ClassVar, NamedTuple

import pytest
import torch

from ibaml import tree
from ibaml.solvers.inner import InnerSolver
from ibaml.testing.base import (
    DIFFERENCE,
    assert_close,
    assert_json_round_trip,
    central_difference,
    draw,
    fields_of,
    generator,
    with_settings,
)
from ibaml.types import InnerSolution, PyTree, Tensor

_NUM_STEPS = 500
_SPECTRUM = (4.0, 8.0)
_START_DISTANCE = 0.1


class _Problem(NamedTuple):
    """``(x - target)^T A (x - target) / 2`` in four unknowns, and its geometry (``ibaml.solvers.inner.Geometry``)."""

    matrix: Tensor
    target: Tensor
    start: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        return 0.5 * (x - self.target) @ self.matrix @ (x - self.target)

    def bent(self, x: Tensor) -> Tensor:
        """The same with a quartic term: its Hessian changes from place to place."""
        return self(x) + 0.1 * ((x * (1 + self.target)) ** 4).sum()

    def scale(self) -> Tensor:
        return torch.full_like(self.target, 0.1)

    def curvature(self) -> Tensor:
        return torch.zeros_like(self.target)

    def natural_direction(self, value: Tensor, gradient: Tensor) -> Tensor:
        return torch.linalg.solve(self.matrix, gradient)


class _InTree(NamedTuple):
    """The geometry of a problem whose unknowns are the leaves of a tree."""

    problem: _Problem
    like: PyTree

    def scale(self) -> PyTree:
        return tree.ravel(self.like)[1](self.problem.scale())

    def curvature(self) -> PyTree:
        return tree.ravel(self.like)[1](self.problem.curvature())

    def natural_direction(self, value: PyTree, gradient: PyTree) -> PyTree:
        return tree.ravel(self.like)[1](self.problem.natural_direction(tree.ravel(value)[0], tree.ravel(gradient)[0]))


class InnerSolverContract:
    """Convex problems against their optimum, and derivatives through the steps against central differences.

    The quadratic problems have four unknowns, Hessians with eigenvalues from 4 to 8, and starts about 0.2 from the
    optimum. The suite gives every solver the geometry of the problem (units of 0.1, Newton's direction) and sets a
    setting named ``num_steps``: to 500 where a problem is to be solved.

    Attributes:
        tolerance: Distance from the optimum, relative to that of the start.
    """

    tolerance: ClassVar[float] = 1e-6

    @staticmethod
    def make() -> InnerSolver:
        """Returns the solver to test."""
        raise NotImplementedError

    @pytest.fixture
    def solver(self) -> InnerSolver:
        """The solver to test."""
        return self.make()

    def test_reaches_the_optimum_of_strictly_convex_quadratics(self, solver: InnerSolver) -> None:
        """Random problems, sixteen at once under ``torch.func.vmap``."""
        long = with_settings(solver, num_steps=_NUM_STEPS)

        def solve(problem: _Problem) -> tuple[Tensor, Tensor]:
            solution = long(problem, problem.start, geometry=problem)
            return solution.value, solution.grad_norm

        problems = _problems(16)
        values, norms = torch.func.vmap(solve)(problems)
        start = torch.linalg.vector_norm(problems.start - problems.target, dim=-1)
        distance = torch.linalg.vector_norm(values - problems.target, dim=-1)
        assert (distance <= self.tolerance * start).all(), f"distances {distance}, at the start {start}"
        assert (norms <= 1.01 * _SPECTRUM[1] * self.tolerance * start).all()

    def test_gradient_norm_is_that_at_the_value(self, solver: InnerSolver) -> None:
        """``grad_norm`` against the gradient of the loss there, and the number of steps against the settings."""
        problem = _problem()
        solution = _few(solver)(problem.bent, problem.start, geometry=problem)
        expected = torch.linalg.vector_norm(torch.func.grad(problem.bent)(solution.value))
        assert_close(solution.grad_norm, expected)
        assert solution.num_steps == _few(solver).num_steps

    def test_gradient_norm_can_be_spared(self, solver: InnerSolver) -> None:
        """It is then NaN, and the value the same."""
        problem = _problem()
        with_norm = _few(solver)(problem.bent, problem.start, geometry=problem)
        without = _few(solver)(problem.bent, problem.start, geometry=problem, with_grad_norm=False)
        assert torch.isnan(without.grad_norm)
        assert torch.equal(without.value, with_norm.value)

    def test_derivatives_through_the_steps_equal_central_differences(self, solver: InnerSolver) -> None:
        """In the start and in a parameter of the loss."""
        problem, weights = _problem(), draw(4, seed=2)

        def outer(arguments: tuple[Tensor, Tensor]) -> Tensor:
            start, target = arguments
            loss = problem._replace(target=target)
            return weights @ _few(solver)(loss.bent, start, geometry=problem).value

        at = (problem.start, problem.target)
        assert_close(torch.func.grad(outer)(at), central_difference(outer, at), DIFFERENCE)

    def test_truncation_leaves_the_value_alone(self, solver: InnerSolver) -> None:
        """``num_differentiable_steps`` is about derivatives; beyond the number of steps it does nothing."""
        problem, weights = _problem(), draw(4, seed=2)

        def outer(start: Tensor, limit: int | None) -> Tensor:
            steps = _few(solver)(problem.bent, start, geometry=problem, num_differentiable_steps=limit)
            return weights @ steps.value

        full = outer(problem.start, None)
        for limit in (0, 1, 2, 3, 10):
            assert_close(outer(problem.start, limit), full, what=f"num_differentiable_steps={limit}")
        derivative = torch.func.grad(outer)(problem.start, None)
        assert_close(torch.func.grad(outer)(problem.start, 3), derivative)
        assert_close(torch.func.grad(outer)(problem.start, 10), derivative)

    def test_no_differentiable_step_is_the_identity_in_the_start(self, solver: InnerSolver) -> None:
        """With no differentiable step the value counts as the start plus a constant."""
        problem, weights = _problem(), draw(4, seed=2)

        def outer(start: Tensor, target: Tensor) -> Tensor:
            loss = problem._replace(target=target)
            steps = _few(solver)(loss.bent, start, geometry=problem, num_differentiable_steps=0)
            return weights @ steps.value

        by_start, by_target = torch.func.grad(outer, (0, 1))(problem.start, problem.target)
        assert_close(by_start, weights)
        assert torch.equal(by_target, torch.zeros_like(by_target))

    def test_memory_does_not_grow_with_the_steps_outside_a_derivative(self, solver: InnerSolver) -> None:
        """No graph is kept where nothing asks for one, nor before the first differentiable step."""
        problem = _problem()
        solution = _few(solver)(problem.bent, problem.start, geometry=problem)
        assert not solution.value.requires_grad and not solution.grad_norm.requires_grad

        def num_nodes(num_steps: int) -> int:
            start = problem.start.clone().requires_grad_()
            steps = with_settings(solver, num_steps=num_steps)
            solution = steps(problem.bent, start, geometry=problem, num_differentiable_steps=1)
            return _num_nodes(solution.value)

        assert num_nodes(8) == num_nodes(4)

    def test_vmap_equals_the_loop(self, solver: InnerSolver) -> None:
        """Values, gradient norms and derivatives."""
        problems, weights = _problems(3), draw(4, seed=2)

        def solve(problem: _Problem) -> tuple[Tensor, Tensor]:
            solution: InnerSolution = _few(solver)(problem.bent, problem.start, geometry=problem)
            return solution.value, solution.grad_norm

        def derivative(problem: _Problem) -> Tensor:
            return torch.func.grad(lambda target: weights @ solve(problem._replace(target=target))[0])(problem.target)

        batched = torch.func.vmap(solve)(problems), torch.func.vmap(derivative)(problems)
        for index in range(3):
            single = tree.map(lambda leaf, i=index: leaf[i], problems)
            expected = solve(single), derivative(single)
            assert_close(tree.map(lambda leaf, i=index: leaf[i], batched), expected)

    def test_nested_trees_are_solved_like_their_flat_vector(self, solver: InnerSolver) -> None:
        """The inner variable may be any pytree."""
        problem = _problem()
        start = {"a": problem.start[:2], "b": [problem.start[2:3], (problem.start[3:],)]}
        solution = _few(solver)(lambda x: problem.bent(tree.ravel(x)[0]), start, geometry=_InTree(problem, start))
        flat = _few(solver)(problem.bent, problem.start, geometry=problem)
        assert_close(tree.ravel(solution.value)[0], flat.value)
        assert_close(solution.grad_norm, flat.grad_norm)
        assert type(solution.value["b"][1]) is tuple

    def test_float32_stays_float32(self, solver: InnerSolver) -> None:
        """Nothing is widened on the way."""
        problem = _Problem(*(part.float() for part in _problem()))
        solution = _few(solver)(problem, problem.start, geometry=problem)
        assert solution.value.dtype == solution.grad_norm.dtype == torch.float32

    def test_geometry_that_is_needed_is_asked_for(self, solver: InnerSolver) -> None:
        """Without a geometry a solver either works or names what it lacks."""
        problem = _problem()
        try:
            assert torch.isfinite(_few(solver)(problem, problem.start).value).all()
        except ValueError as error:
            assert "prior" in str(error), "a message says that the units come from a prior"

    def test_settings_out_of_range_are_refused(self, solver: InnerSolver) -> None:
        """Of those settings that a solver has, by their names."""
        bad: dict[str, tuple[Any, ...]] = {
            "num_steps": (0, -1),
            "learning_rate": (0.0, -0.1, math.nan, math.inf),
            "momentum": (-0.1, 1.0, math.nan),
            "betas": ((-0.1, 0.9), (0.9, 1.0)),
            "epsilon": (0.0, -1e-8),
        }
        record: Any = solver
        for name, values in bad.items():
            for value in values if name in fields_of(solver) else ():
                with pytest.raises(ValueError, match=name):
                    dataclasses.replace(record, **{name: value})
        problem = _problem()
        with pytest.raises(ValueError, match="num_differentiable_steps must be at least 0 or None, but is -1."):
            solver(problem, problem.start, geometry=problem, num_differentiable_steps=-1)

    def test_json_round_trip(self, solver: InnerSolver) -> None:
        """A solver is a record that recipes and saved models can hold."""
        assert_json_round_trip(solver)


def _few(solver: InnerSolver) -> InnerSolver:
    return with_settings(solver, num_steps=3)


def _problem(seed: int = 0) -> _Problem:
    return _Problem(*(part[0] for part in _problems(1, seed)))


def _problems(count: int, seed: int = 0) -> _Problem:
    """Random problems with a leading axis."""
    source = generator(seed)
    normal = torch.randn(count, 4, 6, generator=source, dtype=torch.float64)
    basis = torch.linalg.qr(normal[..., :4])[0]
    spectrum = torch.linspace(*_SPECTRUM, 4, dtype=torch.float64)
    target = normal[..., 4]
    return _Problem(basis @ torch.diag(spectrum) @ basis.mT, target, target + _START_DISTANCE * normal[..., 5])


def _num_nodes(value: Tensor) -> int:
    """Number of autograd nodes behind a tensor."""
    found: set[Any] = set()
    queue: list[Any] = [value.grad_fn]
    while queue:
        node = queue.pop()
        if node is not None and node not in found:
            found.add(node)
            queue.extend(parent for parent, _ in node.next_functions)
    return len(found)
