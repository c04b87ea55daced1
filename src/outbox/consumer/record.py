"""What the engine needs of a Kafka record, and its headers read once.

Records may come from anybody: headers without a value, bytes that are no text, an `ob-pos` made up by hand. None of
that may stop a partition; a position that our own relay would not have written counts as none.
"""

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Final, Protocol

from pydantic import TypeAdapter

from outbox import limits, upcasting, wire
from outbox.cache.fold import Fault
from outbox.event import Event, key_text
from outbox.wire import Position

_LOG_ID: Final = re.compile(r"[0-9a-f]{1,15}-[0-9a-f]{4}")
_INT16_MAX: Final = 2**15 - 1
_INT32_MAX: Final = 2**31 - 1
_INT64_MAX: Final = 2**63 - 1
_TYPE: Final = "ce_type"
_position: Final = tuple.__new__
"""How a NamedTuple makes itself, without the call in between that would take twice as long."""
_ID: Final = "ce_id"


class Record(Protocol):
    """A record as aiokafka delivers it."""

    @property
    def offset(self) -> int:
        """In its partition."""

    @property
    def timestamp(self) -> int:
        """Milliseconds since the epoch."""

    @property
    def key(self) -> bytes | None:
        """The Kafka key."""

    @property
    def value(self) -> bytes | None:
        """The payload; None for a tombstone of a compacted topic."""

    @property
    def headers(self) -> Sequence[tuple[str, bytes | None]]:
        """In order; names may repeat, and the last one counts."""


@dataclass(slots=True)  # not frozen: one is made for each record, and freezing would triple what that costs
class Arrival:
    """A record that has not been applied yet."""

    record: Record
    headers: Mapping[str, bytes | None]
    event_type: str | None
    position: Position | None
    schema_version: int = 1
    is_replay: bool = False
    """Somebody sent it once more on purpose."""
    event_class: type[Event] | None = None
    event: Event | Fault | None = None
    """What `decode` made of it, for that class."""


def arrival(record: Record) -> Arrival:
    """Read a record's headers."""
    headers = dict(record.headers)
    event_type = headers.get(_TYPE)
    position = headers.get(wire.POSITION_HEADER)
    version = headers.get(wire.SCHEMA_VERSION_HEADER)
    return Arrival(
        record,
        headers,
        None if event_type is None else _type_text(event_type),
        None if position is None else read_position(position),
        1 if version is None else _version(version),
        wire.REPLAY_HEADER in headers,
    )


def record_key(found: Arrival, partition: int, adapter: TypeAdapter[Any]) -> str:
    """The key of an event that cannot be decoded: the record's, in the form that decoded events have."""
    raw = found.record.key
    if not raw:
        return f"offset {found.record.offset} of partition {partition}"
    try:
        return key_text(adapter.validate_python(raw.decode()))
    except ValueError:
        text = storable(raw)
    if len(text.encode()) <= limits.KEY_MAX_BYTES:
        return text
    return f"{text[:100]}... sha256:{hashlib.sha256(raw).hexdigest()}"


def decode(found: Arrival, event_class: type[Event]) -> Event | Fault:
    """The event in a record's value; decoded once, however many caches and inboxes take it. Never raises."""
    event = found.event
    if event is None or found.event_class is not event_class:
        found.event_class, found.event = event_class, (event := _decode(found, event_class))
    return event


def _decode(found: Arrival, event_class: type[Event]) -> Event | Fault:
    kind = event_class.__kind__
    assert kind is not None
    payload = found.record.value
    if payload is None:
        return Fault("PayloadMissing", f"a record of type {kind.type} has no value")
    try:
        if found.schema_version < kind.schema_version:
            payload = upcasting.upcast(event_class, kind, found.schema_version, payload)
        event: Event = event_class.__pydantic_validator__.validate_json(payload)
    except Exception as error:  # noqa: BLE001 - not only bad JSON: validators of the event class are the user's code
        return Fault.of(error)
    return event


def read_position(header: bytes) -> Position | None:
    """An `ob-pos` that can be stored and compared; None otherwise."""
    try:
        head, ordinal, position, transaction_id = header.rsplit(b"/", 3)
        origin = _origin(head)
        if origin is None:
            return None
        numbers = int(ordinal), int(position), int(transaction_id)
    except ValueError:
        return None
    storable = 0 <= numbers[0] <= _INT32_MAX and 0 <= numbers[1] <= _INT64_MAX and 0 <= numbers[2] <= _INT64_MAX
    return _position(Position, origin + numbers) if storable else None


@lru_cache(maxsize=4096)
def _origin(head: bytes) -> tuple[str, int, int] | None:
    """Log id, shard and window; the part that all records of a window share."""
    at = wire.parse_position(head + b"/0/0/0")
    if at is None or not _LOG_ID.fullmatch(at.log_id):
        return None
    storable = 0 <= at.shard <= _INT16_MAX and 0 <= at.window <= _INT64_MAX
    return (at.log_id, at.shard, at.window) if storable else None


@lru_cache(maxsize=256)
def _version(text: bytes) -> int:
    """A schema version; 1 where the header holds none that could be stored."""
    return int(text) if text.isdigit() and len(text) <= 5 and 1 <= int(text) <= _INT16_MAX else 1


@lru_cache(maxsize=1024)
def _type_text(event_type: bytes) -> str:
    return event_type.decode("utf-8", "backslashreplace")


def event_id(record: Record) -> str | None:
    """The `ce_id` of a record, in a form that can be stored."""
    value = dict(record.headers).get(_ID)
    return None if value is None else storable(value)[: limits.EVENT_ID_MAX_CHARACTERS]


def storable(raw: bytes) -> str:
    """Bytes of unknown making as text that PostgreSQL takes."""
    return raw.decode("utf-8", "backslashreplace").replace("\x00", "\\x00")
