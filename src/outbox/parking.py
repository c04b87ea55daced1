"""Parked keys as data: what waits, in which order, and why. One shape for both sides.

A parker is `relay`, which parks a key that cannot be published, or the table of a cache, whose consumer parks a key
that cannot be applied. All later events of a parked key wait behind the first, and no other key waits.

To retry is to set a flag, because only who publishes or applies the key's other events can put these in their place:
the relay (`outbox.relay.release`), or the owner of the key's partition (`outbox.consumer.retries`). To discard is to
give the waiting events up for ever; what comes later is published and applied.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Final

from outbox import limits, postgres

if TYPE_CHECKING:
    from outbox.postgres import Connection, Pool

SQL: Final = postgres.Statements("outbox", "parking.sql")

RELAY: Final = "relay"
"""The parker of keys that cannot be published."""
_PAGE_KEYS: Final = 1_000


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
    attempts: int
    """Retries that failed since then; the relay begins anew where all of the key's events had been released."""
    retry_at: datetime | None
    """When its events are tried again; None: not before somebody asks for it."""
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


async def retry(db: "Pool | Connection", places: Sequence[ParkedKey]) -> int:
    """Have these keys' events tried again, soon; returns how many of the keys are still parked."""
    columns = [[str(getattr(place, name)) for place in places] for name in ("parker", "topic", "key")]
    row = await SQL.retry.fetchrow(db, *columns)
    assert row is not None, "an aggregate has a row"
    flagged: int = row["flagged"]
    return flagged


async def retry_all(
    db: "Pool | Connection", *, parker: str | None = None, topic: str | None = None, reason: str | None = None
) -> int:
    """Have all parked keys tried again, narrowed to a parker, topic or reason where named; returns how many.

    Works in pages, a transaction each where `db` is a pool: after an interruption some keys are flagged and others not.
    """
    flagged = 0
    last = "", "", ""
    while (row := await SQL.retry_page.fetchrow(db, *last, parker, topic, reason, _PAGE_KEYS)) is not None:
        flagged += row["flagged"]
        last = row["parker"], row["topic"], row["key"]
    return flagged


async def discard(db: "Pool | Connection", place: ParkedKey) -> int | None:
    """Give up the waiting events of a key for ever and free the key.

    Returns how many events they were; None where the key is not parked any more. A consumer's batch that is about to
    park one more of the key is waited for.
    """
    if place.parker == RELAY:
        relayed: int | None = await SQL.discard_relayed.fetchval(db, place.topic, place.key)
        return relayed
    key = place.parker, place.topic, place.key
    async with postgres.acquire(db) as connection, postgres.atomic(connection):
        if await SQL.hold.fetchrow(connection, *key) is None:
            return None
        gone: int = await SQL.discard.fetchval(connection, *key)
        return gone
