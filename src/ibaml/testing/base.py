"""What the contract suites share: random numbers, oracles by differences, and a runner without pytest."""

import dataclasses
import inspect
import json
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from ibaml import records, tree
from ibaml.types import PyTree, Tensor

ALGEBRA = 1e-10
"""Tolerance where two ways to a number differ by rounding only."""

DIFFERENCE = 1e-6
"""Tolerance of central differences."""

STANDARD_ERRORS = 5.0
"""How many of them a mean of random draws may be off."""


def failures(contract: type, *, only: str = "test_") -> dict[str, BaseException]:
    """Runs a contract suite without a test runner, in a notebook for example.

    Args:
        contract: A subclass of a suite with its ``make``.
        only: Run the tests whose names start so.

    Returns:
        What each failed test raised, by the test's name; empty if the contract is kept.

    Examples:
        >>> from ibaml.solvers.linear import Dense
        >>> from ibaml.testing import LinearSolverContract
        >>> class OfDense(LinearSolverContract):
        ...     make = Dense
        >>> failures(OfDense)
        {}
    """
    found: dict[str, BaseException] = {}
    for name, test in inspect.getmembers(contract, inspect.isfunction):
        if not name.startswith(only):
            continue
        case: Any = contract()
        try:
            test(case, case.make())
        except pytest.skip.Exception:
            continue
        except (Exception, pytest.fail.Exception) as error:
            found[name] = error
    return found


def generator(seed: int = 0) -> torch.Generator:
    """Returns a generator with a seed."""
    return torch.Generator().manual_seed(seed)


def draw(*shape: int, seed: int = 0) -> Tensor:
    """Returns standard normal numbers in float64."""
    return torch.randn(shape, generator=generator(seed), dtype=torch.float64)


def draw_like(like: PyTree, seed: int = 0, scale: float = 1.0) -> PyTree:
    """Returns a tree of normal numbers with the structure, shapes and dtypes of another."""
    source = generator(seed)
    return tree.map(lambda leaf: scale * torch.randn(leaf.shape, generator=source, dtype=leaf.dtype), like)


def assert_close(actual: PyTree, expected: PyTree, tolerance: float = ALGEBRA, what: str = "") -> None:
    """Compares two trees leaf by leaf, absolutely and relatively."""
    actual_leaves, expected_leaves = tree.leaves(actual), tree.leaves(expected)
    assert len(actual_leaves) == len(expected_leaves), f"{what} has {len(actual_leaves)} tensors"
    for one, other in zip(actual_leaves, expected_leaves, strict=True):
        torch.testing.assert_close(
            one, other, rtol=tolerance, atol=tolerance, msg=lambda text: f"{what}: {text}" if what else text
        )


def central_difference(function: Callable[[PyTree], Tensor], at: PyTree, step: float = 1e-5) -> PyTree:
    """Returns the gradient of a scalar function by central differences, in the structure of ``at``."""
    vector, unravel = tree.ravel(at)
    units = step * torch.eye(len(vector), dtype=vector.dtype)
    slopes = [(function(unravel(vector + unit)) - function(unravel(vector - unit))) / (2 * step) for unit in units]
    return unravel(torch.stack(slopes).detach())


def over_seeds(check: Callable[[int], None], max_examples: int = 10) -> None:
    """Calls a check with seeds that hypothesis chooses; a method with ``given`` could not be inherited twice."""

    # A smaller seed is no simpler case.
    @settings(deadline=None, max_examples=max_examples, database=None, phases=[Phase.generate])
    @given(seed=st.integers(0, 2**20))
    def run(seed: int) -> None:
        check(seed)

    run()


def with_settings(record: Any, **wanted: Any) -> Any:
    """Returns a record with those of the settings that it has; what is no record comes back as it is."""
    return dataclasses.replace(record, **{name: value for name, value in wanted.items() if name in fields_of(record)})


def fields_of(record: Any) -> list[str]:
    """Names of a record's settings; none for what is no record."""
    return [field.name for field in dataclasses.fields(record)] if dataclasses.is_dataclass(record) else []


def assert_json_round_trip(record: Any) -> None:
    """Writes a record as JSON and reads it again; a setting that is misspelt there is refused by its nearest name."""
    assert dataclasses.is_dataclass(record), f"{type(record).__name__} is no frozen dataclass: it could not be stored"
    written = json.loads(json.dumps(records.to_json(record)))
    known = set(_record_types([record]))
    assert records.from_json(written, known) == record
    with pytest.raises(ValueError, match="has no setting 'no_such_setting'"):
        records.from_json({**written, "no_such_setting": 1}, known)


def _record_types(values: Iterable[Any]) -> Iterator[type]:
    for value in values:
        if dataclasses.is_dataclass(value):
            yield type(value)
            yield from _record_types(getattr(value, name) for name in fields_of(value))
        elif isinstance(value, tuple):
            yield from _record_types(value)
