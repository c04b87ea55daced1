"""The restore guard, and adoption.

A database that was restored from a backup, promoted from a standby or copied still holds windows, positions and
transaction ids of its former life. Publishing from it could repeat positions for other events, or skip events for
ever. So a relay refuses to start where the system identifier, the database's oid or the timeline differ from those of
the log, and where Kafka holds records of this log from windows that the database has never logged: a copied data
directory keeps all three identifiers, and only the records tell.

Adoption is the operator's word that this database goes on. In one transaction it blocks emits, gives rows that were
not logged yet the id of that transaction, leaves out those that Kafka turns out to have, and opens a new log whose
ordinal outranks the former. Windows logged before are replayed under their own log id, if they were not done. After a
dump and restore, where transaction ids start again, rows logged before get ids that no window of the new cluster can
reach. A crash before the commit changes nothing; a second adoption opens one more log, which does no harm.
"""

import json
import logging
from collections import defaultdict
from dataclasses import dataclass
from typing import Final
from uuid import UUID

from outbox import kafka, limits, postgres, wire
from outbox.errors import RestoreDetected
from outbox.postgres import Connection, Pool
from outbox.relay import topics
from outbox.relay.window import Offsets

log = logging.getLogger(__name__)
SQL: Final = postgres.Statements("outbox", "relay/restore.sql")

_ADOPTION_TIMEOUT_SECONDS: Final = limits.MIGRATION_TIMEOUT_SECONDS
"""Its statements read, and may rewrite, every event that is still there."""
_REMEDY: Final = "make sure that no relay runs against another copy of this database, then run: outbox adopt"


@dataclass(frozen=True, slots=True)
class Adoption:
    """What an adoption did."""

    log_id: str
    restamped: int
    """Events that were not logged yet and will be published by the new log."""
    left_out: int
    """Events that Kafka had already."""
    position: int
    """The log's last position so far."""


@dataclass(frozen=True, slots=True)
class Ahead:
    """A record in Kafka from a window that this database has not logged."""

    topic: str
    partition: int
    offset: int
    position: wire.Position
    event_id: str | None


async def guard(connection: Connection, servers: str, partition_counts: dict[str, int], known: Offsets) -> Offsets:
    """Refuse to publish from a database whose past Kafka contradicts; the end of every partition comes back.

    Args:
        connection: to the log's database.
        servers: Kafka bootstrap servers.
        partition_counts: the pinned topics.
        known: the offsets up to which earlier tenures have looked or written.

    Raises:
        RestoreDetected: see the module's essay; nothing was changed.
        KafkaError, OSError, TimeoutError: Kafka could not be asked.
    """
    current = await check_identity(connection)
    evidence, ends = await look_ahead(connection, servers, partition_counts, known)
    # What lies ahead of a retired log was there when its successor was adopted, and was left out then.
    evidence = [ahead for ahead in evidence if ahead.position.log_id == current]
    if evidence:
        first = evidence[0]
        raise RestoreDetected(
            f"{first.topic}/{first.partition} at offset {first.offset} holds window {first.position.window} of log "
            f"{first.position.log_id}, which this database has never logged: it is older than Kafka; {_REMEDY}"
        )
    return ends


async def refuse_standby(connection: Connection) -> None:
    """Asked before the lease, which a standby could not grant.

    Raises:
        RestoreDetected: this server is a standby.
    """
    if await SQL.standby.fetchval(connection):
        raise RestoreDetected("this server is a standby: point the relay at the primary")


async def check_identity(connection: Connection) -> str:
    """Compare the log's identity with the database's; the current log's id comes back.

    Raises:
        RestoreDetected: they differ, or this is a standby.
    """
    await refuse_standby(connection)
    row = await SQL.identity.fetchrow(connection)
    assert row is not None, "one log is always current"
    reasons = {
        "same_system": "another cluster (restored from a dump, or upgraded)",
        "same_database": "another database (copied from a template, or restored from a dump)",
        "same_timeline": "another timeline (promoted from a standby, or restored to a point in time)",
    }
    differing = [text for column, text in reasons.items() if not row[column]]
    if differing:
        raise RestoreDetected(f"log {row['log_id']} was opened in {' and '.join(differing)}; {_REMEDY}")
    return str(row["log_id"])


