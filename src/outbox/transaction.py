"""The unit of work: business writes and the events that report them, committed together or not at all.

Guarantees, and what a crash does to them:

* Events are buffered and flushed by one INSERT, the last statement before COMMIT (or the last of the block, where the
  caller owns the transaction). The business row locks are still held then, so for one key the order of positions is the
  order of the writes, whichever process makes them.
* An event belongs to the savepoint in which it was emitted. When that savepoint is rolled back, by whomever, its events
  are dropped: the buffer follows the connection's own SAVEPOINT, RELEASE and ROLLBACK TO statements. Where such a
  statement was interrupted, nothing commits.
* A crash before COMMIT leaves neither rows nor events; a crash after it leaves both. There is no state in between.
* What could never be published is refused here, while the caller can still roll back.
"""

import asyncio
import json
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, Final, TypeAlias, cast
from uuid import UUID

from outbox import codec, limits, postgres, savepoints
from outbox.errors import EmitError, NotMigrated, ReceiptUnavailable, RecordTooLarge, TransactionClosed
from outbox.event import Event, check_headers, key_text, kind_of
from outbox.postgres import Connection, Pool, Record
from outbox.receipt import Receipt

SQL: Final = postgres.Statements("outbox", "transaction.sql")


@dataclass(frozen=True, slots=True)
class Emission:
    """One event, validated and encoded."""

    topic: str
    key: str
    event_id: UUID
    event_type: str
    schema_version: int
    headers: str | None
    payload: bytes

    @property
    def size_bytes(self) -> int:
        """What the record will need in Kafka, our own headers included."""
        headers_bytes = len((self.headers or "").encode())
        return len(self.payload) + len(self.key.encode()) + headers_bytes + limits.RECORD_OVERHEAD_BYTES


def describe(event: Event, headers: Mapping[str, str] | None = None) -> Emission:
    """Validate and encode one event.

    Raises:
        EmitError: it could never be published; says which field and what to do.
    """
    kind = kind_of(type(event))
    if headers:
        check_headers(headers)
    emission = Emission(
        topic=kind.topic,
        key=key_text(getattr(event, kind.key_field, None)),
        event_id=codec.uuid7(),
        event_type=kind.type,
        schema_version=kind.schema_version,
        headers=json.dumps(dict(headers), ensure_ascii=False) if headers else None,
        payload=codec.encode(event),
    )
    if emission.size_bytes > limits.RECORD_MAX_BYTES:
        raise RecordTooLarge(
            "payload",
            f"{kind.type} needs {emission.size_bytes} bytes as a record",
            f"stay below {limits.RECORD_MAX_BYTES}: store the bulk elsewhere and send a reference",
        )
    return emission


@dataclass(slots=True)
class _Level:
    """What was emitted since one savepoint, and the names that an interrupted statement may have given or taken."""

    name: str
    events: list[Emission] = field(default_factory=list)
    doubts: set[str] = field(default_factory=set)
    is_doubtful: bool = False


class Buffer:
    """Events by savepoint, as a pure value: what was emitted, minus what was rolled back."""

    def __init__(self) -> None:
        """An empty buffer outside any savepoint."""
        self._levels = [_Level("")]

    def add(self, emission: Emission) -> None:
        """Keep an event at the present level."""
        self._levels[-1].events.append(emission)

    def observe(self, query: str, error: BaseException | None = None) -> None:
        """Follow the savepoint statements of one query, as PostgreSQL does.

        A single statement that the server refused changed nothing. Of a longer text, or one that was cancelled, some
        may have been carried out: that is in doubt until the transaction goes back behind it.
        """
        text = savepoints.read(query)
        if error is None:
            for change in text.changes:
                self._apply(change)
        elif text.changes and (text.statements > 1 or not isinstance(error, postgres.PostgresError)):
            self._levels[-1].is_doubtful = True
            self._levels[-1].doubts |= {change.name for change in text.changes if change.kind != "rollback"}

    def _apply(self, change: savepoints.Change) -> None:
        if change.kind == "open":
            self._levels.append(_Level(change.name))
            return
        depth = max((n for n, level in enumerate(self._levels) if level.name == change.name and n), default=0)
        if not depth:
            return  # of a level opened before this unit of work
        found, above = self._levels[depth], self._levels[depth + 1 :]
        if change.kind == "rollback":
            # That this savepoint still exists says what became of the doubtful ones above it, unless one has its name.
            doubts = found.doubts.union(*(level.doubts for level in above))
            self._levels[depth:] = [_Level(found.name, [], doubts, is_doubtful=found.name in doubts)]
        else:
            del self._levels[depth:]
            below = self._levels[-1]
            for level in (found, *above):
                below.events += level.events
                below.doubts |= level.doubts
                below.is_doubtful |= level.is_doubtful

    def drain(self) -> list[Emission]:
        """All events that still count, in the order emitted; the buffer is empty afterwards.

        Raises:
            EmitError: a savepoint statement was interrupted, so that nobody knows which events still count.
        """
        levels, self._levels = self._levels, [_Level("")]
        events = [event for level in levels for event in level.events]
        if events and any(level.is_doubtful for level in levels):
            raise EmitError(
                "savepoints",
                "a savepoint statement was interrupted, and which events still count depends on what became of it",
                "try the whole transaction again",
            )
        return events


