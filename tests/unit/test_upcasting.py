"""Events of other versions than the class: older ones are brought up to date, newer ones are read tolerantly."""

from collections.abc import Callable
from typing import Any
from uuid import UUID, uuid4

import pytest
from pydantic import BaseModel

from outbox import Cache, CacheDeclarationError, Event, EventDeclarationError, Key
from outbox.cache.fold import Fault
from outbox.consumer.record import arrival, decode
from outbox.upcasting import Payload, Upcaster
from tests.support.caching import Rec


def renamed(version: int = 3) -> type[Event]:
    """A class of its own for each test, because upcasters are registered on classes."""

    class Renamed(Event, topic="llm.agents", type="agent.renamed", schema_version=version):
        agent_id: Key[UUID]
        agent_name: str
        size_bytes: float = 0.0

    return Renamed


def first(payload: Payload) -> Payload:
    """Version 1 called the name `label`."""
    return {"agent_id": payload["agent_id"], "label": payload["name"]}


def second(payload: Payload) -> Payload:
    return {**payload, "agent_name": payload["label"]}


def chained() -> type[Event]:
    event = renamed()
    event.upcast(from_version=2)(second)
    event.upcast(from_version=1)(first)
    return event


def read(event: type[Event], payload: bytes, version: bytes | None = None) -> Event | Fault:
    headers = [("ce_type", b"agent.renamed"), *([("ob-schema-version", version)] if version is not None else [])]
    return decode(arrival(Rec(0, b"k", payload, headers)), event)


AGENT = uuid4()


@pytest.mark.parametrize(
    ("version", "fields"),
    [
        (None, '"name": "Ada"'),
        (b"1", '"name": "Ada"'),
        (b"2", '"label": "Ada"'),
        (b"3", '"agent_name": "Ada"'),
        (b"4", '"agent_name": "Ada", "new_in_4": {"a": [1]}'),
        (b"32767", '"agent_name": "Ada"'),
        (b"32768", '"name": "Ada"'),
        (b"0", '"name": "Ada"'),
        (b"x", '"name": "Ada"'),
    ],
)
def test_each_version_becomes_the_class(version: bytes | None, fields: str) -> None:
    """Red when `_decode` takes every version for its own."""
    event = chained()
    assert read(event, f'{{"agent_id": "{AGENT}", {fields}}}'.encode(), version) == event.model_validate(
        {"agent_id": AGENT, "agent_name": "Ada"}
    )


def test_the_result_is_validated_as_json() -> None:
    """So an upcaster may leave Python values behind, and strict or custom types mean the same for every version."""
    event = renamed(2)

    @event.upcast(from_version=1)
    def with_python_values(payload: Payload) -> Payload:
        return {"agent_id": UUID(payload["id"]), "agent_name": payload["name"], "size_bytes": payload["size"]}

    found = read(event, f'{{"id": "{AGENT}", "name": "Ada", "size": 1.5}}'.encode())
    assert found == event.model_validate({"agent_id": AGENT, "agent_name": "Ada", "size_bytes": 1.5})


def failing(_payload: Payload) -> Payload:
    raise KeyError("name")


def no_dict(_payload: Payload) -> Any:
    return ["Ada"]


@pytest.mark.parametrize(
    ("upcaster", "payload", "reason", "says"),
    [
        (failing, b"{}", "UpcastError", "from version 1 raised KeyError"),
        (no_dict, b"{}", "UpcastError", "returned list, not a dict"),
        (second, b"[1]", "UpcastError", "no JSON object but list"),
        (second, b"{", "ValueError", "EOF"),
        (dict, b"{}", "ValidationError", "agent_id"),
        (second, None, "PayloadMissing", "no value"),
    ],
)
def test_what_goes_wrong_is_the_fault_of_the_event(upcaster: Upcaster, payload: bytes, reason: str, says: str) -> None:
    event = renamed(2)
    event.upcast(from_version=1)(upcaster)
    found = read(event, payload)
    assert isinstance(found, Fault)
    assert found.reason == reason
    assert says in found.detail


def test_a_version_without_upcaster_is_named() -> None:
    """Not read as if it were the present one: a field that means something else would pass unseen."""
    event = renamed()
    event.upcast(from_version=2)(second)
    found = read(event, b"{}", b"1")
    assert isinstance(found, Fault)
    assert "agent.renamed came in version 1, and there is no upcaster from version 1" in found.detail
    assert "@Renamed.upcast(from_version=1)" in found.detail


async def awaiting(payload: Payload) -> Payload:
    return payload


class Abstract(Event, topic="llm.agents"):
    agent_id: Key[UUID]


@pytest.mark.parametrize(
    ("declare", "field", "says"),
    [
        (lambda: Abstract.upcast(from_version=1)(first), "upcast", "Abstract is abstract; register it on a class"),
        (lambda: renamed(1).upcast(from_version=1)(first), "from_version", "1 is not below Renamed's schema_version"),
        (lambda: renamed(3).upcast(from_version=3)(first), "from_version", "3 is not below"),
        (lambda: renamed(3).upcast(from_version=0)(first), "from_version", "0 is not below"),
        (lambda: renamed(3).upcast(from_version=True)(first), "from_version", "True is not below"),
        (lambda: renamed(3).upcast(from_version="1")(first), "from_version", "'1' is not below"),  # type: ignore[arg-type]
        (lambda: renamed(3).upcast(from_version=1)(awaiting), "upcast", "no plain function; write it as"),  # type: ignore[arg-type]
        (lambda: chained().upcast(from_version=1)(second), "from_version", "from version 1 already: first"),
    ],
)
def test_misuse_is_told_at_declaration(declare: Callable[[], object], field: str, says: str) -> None:
    with pytest.raises(EventDeclarationError) as caught:
        declare()
    assert caught.value.field == field
    assert says in str(caught.value)
    assert isinstance(caught.value, TypeError)


def test_a_gap_is_told_where_a_handler_is_declared() -> None:
    """Red when handlers do not call `upcasting.check`."""
    event = renamed(4)
    event.upcast(from_version=1)(first)
    event.upcast(from_version=3)(second)

    class Row(BaseModel):
        agent_id: UUID

    cache = Cache(Row, table="t", key="agent_id", topic="llm.agents")

    def handler(event: Any) -> Row:
        return Row(agent_id=event.agent_id)

    handler.__annotations__ = {"event": event, "return": Row}
    with pytest.raises(CacheDeclarationError, match=r"handler: upcast: Renamed has .* but none from 2; register"):
        cache.on(handler)
    event.upcast(from_version=2)(second)
    cache.on(handler)


def test_a_subclass_has_its_own_chain() -> None:
    base = chained()

    class Later(base, type="agent.renamed", schema_version=2):  # type: ignore[misc, valid-type]
        pass

    assert Later.__upcasters__ == {}
    assert sorted(base.__upcasters__) == [1, 2]


def test_a_record_is_decoded_once_for_each_class() -> None:
    """Red when `decode` does not remember."""
    event, other = chained(), renamed()
    found = arrival(
        Rec(0, b"k", f'{{"agent_id": "{AGENT}", "agent_name": "Ada"}}'.encode(), [("ob-schema-version", b"3")])
    )
    assert decode(found, event) is decode(found, event)
    assert type(decode(found, other)) is other
    assert type(decode(found, event)) is event
    broken = arrival(Rec(0, b"k", b"{"))
    assert decode(broken, event) is decode(broken, event)
