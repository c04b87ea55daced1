"""The engine: a batch of one partition into PostgreSQL, exactly once. It knows nothing of FastStream or Kafka.

    claim:  epoch + 1 on the partition's row (waits for a former owner's open transaction), then its marks
    apply:  drop duplicates -> decode, call handlers, fold            (pure, no connection held)
            BEGIN
              advance   compare-and-swap of (epoch, next_offset); locks the partition's row; writes the marks
              merge     one statement a cache
              park      events that cannot be applied
            COMMIT

Guarantees:

* **Once.** Rows and position commit together. A crash before COMMIT leaves the old position: the batch is read again. A
  crash after it leaves the new one: the batch is not. A lost reply of COMMIT looks like the first, and the second try
  finds the offset moved: it changes nothing, and the partition is claimed again.
* **One owner.** A batch of an older epoch updates no row and is rolled back, whenever its process wakes up.
* **In order.** A relay's (window, ordinal) grow within log and shard, but for duplicates. So a record at or below the
  *running maximum*, which begins at the stored mark, was applied before or stands earlier in this very batch. Late
  bytes of a zombie relay are such records.
* The marks live in this process between batches: under its epoch nobody else writes them.
* **Every cache of the consumer, or it is known not to be complete.** A batch of a process that does not know one of
  them, such as an older release of the service, says of that one in its own transaction that it lacks events.
* **Every table of a cache.** While a cache is rebuilt into a new generation, the batch goes into both tables. Which
  they are is asked under the lock that a swap needs for itself; where they are others than this process knows, the
  batch is rolled back, the tables are looked up, and it is done again.
"""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final, TypeAlias

from outbox import garbage, limits, postgres, retry, wire
from outbox.cache import Cache
from outbox.cache.table import quoted_name
from outbox.consumer import retries
from outbox.consumer.deliver import InboxTarget
from outbox.consumer.inbox import Inbox
from outbox.consumer.poison import Target as CacheTarget
from outbox.consumer.record import Arrival, Record, arrival, event_id
from outbox.consumer.target import Tally, Target, Work
from outbox.errors import CacheDeclarationError
from outbox.postgres import Connection, Pool

SQL: Final = postgres.Statements("outbox", "consumer/apply.sql")

Mark: TypeAlias = tuple[int, int]
"""Window and ordinal."""

_BEFORE_ALL: Final[Mark] = (-1, -1)
_SWAPPED: Final = "the tables of a cache were swapped again and again; it is tried later"
_LOOKS_MAX: Final = 5
"""How often in a row the tables of a batch may turn out to be others; each is a swap."""


class _OtherTablesError(Exception):
    """The batch was rolled back: a cache has other tables now."""


