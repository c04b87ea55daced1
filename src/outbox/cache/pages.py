"""Pages of the owner into a cache's table: bootstrap, rebuild, repair and single rows are this one thing.

A page says what the owner's table held when its snapshot was taken. It may come at any time and in any order, between
any events: which of the two is newer is decided by whether the page's snapshot sees the event's transaction (see
`merge.sql`). A page speaks for a range of keys, or for single keys; what it speaks for and does not hold is deleted.

    BEGIN
      lock      the cache's lock, alone: no batch is open, none begins (a statement of its own, so that what follows
                sees all that batches wrote)
      open      the page's record, unless what it would have to be compared with was forgotten already
      merge     one statement
      parked    waiting events that the page contains are void; the others are tried again
      moved     whatever the caller keeps about its progress
    COMMIT

A crash at any line leaves nothing of the page. A page that is merged twice has the same effect as once.
"""

import contextlib
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol
from uuid import UUID

from pydantic import BaseModel, ValidationError

from outbox import garbage, limits, postgres
from outbox.cache import memory
from outbox.cache.merge import SQL as MERGE
from outbox.cache.merge import Merge
from outbox.errors import CacheNotFed, OwnerRowInvalid, PageRefused
from outbox.event import key_text
from outbox.postgres import Connection, Pool, Record

SQL: Final = postgres.Statements("outbox", "cache/pages.sql")


class Page(Protocol):
    """What an owner answers."""

    @property
    def log(self) -> str:
        """The owner's current log id."""

    @property
    def snapshot(self) -> str:
        """PostgreSQL's snapshot of the statement that read the rows, as text."""

    @property
    def rows(self) -> Sequence[dict[str, Any]]:
        """By column."""


@dataclass(frozen=True, slots=True)
class Merged:
    """What a page did.

    Attributes:
        rows: in the page.
        written: of them, not older than what the cache had.
        removed: rows of the cache that the page spoke for and did not have.
        late: keys of the page's rows that it did not write, because it does not see the last event of the cache's.
    """

    rows: int
    written: int
    removed: int
    late: tuple[str, ...] = ()


Moved = Callable[[Connection, Merged], Awaitable[None]]


