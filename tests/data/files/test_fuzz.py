"""Files from elsewhere: a seeded few of the cases of ``make faults``."""

import itertools

import pytest
from tests.campaigns.damage import BOMBS, KINDS, drop, fuzz


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_damage_is_refused_by_name_or_changes_nothing(kind, tmp_path):
    failures = [failure for failure in itertools.islice(fuzz(kind, tmp_path, seed=0), 40) if failure is not None]
    assert failures == []


@pytest.mark.parametrize("bomb", BOMBS, ids=lambda bomb: bomb.name)
def test_what_asks_for_much_is_refused_by_name(bomb, tmp_path):
    assert drop(bomb, tmp_path) is None
