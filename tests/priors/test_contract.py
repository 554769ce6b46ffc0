"""Every registered family of priors keeps the contract."""

import pytest

from ibaml.priors import PRIORS, Prior
from ibaml.testing import PriorContract


class TestRegistered(PriorContract):
    @pytest.fixture(params=PRIORS)
    def prior(self, request: pytest.FixtureRequest) -> Prior:
        return PRIORS[request.param]()
