"""Why a cache's row is what it is: the event or page that made it, what was skipped, what waits, the owner's row.

Everything that the database knows comes from one READ ONLY REPEATABLE READ transaction. The records come from Kafka
after it, the newest ones of the key's partition; so what the consumer applies meanwhile is told as not read yet.
"""

import asyncio
import contextlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any, Final
from uuid import UUID

from outbox import kafka, limits, parking, postgres
from outbox.cache import Cache, table
from outbox.cache.table import Table
from outbox.cache.verdicts import Judged, Known, Scan, judge
from outbox.consumer.record import Arrival, arrival
from outbox.errors import CacheDeclarationError, CacheNotFed
from outbox.parking import ParkedKey
from outbox.postgres import Connection, Pool, Record

SQL: Final = postgres.Statements("outbox", "cache/explain.sql")


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """The event and the page that row or tombstone name.

    Attributes:
        by_page: the page is the newer of the two, or there is no event.
        at: when it was written.
    """

    log_id: str | None
    position: int | None
    transaction_id: int | None
    partition: int | None
    offset: int | None
    page_id: int | None
    by_page: bool
    at: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class PageSeen:
    """A page of the owner that speaks for the key."""

    id: int
    log_id: str
    snapshot: str
    merged_at: datetime
    is_range: bool
    after_key: str | None
    through_key: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Scanned:
    """The records of the key that Kafka still has.

    Attributes:
        why_not: why there are none to judge; None where they were read.
        first: the first offset that was read.
        end: behind the last one.
        next_offset: where the consumer stands in the partition; None where it never read it.
        state: of the partition; see outbox.positions.
    """

    partition: int | None = None
    first: int = 0
    end: int = 0
    next_offset: int | None = None
    state: str | None = None
    records: tuple[Judged, ...] = ()
    why_not: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class OwnersRow:
    """What the owner says.

    Attributes:
        row: as the owner's query returns it; None where it has none.
        differs: fields in which the cache's row differs; None where there is nothing to compare.
    """

    row: dict[str, Any] | None = None
    differs: tuple[str, ...] | None = None
    error: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Explanation:
    """Everything about one key of a cache."""

    table: str
    key: str
    consumer: str
    topic: str
    row: dict[str, Any] | None
    row_origin: Origin | None
    tombstone: Origin | None
    pages: tuple[PageSeen, ...]
    parked: tuple[ParkedKey, ...]
    lag_seconds: float | None
    parked_at_owner: bool
    scanned: Scanned | None = None
    owner: OwnersRow | None = None

    @property
    def is_known(self) -> bool:
        """Whether anything speaks of this very key; a page of all keys does not."""
        judged = self.scanned is not None and self.scanned.records
        owned = self.owner is not None and self.owner.row is not None
        return bool(self.row is not None or self.tombstone or self.parked or self.parked_at_owner or judged or owned)


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """What to look at besides the database.

    Attributes:
        cache: its declaration; tells event types and the owner.
        servers: Kafka; without it no record is read.
        records: how many of the newest records of the partition are read.
        partition: the key's; worked out where it is not given.
    """

    cache: Cache[Any] | None = None
    servers: str | None = None
    records: int = limits.EXPLAIN_RECORDS
    partition: int | None = None


async def explain(pool: Pool, name: str, key: str, wanted: Wanted) -> Explanation:
    """Explain a key of the cache declared for table `name`, in the database of `pool`.

    Raises:
        CacheNotFed: no consumer has ever fed that table.
        CacheDeclarationError: the key's column, or the key, cannot be made out.
        KafkaError, OSError, TimeoutError: Kafka does not answer.
    """
    cache = wanted.cache
    snapshot = {"isolation": "repeatable_read", "readonly": True}
    async with postgres.acquire(pool) as connection, postgres.transact(connection, **snapshot):
        subject = await SQL.subject.fetchrow(connection, table.quoted_name(name), name, key)
        if subject is None:
            raise CacheNotFed(f"no consumer has fed a table {name} here: name the table as the cache declares it")
        found = await _key_table(connection, name, subject["oid"], None if cache is None else cache.key)
        normal = _normal(key, found.key_type)
        if normal != key:  # freshness knows the key by its text
            subject = await SQL.subject.fetchrow(connection, table.quoted_name(name), name, normal) or subject
        told = await _told(connection, found, subject, normal)
        consumer, topic = subject["consumer"], subject["topic"]
        positions = {row["partition"]: row for row in await SQL.positions.fetch(connection, consumer, topic)}
        waiting = await SQL.parked_offsets.fetch(connection, subject["name"], topic, normal, limits.PARKED_MAX_EVENTS)
    if wanted.servers is not None:
        offsets = {number: row["next_offset"] for number, row in positions.items()}
        read = await _read(_placed(wanted, told, waiting), told, found.key_type, offsets)
        stands = positions.get(read.partition) if read.partition is not None else None
        told = replace(
            told, scanned=await _judged(pool, told, read, stands, _known(told, read, stands, waiting, cache))
        )
    if cache is not None and cache.owner is not None:
        told = replace(told, owner=await _of_owner(pool, cache, told, found.key_type))
    return told