async def look_ahead(
    connection: Connection,
    servers: str,
    partition_counts: dict[str, int],
    known: Offsets,
    *,
    records_max: int | None = limits.GUARD_MAX_RECORDS,
) -> tuple[list[Ahead], Offsets]:
    """Records of our logs beyond the last logged windows, from `known` (or the topics' start) to the present end."""
    logged = {(row["log_id"], row["shard"]): row["window_no"] for row in await SQL.last_windows.fetch(connection)}
    logs = {log_id for log_id, _ in logged}
    row = await SQL.identity.fetchrow(connection)
    assert row is not None
    logs.add(row["log_id"])
    found: list[Ahead] = []
    ends: Offsets = defaultdict(dict)
    if not partition_counts:
        return found, {}
    read = 0
    async with kafka.Tail(servers) as tail:
        for topic, count in partition_counts.items():
            ranges = {}
            for partition, (first, end) in (await tail.ends(topic, count)).items():
                ends[topic][partition] = end
                ranges[partition] = (max(first, known.get(topic, {}).get(partition, first)), end)
            async for record in tail.read(topic, ranges):
                read += 1
                if records_max is not None and read > records_max:
                    raise RestoreDetected(
                        f"over {records_max} records lie beyond the known offsets of {topic}, too many to look for "
                        f"ours at every start (adoption looks through all of them, once); {_REMEDY}"
                    )
                envelope = wire.envelope_of(record.headers)
                at = envelope.position
                if at is not None and at.log_id in logs and at.window > logged.get((at.log_id, at.shard), 0):
                    found.append(Ahead(topic, record.partition, record.offset, at, envelope.event_id))
    return found, dict(ends)


async def adopt(pool: Pool, servers: str) -> Adoption:
    """Let this database go on under a new log; see the module's essay.

    Raises:
        RestoreDetected: this server is a standby.
        KafkaError, OSError, TimeoutError: Kafka could not be asked what it has.
    """
    async with postgres.acquire(pool) as connection:
        if await SQL.standby.fetchval(connection):
            raise RestoreDetected("this server is a standby: promote it first, then adopt")
        async with connection.transaction():
            await SQL.block_emits.execute(connection, timeout=_ADOPTION_TIMEOUT_SECONDS)
            counts = {row["topic"]: row["partition_count"] for row in await topics.SQL.known.fetch(connection)}
            known = await _known_offsets(connection)
            evidence, ends = await look_ahead(connection, servers, counts, known, records_max=None)
            ids = [UUID(ahead.event_id) for ahead in evidence if ahead.event_id is not None]
            left_out = await SQL.leave_out.fetch(connection, ids, timeout=_ADOPTION_TIMEOUT_SECONDS)
            await SQL.leave_out_parked.execute(connection, ids, timeout=_ADOPTION_TIMEOUT_SECONDS)
            restamped = await SQL.restamp.execute(connection, timeout=_ADOPTION_TIMEOUT_SECONDS)
            await SQL.settle_unfinished.execute(connection, timeout=_ADOPTION_TIMEOUT_SECONDS)
            await SQL.settle_finished.execute(connection, timeout=_ADOPTION_TIMEOUT_SECONDS)
            highest = max((ahead.position.position for ahead in evidence), default=0)
            opened = await SQL.open_log.fetchrow(connection, highest)
            await SQL.restart_shards.execute(connection, json.dumps(ends))
    assert opened is not None
    adoption = Adoption(
        log_id=opened["log_id"],
        restamped=int(restamped.split()[-1]),
        left_out=len(left_out),
        position=opened["at"],
    )
    log.warning("adopted this database: %s", adoption)
    return adoption


async def _known_offsets(connection: Connection) -> Offsets:
    """For each partition the smallest offset that any shard knows, so that no shard's records are passed over."""
    known: Offsets = {}
    for row in await SQL.next_offsets.fetch(connection):
        for topic, by_partition in json.loads(row["next_offsets"]).items():
            offsets = known.setdefault(topic, {})
            for partition, offset in by_partition.items():
                offsets[int(partition)] = min(offset, offsets.get(int(partition), offset))
    return known
