"""Every registered algorithm keeps the contract."""

from typing import Any

import pytest

from ibaml.algorithms import ALGORITHMS, Algorithm, make_algorithm
from ibaml.testing import AlgorithmContract

REGRESSION: list[tuple[str, dict[str, Any]]] = [
    ("linear_gaussian", {}),
    ("linear_gaussian", {"covariance": "diagonal", "outer": "expected_nll"}),
    ("linear_gaussian", {"prior": "full", "outer": "marginal"}),
    ("gp", {}),
    ("generalized_linear", {}),
    ("generalized_linear", {"prior": "full", "outer": "marginal"}),
    ("generalized_linear", {"prior": "low_rank", "outer": "expected_nll", "centre": True}),
]
CLASSIFICATION: list[tuple[str, dict[str, Any]]] = [
    ("softmax", {}),
    ("softmax", {"outer": "predictive_nll", "centre": True, "prior": "low_rank"}),
    ("gaussian_classes", {}),
    ("gaussian_classes", {"tied": False}),
    ("prototypes", {}),
    ("ridge", {}),
    ("neighbours", {}),
]


class TestGradientBased(AlgorithmContract):
    @pytest.fixture(params=[name for name, record in ALGORITHMS.items() if not record.uses_features])
    def algorithm(self, request: pytest.FixtureRequest) -> Algorithm:
        return make_algorithm(request.param)


class TestRegressionHeads(AlgorithmContract):
    adapt = "2.*"

    @pytest.fixture(params=REGRESSION, ids=str)
    def algorithm(self, request: pytest.FixtureRequest) -> Algorithm:
        return make_algorithm(request.param[0], **request.param[1])


class TestClassificationHeads(AlgorithmContract):
    adapt = "2.*"
    likelihood = "categorical"

    @pytest.fixture(params=CLASSIFICATION, ids=str)
    def algorithm(self, request: pytest.FixtureRequest) -> Algorithm:
        return make_algorithm(request.param[0], **request.param[1])


def test_every_head_is_tested() -> None:
    heads = {name for name, record in ALGORITHMS.items() if record.uses_features}
    assert heads == {name for name, _ in REGRESSION + CLASSIFICATION}
