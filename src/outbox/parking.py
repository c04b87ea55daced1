"""Parked keys as data: what waits, in which order, and why. One shape for both sides.

A parker is `relay`, which parks a key that cannot be published, or the table of a cache, whose consumer parks a key
that cannot be applied. All later events of a parked key wait behind the first, and no other key waits.
"""

from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Final

from outbox import limits, postgres

if TYPE_CHECKING:
    from outbox.postgres import Connection, Pool

SQL: Final = postgres.Statements("outbox", "parking.sql")


@dataclass(frozen=True, slots=True, kw_only=True)
class ParkedKey:
    """One key set aside, and why."""

    parker: str
    topic: str
    key: str
    shard: int | None
    """Of the relay that parked it."""
    partition: int | None
    """From which a consumer read it."""
    reason: str
    detail: str
    parked_at: datetime
    events: int
    """Waiting events, counted up to `PARKED_MAX_EVENTS`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ParkedEvent:
    """One waiting event and where it came from: window and position for the relay, offset for a consumer."""

    log_id: str | None
    window_no: int | None
    ordinal: int | None
    position: int | None
    partition: int | None
    offset: int | None
    event_id: str | None
    event_type: str | None
    schema_version: int | None
    headers: str | None
    """As JSON text."""
    payload: bytes | None
    """The first bytes, as many as were asked for."""
    payload_bytes: int | None
    created_at: datetime
    parked_at: datetime

    @property
    def is_whole(self) -> bool:
        """Whether all of the payload is here."""
        return self.payload is None or len(self.payload) == self.payload_bytes


async def keys(
    db: "Pool | Connection", *, parker: str | None = None, topic: str | None = None, limit: int = limits.PARKED_SHOWN
) -> list[ParkedKey]:
    """Parked keys by parker, topic and key; narrowed to one parker or topic where named."""
    rows = await SQL.keys.fetch(db, parker, topic, limit, limits.PARKED_MAX_EVENTS)
    return [ParkedKey(**row) for row in rows]


async def find(
    db: "Pool | Connection", key: str, *, parker: str | None = None, topic: str | None = None
) -> list[ParkedKey]:
    """Every place where this key is parked: it may be the key of several topics, and parked by several parkers."""
    rows = await SQL.named.fetch(db, key, parker, topic, limits.PARKED_MAX_EVENTS, limits.PARKED_SHOWN)
    return [ParkedKey(**row) for row in rows]


async def events(
    db: "Pool | Connection",
    parked: ParkedKey,
    *,
    limit: int = limits.PARKED_SHOWN,
    payload_max_bytes: int = limits.PARKED_PAYLOAD_SHOWN_BYTES,
) -> list[ParkedEvent]:
    """The first waiting events of a parked key in the order in which they will be released."""
    rows = await SQL.events.fetch(db, parked.parker, parked.topic, parked.key, limit, payload_max_bytes)
    return [ParkedEvent(**row) for row in rows]
