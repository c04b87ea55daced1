"""A rebuild: all pages of the owner into a cache's table, from the first key to the last, while events go on arriving.

    take     the row of outbox.rebuilds, under a lease: one worker at a time
    page     read page n + 1 from the owner while page n is merged; each merge is a transaction that moves the row, too
    last     the page without successor also says that the table holds all of the owner's log

Bootstrap, repair after lost records and filling a new generation are this one thing.

Guarantees:

* **Events and pages in any order.** A page is merged under the one rule (`pages`, `merge.sql`), so nothing is stopped
  for a rebuild and nothing that came meanwhile is lost. Rows that the owner does not have go, because each page speaks
  for all keys between its first and its last.
* **Nothing that Kafka lost stays lost.** A row that an event changed after its page was read is not written by it, and
  may lack what came before that event: it is read again until it is written (`reread`), and only then the page counts.
* **Resumable.** Page and progress commit together. A kill at any line leaves the pages that were committed; whoever
  takes the row next goes on after them. What was read ahead is lost, and read again.
* **One worker.** A worker whose lease ran out and was taken over finds another name in the row, in its page's own
  transaction, which is then rolled back.
* **One log.** If the owner's log changes, the rebuild begins again; a page of an older log is refused.
* **Halted partitions.** What Kafka lost had been committed by the owner, so pages read *after* a partition was set free
  contain it, and those read before may not. Setting one free begins every rebuild of the topic's tables again, in one
  statement; one that halts before the end does so once more.
"""

import asyncio
import contextlib
import logging
import os
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final
from uuid import UUID, uuid4

from outbox import limits, postgres, retry
from outbox.cache.owner import Owner, OwnerPage
from outbox.cache.pages import Merged, Pages
from outbox.cache.reread import read_again
from outbox.errors import CacheNotFed, OwnerError, OwnerPageInvalid, OwnerUnavailable, PageRefused, RebuildBusy
from outbox.postgres import Connection, Pool, Record

if TYPE_CHECKING:
    from outbox.cache import Cache

log = logging.getLogger(__name__)

SQL: Final = postgres.Statements("outbox", "cache/rebuild.sql")

_UUID_CHARACTERS: Final = 36
_STUMBLES_MAX: Final = 5
"""Errors in a row, without a page between them, that a rebuild tries to outlive."""


