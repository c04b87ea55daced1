"""Rows in the memory of a process, in front of the table; PostgreSQL says which of them have changed.

    get ---> remembered? ---------------------------------> the row
                 | no
                 v
             register the read -> query -> still registered? -> remember
                                               ^
    batch: BEGIN .. merge .. NOTIFY .. COMMIT -+-> forget these keys, and what is registered for them

    bypassed --(LISTEN, and the table is known)--> listening --(connection lost, table swapped, stop)--> bypassed, empty

Guarantees:

* What is remembered was the row when its read began, and no change of it has been heard of since. PostgreSQL delivers a
  notification after its commit has become visible. So a read that does not see a change was registered before that
  change is heard of; hearing of it takes the registration away, or the remembered row if the read was quicker. *Read
  the old row, hear of the new one, remember the old one* cannot happen.
* Nothing is remembered before LISTEN has returned, nor after the connection that listens is lost: then everything is
  dropped at once, the reads under way included, and the table is read until a new connection listens.
* A connection that is dead without a sign is found out by a look every `MEMORY_CHECK_SECONDS`, and no row is older than
  `MEMORY_ROW_SECONDS` whatever happens. That a key is absent is remembered for `MEMORY_ABSENT_SECONDS` only.
* A swap of generations (`outbox.caches.role`) drops everything; the table is looked up before anything is remembered.
* Without a consumer that notifies (`outbox.caches.notifies`), or through a pooler, nothing is remembered.

A crash leaves nothing behind: PostgreSQL ends the LISTEN with its connection.
"""

import asyncio
import contextlib
import copy
import enum
import json
import logging
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, Final, Generic, Self, TypeVar

from pydantic import BaseModel

from outbox import clock, limits, postgres, retry
from outbox.cache.read import Reader
from outbox.cache.table import quoted_name
from outbox.errors import CacheDeclarationError
from outbox.event import key_text
from outbox.loop import Loop
from outbox.postgres import Connection, Pool, Record

log = logging.getLogger(__name__)

SQL: Final = postgres.Statements("outbox", "cache/memory.sql")
CHANNEL: Final = "outbox_cache"

Row = TypeVar("Row", bound=BaseModel)


class _Unknown(enum.Enum):
    UNKNOWN = enum.auto()


_UNKNOWN: Final = _Unknown.UNKNOWN


async def notify(connection: Connection, oid: int, keys: Sequence[str] | None) -> None:
    """Tell processes that remember rows of a table, when this transaction commits, that these changed; None: any.

    More keys than fit into a notification count as any.
    """
    payload = json.dumps({"table": oid})
    if keys is not None and sum(map(len, keys)) <= limits.NOTIFY_MAX_BYTES:
        named = json.dumps({"table": oid, "keys": list(keys)}, ensure_ascii=False, separators=(",", ":"))
        if len(named.encode()) <= limits.NOTIFY_MAX_BYTES:
            payload = named
    await SQL.notify.execute(connection, payload)


class Read:
    """A read of the table under way; what it finds is remembered for keys that are still registered for it."""

    __slots__ = ("started",)

    def __init__(self) -> None:
        self.started: Final = clock.monotonic()


class Remembered:
    """Rows by key, the least recently used one leaving first; pure, and bounded."""

    def __init__(self, max_rows: int) -> None:
        """Holds at most `max_rows` keys, absent ones included."""
        self._max_rows = max_rows
        self._entries: OrderedDict[str, tuple[Record | None, float]] = OrderedDict()
        """Row, or None where there is none, and until when."""
        self._reading: dict[str, set[Read]] = {}

    def __len__(self) -> int:
        return len(self._entries)

    def look(self, key: str) -> Record | _Unknown | None:
        """The row of a key, None if it has none; unknown where that is not remembered."""
        entry = self._entries.get(key)
        if entry is None:
            return _UNKNOWN
        record, until = entry
        if clock.monotonic() >= until:
            del self._entries[key]
            return _UNKNOWN
        self._entries.move_to_end(key)
        return record

    def begin(self, keys: Iterable[str]) -> Read:
        """Register a read of these keys, before its query is sent."""
        read = Read()
        for key in keys:
            self._reading.setdefault(key, set()).add(read)
        return read

    def end(self, read: Read, keys: Iterable[str], found: Mapping[str, Record] | None) -> None:
        """Remember what a read found, unless the key was forgotten meanwhile; with None found, the read has failed."""
        for key in keys:
            reads = self._reading.get(key)
            if reads is None or read not in reads:
                continue
            reads.remove(read)
            if not reads:
                del self._reading[key]
            if found is not None:
                record = found.get(key)
                kept = limits.MEMORY_ABSENT_SECONDS if record is None else limits.MEMORY_ROW_SECONDS
                self._entries[key] = (record, read.started + kept)
                self._entries.move_to_end(key)
        while len(self._entries) > self._max_rows:
            self._entries.popitem(last=False)

    def forget(self, keys: Iterable[str]) -> None:
        """These keys have changed, or may have."""
        for key in keys:
            self._entries.pop(key, None)
            self._reading.pop(key, None)

    def clear(self) -> None:
        """Anything may have changed."""
        self._entries.clear()
        self._reading.clear()


