"""Every registered algorithm keeps the contract."""

import pytest

from ibaml.algorithms import ALGORITHMS, Algorithm, make_algorithm
from ibaml.testing import AlgorithmContract


class TestRegistered(AlgorithmContract):
    @pytest.fixture(params=ALGORITHMS)
    def algorithm(self, request: pytest.FixtureRequest) -> Algorithm:
        return make_algorithm(request.param)
