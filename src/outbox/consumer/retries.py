"""Parked keys of caches and inboxes, tried again: by the owner of their partition, and by nobody else.

    parked -> due (1 s later, then twice as long each time; or `outbox parked retry`, or a page of the owner)
       ^         |  the partition's owner, between two batches, or a batch that brings the key's next event
       |         v
       |      BEGIN, the partition's row locked as by a batch, then the key's row
       |         the key's events in order, through the same handlers and the same merge, in savepoints
       |         those that succeed are deleted; behind the last of them the key is free
       +--------- the first that fails stays, with all behind it
              COMMIT

Guarantees:

* One at a time. A batch and a retry hold the partition's row and the key's, so no event is queued behind a key that is
  being freed (H43), and a process that has lost the partition retries nothing.
* Once, in order. Effects and the deletion of the parked events commit together; a crash before that leaves the events
  parked and due, a crash after it leaves neither.
* Bounded: some keys a turn, some events of each, a second in all and the event that is being handled then; and after
  `PARKED_RETRY_ATTEMPTS` failures nothing happens by itself. Asking for a retry always counts.
"""

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from outbox import clock, limits, postgres
from outbox.cache.fold import Fault
from outbox.consumer import parking
from outbox.consumer.record import Arrival, arrival
from outbox.consumer.target import Tally, Target
from outbox.postgres import Connection, Pool

log = logging.getLogger(__name__)

SQL: Final = postgres.Statements("outbox", "consumer/retries.sql")


@dataclass(slots=True)
class ParkedRecord:
    """A parked event as the record that it came in, but for bytes of key and headers that were no text."""

    offset: int
    timestamp: int
    key: bytes | None
    value: bytes | None
    headers: Sequence[tuple[str, bytes | None]]


@dataclass(frozen=True, slots=True)
class Retried:
    """What a retry of one key came to: how many of its events were applied, and whether it is free now."""

    events: int
    is_free: bool


async def due(pool: Pool, parkers: Sequence[str], partitions: Sequence[tuple[str, int]]) -> list[tuple[str, int]]:
    """Those of the partitions that have keys to be tried now."""
    topics, numbers = [topic for topic, _ in partitions], [number for _, number in partitions]
    return [(row["topic"], row["partition"]) for row in await SQL.due.fetch(pool, parkers, topics, numbers)]


async def turn(connection: Connection, targets: Sequence[Target], partition: int) -> Tally:
    """Try keys of a partition that are due, in a transaction that holds the partition's row."""
    until = clock.monotonic() + limits.RETRY_TURN_SECONDS
    tally = Tally()
    tried = free = 0
    for target in targets:
        keys = await SQL.due_keys.fetch(connection, target.name, target.topic, partition, limits.RETRY_MAX_KEYS)
        for row in keys:
            if tried and clock.monotonic() > until:
                break
            retried = await retry(connection, target, partition, row["key"], until)
            tried += 1
            free += retried.is_free
            tally.retried += retried.events
    if tried:
        log.info("partition %d: tried %d parked keys again: %d are free, %d events applied",
                 partition, tried, free, tally.retried)  # fmt: skip
    return tally


async def behind(connection: Connection, target: Target, partition: int, keys: Sequence[str]) -> tuple[list[str], int]:
    """Which of a batch's keys wait, so that its events queue behind them; how many events were applied meanwhile.

    What waits for a key goes first, if its time has come.
    """
    until = clock.monotonic() + limits.RETRY_TURN_SECONDS
    waiting: list[str] = []
    applied = 0
    for row in await parking.SQL.waiting.fetch(connection, target.name, target.topic, keys):
        is_in_time = not applied or clock.monotonic() <= until
        if row["due"] and applied < limits.RETRY_MAX_EVENTS and is_in_time:
            found = await retry(connection, target, partition, row["key"], until)
            applied += found.events
            if found.is_free:
                continue
        waiting.append(row["key"])
    return waiting, applied


async def retry(connection: Connection, target: Target, partition: int, key: str, until: float) -> Retried:
    """Try one key, whose row the transaction has locked; what time `until` does not suffice for stays due."""
    name, topic = target.name, target.topic
    rows = await SQL.events.fetch(connection, name, topic, key, limits.RETRY_MAX_EVENTS)
    arrivals = _of_one_log([arrival(_record(key, row)) for row in rows])
    replayed = await target.replay(connection, key, arrivals, partition, until=until)
    if replayed.applied:
        await SQL.applied.execute(connection, [row["id"] for row in rows[: replayed.applied]])
    if replayed.fault is None:
        return Retried(replayed.applied, await SQL.free.fetchval(connection, name, topic, key))
    await _fail(connection, target, key, replayed.fault, is_another=replayed.applied > 0)
    return Retried(replayed.applied, is_free=False)


async def _fail(connection: Connection, target: Target, key: str, fault: Fault, *, is_another: bool) -> None:
    reason, detail = parking.texts(fault)
    await SQL.failed.execute(
        connection, target.name, target.topic, key, reason, detail,
        limits.PARKED_RETRY_FIRST_SECONDS, limits.PARKED_RETRY_MAX_SECONDS, limits.PARKED_RETRY_ATTEMPTS, is_another,
    )  # fmt: skip


def _of_one_log(arrivals: list[Arrival]) -> list[Arrival]:
    """Up to where another log begins, as in a batch; the rest stays due."""
    log_id = None
    for number, found in enumerate(arrivals):
        if found.position is not None:
            if log_id is not None and found.position.log_id != log_id:
                return arrivals[:number]
            log_id = found.position.log_id
    return arrivals


def _record(key: str, row: postgres.Record) -> ParkedRecord:
    headers = json.loads(row["headers"] or "{}")
    return ParkedRecord(
        row["offset"] or 0,
        row["created_ms"],
        key.encode(),
        row["payload"],
        [(name, None if text is None else text.encode()) for name, text in headers.items()],
    )
