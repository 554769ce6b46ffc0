"""Every registered likelihood keeps the contract."""

import pytest

from ibaml.likelihoods import LIKELIHOODS, Gaussian, Likelihood
from ibaml.testing import LikelihoodContract


class TestRegistered(LikelihoodContract):
    @pytest.fixture(params=LIKELIHOODS)
    def likelihood(self, request: pytest.FixtureRequest) -> Likelihood:
        return LIKELIHOODS[request.param]()


class TestHeteroscedastic(LikelihoodContract):
    make = staticmethod(lambda: Gaussian(heteroscedastic=True))
