import sys

import pytest

from ibaml.optional import require


def test_a_missing_package_is_named_with_the_extra_that_has_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.ensemble", None)
    with pytest.raises(ImportError, match=r"needs scikit-learn, which is not installed: pip install 'ibaml\[exp"):
        require("sklearn.ensemble", "scikit-learn", "experiments")
