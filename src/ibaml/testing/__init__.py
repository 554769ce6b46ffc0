"""Contract suites: what every likelihood, prior, solver, algorithm and task source promises, as tests.

An implementation of one's own is proved by a class in a test file, which pytest collects::

    class TestMine(LikelihoodContract):
        make = MyLikelihood

``make`` is a class, or ``staticmethod`` of a function, that takes nothing and returns what is to be tested. A suite
over several implementations overrides the fixture instead, with one parameter for each. The library's own registries
are tested so. Numbers are compared in float64 with oracles: closed forms, direct solutions, central differences and,
where draws are random, five standard errors.

Needs pytest and hypothesis: ``pip install 'ibaml[test]'``.
"""

try:
    import hypothesis  # noqa: F401  # pyright: ignore[reportUnusedImport]
    import pytest
except ImportError as error:
    raise ImportError("ibaml.testing needs pytest and hypothesis: pip install 'ibaml[test]'.") from error

# Without this a failed assert in a suite would not say what it compared.
_SUITES = ("algorithm", "base", "inner_solver", "likelihood", "linear_solver", "prior", "task_source")
pytest.register_assert_rewrite(*(f"{__name__}.{suite}" for suite in _SUITES))

from ibaml.testing.algorithm import AlgorithmContract  # noqa: E402
from ibaml.testing.base import failures  # noqa: E402
from ibaml.testing.inner_solver import InnerSolverContract  # noqa: E402
from ibaml.testing.likelihood import LikelihoodContract  # noqa: E402
from ibaml.testing.linear_solver import LinearSolverContract  # noqa: E402
from ibaml.testing.prior import PriorContract  # noqa: E402
from ibaml.testing.task_source import TaskSourceContract  # noqa: E402

__all__ = [
    "AlgorithmContract",
    "InnerSolverContract",
    "LikelihoodContract",
    "LinearSolverContract",
    "PriorContract",
    "TaskSourceContract",
    "failures",
]
