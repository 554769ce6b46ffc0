"""Every registered algorithm keeps the contract."""

import pytest

from ibaml.algorithms import ALGORITHMS, Algorithm, make_algorithm
from ibaml.testing import AlgorithmContract


class TestGradientBased(AlgorithmContract):
    @pytest.fixture(params=[name for name in ALGORITHMS if name != "linear_gaussian"])
    def algorithm(self, request: pytest.FixtureRequest) -> Algorithm:
        return make_algorithm(request.param)


class TestLinearGaussian(AlgorithmContract):
    adapt = "2.*"

    @pytest.fixture(params=["full", "diagonal"])
    def algorithm(self, request: pytest.FixtureRequest) -> Algorithm:
        return make_algorithm("linear_gaussian", covariance=request.param)
