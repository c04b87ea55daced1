"""A copy of a cache's table, and two consumers that might feed it through the engine that all consumers use.

The copy has a name and a consumer of its own, so that neither the service's table nor what is known of it is touched,
and tests may run beside each other. It is dropped at the end, whatever happened; a process that is killed leaves it,
and its name says whose it was.
"""

import uuid
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Final

from outbox import crash_sites, postgres
from outbox.cache import Cache
from outbox.cache.merge import Merge
from outbox.cache.pages import Pages
from outbox.consumer.apply import Engine, Outcome, Partition
from outbox.event import key_text
from outbox.postgres import Pool
from outbox.testing.plan import Fate
from outbox.testing.stream import Shown, Stream

SQL: Final = postgres.Statements("outbox", "testing/scratch.sql")

_SITES: Final = {Fate.DIED_EARLY: "outbox.consumer.apply.advance", Fate.DIED_LATE: "outbox.cache.merge.merge"}


class DiedError(Exception):
    """The consumer of a plan dies here."""


_deadly: Final[ContextVar[str | None]] = ContextVar("deadly", default=None)
"""The crash site after which the consumer of this task dies."""


@dataclass(frozen=True, slots=True)
class Record:
    """What the engine wants to know of a Kafka record."""

    offset: int
    key: bytes
    value: bytes
    headers: Sequence[tuple[str, bytes | None]]
    timestamp: int = 1_750_000_000_000


@dataclass(frozen=True, slots=True)
class Page:
    """What the owner would have answered."""

    log: str
    snapshot: str
    rows: list[dict[str, Any]]


class Scratch:
    """The copy of the table, and two consumers that might feed it."""

    def __init__(self, pool: Pool, cache: Cache[Any], merge: Merge, stream: Stream) -> None:
        """Made by `scratch`."""
        self.stream = stream
        self._pool = pool
        self._table = merge.table
        self._merge = merge
        self._consumer = f"outbox.testing {merge.table.name}"
        self._parker = f"{merge.table.schema}.{merge.table.name}"
        copy: Cache[Any] = Cache(cache.row, table=self._parker, key=cache.key, topic=cache.topic)
        copy.handlers.update(cache.handlers)
        self._engines = [Engine(pool, self._consumer, f"consumer {number}", [copy]) for number in (1, 2)]
        self._pages = Pages(pool, merge, topic=cache.topic, parker=self._parker)
        self._topic = cache.topic
        self._rows = merge.table.compose(SQL.rows)
        self._empty = merge.table.compose(SQL.empty)

    async def prepare(self) -> None:
        """Before the first plan."""
        for engine in self._engines:
            await engine.prepare()
        lives = self.stream.lives.values()
        rows = [row for life in lives for row in life.rows if row is not None]
        stored = iter(await self._table.compose(SQL.as_stored).fetch(self._pool, self._merge.rows(rows)))
        for life in lives:
            life.shown = [None if row is None else self._shown(next(stored)) for row in life.rows]

    async def empty(self) -> None:
        """Nothing is left of the last plan."""
        await self._empty.execute(self._pool, self._table.oid, self._consumer, self._parker)

    async def drop(self) -> None:
        """Nothing is left at all."""
        await self.empty()
        await SQL.forget.execute(self._pool, self._table.oid)
        await self._table.compose(SQL.drop).execute(self._pool)

    async def rows(self) -> dict[str, Shown]:
        """What the table has, by key."""
        found = await self._rows.fetch(self._pool)
        return {key_text(record[self._table.key]): self._shown(record) for record in found}

    def _shown(self, record: Any) -> dict[str, Any]:
        return {column: record[column] for column in self._table.columns}

    async def parked(self) -> dict[str, str]:
        """Why events were set aside, by key."""
        found = await SQL.parked.fetch(self._pool, self._parker)
        return {record["key"]: f"{record['reason']}: {record['detail']}" for record in found}

    async def claim(self, number: int) -> Partition:
        """One of the consumers takes the partition."""
        return await self._engines[number].claim(self._topic, 0, 0)

    async def apply(self, number: int, partition: Partition, records: Sequence[Record], fate: Fate) -> Outcome:
        """A batch.

        Raises:
            DiedError: by fate.
        """
        token = _deadly.set(_SITES.get(fate))
        try:
            return await self._engines[number].apply(partition, records)
        finally:
            _deadly.reset(token)

    async def merge_page(self, page: Page, keys: Sequence[str] | None) -> None:
        """A page of the owner."""
        if keys is None:
            await self._pages.merge(page, after=None, through=None)
        else:
            await self._pages.merge_keys(page, keys)


@asynccontextmanager
async def scratch(pool: Pool, cache: Cache[Any], stream: Stream) -> AsyncIterator[Scratch]:
    """A copy of the cache's table, for the length of the block."""
    live = (await cache.prepare(pool)).table
    oid = await SQL.make.fetchval(pool, live.oid, f"outbox_testing_{uuid.uuid4().hex[:16]}")
    made = Scratch(pool, cache, await cache.prepare(pool, oid), stream)
    try:
        with _deaths():
            await made.prepare()
            yield made
    finally:
        await made.drop()


_users = 0
_former: crash_sites.Hook | None = None


@contextmanager
def _deaths() -> Iterator[None]:
    """Consumers may die, but only those of a plan, whatever else runs in this process."""
    global _users, _former  # noqa: PLW0603 - the hook is one for the process, too
    if _users == 0:
        _former, crash_sites.hook = crash_sites.hook, _die
    _users += 1
    try:
        yield
    finally:
        _users -= 1
        if _users == 0:
            crash_sites.hook = _former


async def _die(site: str, side: crash_sites.Side) -> None:
    if side == "after" and site == _deadly.get():
        raise DiedError
    if _former is not None:
        await _former(site, side)