async def _told(connection: Connection, found: Table, subject: Record, key: str) -> Explanation:
    oid, topic = subject["oid"], subject["topic"]
    row = await found.compose(SQL.row).fetchrow(connection, key)
    stone = await SQL.tombstone.fetchrow(connection, oid, key)
    named = [record["page_id"] for record in (row, stone) if record is not None and record["page_id"] is not None]
    pages = await found.compose(SQL.pages).fetch(connection, oid, key, named, limits.EXPLAIN_PAGES)
    parked = [
        one for one in await parking.find(connection, key, topic=topic) if one.parker in {subject["name"], "relay"}
    ]
    return Explanation(
        table=subject["name"],
        key=key,
        consumer=subject["consumer"],
        topic=topic,
        row=None if row is None else json.loads(row["document"]),
        row_origin=None if row is None else await _origin(connection, row),
        tombstone=None if stone is None else await _origin(connection, stone),
        pages=tuple(PageSeen(**page) for page in pages),
        parked=tuple(parked),
        lag_seconds=subject["lag_seconds"],
        parked_at_owner=subject["parked_at_owner"],
    )


async def _origin(connection: Connection, record: Record) -> Origin:
    """Of row or tombstone: which of its event and its page came last."""
    page_id, transaction_id = record["page_id"], record["transaction_id"]
    by_page = page_id is not None and transaction_id is None
    if page_id is not None and transaction_id is not None:
        seen = await SQL.seen.fetchrow(connection, [record["log_id"]], [transaction_id], [page_id])
        by_page = seen is not None and seen["page_id"] is not None
    return Origin(
        log_id=record["log_id"],
        position=record["position"],
        transaction_id=None if transaction_id is None else int(transaction_id),
        partition=record.get("partition"),
        offset=record.get("offset"),
        page_id=page_id,
        by_page=by_page,
        at=record["at"],
    )


async def _key_table(connection: Connection, name: str, oid: int, key: str | None) -> Table:
    """The table, as far as a key has to be found in it."""
    columns = {column["name"]: column for column in await table.SQL.describe.fetch(connection, oid)}
    unique = [key] if key is not None else [column for column, facts in columns.items() if facts["is_unique"]]
    if len(unique) != 1 or unique[0] not in columns:
        raise CacheDeclarationError(
            f"cache {name}: which column is the key cannot be told from the table; say where it is declared, with --app"
        )
    first = next(iter(columns.values()))
    return Table(
        oid=oid, schema=first["schema"], name=first["table"], key=unique[0],
        key_type=table.key_type_of(name, columns[unique[0]]), columns=(), read=(),
        json=frozenset(), exact=frozenset(), binary=frozenset(), numeric=frozenset(),
    )  # fmt: skip


def _normal(key: str, kind: type) -> str:
    """A key in the form that events have it in.

    Raises:
        CacheDeclarationError: the table cannot have such a key.
    """
    try:
        return str(kind(key))
    except ValueError:
        raise CacheDeclarationError(f"key {key!r} is no {kind.__name__}, as the table's keys are") from None


# ---------------------------------------------------------------------------------------------------------- records


@dataclass(frozen=True, slots=True)
class _Read:
    partition: int | None
    first: int = 0
    end: int = 0
    scan: Scan | None = None
    why_not: str | None = None


def _placed(wanted: Wanted, told: Explanation, waiting: Sequence[Record]) -> Wanted:
    """With the partition where one of the key's events was found, unless another one is wanted."""
    places = [wanted.partition, told.row_origin and told.row_origin.partition, *(row["partition"] for row in waiting)]
    return replace(wanted, partition=next((place for place in places if place is not None), None))


