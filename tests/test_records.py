"""Records and JSON."""

import dataclasses
import json
from typing import Literal

import pytest

from ibaml.records import from_json, to_json


@dataclasses.dataclass(frozen=True, kw_only=True)
class Wheel:
    radius: float = 1.0
    spokes: tuple[int, ...] = (3, 4)

    def __post_init__(self) -> None:
        if self.radius <= 0:
            raise ValueError(f"radius must be positive, but is {self.radius}.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cart:
    wheels: tuple[Wheel, ...]
    options: dict[str, object]
    name: str | None = None


RECORDS = (Wheel, Cart)


def test_nested_records_come_back_equal_through_text():
    cart = Cart(wheels=(Wheel(), Wheel(radius=2.5, spokes=())), options={"size": (1, 2), "on": True, "none": None})
    assert from_json(json.loads(json.dumps(to_json(cart))), RECORDS) == cart


def test_a_class_that_was_not_named_is_never_built():
    with pytest.raises(ValueError, match="there is no record of type 'Wheel'; there are Cart"):
        from_json(to_json(Wheel()), [Cart])


def test_a_misspelt_field_is_answered_with_the_nearest():
    with pytest.raises(ValueError, match="Wheel has no setting 'radiu'; did you mean 'radius'"):
        from_json({"type": "Wheel", "radiu": 1.0}, RECORDS)


def test_a_missing_field_is_named():
    with pytest.raises(ValueError, match="Cart cannot be built from .* 'wheels'"):
        from_json({"type": "Cart", "options": {}}, RECORDS)


def test_the_checks_of_a_record_are_made_again():
    with pytest.raises(ValueError, match="radius must be positive"):
        from_json({"type": "Wheel", "radius": -1.0}, RECORDS)


def test_what_json_cannot_hold_is_refused():
    with pytest.raises(TypeError, match="a setting is a set"):
        to_json({"sizes": {1, 2}})


@dataclasses.dataclass(frozen=True)
class Kinds:
    count: int = 1
    rate: float = 1.0
    name: str = "a"
    is_on: bool = True
    most: int | None = None
    sides: tuple[int, ...] = ()
    pair: tuple[int, float] = (1, 1.0)
    way: Literal["a", "b"] = "a"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *[("count", value) for value in (2.5, "2", None, True, [1])],
        *[("rate", value) for value in ("2", True)],
        *[("name", value) for value in (2, None)],
        *[("is_on", value) for value in ("no", 1)],
        *[("most", value) for value in (2.5, "2")],
        *[("sides", value) for value in (3, [1, "2"], "12")],
        *[("pair", value) for value in ([1], [1, 2, 3], ["1", 2])],
        *[("way", value) for value in ("c", 1)],
    ],
)
def test_values_of_another_kind_are_refused(field, value):
    with pytest.raises(ValueError, match=f"Kinds has {field} = .*, which is of another kind than that setting"):
        from_json({"type": "Kinds", field: value}, [Kinds])


def test_values_of_their_kind_are_taken():
    made = Kinds(rate=2, most=3, sides=(1, 2), pair=(1, 2), way="b")
    assert from_json(to_json(made), [Kinds]) == made


def test_what_is_nested_too_deeply_is_refused():
    value: object = 1
    for _ in range(5000):
        value = [value]
    with pytest.raises(ValueError, match="the settings are nested too deeply"):
        from_json(value, [])
    with pytest.raises(ValueError, match="there is no record of type"):
        from_json({"type": [1]}, [Kinds])