class Memory(Loop, Generic[Row]):
    """What this process remembers of one cache, while the context lasts.

    Attributes:
        listening: whether changes are heard of; while they are not, the table is read.
        hits: rows, and absences, answered from memory.
        misses: those that the table was asked for while listening.
    """

    def __init__(
        self, pool: Pool, table: str, key: str, max_rows: int, reader: Callable[[], Awaitable[Reader[Row]]]
    ) -> None:
        """For the cache declared for `table`; see `Cache.memory`."""
        super().__init__(drain_timeout_seconds=limits.DRAIN_TIMEOUT_SECONDS)
        self.pool: Final = pool
        self.listening = False
        self.hits = 0
        self.misses = 0
        self._table = table
        self._key = key
        self._reader = reader
        self._remembered = Remembered(max_rows)
        self._shared: dict[str, asyncio.Task[Record | None]] = {}
        """Queries for single keys that others may join."""
        self._oid: int | None = None
        self._swaps = 0
        self._wake = asyncio.Event()
        self._pauses = retry.backoff()
        self._complaint: str | None = None

    def __len__(self) -> int:
        """How many keys are remembered."""
        return len(self._remembered)

    async def __aenter__(self) -> Self:
        """Look at the table, if the database answers, and begin to listen.

        Raises:
            CacheDeclarationError: the cache does not fit its table, or keys of its type cannot be told apart by text.
        """
        try:
            await self._reader()
            found = await SQL.look.fetchrow(self.pool, quoted_name(self._table), self._key)
        except Exception as error:
            if not retry.is_transient(error):
                raise
            log.warning("the database does not answer (%r); cache %s is remembered once it does", error, self._table)
        else:
            if found is not None and not found["key_is_exact"]:
                raise CacheDeclarationError(self._not_exact())
        return await super().__aenter__()

    def stop(self) -> None:
        """Ask the loop to end; from now on the table is read."""
        super().stop()
        self._bypass()
        self._wake.set()

    # ------------------------------------------------------------------------------------------------------ reading

    async def one(self, key: str) -> Row | None:
        """The row of a key."""
        reader = await self._reader()
        if not self.listening:
            return await reader.one(self.pool, key)
        record = self._remembered.look(key)
        if record is _UNKNOWN:
            self.misses += 1
            record = await self._asked(reader, key)
        else:
            self.hits += 1
        return None if record is None else _model(reader, record)

    async def many(self, keys: Collection[str]) -> list[Row]:
        """The rows of these keys that exist."""
        reader = await self._reader()
        if not self.listening:
            return await reader.many(self.pool, keys)
        records: list[Record] = []
        missing: list[str] = []
        for key in keys:
            record = self._remembered.look(key)
            if record is _UNKNOWN:
                missing.append(key)
            elif record is not None:
                records.append(record)
        self.misses += len(missing)
        self.hits += len(keys) - len(missing)
        if missing:
            records += (await self._read(reader, missing)).values()
        return [_model(reader, record) for record in records]

    def forget(self, keys: Iterable[str]) -> None:
        """Read these keys anew: somebody has seen newer rows of them than may be remembered."""
        keys = list(keys)
        self._remembered.forget(keys)
        for key in keys:
            self._shared.pop(key, None)

    async def _asked(self, reader: Reader[Row], key: str) -> Record | None:
        """The table's answer for one key; whoever asks meanwhile gets the same. One who gives up disturbs nobody."""
        task = self._shared.get(key)
        if task is None:
            task = self._shared[key] = asyncio.create_task(self._read_one(reader, key))
            task.add_done_callback(lambda done: self._landed(key, done))
        return await asyncio.shield(task)

    def _landed(self, key: str, task: asyncio.Task[Record | None]) -> None:
        if self._shared.get(key) is task:
            del self._shared[key]
        if not task.cancelled():
            task.exception()  # looked at, for the case that nobody waits for it any more

    async def _read_one(self, reader: Reader[Row], key: str) -> Record | None:
        return (await self._read(reader, [key])).get(key)

    async def _read(self, reader: Reader[Row], keys: list[str]) -> dict[str, Record]:
        found: dict[str, Record] | None = None
        read = self._remembered.begin(keys)
        try:
            records = await reader.records(self.pool, keys)
            found = {key_text(record[self._key]): record for record in records}
            return found
        finally:
            self._remembered.end(read, keys, found)

    # ---------------------------------------------------------------------------------------------------- listening

    async def _main(self) -> None:
        while not self._stopping.is_set():
            try:
                async with postgres.acquire(self.pool) as connection:
                    await self._follow(connection)
            except Exception as error:  # noqa: BLE001 - whatever it was, the table is read meanwhile
                level = logging.WARNING if retry.is_transient(error) else logging.ERROR
                log.log(level, "cache %s is read from its table: %r", self._table, error)
            await retry.pause(next(self._pauses), self._stopping)

    async def _follow(self, connection: Connection) -> None:
        """Listen on a connection until it is lost, or until stop."""
        connection.add_termination_listener(self._on_lost)
        try:
            async with asyncio.timeout(limits.MEMORY_CHECK_SECONDS):
                await connection.add_listener(CHANNEL, self._on_notification)
            while not self._stopping.is_set():
                self._wake.clear()
                await self._check(connection)
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(limits.MEMORY_CHECK_SECONDS):
                        await self._wake.wait()
        finally:
            self._bypass()
            connection.remove_termination_listener(self._on_lost)
            with contextlib.suppress(*postgres.CONNECTION_ERRORS):
                async with asyncio.timeout(limits.MEMORY_CHECK_SECONDS):
                    await connection.remove_listener(CHANNEL, self._on_notification)

    async def _check(self, connection: Connection) -> None:
        """Find out that the connection lives, what the table is, and whether remembering is safe."""
        swaps = self._swaps
        async with asyncio.timeout(limits.MEMORY_CHECK_SECONDS):
            found = await SQL.look.fetchrow(connection, quoted_name(self._table), self._key)
        assert found is not None
        if self._swaps != swaps:  # the tables were swapped after this look's snapshot
            self._wake.set()
            return
        problem = self._problem(found, connection)
        if problem is not None:
            self._bypass()
            if problem != self._complaint:
                log.warning("cache %s is read from its table: %s", self._table, problem)
            self._complaint = problem
            return
        self._complaint = None
        if found["oid"] != self._oid:
            self._bypass()
            self._oid = found["oid"]
        if not self._stopping.is_set():
            self.listening = True
            self._pauses = retry.backoff()

    def _problem(self, found: Record, connection: Connection) -> str | None:
        if found["pid"] != connection.get_server_pid() or not found["hears"]:
            return (
                "a pooler stands between, and notifications may not pass it; give memory() a pool on the server itself"
            )
        if found["oid"] is None:
            return "the table does not exist"
        if not found["key_is_exact"]:
            return self._not_exact()
        if not found["notifies"]:
            return "no consumer notifies of its changes; declare memory_max_rows in the consumer's process too"
        return None

    def _not_exact(self) -> str:
        return (
            f"cache {self._table}: keys that differ as text may be the same to column {self._key}; for memory, make it "
            "text, varchar, uuid or an integer, with a deterministic collation"
        )

    def _bypass(self) -> None:
        self.listening = False
        self._clear()

    def _clear(self) -> None:
        self._remembered.clear()
        self._shared.clear()

    def _on_lost(self, _connection: object) -> None:
        self._bypass()
        self._wake.set()

    def _on_notification(self, _connection: object, _pid: int, _channel: str, payload: object) -> None:
        try:
            said: dict[str, Any] = json.loads(str(payload))
            table, keys, role = said["table"], said.get("keys"), said.get("role")
        except (ValueError, TypeError, LookupError, AttributeError):
            log.warning(
                "cache %s: a notification of others on channel %s; everything is forgotten", self._table, CHANNEL
            )
            self._clear()
            return
        if role is not None:
            self._swaps += 1
            self._bypass()
            self._wake.set()
        elif table == self._oid:
            if keys is None:
                self._clear()
            else:
                self.forget(keys)


def _model(reader: Reader[Row], record: Record) -> Row:
    """A row of the caller's own, whatever becomes of it."""
    return reader.model({name: _own(value) for name, value in record.items()})


def _own(value: object) -> object:
    return copy.deepcopy(value) if isinstance(value, list) else value
