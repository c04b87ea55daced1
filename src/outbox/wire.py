"""Rows of the log to Kafka records and back: CloudEvents headers in binary mode, and `ob-pos`.

`ob-pos` is log id / shard / window / ordinal / position / transaction id. A window that is replayed after a crash
carries the same values again, so (window, ordinal) within one log and shard tells a consumer what it has applied
already.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Final, NamedTuple, TypeAlias

Header: TypeAlias = tuple[str, bytes]

POSITION_HEADER: Final = "ob-pos"
SCHEMA_VERSION_HEADER: Final = "ob-schema-version"
REPLAY_HEADER: Final = "ob-replay"
"""On records that somebody sent once more on purpose; its value names that occasion."""
_VERSION_MAX_DIGITS: Final = 5


class Position(NamedTuple):
    """Where a record stands in the log that it came from."""

    log_id: str
    shard: int
    window: int
    ordinal: int
    position: int
    transaction_id: int

    @property
    def log_ordinal(self) -> int:
        """Orders incarnations of a log; the higher one wins."""
        return log_ordinal(self.log_id)

    @property
    def mark(self) -> tuple[int, int]:
        """What is compared within one log and shard."""
        return self.window, self.ordinal


@dataclass(frozen=True, slots=True)
class Envelope:
    """What the headers of a record say."""

    event_id: str | None
    event_type: str | None
    schema_version: int
    source: str | None
    position: Position | None


@lru_cache(maxsize=1024)
def log_ordinal(log_id: str) -> int:
    """The ordinal in front of a log id's dash; 0 for the empty id of foreign producers."""
    return int(log_id.partition("-")[0] or "0", 16)


def type_headers(source: str, event_type: str, schema_version: int) -> list[Header]:
    """The headers that all events of a type share; built once a type, not once an event."""
    headers = [
        ("ce_specversion", b"1.0"),
        ("ce_type", event_type.encode()),
        ("ce_source", source.encode()),
        ("content-type", b"application/json"),
    ]
    if schema_version != 1:
        headers.append((SCHEMA_VERSION_HEADER, b"%d" % schema_version))
    return headers


def position_prefix(log_id: str, shard: int, window_no: int) -> bytes:
    """The part of `ob-pos` that a window's records share."""
    return f"{log_id}/{shard}/{window_no}/".encode()


def parse_position(text: bytes) -> Position | None:
    """An `ob-pos` header; None where it is not ours to read."""
    parts = text.decode("ascii", "replace").split("/")
    if len(parts) != 6:
        return None
    try:
        log_id, *numbers = parts
        log_ordinal(log_id)
        return Position(log_id, *(int(number) for number in numbers))
    except ValueError:
        return None


def envelope_of(headers: Sequence[tuple[str, bytes | None]]) -> Envelope:
    """The envelope of a record; tolerant of foreign, missing and broken headers."""
    found = {name: value for name, value in headers if value is not None}
    version = found.get(SCHEMA_VERSION_HEADER, b"1")
    return Envelope(
        event_id=_text(found.get("ce_id")),
        event_type=_text(found.get("ce_type")),
        schema_version=int(version) if version.isdigit() and len(version) <= _VERSION_MAX_DIGITS else 1,
        source=_text(found.get("ce_source")),
        position=parse_position(found[POSITION_HEADER]) if POSITION_HEADER in found else None,
    )


def _text(value: bytes | None) -> str | None:
    return None if value is None else value.decode("utf-8", "replace")
