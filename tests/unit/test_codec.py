"""JSON that every consumer can store, and identifiers that sort by time."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, ConfigDict, Field

from outbox import EmitError, clock, codec


class Document(BaseModel):
    model_config = ConfigDict(ser_json_inf_nan="constants")

    value: Any


pieces = st.characters(exclude_categories=["Cs"]) | st.sampled_from(["\x00", "\\", "u0000", "NaN", '"'])
text = st.lists(pieces, max_size=6).map("".join)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | text,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(text, inner, max_size=4),
    max_leaves=12,
)


def storable(value: object) -> bool:
    """Whether jsonb takes it; an independent reading."""
    if isinstance(value, float):
        return value == value and value not in {float("inf"), float("-inf")}  # noqa: PLR0124 - NaN
    if isinstance(value, str):
        return "\x00" not in value
    if isinstance(value, dict):
        return all(map(storable, value)) and all(map(storable, value.values()))
    return not isinstance(value, list) or all(map(storable, value))


@given(values)
def test_encoded_if_and_only_if_it_can_be_stored(value: object) -> None:
    if storable(value):
        assert json.loads(codec.encode(Document(value=value))) == {"value": value}
    else:
        with pytest.raises(EmitError):
            codec.encode(Document(value=value))


def test_the_field_is_the_callers() -> None:
    with pytest.raises(EmitError) as error:
        codec.encode(Document(value=float("nan")), "result")
    assert error.value.field == "result"


def test_aliases_are_the_wire_names() -> None:
    class Aliased(BaseModel):
        model_config = ConfigDict(populate_by_name=True)
        a: int = Field(alias="wireName")

    assert codec.encode(Aliased.model_validate({"a": 1})) == b'{"wireName":1}'


def test_uuid7_sorts_by_time(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    for milliseconds in (0, 1, 1_750_000_000_000, 2**48 - 1):
        monkeypatch.setattr(clock, "wall", lambda at=milliseconds: (at + 0.5) / 1000)
        identifier = codec.uuid7()
        assert identifier.version == 7
        assert identifier.variant == "specified in RFC 4122"
        assert identifier.int >> 80 == milliseconds
        made.append(identifier)
    assert made == sorted(made)


def test_uuid7_is_random(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clock, "wall", lambda: 1.0)
    assert len({codec.uuid7() for _ in range(1_000)}) == 1_000
