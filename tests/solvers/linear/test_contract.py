"""Every registered linear solver keeps the contract."""

import pytest

from ibaml.solvers.linear import LINEAR_SOLVERS, LinearSolver
from ibaml.testing import LinearSolverContract


class TestRegistered(LinearSolverContract):
    @pytest.fixture(params=LINEAR_SOLVERS)
    def solver(self, request: pytest.FixtureRequest) -> LinearSolver:
        return LINEAR_SOLVERS[request.param]()
