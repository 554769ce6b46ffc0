"""Every registered inner solver keeps the contract."""

import pytest

from ibaml.solvers.inner import INNER_SOLVERS, GradientDescent, InnerSolver
from ibaml.testing import InnerSolverContract


class TestRegistered(InnerSolverContract):
    @pytest.fixture(params=INNER_SOLVERS)
    def solver(self, request: pytest.FixtureRequest) -> InnerSolver:
        return INNER_SOLVERS[request.param]()


class TestMomentum(InnerSolverContract):
    make = staticmethod(lambda: GradientDescent(momentum=0.5))
