"""The consumer's part of parking: events of a cache that wait, with all that it takes to apply them later."""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final
from uuid import UUID

from outbox import limits, postgres
from outbox.cache.fold import Fault, Step
from outbox.cache.merge import Change
from outbox.consumer.record import Arrival, storable
from outbox.errors import ParkingFull
from outbox.postgres import Connection

log = logging.getLogger(__name__)

SQL: Final = postgres.Statements("outbox", "consumer/parking.sql")

_CREATED_MS_MAX: Final = 253_402_300_799_000
_LOGGED_KEYS: Final = 10
_REASON_MAX_CHARACTERS: Final = 100


BEHIND: Final = Fault("Behind", "an earlier event of the key waits")


@dataclass(frozen=True, slots=True)
class Queue:
    """Events of one key that have to wait, in order, and why the first of them does."""

    key: str
    fault: Fault
    steps: Sequence[Step]


async def resolve(connection: Connection, cache: str, topic: str, changes: Sequence[Change]) -> int:
    """Full rows took effect: forget what waited for them. Returns how many events did."""
    last = {change.key: change.log_id for change in changes}
    resolved: int = await SQL.resolve.fetchval(connection, cache, topic, list(last), list(last.values()))
    log.info("cache %s: full rows resolved %d parked events of %d keys", cache, resolved, len(last))
    return resolved


async def park(connection: Connection, cache: str, topic: str, partition: int, queues: Sequence[Queue]) -> int:
    """Set events aside behind their keys. Returns how many.

    Raises:
        ParkingFull: the cache has as many parked events as it may.
    """
    events = [(queue.key, step.source) for queue in queues for step in queue.steps]
    waiting: int = await SQL.room.fetchval(connection, cache, limits.PARKED_MAX_EVENTS + 1)
    if waiting + len(events) > limits.PARKED_MAX_EVENTS:
        raise ParkingFull(
            f"cache {cache}: {waiting} events are parked and {len(events)} more would be over the bound of "
            f"{limits.PARKED_MAX_EVENTS}; look at `outbox parked list`, mend the cause, or discard them"
        )
    for queue in queues[:_LOGGED_KEYS]:
        log.warning("cache %s: parked key %r of %s: %s", cache, queue.key, topic, queue.fault)
    if len(queues) > _LOGGED_KEYS:
        log.warning("cache %s: parked %d more keys of %s", cache, len(queues) - _LOGGED_KEYS, topic)
    reasons = [texts(queue.fault) for queue in queues]
    await SQL.open_keys.execute(
        connection,
        cache,
        topic,
        [queue.key for queue in queues],
        partition,
        [reason for reason, _ in reasons],
        [detail for _, detail in reasons],
        limits.PARKED_RETRY_FIRST_SECONDS,
    )
    rows = [_row(key, arrival) for key, arrival in events]
    await SQL.queue.execute(connection, cache, topic, partition, *(list(column) for column in zip(*rows, strict=True)))
    return len(rows)


def texts(fault: Fault) -> tuple[str, str]:
    """Reason and detail of a fault, in a form that can be stored."""
    return fault.reason[:_REASON_MAX_CHARACTERS], _text(fault.detail)[: limits.PARKED_DETAIL_MAX_CHARACTERS]


def _row(key: str, arrival: Arrival) -> tuple[object, ...]:
    at = arrival.position
    record = arrival.record
    return (
        key,
        record.offset,
        *((at.log_id, at.shard, at.window, at.ordinal, at.position, str(at.transaction_id)) if at else (None,) * 6),
        _uuid(arrival.headers.get("ce_id")),
        None if arrival.event_type is None else _text(arrival.event_type),
        arrival.schema_version,
        _json(arrival.headers),
        record.value,
        min(max(record.timestamp, 0), _CREATED_MS_MAX),
    )


def _uuid(value: bytes | None) -> UUID | None:
    try:
        return None if value is None else UUID(value.decode())
    except ValueError:
        return None


def _json(headers: Mapping[str, bytes | None]) -> str:
    return json.dumps({_text(name): None if value is None else storable(value) for name, value in headers.items()})


def _text(text: str) -> str:
    """Text that PostgreSQL takes."""
    return storable(text.encode("utf-8", "backslashreplace"))