@dataclass(slots=True)
class Partition:
    """A partition that this process has claimed.

    Attributes:
        next_offset: the first offset not applied.
        state: as stored; `running`, or why it stands still.
        last_event_id: of the record before it, if that had one.
        marks: by log id and shard.
    """

    topic: str
    number: int
    epoch: int
    next_offset: int
    last_event_id: str | None = None
    marks: dict[tuple[str, int], Mark] = field(default_factory=dict)
    state: str = "running"


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What became of a batch.

    Attributes:
        fenced: another process claimed the partition, or this batch was applied before: claim it again.
        dropped: duplicates, records before the position, and replayed ones that a cache or inbox does not want.
        applied: events that took effect on a cache, or were superseded within the batch, or were handled by an inbox.
        unknown: events of types that a cache or inbox has no handler for.
        parked: events set aside.
        resolved: parked events made irrelevant by full rows.
        retried: parked events applied after all.
    """

    fenced: bool = False
    dropped: int = 0
    applied: int = 0
    unknown: int = 0
    parked: int = 0
    resolved: int = 0
    retried: int = 0

    def __add__(self, other: "Outcome") -> "Outcome":
        return Outcome(
            fenced=self.fenced or other.fenced,
            dropped=self.dropped + other.dropped,
            applied=self.applied + other.applied,
            unknown=self.unknown + other.unknown,
            parked=self.parked + other.parked,
            resolved=self.resolved + other.resolved,
            retried=self.retried + other.retried,
        )


@dataclass(slots=True)
class _Batch:
    next_offset: int
    last_event_id: str | None
    marks: dict[tuple[str, int], Mark]
    dropped: int
    works: list[Work]
    size: int
    """Records."""


class Engine:
    """Applies batches for one consumer."""

    def __init__(self, db: Pool, consumer: str, owner: str, targets: Sequence[Cache[Any] | Inbox | Target]) -> None:
        """For the consumer group `consumer`; `owner` names this process to people."""
        self._pool = db
        self._consumer = consumer
        self._owner = owner
        self._caches = [target for target in targets if isinstance(target, Cache)]
        self._inboxes = [target for target in targets if isinstance(target, Inbox)]
        self._others: list[Target] = [target for target in targets if not isinstance(target, Cache | Inbox)]
        self._targets: dict[str, list[Target]] = {}
        self._tables: list[int] = []

    async def prepare(self, *, takes_over: bool = True) -> None:
        """Check every cache against the database, and say there that this consumer feeds it.

        Args:
            takes_over: also a cache that another consumer feeds, whose batches are refused from then on.

        Raises:
            CacheDeclarationError: one does not fit its table, or is another consumer's.
        """
        targets: dict[str, list[Target]] = {}
        tables: list[int] = []
        await SQL.forget_dropped.execute(self._pool)
        for cache in self._caches:
            merge = await cache.prepare(self._pool)
            if not takes_over:
                await self._check_consumer(cache.table, merge.table.oid)
            known_as = merge.table.oid, cache.table
            quoted, notifies = quoted_name(cache.table), cache.memory_max_rows is not None
            await SQL.forget_renamed.execute(self._pool, *known_as, quoted)
            await SQL.register.execute(self._pool, *known_as, self._consumer, cache.topic, notifies, quoted)
            feeds = [CacheTarget(cache, merge, cache.table)]
            if (spare := await SQL.spare.fetchrow(self._pool, cache.table)) is not None:
                feeds.append(CacheTarget(cache, await cache.prepare(self._pool, spare["oid"]), spare["name"]))
            targets.setdefault(cache.topic, []).extend(feeds)
            tables += [target.merge.table.oid for target in feeds]
        for inbox in self._inboxes:  # last, so that what they emit is inserted when all else is done
            targets.setdefault(inbox.topic, []).append(InboxTarget(inbox))
        for other in self._others:
            targets.setdefault(other.topic, []).append(other)
        self._targets, self._tables = targets, tables

    async def _check_consumer(self, name: str, oid: int) -> None:
        feeds = await SQL.fed_by.fetchval(self._pool, oid)
        if feeds is not None and feeds != self._consumer:
            raise CacheDeclarationError(
                f"cache {name}: consumer {feeds} feeds its table since it started, and two would undo each other's "
                f"rows; stop {feeds} or this one, {self._consumer}, or give each a table of its own"
            )

    async def database(self) -> str:
        """The name of the database."""
        name: str = await SQL.database.fetchval(self._pool)
        return name

    async def claim(self, topic: str, number: int, first_offset: int) -> Partition:
        """Take a partition over from whoever has it; a partition never read before begins at `first_offset`."""
        async with postgres.acquire(self._pool) as connection:
            row = await SQL.claim.fetchrow(connection, self._consumer, topic, number, first_offset, self._owner)
            marks = await SQL.applied.fetch(connection, self._consumer, topic, number)
        assert row is not None
        return Partition(
            topic,
            number,
            row["epoch"],
            row["next_offset"],
            row["last_event_id"],
            {(mark["log_id"], mark["shard"]): (mark["window_no"], mark["ordinal"]) for mark in marks},
            row["state"],
        )

    async def stored_state(self, topic: str, number: int) -> str | None:
        """Whether a partition may go on; None where it was never read."""
        state: str | None = await SQL.stored_state.fetchval(self._pool, self._consumer, topic, number)
        return state

    async def set_state(self, partition: Partition, state: str) -> None:
        """Store that a claimed partition stands still, or that it goes on, for people and for freshness."""
        await SQL.set_state.execute(
            self._pool, self._consumer, partition.topic, partition.number, partition.epoch, state
        )
        partition.state = state

    async def restart(self, partition: Partition, first_offset: int) -> None:
        """Let a claimed partition that was set free go on at the first record that Kafka has."""
        await SQL.restart.execute(
            self._pool, self._consumer, partition.topic, partition.number, partition.epoch, first_offset
        )
        partition.next_offset, partition.last_event_id, partition.state = first_offset, None, "running"

    async def apply(self, partition: Partition, records: Sequence[Record]) -> Outcome:
        """Apply records of a partition, in the order of their offsets, in one transaction; one more where a log begins.

        Raises:
            ParkingFull: nothing was applied; the partition has to wait.
            PostgresError, OSError, TimeoutError: nothing is known to be applied; claim again and read again.
        """
        total = Outcome()
        while True:
            batch, outcome = await self._apply_one_log(partition, records)
            total += outcome
            if batch is None or outcome.fenced or len(records) == batch.size:
                return total
            records = records[batch.size :]

    async def _apply_one_log(self, partition: Partition, records: Sequence[Record]) -> tuple[_Batch | None, Outcome]:
        for _ in range(_LOOKS_MAX):
            batch = self._read(partition, records)
            if batch is None:
                return None, Outcome(dropped=len(records))
            try:
                outcome = await self._commit_or_bisect(partition, batch)
            except _OtherTablesError:
                await self.prepare(takes_over=False)
                continue
            if not outcome.fenced:
                partition.next_offset = batch.next_offset
                partition.last_event_id = batch.last_event_id
                partition.marks |= batch.marks
            return batch, outcome
        raise TimeoutError(_SWAPPED)

    async def _commit_or_bisect(self, partition: Partition, batch: _Batch) -> Outcome:
        try:
            return await self._commit(partition, batch, careful=False)
        except Exception as error:
            if not retry.is_data(error):
                raise
        return await self._commit(partition, batch, careful=True)

    @garbage.held()
    def _read(self, partition: Partition, records: Sequence[Record]) -> _Batch | None:
        marks: dict[tuple[str, int], Mark] = {}
        fresh: list[Arrival] = []
        log_id: str | None = None
        for index, record in enumerate(records):
            if record.offset < partition.next_offset:
                continue
            found = arrival(record)
            if (at := found.position) is not None and not found.is_replay:  # replayed ones are in no order
                origin = at[:2]
                mark = at[2:4]
                if mark <= (marks.get(origin) or partition.marks.get(origin, _BEFORE_ALL)):
                    continue
                if at[0] != log_id:
                    if log_id is not None and at.log_ordinal > wire.log_ordinal(log_id):
                        records = records[:index]  # a fold must not carry a row of an older log into a newer one
                        break
                    log_id = log_id or at[0]
                marks[origin] = mark
            fresh.append(found)
        if not records or records[-1].offset < partition.next_offset:
            return None
        works = [target.work(fresh, partition.number) for target in self._targets[partition.topic]]
        dropped = len(records) - len(fresh)
        return _Batch(records[-1].offset + 1, event_id(records[-1]), marks, dropped, works, len(records))

    async def _commit(self, partition: Partition, batch: _Batch, *, careful: bool) -> Outcome:
        async with (
            asyncio.timeout(limits.BATCH_TIMEOUT_SECONDS),
            postgres.acquire(self._pool) as connection,
            postgres.transact(connection),
        ):
            parkers = await self._advance(connection, partition, batch)
            if parkers is None:
                return Outcome(fenced=True)
            if careful:
                await SQL.immediate.execute(connection)
            tallies = [
                await work.run(connection, waiting=work.target.name in parkers, careful=careful) for work in batch.works
            ]
        return _outcome(batch.dropped, tallies)

    async def _advance(self, connection: Connection, partition: Partition, batch: _Batch) -> list[str] | None:
        """Take the locks, in this order, and move the position; returns who has parked keys, None when fenced."""
        fed = [cache.table for cache in self._caches]
        moved = await SQL.advance.fetchrow(
            connection,
            self._consumer,
            partition.topic,
            partition.number,
            partition.epoch,
            partition.next_offset,
            batch.next_offset,
            batch.last_event_id,
            [log_id for log_id, _ in batch.marks],
            [shard for _, shard in batch.marks],
            [window for window, _ in batch.marks.values()],
            [ordinal for _, ordinal in batch.marks.values()],
            [target.name for target in self._targets[partition.topic]],
            str(limits.BATCH_IDLE_SECONDS * 1000),
            fed,
            bool(batch.works) and all(work.keeps_plans for work in batch.works),
        )
        if moved is None:
            return None
        if moved["tables"] != self._tables:
            raise _OtherTablesError
        if moved["passes_by"]:
            await SQL.lose_events.execute(connection, self._consumer, partition.topic, fed)
        parkers: list[str] = moved["parkers"]
        return parkers

    # -------------------------------------------------------------------------------------- parked keys

    async def due(self, partitions: Sequence[tuple[str, int]]) -> list[tuple[str, int]]:
        """Those of the partitions, by topic and number, that have parked keys to be tried now."""
        names = [target.name for targets in self._targets.values() for target in targets]
        return await retries.due(self._pool, names, partitions)

    async def retry(self, partition: Partition) -> Outcome:
        """Try parked keys of a partition that are due, under the locks of a batch that moves nothing.

        Raises:
            PostgresError, OSError, TimeoutError: nothing is known to be applied; what is not stays due.
        """
        nothing = _Batch(partition.next_offset, partition.last_event_id, {}, 0, [], 0)
        for _ in range(_LOOKS_MAX):
            try:
                async with (
                    asyncio.timeout(limits.BATCH_TIMEOUT_SECONDS),
                    postgres.acquire(self._pool) as connection,
                    postgres.transact(connection),
                ):
                    parkers = await self._advance(connection, partition, nothing)
                    if parkers is None:
                        return Outcome(fenced=True)
                    await SQL.immediate.execute(connection)
                    waiting = [target for target in self._targets[partition.topic] if target.name in parkers]
                    return _outcome(0, [await retries.turn(connection, waiting, partition.number)])
            except _OtherTablesError:
                await self.prepare(takes_over=False)
        raise TimeoutError(_SWAPPED)


def _outcome(dropped: int, tallies: Sequence[Tally]) -> Outcome:
    return Outcome(
        dropped=dropped + sum(tally.dropped for tally in tallies),
        applied=sum(tally.applied for tally in tallies),
        unknown=sum(tally.unknown for tally in tallies),
        parked=sum(tally.parked for tally in tallies),
        resolved=sum(tally.resolved for tally in tallies),
        retried=sum(tally.retried for tally in tallies),
    )