class _StartOverError(Exception):
    """The pages merged so far do not count: the owner's log changed, a partition halted, or events were lost."""


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a rebuild is.

    Attributes:
        pages: merged.
        rows: in them.
        changed: of them, newer than what the table had.
        removed: rows of the table that the owner does not have.
        finished: the last page was merged.
    """

    pages: int = 0
    rows: int = 0
    changed: int = 0
    removed: int = 0
    finished: bool = False


Report = Callable[[Progress], None]


class Rebuild:
    """Rebuilds one table of a cache; make one for each run."""

    def __init__(self, db: Pool, cache: "Cache[Any]", *, oid: int | None = None) -> None:
        """Of the cache's live table, or of its spare one.

        Args:
            db: a pool on the cache's database; two connections are used.
            cache: with an owner.
            oid: of the spare table.

        Raises:
            OwnerError: the cache has no owner.
        """
        if cache.owner is None:
            raise OwnerError(f"cache {cache.table} has no owner to copy rows from; declare it: Cache(..., owner=...)")
        self._pool = db
        self._cache = cache
        self._owner: Owner = cache.owner
        self._oid = oid
        self._parker = cache.table
        self._worker: Final = f"{socket.gethostname()}:{os.getpid()}:{uuid4().hex[:8]}"
        self._log: str | None = None
        self._after: str | None = None
        self._key_type: type = str
        self._progress = Progress()

    async def run(self, *, report: Report | None = None, free: bool = False, unless_complete: bool = False) -> Progress:
        """Merge all pages; goes on where an unfinished rebuild of the table stopped.

        Args:
            report: called after each page.
            free: let partitions of the topic that stand still go on.
            unless_complete: do nothing where the table holds all of the owner's present log.

        Raises:
            RebuildBusy: another process does it.
            CacheNotFed: no consumer has ever fed the table.
            OwnerError: the owner does not answer, or not as it should.
            OwnerRowInvalid: a row of the owner does not fit.
        """
        pages = await self._prepared()
        complete_log = (await self._owner.page(None, 1)).log if unless_complete else None
        if free:
            await self._free()
        if not await self._take(unless_log=complete_log):
            return Progress(finished=True)
        async with self._keeping_the_lease():
            stumbles, pauses = 0, retry.backoff()
            while not self._progress.finished:
                before = self._progress.pages
                try:
                    await self._pass(pages, report or _silent, free=free)
                except _StartOverError as reason:
                    log.warning("rebuild of %s begins again: %s", self._parker, reason)
                    if free:
                        await self._free()
                    await asyncio.sleep(next(pauses))
                    await self._take(anew=True)
                except Exception as error:
                    stumbles = 1 if self._progress.pages > before else stumbles + 1
                    if stumbles > _STUMBLES_MAX or not (isinstance(error, PageRefused) or retry.is_transient(error)):
                        raise
                    log.warning("rebuild of %s goes on after: %r", self._parker, error)
                    await asyncio.sleep(next(pauses))
                    pages = await self._prepared()
                    if (row := await SQL.done.fetchrow(self._pool, self._oid, self._worker)) is not None:
                        self._progress = _progress(row, finished=True)  # only the reply of the last COMMIT was lost
                    else:
                        await self._take()
        return self._progress

    async def _prepared(self) -> Pages:
        """For the table as it is called now."""
        merge = await self._cache.prepare(self._pool, self._oid)
        self._oid, self._key_type = merge.table.oid, merge.table.key_type
        self._parker = await SQL.parker.fetchval(self._pool, self._oid) or self._cache.table
        return Pages(self._pool, merge, topic=self._cache.topic, parker=self._parker)

    # ------------------------------------------------------------------------------------------------- pages

    async def _pass(self, pages: Pages, report: Report, *, free: bool) -> None:
        """Pages from where we are to the last, each read while the one before is merged."""
        after = self._after
        reading = asyncio.create_task(self._read(after))
        try:
            while True:
                page, through = await reading
                self._check_log(page)
                self._log = page.log
                if through is not None:
                    reading = asyncio.create_task(self._read(through))

                await self._merge(pages, page, after, through, free=free)
                after = through
                report(self._progress)
                if through is None:
                    return
        finally:
            reading.cancel()
            with contextlib.suppress(asyncio.CancelledError, Exception):
                await reading

    async def _merge(
        self, pages: Pages, page: OwnerPage, after: str | None, through: str | None, *, free: bool
    ) -> None:
        """Merge a page and move the progress behind it, in its transaction unless it was too late for some rows."""

        async def moved(connection: Connection, merged: Merged) -> None:
            if not merged.late:
                await self._moved(connection, merged, page.log, through, free=free)

        merged = await pages.merge(page, after=after, through=through, moved=moved)
        if not merged.late:
            return
        more = await read_again(self._owner, pages, merged.late, self._key_type, self._check_log)
        merged = Merged(merged.rows, merged.written + more.written, merged.removed + more.removed)
        async with postgres.acquire(self._pool) as connection, postgres.transact(connection):
            await self._moved(connection, merged, page.log, through, free=free)

    async def _read(self, after: str | None) -> tuple[OwnerPage, str | None]:
        """A page and its last key; None for that where no key follows."""
        page = await self._owner.page(self._key(after), limits.OWNER_PAGE_ROWS)
        keys = check_order(page, self._cache.key, self._key_type, after)
        if not keys and not page.last:
            raise OwnerPageInvalid(
                None, "rows", "there are none, and there are to be more", "let the owner return rows"
            )
        return page, None if page.last else keys[-1]

    def _check_log(self, page: OwnerPage) -> None:
        if self._log is None or page.log == self._log:
            return
        if _ordinal(page.log) > _ordinal(self._log):
            raise _StartOverError(f"the owner's log is {page.log} now, and was {self._log}")
        raise OwnerUnavailable(
            f"the owner answers from log {page.log}, and was at {self._log} before; see which is right"
        )

    async def _moved(
        self, connection: Connection, merged: Merged, log_id: str, through: str | None, *, free: bool
    ) -> None:
        """In the page's transaction: the progress, and at the end that the table is complete."""
        last = through is None
        if last and free and await SQL.halted.fetchval(connection, self._oid):
            raise _StartOverError("partitions of the topic came to stand still meanwhile")
        row = await SQL.moved.fetchrow(
            connection, self._oid, self._worker, log_id, through, merged.rows, merged.written, merged.removed, last
        )
        if row is None:
            holder = await SQL.holder.fetchrow(connection, self._oid)
            if holder is not None and holder["worker"] is None:
                raise _StartOverError("events passed the table by meanwhile")
            raise RebuildBusy(f"another process has taken over the rebuild of {self._parker}; this one stops")
        if last:
            await SQL.complete.execute(connection, self._oid, log_id)
        self._progress = _progress(row, finished=last)

    def _key(self, text: str | None) -> object | None:
        return None if text is None else self._key_type(text)

    # ------------------------------------------------------------------------------------------------- lease

    async def _take(self, *, anew: bool = False, unless_log: str | None = None) -> bool:
        """Whether there is something to do, and it is ours.

        Raises:
            RebuildBusy: a living process has it.
            CacheNotFed: no consumer feeds the table.
        """
        first_until = None
        while True:
            arguments = (self._oid, self._worker, limits.REBUILD_LEASE_SECONDS, anew, unless_log)
            if (row := await SQL.take.fetchrow(self._pool, *arguments)) is not None:
                self._log, self._after = row["log_id"], row["after_key"]
                self._progress = _progress(row, finished=False)
                return True
            holder = await SQL.holder.fetchrow(self._pool, self._oid)
            assert holder is not None, "a row whether there is anything or not"
            if not holder["fed"]:
                raise CacheNotFed(
                    f"no consumer has fed the table of cache {self._parker} yet: start the consumer, then rebuild it"
                )
            if not holder["held"]:
                if unless_log is not None and holder["complete_log"] == unless_log:
                    return False
                continue
            # A dead worker's lease runs out; a living one's does not.
            first_until = first_until or holder["lease_until"]
            if holder["lease_until"] > first_until:
                raise RebuildBusy(f"{self._parker} is being rebuilt by {holder['worker']}; see: outbox cache status")
            await asyncio.sleep(limits.REBUILD_LEASE_SECONDS / 10)

    @asynccontextmanager
    async def _keeping_the_lease(self) -> AsyncIterator[None]:
        """Renewed however slow the owner is; handed back at the end, so that nobody has to wait for it."""

        async def renew() -> None:
            while True:
                await asyncio.sleep(limits.REBUILD_LEASE_SECONDS / 3)
                try:
                    await SQL.renew.execute(self._pool, self._oid, self._worker, limits.REBUILD_LEASE_SECONDS)
                except Exception as error:
                    if not retry.is_transient(error):
                        raise
                    log.info("lease of the rebuild of %s not renewed: %r", self._parker, error)

        renewing = asyncio.create_task(renew(), name=f"lease of the rebuild of {self._parker}")
        try:
            yield
        finally:
            renewing.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await renewing
            try:
                await SQL.release.execute(self._pool, self._oid, self._worker)
            except Exception as error:
                if not retry.is_transient(error):
                    raise
                log.info("lease of the rebuild of %s not handed back, it runs out: %r", self._parker, error)

    async def _free(self) -> None:
        await free(self._pool, self._cache, oid=self._oid)