class Pages:
    """Merges pages into one table of a cache."""

    def __init__(self, pool: Pool, merge: Merge, *, topic: str, parker: str) -> None:
        """For the table that `merge` was prepared for.

        Args:
            pool: on the cache's database.
            merge: see `Cache.prepare`; what the owner sends has to fit its row class.
            topic: of the cache.
            parker: by which the table's keys are parked.
        """
        self._pool = pool
        self._merge = merge
        self._topic = topic
        self._parker = parker
        self._statement = merge.table.compose(MERGE.merge_page)

    async def merge(
        self, page: Page, *, after: object | None, through: object | None, moved: Moved | None = None
    ) -> Merged:
        """Merge a page that holds every row of the owner with `after` < key <= `through`.

        Args:
            page: the owner's answer.
            after: where it begins; None at the first key.
            through: its last key; None where no key follows.
            moved: called in the transaction, to note how far the caller is.

        Raises:
            OwnerRowInvalid: a row does not fit; nothing was merged.
            PageRefused: the page is too old to be compared; read it again.
            CacheNotFed: no consumer has ever fed the table.
        """
        bounds = tuple(None if bound is None else key_text(bound) for bound in (after, through))
        return await self._merge_page(page, bounds, None, moved)

    async def merge_keys(self, page: Page, keys: Iterable[object]) -> Merged:
        """Merge a page that holds the rows of these keys which the owner has; raises what `merge` raises."""
        return await self._merge_page(page, None, [key_text(key) for key in keys], None)

    async def merge_alone(self, read: Callable[[], Awaitable[Page]], key: object) -> Merged:
        """Merge a page of one key that is read while no batch of the cache is open: nothing can be newer than it.

        Batches wait for `read`, which has to be short. Raises what that and `merge` raise.
        """
        async with postgres.acquire(self._pool) as connection, postgres.transact(connection):
            cache = await self._locked(connection)
            page = await read()
            document = self._merge.rows(self.validated(page))
            return await self._merge_locked(connection, cache, page, document, bounds=None, keys=[key_text(key)])

    async def _merge_page(
        self, page: Page, bounds: tuple[str | None, ...] | None, keys: list[str] | None, moved: Moved | None
    ) -> Merged:
        with garbage.held():
            rows = self.validated(page)
            document = self._merge.rows(rows)
        async with postgres.acquire(self._pool) as connection, postgres.transact(connection):
            cache = await self._locked(connection)
            merged = await self._merge_locked(connection, cache, page, document, bounds=bounds, keys=keys)
            if moved is not None:
                await moved(connection, merged)
        return merged

    async def _locked(self, connection: Connection) -> Record:
        """Lock the cache alone; its name, and whether readers are told of changes."""
        cache = await SQL.cache_name.fetchrow(connection, self._merge.table.oid)
        if cache is None:
            raise CacheNotFed(
                f"no consumer has fed the table of cache {self._parker} yet: start the service's consumer, then "
                "merge pages of its owner"
            )
        await SQL.lock_alone.execute(connection, cache["name"])
        return cache

    async def _merge_locked(
        self,
        connection: Connection,
        cache: Record,
        page: Page,
        document: str,
        *,
        bounds: tuple[str | None, ...] | None,
        keys: list[str] | None,
    ) -> Merged:
        oid = self._merge.table.oid
        after, through = bounds or (None, None)
        page_id = await SQL.open.fetchval(
            connection, oid, page.log, page.snapshot, bounds is not None, after, through, self._merge.table.full_name
        )
        if page_id is None:
            raise PageRefused(
                f"cache {cache['name']}: a page of log {page.log} is older than what was forgotten, or the cache "
                "has another table now; prepare for its table and read it again"
            )
        found = await self._statement.fetchrow(connection, oid, page_id, document, keys)
        assert found is not None, "two counts are one row"
        merged = Merged(len(page.rows), found["written"], found["removed"], tuple(found["late"]))
        if cache["notifies"] and (merged.written or merged.removed):
            await memory.notify(connection, oid, keys)
        await self._void_parked(connection, page, after, through, keys)
        return merged

    def validated(self, page: Page) -> list[BaseModel]:
        """The rows of a page, as the row class has them.

        Raises:
            OwnerRowInvalid: one does not fit.
        """
        rows = [self._with_bytes(row) for row in page.rows] if self._merge.table.binary else page.rows
        try:
            return self._merge.shape.rows.validate_python(rows)
        except ValidationError as error:
            first = error.errors(include_url=False, include_context=False, include_input=False)[0]
            index, *field = first["loc"]
            key = page.rows[int(index)].get(self._merge.table.key, "(missing)")
            raise OwnerRowInvalid(
                f"cache {self._parker}: owner's row {key!r} does not fit, field {'.'.join(map(str, field)) or '-'}: "
                f"{first['msg']} ({error.error_count()} problems in the page); let the owner's query return what the "
                "row class takes, or change the row class"
            ) from None

    def _with_bytes(self, row: dict[str, Any]) -> dict[str, Any]:
        """Bytes come as PostgreSQL writes them in JSON, in hexadecimal digits; pydantic would take those for text."""
        found = {}
        for name in self._merge.table.binary & row.keys():
            if isinstance(value := row[name], str) and value.startswith("\\x"):
                with contextlib.suppress(ValueError):  # then the row class says what is wrong with it
                    found[name] = bytes.fromhex(value[2:])
        return {**row, **found} if found else row

    async def _void_parked(
        self, connection: Connection, page: Page, after: str | None, through: str | None, keys: list[str] | None
    ) -> None:
        waiting = await SQL.parked.fetch(connection, self._parker, self._topic, limits.PARKED_MAX_EVENTS)
        if not waiting:
            return
        asked = set(keys or ())
        spoken_for = [
            key
            for record in waiting
            if (key := record["key"]) in asked or (keys is None and self._within(key, after, through))
        ]
        if spoken_for:
            await SQL.void.execute(connection, self._parker, self._topic, spoken_for, page.log, page.snapshot)

    def _within(self, key: str, after: str | None, through: str | None) -> bool:
        try:
            return (after is None or self._order(key) > self._order(after)) and (
                through is None or self._order(key) <= self._order(through)
            )
        except ValueError:  # parked under a name of its own, because its event has no key of this type
            return False

    def _order(self, key: str) -> Any:
        """A key as PostgreSQL compares it: uuid and integers by value, text by code points."""
        kind = self._merge.table.key_type
        return UUID(key).int if kind is UUID else kind(key)
