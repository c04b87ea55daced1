"""What an event class may say, and what an event that could never be published is told."""

import enum
import math
import uuid
from collections.abc import Callable
from itertools import count
from typing import Annotated, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from outbox import EmitError, Event, Key, RecordTooLarge, limits
from outbox.event import EventKind, check_headers, key_text, kind_of
from outbox.transaction import describe


class Placed(Event, topic="orders", type="order.placed"):
    order: Key[Any]
    data: Any = None


def refused(call: Callable[[], object], field: str) -> EmitError:
    """The error of a call, which says what to do."""
    with pytest.raises(EmitError) as caught:
        call()
    error = caught.value
    assert error.field == field
    assert error.problem
    assert error.remedy
    assert str(error) == f"{field}: {error.problem}; {error.remedy}"
    return error


class TestDeclaration:
    def test_a_kind(self) -> None:
        class Base(Event, topic="llm.agents"):
            agent_id: Key[uuid.UUID]

        class Renamed(Base, type="agent.renamed", schema_version=3):
            name: str

        class Nameless(Renamed):
            pass

        assert kind_of(Renamed) == EventKind(
            type="agent.renamed", topic="llm.agents", schema_version=3, key_field="agent_id"
        )
        for abstract in (Base, Nameless, Event):
            assert "abstract" in refused(lambda kind=abstract: kind_of(kind), "type").problem  # type: ignore[misc]

    def test_what_is_no_event_is_refused(self) -> None:
        refused(lambda: describe({"key": "k"}), "type")  # type: ignore[arg-type]
        refused(lambda: describe([Placed(order="k")]), "type")  # type: ignore[arg-type]

    @pytest.mark.parametrize("keyword", ["topics", "Type", "schemaversion", "key", "version"])
    def test_a_misspelt_keyword(self, keyword: str) -> None:
        with pytest.raises(TypeError, match=f"unknown class keyword '{keyword}'.*schema_version, topic, type"):
            type("Broken", (Event,), {"__module__": __name__}, **{keyword: "x"})

    def test_configuration_of_pydantic_passes(self) -> None:
        class Titled(Event, topic="t", type="x", title="A title"):
            key: Key[str]

        assert Titled.model_config["title"] == "A title"

    @pytest.mark.parametrize(
        ("fields", "keywords", "problem"),
        [
            ({"a": Key[str], "b": Key[str]}, {"topic": "t", "type": "x"}, "has 2 key fields"),
            ({"a": str}, {"topic": "t", "type": "x"}, "has 0 key fields"),
            ({"a": Key[str]}, {"type": "x"}, "no topic"),
            ({"a": Key[str]}, {"topic": "t", "type": ""}, "type must have"),
            ({"a": Key[str]}, {"topic": "t", "type": "ü" * 128}, "type must have"),
            ({"a": Key[str]}, {"topic": "t", "type": "a\x00"}, "U\\+0000"),
            ({"a": Key[str]}, {"topic": "t", "type": "a\ud800"}, "surrogate"),
            ({"a": Key[str]}, {"topic": "t", "type": "x", "schema_version": 0}, "schema_version"),
            ({"a": Key[str]}, {"topic": "t", "type": "x", "schema_version": 32_768}, "schema_version"),
            *(
                ({"a": Key[str]}, {"topic": topic, "type": "x"}, "no Kafka topic name")
                for topic in ("", ".", "..", "a b", "a/b", "ünicode", "a" * 250, "a\n", "a'b", "٣")
            ),
        ],
    )
    def test_a_class_that_could_not_publish(self, fields: Any, keywords: Any, problem: str) -> None:
        with pytest.raises(TypeError, match=problem):
            type("Broken", (Event,), {"__annotations__": fields, "__module__": __name__}, **keywords)

    def test_an_inherited_second_key(self) -> None:
        class Base(Event, topic="t"):
            a: Key[str]

        with pytest.raises(TypeError, match="2 key fields"):

            class Broken(Base, type="x"):
                b: Key[str]

    def test_events_are_immutable_and_ignore_new_fields(self) -> None:
        event = Placed.model_validate({"order": "k", "later": 1})
        with pytest.raises(ValidationError):
            event.data = 1


class Colour(enum.Enum):
    RED = "red"


class Word(enum.StrEnum):
    RED = "red"


class Number(enum.IntEnum):
    ONE = 1


class Shouting(str):
    __slots__ = ()

    def __str__(self) -> str:
        return "OTHER"