async def free(db: Pool, cache: "Cache[Any]", *, oid: int | None = None) -> list[str]:
    """Let partitions of a cache's topic that stand still go on with what Kafka has; see the module's essay.

    Returns the names of the caches that are incomplete now, this one included; none if no partition stood still.
    """
    if oid is None:
        oid = (await cache.prepare(db)).table.oid
    names = sorted({row["name"] for row in await SQL.free.fetch(db, oid)})
    if names:
        log.warning("partitions of %s that stood still go on with what Kafka has", cache.topic)
    if others := [name for name in names if name != cache.table]:
        log.warning("rebuild these caches of the topic, too: %s", ", ".join(others))
    return names


def check_order(page: OwnerPage, key: str, key_type: type, after: str | None) -> list[str]:
    """The keys of a page as text; they have to follow each other as the cache compares them.

    A page that is in another order would speak for keys that are elsewhere in the owner, and they would be deleted.

    Raises:
        OwnerPageInvalid: they do not, or one is no key of the cache.
    """
    wanted = int if key_type is int else str
    keys: list[str] = []
    former = None if after is None else _comparable(after, key_type)
    for row in page.rows:
        value = row.get(key)
        if type(value) is not wanted:
            kind = "a number" if wanted is int else "text"
            remedy = f"let the query return {key}, cast to {'bigint' if wanted is int else 'uuid or text'}"
            raise OwnerPageInvalid(repr(value), key, f"is no key of this cache, which has to be {kind}", remedy)
        try:
            place = _comparable(value, key_type)
        except ValueError:
            raise OwnerPageInvalid(str(value), key, "is no uuid", "let the query return uuids") from None
        if former is not None and not place > former:
            problem = "does not follow the key before it"
            remedy = 'return one row a key, ordered by the key: text by its bytes (collate "C")'
            raise OwnerPageInvalid(str(value), key, problem, remedy)
        former = place
        keys.append(str(value))
    return keys


def _comparable(value: Any, key_type: type) -> Any:
    if key_type is not UUID:
        return key_type(value)
    # The canonical text of uuids is in the order of their values; making the objects would cost a microsecond a row.
    return value.lower() if len(value) == _UUID_CHARACTERS else str(UUID(value))


def _ordinal(log_id: str) -> int:
    return int(log_id.partition("-")[0], 16)


def _progress(row: Record, *, finished: bool) -> Progress:
    return Progress(row["pages"], row["rows"], row["changed"], row["removed"], finished)


def _silent(_: Progress) -> None:
    pass