class Transaction:
    """An open transaction that also emits events; made by `outbox.transaction`."""

    def __init__(self, connection: Connection, buffer: Buffer, pool: Pool | None = None) -> None:
        """For `transaction`; services do not construct it."""
        self._connection = connection
        self._pool = pool
        self._buffer = buffer
        self._loop = asyncio.get_running_loop()
        self._emitted = 0
        self._open = True
        self._receipt: Receipt | ReceiptUnavailable = ReceiptUnavailable(
            "the transaction has not committed yet: read tx.receipt after its block"
        )

    @property
    def connection(self) -> Connection:
        """The connection, for anything that asyncpg can do; do not commit or roll back on it."""
        return self._connection

    @property
    def pool(self) -> Pool | None:
        """The pool that the connection is from, for work after the transaction; None where a connection was given."""
        return self._pool

    @property
    def is_open(self) -> bool:
        """Whether the block is still running."""
        return self._open

    def emit(self, *events: Event, headers: Mapping[str, str] | None = None) -> None:
        """Publish events if and only if this transaction commits. Call it after the write that they report.

        Args:
            events: instances of concrete `Event` classes.
            headers: Kafka headers, text to text, for each of them.

        Raises:
            EmitError: an event could never be published; the transaction is still usable.
            TransactionClosed: the block has ended.
        """
        self.require_open()
        if self._emitted + len(events) > limits.EMIT_MAX_EVENTS:
            raise EmitError("events", f"are more than {limits.EMIT_MAX_EVENTS} in one transaction", "split the work")
        emissions = [describe(event, headers) for event in events]
        self._emitted += len(emissions)
        for emission in emissions:
            # Savepoint observations arrive through the event loop's queue; so do emissions, and the order stays true.
            self._loop.call_soon(self._buffer.add, emission)

    @property
    def receipt(self) -> Receipt:
        """Where this transaction's events stand in the log, once it has committed; for `Cache.wait_for`.

        Raises:
            ReceiptUnavailable: not committed yet, nothing emitted, or more keys than a receipt can name.
        """
        if isinstance(self._receipt, ReceiptUnavailable):
            raise self._receipt
        return self._receipt

    async def execute(self, query: str, *args: object) -> str:
        """As asyncpg's."""
        return await self._connection.execute(query, *args)

    async def fetch(self, query: str, *args: object) -> list[Record]:
        """As asyncpg's."""
        return await self._connection.fetch(query, *args)

    async def fetchrow(self, query: str, *args: object) -> Record | None:
        """As asyncpg's."""
        return await self._connection.fetchrow(query, *args)

    async def fetchval(self, query: str, *args: object) -> Any:
        """As asyncpg's."""
        return await self._connection.fetchval(query, *args)

    def require_open(self) -> None:
        """For `transaction` and `emit`.

        Raises:
            TransactionClosed: the block has ended.
        """
        if not self._open:
            raise TransactionClosed("this transaction has ended: emit inside its block")

    def seal(self) -> None:
        """For `transaction`: the block has ended; what is emitted from now on would miss the flush.

        Raises:
            TransactionClosed: the block committed or rolled back by itself, so nothing is left to commit events with.
        """
        self._open = False
        if not self._connection.is_in_transaction():
            raise TransactionClosed(
                "the block ended its own transaction: leave COMMIT and ROLLBACK to outbox.transaction"
            )

    def close(self, receipt: Receipt | ReceiptUnavailable) -> None:
        """For `transaction`: the block has ended, with this receipt or the reason why there is none."""
        self._open = False
        self._receipt = receipt


async def _flush(connection: Connection, events: list[Emission]) -> list[Record]:
    """Insert the events; the last statement of the unit of work."""
    if not events:
        return []
    try:
        return await SQL.flush.fetch(
            connection,
            [e.topic for e in events],
            [e.key for e in events],
            [e.event_id for e in events],
            [e.event_type for e in events],
            [e.schema_version for e in events],
            [e.headers for e in events],
            [e.payload for e in events],
        )
    except postgres.PostgresError as error:
        if error.sqlstate == postgres.TOO_LARGE:
            remedy = "send less, or have a larger limit entered for the topic in outbox.topics"
            raise RecordTooLarge("payload", str(error), remedy) from error
        if error.sqlstate in postgres.UNDEFINED:
            raise NotMigrated("the database has no log to emit to; run: outbox migrate up") from error
        raise


Db: TypeAlias = Pool | Connection | Transaction


@asynccontextmanager
async def transaction(db: Db) -> AsyncIterator[Transaction]:
    """Open a unit of work: on a pool a transaction of its own; on a connection or another unit of work, inside theirs.

    With a pool, or a connection that has no transaction open, the block's end flushes the events and commits. Inside
    a caller's transaction the block is a savepoint, its end flushes, and the caller commits. Inside another unit of
    work the block is a savepoint whose events join the outer flush.

    Raises: EmitError: from `emit`, or at the end where only the database knows (the topic's own limit); nothing is
    committed.
    """
    if isinstance(db, Transaction):
        db.require_open()
        async with postgres.atomic(db.connection):
            yield db
        return
    async with postgres.acquire(db) as connection:
        buffer = Buffer()
        unit = Transaction(connection, buffer, None if db is connection else cast("Pool", db))
        rows: list[Record] = []
        try:
            async with postgres.atomic(connection):
                stop_observing = postgres.on_savepoints(connection, buffer.observe)
                try:
                    yield unit
                    unit.seal()
                    await asyncio.sleep(0)  # lets queued observations and emissions reach the buffer
                    rows = await _flush(connection, buffer.drain())
                finally:
                    stop_observing()
        except BaseException:
            unit.close(ReceiptUnavailable("the transaction was rolled back, unless its COMMIT was lost on the way"))
            raise
        unit.close(Receipt.of(rows))