async def _read(wanted: Wanted, told: Explanation, kind: type, offsets: Mapping[int, int]) -> _Read:
    """The newest records of the key's partition; `offsets` is where the consumer stands in each."""
    assert wanted.servers is not None
    async with kafka.Tail(wanted.servers) as tail:
        ends = await tail.ends(told.topic, limits.EXPLAIN_PARTITIONS)
        if not ends:
            return _Read(wanted.partition, why_not=f"Kafka has no topic {told.topic}")
        # Where no event was found, the key is where every Kafka client puts it, as long as the topic has not grown.
        where = kafka.partition_hash(told.key) % len(ends) if wanted.partition is None else wanted.partition
        if where not in ends:
            return _Read(where, why_not=f"topic {told.topic} has no partition {where}")
        begin, end = ends[where]
        first = max(begin, end - wanted.records)
        scan = Scan()

        async def take(start: int, stop: int, seconds: float) -> None:
            async with asyncio.timeout(seconds):
                async for record in tail.read(told.topic, {where: (start, stop)}):
                    scan.take(arrival(record), is_of_key=_is_of(record.key, told.key, kind))

        try:
            await take(first, end, limits.EXPLAIN_SECONDS)
        except TimeoutError:
            reason = f"reading took more than {limits.EXPLAIN_SECONDS:g} s; ask for fewer with --newest"
            return _Read(where, first, end, why_not=reason)
        if end < offsets.get(where, 0):
            # The embedded broker understates the end while the last batch has several records. There may be none.
            with contextlib.suppress(TimeoutError):
                await take(end, offsets[where], limits.EXPLAIN_BEYOND_SECONDS)
                end = offsets[where]
    return _Read(where, first, end, scan)


def _is_of(raw: bytes | None, key: str, kind: type) -> bool:
    if raw is None:
        return False
    if raw == key.encode():
        return True
    try:
        return kind is not str and str(kind(raw.decode())) == key
    except ValueError:
        return False


async def _judged(pool: Pool, told: Explanation, read: _Read, stands: Record | None, known: Known) -> Scanned:
    scanned = Scanned(
        partition=read.partition,
        first=read.first,
        end=read.end,
        next_offset=None if stands is None else stands["next_offset"],
        state=None if stands is None else stands["state"],
        why_not=read.why_not,
    )
    if read.scan is None:
        return scanned
    seen = await _seen(pool, [found for found, _, _ in read.scan.records], [page.id for page in told.pages])
    return replace(scanned, records=tuple(judge(read.scan, known, seen)))


def _known(
    told: Explanation, read: _Read, stands: Record | None, waiting: Sequence[Record], cache: Cache[Any] | None
) -> Known:
    last = told.row_origin or told.tombstone
    return Known(
        next_offset=0 if stands is None else stands["next_offset"],
        handled=None if cache is None else cache.handlers.keys(),
        replays=cache is not None and cache.replays,
        parked={row["offset"] for row in waiting if row["partition"] == read.partition},
        offset=last.offset if last is not None and last.partition == read.partition else None,
        position=None if last is None else last.position,
        log_id=None if last is None else last.log_id,
    )


async def _seen(pool: Pool, found: Sequence[Arrival], pages: Sequence[int]) -> dict[int, int]:
    """Which page contains an event, by the event's offset."""
    placed = [(one.record.offset, one.position) for one in found if one.position is not None]
    if not placed or not pages:
        return {}
    logs = [at.log_id for _, at in placed]
    transactions = [str(at.transaction_id) for _, at in placed]
    rows = await SQL.seen.fetch(pool, logs, transactions, list(pages))
    return {placed[row["number"] - 1][0]: row["page_id"] for row in rows if row["page_id"] is not None}


# ------------------------------------------------------------------------------------------------------------ owner


async def _of_owner(pool: Pool, cache: Cache[Any], told: Explanation, kind: type) -> OwnersRow:
    """The owner's row, or why there is none to be had: an explanation is wanted most when something fails."""
    assert cache.owner is not None
    try:
        page = await cache.owner.get(UUID(told.key) if kind is UUID else kind(told.key))
        row = next(iter(page.rows), None)
        cached = await cache.get(pool, told.key)
        if row is None or cached is None:
            return OwnersRow(row=row)
        ours, theirs = cached.__dict__, cache.row.model_validate(row).__dict__
    except Exception as error:  # noqa: BLE001 - whatever it is, it is part of the explanation
        return OwnersRow(error=str(error) or type(error).__name__)
    differs = [name for name in theirs if name != table.SYNCED and ours[name] != theirs[name]]
    return OwnersRow(row=row, differs=tuple(differs))