class TestKey:
    @pytest.mark.parametrize(
        ("value", "text"),
        [
            ("k", "k"),
            (" ", " "),
            (7, "7"),
            (-(10**30), "-1" + "0" * 30),
            (uuid.UUID("0190AAAA-0000-7000-8000-00000000000F"), "0190aaaa-0000-7000-8000-00000000000f"),
            (Word.RED, "red"),
            (Number.ONE, "1"),
            (Shouting("quiet"), "quiet"),
            ("é" * 512, "é" * 512),
            ("x" * limits.KEY_MAX_BYTES, "x" * limits.KEY_MAX_BYTES),
        ],
    )
    def test_text(self, value: object, text: str) -> None:
        assert key_text(value) == text
        assert describe(Placed(order=value)).key == text

    @pytest.mark.parametrize(
        "value",
        [
            None,
            True,
            False,
            1.5,
            Colour.RED,
            b"bytes",
            ("a",),
            "",
            "x" * (limits.KEY_MAX_BYTES + 1),
            "é" * 513,
            10**1024,
            10**5000,
            "a\x00b",
            "\ud800",
            "\udfff" * 2000,
        ],
        ids=map(str, count()),
    )
    def test_refused(self, value: object) -> None:
        refused(lambda: key_text(value), "key")
        refused(lambda: describe(Placed.model_construct(order=value)), "key")

    def test_missing(self) -> None:
        refused(lambda: describe(Placed.model_construct()), "key")

    def test_an_optional_key_is_refused_when_it_is_none(self) -> None:
        class Optional(Event, topic="t", type="x"):
            key: Annotated[Key[str | None], "note"] = None

        refused(lambda: describe(Optional()), "key")

    @given(st.text(st.characters(exclude_categories=["Cs"]), max_size=300) | st.integers() | st.uuids())
    def test_a_key_is_its_text_or_is_refused(self, value: object) -> None:
        text = str(value)
        if "\x00" in text or not 1 <= len(text.encode("utf-8", "surrogatepass")) <= limits.KEY_MAX_BYTES:
            refused(lambda: key_text(value), "key")
        else:
            assert key_text(value) == text


class TestHeaders:
    @pytest.mark.parametrize(
        "headers",
        [
            {"a": 1},
            {"a": None},
            {"a": b"x"},
            {1: "a"},
            {"": "a"},
            {"ce_type": "a"},
            {"ob-pos": "a"},
            {"content-type": "a"},
            {"a": "\x00"},
            {"\x00": "a"},
            {"a": "\ud800"},
            {"\ud800": "a"},
            {"a": "x" * limits.HEADERS_MAX_BYTES},
            {"a": '"' * (limits.HEADERS_MAX_BYTES // 2)},
            {"a": "\x01" * (limits.HEADERS_MAX_BYTES // 6)},
            {f"{n:05}": "" for n in range(1_500)},
            [("a", "b")],
            "text",
        ],
        ids=map(str, count()),
    )
    def test_refused(self, headers: Any) -> None:
        refused(lambda: check_headers(headers), "headers")
        refused(lambda: describe(Placed(order="k"), headers), "headers")

    def test_taken(self) -> None:
        check_headers({"traceparent": "00-1-2-01", "x": "", "ünï": "\r\n\t\u202e", "ceremony": "1", "CE_x": "1"})


def nested(depth: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(depth):
        value = [value]
    return value


class TestPayload:
    @pytest.mark.parametrize(
        "data",
        [
            math.nan,
            math.inf,
            {"deep": {"list": [1, -math.inf]}},
            "a\x00b",
            {"a\x00": 1},
            {"a": ["\\u0000", "\x00"]},
            "\ud800",
            {"\udc00": 1},
            object(),
            b"\xff",
            nested(3_000),
            {"NaN": math.nan},
        ],
        ids=map(str, count()),
    )
    def test_refused(self, data: object) -> None:
        refused(lambda: describe(Placed(order="k", data=data)), "payload")

    @pytest.mark.parametrize("data", ["NaN", "Infinity", {"-Infinity": "NaN"}, r"\u0000", {r"\u0000": [r"\\u0000"]}])
    def test_innocent_text_is_taken(self, data: object) -> None:
        emission = describe(Placed(order="k", data=data))
        assert Placed.model_validate_json(emission.payload).data == data

    def test_a_field_that_is_a_float(self) -> None:
        class Measured(Event, topic="t", type="x"):
            key: Key[str]
            value: float

        with pytest.raises(ValidationError):
            Measured(key="k", value=math.nan)
        refused(lambda: describe(Measured.model_construct(key="k", value=math.nan)), "payload")

    def test_too_large(self) -> None:
        room = limits.RECORD_MAX_BYTES - limits.RECORD_OVERHEAD_BYTES - len('{"order":"k","data":""}') - 1
        assert describe(Placed(order="k", data="x" * room)).size_bytes == limits.RECORD_MAX_BYTES
        for data, headers in (("x" * (room + 1), None), ("é" * (room // 2 + 1), None), ("x" * room, {"a": "é"})):
            error = refused(lambda d=data, h=headers: describe(Placed(order="k", data=d), h), "payload")  # type: ignore[misc]
            assert isinstance(error, RecordTooLarge)

    def test_key_and_headers_count_in_bytes(self) -> None:
        one = describe(Placed(order="k"), {"h": "v"})
        two = describe(Placed(order="é"), {"h": "é"})
        assert two.size_bytes == one.size_bytes + 3, "key, its copy in the payload, header"
