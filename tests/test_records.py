"""Records and JSON."""

import dataclasses
import json

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
