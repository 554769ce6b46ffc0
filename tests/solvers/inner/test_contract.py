"""Every registered inner solver keeps the contract."""

import pytest

from ibaml.solvers.inner import INNER_SOLVERS, InnerSolver
from ibaml.testing import InnerSolverContract


class TestRegistered(InnerSolverContract):
    @pytest.fixture(params=INNER_SOLVERS)
    def solver(self, request: pytest.FixtureRequest) -> InnerSolver:
        return INNER_SOLVERS[request.param]()
