"""What every linear solver promises."""

import dataclasses
import math
from typing import Any, ClassVar

import pytest
import torch

from ibaml import tree
from ibaml.solvers.linear import LinearSolver
from ibaml.testing.base import assert_close, assert_json_round_trip, draw, fields_of, over_seeds, with_settings
from ibaml.types import LinearSolution, Tensor

_SPECTRUM = (0.5, 1.5)


class LinearSolverContract:
    """Symmetric systems against ``torch.linalg``, and honest reports where there is no solution.

    The definite systems have eigenvalues from 0.5 to 1.5 and at most twelve unknowns. Settings named ``max_steps`` and
    ``rtol`` are set by the suite: to 50 and 1e-10, unless a test says otherwise.

    Attributes:
        tolerance: Relative error of a solution.
    """

    tolerance: ClassVar[float] = 1e-8

    @staticmethod
    def make() -> LinearSolver:
        """Returns the solver to test."""
        raise NotImplementedError

    @pytest.fixture
    def solver(self) -> LinearSolver:
        """The solver to test."""
        return self.make()

    def _assert_solves(self, solution: LinearSolution, oracle: Tensor) -> None:
        assert solution.converged
        assert not solution.negative_curvature
        assert_close(tree.ravel(solution.value)[0], oracle, self.tolerance)

    def test_definite_system_equals_the_direct_solution(self, solver: LinearSolver) -> None:
        """``A x = b`` for random definite ``A``; the reported residual is the true one."""

        def check(seed: int) -> None:
            size = 1 + seed % 12
            matrix, rhs = _matrix(size, seed), draw(size, seed=seed + 1)
            solution = _tight(solver)(lambda x: matrix @ x, rhs)
            self._assert_solves(solution, torch.linalg.solve(matrix, rhs))
            assert _residual(matrix, solution, rhs) <= 10 * self.tolerance * torch.linalg.vector_norm(rhs)

        over_seeds(check)

    def test_report_consists_of_scalar_tensors(self, solver: LinearSolver) -> None:
        """Shapes and dtypes of a ``LinearSolution``."""
        solution = solver(lambda x: x, draw(5))
        assert all(record.shape == () for record in solution[1:])
        assert solution.residual_norm.dtype == torch.float64
        assert solution.num_steps.dtype == torch.int64
        assert solution.converged.dtype == solution.negative_curvature.dtype == torch.bool

    def test_right_hand_side_may_be_any_pytree(self, solver: LinearSolver) -> None:
        """A solution has the structure of the right-hand side."""
        rhs = {"w": draw(2, 3, seed=1), "nested": [draw(1, seed=2), (draw(1, seed=3),)]}
        flat, unravel = tree.ravel(rhs)
        matrix = _matrix(8)
        solution = _tight(solver)(lambda x: unravel(matrix @ tree.ravel(x)[0]), rhs)
        self._assert_solves(solution, torch.linalg.solve(matrix, flat))
        assert tree.map(lambda leaf: leaf.shape, solution.value) == tree.map(lambda leaf: leaf.shape, rhs)

    def test_zero_right_hand_side_gives_zero(self, solver: LinearSolver) -> None:
        """The trivial system is solved, not divided by its norm."""
        matrix = _matrix(4)
        solution = solver(lambda x: matrix @ x, torch.zeros(4).double())
        assert solution.converged
        assert torch.equal(solution.value, torch.zeros(4).double())
        assert solution.residual_norm == 0

    def test_preconditioner_does_not_change_the_solution(self, solver: LinearSolver) -> None:
        """A preconditioner is about speed only."""
        matrix, rhs = _matrix(8), draw(8, seed=1)
        solution = _tight(solver)(lambda x: matrix @ x, rhs, preconditioner=lambda x: 0.8 * x)
        self._assert_solves(solution, torch.linalg.solve(matrix, rhs))

    def test_vmap_equals_the_loop(self, solver: LinearSolver) -> None:
        """A batch of systems that need different numbers of steps, one of them trivial."""
        basis = torch.linalg.qr(draw(12, 12))[0]
        spectra = torch.ones(4, 12, dtype=torch.float64)
        spectra[1, ::2] = _SPECTRUM[1]
        spectra[2:] = torch.linspace(*_SPECTRUM, 12)
        matrices = basis @ torch.diag_embed(spectra) @ basis.T
        rhs = draw(4, 12, seed=1)
        rhs[3] = 0

        def solve(matrix: Tensor, b: Tensor) -> LinearSolution:
            return _tight(solver)(lambda x: {"w": matrix @ x["w"]}, {"w": b})

        batched = torch.func.vmap(solve)(matrices, rhs)
        assert batched.converged.all()
        for index, (matrix, b) in enumerate(zip(matrices, rhs, strict=True)):
            single = solve(matrix, b)
            assert_close(batched.value["w"][index], single.value["w"], 1e-9)
            assert_close(batched.residual_norm[index], single.residual_norm, 1e-9)
            assert batched.num_steps[index] == single.num_steps

    def test_one_bad_member_of_a_batch_leaves_the_others_alone(self, solver: LinearSolver) -> None:
        """NaN in one system of a batch stays there."""
        matrix, rhs = _matrix(6), draw(6, seed=1)
        factors = torch.tensor([1.0, math.nan, 1.0], dtype=torch.float64)
        batched = torch.func.vmap(lambda f: _tight(solver)(lambda x: f * (matrix @ x), rhs))(factors)
        assert batched.converged.tolist() == [True, False, True]
        for index in (0, 2):
            assert_close(batched.value[index], torch.linalg.solve(matrix, rhs), self.tolerance)

    def test_numbers_that_are_not_finite_are_reported(self, solver: LinearSolver) -> None:
        """Numerical failure is data: nothing is raised, and ``converged`` is false."""
        for bad in (math.nan, math.inf):
            product = solver(lambda x, bad=bad: bad * x, draw(4))
            assert not product.converged and not product.negative_curvature, f"matvec gives {bad}"
            rhs = solver(lambda x: x, torch.tensor([1.0, bad], dtype=torch.float64))
            assert not rhs.converged and not torch.isfinite(rhs.residual_norm), f"right-hand side has {bad}"

    def test_float32_stays_float32(self, solver: LinearSolver) -> None:
        """Single precision is solved to its own precision."""
        matrix, rhs = _matrix(8), draw(8, seed=1)
        narrow = matrix.float()
        solution = with_settings(solver, max_steps=50, rtol=1e-5)(lambda x: narrow @ x, rhs.float())
        assert solution.value.dtype == solution.residual_norm.dtype == torch.float32
        assert solution.converged
        assert_close(solution.value.double(), torch.linalg.solve(matrix, rhs), max(1e-4, self.tolerance))

    def test_convergence_is_claimed_only_where_it_is_true(self, solver: LinearSolver) -> None:
        """Whatever the matrix and the number of steps: the residual is that of the value, and no claim is false."""
        spectra = {
            "definite": torch.linspace(*_SPECTRUM, 10),
            "ill-conditioned": torch.logspace(-12, 0, 10),
            "indefinite": torch.cat([torch.linspace(-1.4, -0.6, 3), torch.linspace(0.5, 1.5, 7)]),
            "negative": torch.linspace(-1.5, -0.5, 10),
        }
        for name, spectrum in spectra.items():
            matrix, rhs = _matrix(10, spectrum=spectrum), draw(10, seed=1)
            for max_steps in (1, 3, 50):
                solution = with_settings(solver, max_steps=max_steps, rtol=1e-6)(lambda x, a=matrix: a @ x, rhs)
                case = f"{name}, max_steps={max_steps}"
                assert torch.isfinite(solution.value).all(), case
                residual = rhs - matrix @ solution.value
                size = torch.linalg.vector_norm(residual)
                # Rounding may part a recurrence from the truth where no solution was found, and only there.
                if solution.converged or name != "ill-conditioned":
                    assert_close(solution.residual_norm, size, 1e-6, case)
                # A least-squares solution counts as one: there A r vanishes beside r.
                least = torch.minimum(size / torch.linalg.vector_norm(rhs), (matrix @ residual).norm() / size)
                assert not solution.converged or least <= 1e-5, case

    def test_solution_of_a_singular_system_is_the_one_of_minimum_norm(self, solver: LinearSolver) -> None:
        """Where convergence is claimed: the pseudo-inverse solution, Zhang et al. 2023, eq. (12)."""
        spectrum = torch.linspace(*_SPECTRUM, 8)
        spectrum[[2, 5]] = 0
        matrix = _matrix(8, spectrum=spectrum)
        inside = matrix @ draw(8, seed=1)
        pseudo_inverse = torch.linalg.pinv(matrix, hermitian=True, rtol=1e-10)
        for name, rhs in {"in the range": inside, "outside": inside + draw(8, seed=2)}.items():
            solution = _tight(solver)(lambda x: matrix @ x, rhs)
            assert torch.isfinite(solution.value).all(), name
            if solution.converged:
                assert_close(solution.value, pseudo_inverse @ rhs, max(1e-6, self.tolerance), name)

    def test_settings_out_of_range_are_refused(self, solver: LinearSolver) -> None:
        """Of a step limit and a tolerance, if there are any, by the name of the argument."""
        record: Any = solver
        for name, values in {"max_steps": (0, -3), "rtol": (-1e-3, 1.0, math.nan)}.items():
            for value in values if name in fields_of(solver) else ():
                with pytest.raises(ValueError, match=name):
                    dataclasses.replace(record, **{name: value})

    def test_json_round_trip(self, solver: LinearSolver) -> None:
        """A solver is a record that recipes and saved models can hold."""
        assert_json_round_trip(solver)


def _tight(solver: LinearSolver) -> LinearSolver:
    return with_settings(solver, max_steps=50, rtol=1e-10)


def _matrix(size: int, seed: int = 0, spectrum: Tensor | None = None) -> Tensor:
    """A dense symmetric matrix with a given spectrum."""
    basis = torch.linalg.qr(draw(size, size, seed=seed))[0]
    values = torch.linspace(*_SPECTRUM, size) if spectrum is None else spectrum
    matrix = basis @ torch.diag(values.double()) @ basis.T
    return 0.5 * (matrix + matrix.T)


def _residual(matrix: Tensor, solution: LinearSolution, rhs: Tensor) -> Tensor:
    return torch.linalg.vector_norm(rhs - matrix @ solution.value)
