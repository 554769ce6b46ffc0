"""Every registered source keeps the contract with its defaults, where its data is at hand."""

import dataclasses

import pytest

from ibaml.data.sources import SOURCES, TaskSource
from ibaml.testing import TaskSourceContract


class TestRegistered(TaskSourceContract):
    @pytest.fixture(params=SOURCES)
    def source(self, request: pytest.FixtureRequest) -> TaskSource:
        record = SOURCES[request.param]
        missing = dataclasses.MISSING
        needed = [f.name for f in dataclasses.fields(record) if f.default is missing and f.default_factory is missing]
        if needed:
            pytest.skip(f"{record.__name__} has no default for {', '.join(needed)}")
        assert record.name == request.param
        return record()
