"""Reconciling: is the cache what its owner has? Compared by digests, looked into only where they differ.

    digests    count and combined digest of 1,024 buckets of keys on both sides; equal buckets are done
    keys       of the buckets that differ: keys and digests of rows on both sides
    confirm    each key that differs is looked at twice, a grace time apart, as rows
    repair     on request: the owner's page of that second look is merged, like any page

A running system always differs somewhere: events are on their way. A key has **drifted** only if both sides stood still
between the two looks, the cache's row is not of an event that the owner's snapshot does not see yet, and the two rows
differ once the owner's has been read into the table's types: 1.50 and 1.5, or a moment in two time zones, are the same.

Guarantees: nothing is written without `fix`. A repair is a merge of a page (`pages`): where an event comes between look
and repair, the event wins. A crash at any line leaves repaired and unrepaired keys, and the next run finds the latter.
The costs are one scan of both tables for the digests, and one more of each for every 200,000 rows in differing buckets.
"""

import asyncio
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, Literal

from outbox import clock, limits, postgres
from outbox.cache import owner as owners
from outbox.cache.asking import questions
from outbox.cache.owner import ComparableOwner, OwnerPage
from outbox.cache.pages import Pages
from outbox.cache.rebuild import SQL as REBUILD
from outbox.cache.table import Table, quote
from outbox.errors import CacheNotFed, OwnerError, OwnerPageInvalid, PageRefused
from outbox.postgres import Pool, Record, Statement

if TYPE_CHECKING:
    from outbox.cache import Cache
    from outbox.cache.merge import Merge

SQL: Final = postgres.Statements("outbox", "cache/reconcile.sql")

_ROWS_AT_ONCE: Final = 200_000
"""Of differing buckets, whose keys are compared in memory."""
_CONFIRMED_AT_ONCE: Final = 10_000
"""Keys between whose two looks one grace time passes."""


@dataclass(frozen=True, slots=True)
class Drift:
    """A key whose row is not the owner's.

    Attributes:
        key: as text.
        kind: `missing` in the cache, a `ghost` that the owner does not have, or `different`.
        columns: that differ.
        parked: an event of the key waits in parking, which explains it.
    """

    key: str
    kind: Literal["missing", "ghost", "different"]
    columns: tuple[str, ...] = ()
    parked: bool = False


@dataclass(slots=True)
class Comparison:
    """What came of it.

    Attributes:
        rows: of the cache.
        buckets: that differed.
        columns: compared.
        uncompared: columns of the cache that the owner does not return.
        drifted: keys that drifted.
        drifts: the first of them, in the order of their keys as text within each step.
        same: keys whose rows differ as text only.
        moving: keys that changed between the two looks; run again to know about them.
        repaired: drifted keys whose row was written or removed.
    """

    rows: int = 0
    buckets: int = 0
    columns: tuple[str, ...] = ()
    uncompared: tuple[str, ...] = ()
    drifted: int = 0
    drifts: list[Drift] = field(default_factory=list)
    same: int = 0
    moving: int = 0
    repaired: int = 0


@dataclass(frozen=True, slots=True)
class _Look:
    """Both rows of a key at one time."""

    owner_row: str | None
    cache_print: str
    drift: Drift | None
    newer: bool


class Reconcile:
    """Compares a cache with its owner; make one for each run."""

    def __init__(self, db: Pool, cache: "Cache[Any]", *, grace_seconds: float = limits.RECONCILE_GRACE_SECONDS) -> None:
        """Of the cache's live table.

        Args:
            db: a pool on the cache's database.
            cache: with an owner that can be compared: `SqlOwner`, `HttpOwner`.
            grace_seconds: between the two looks; longer than events are usually on their way.

        Raises:
            OwnerError: there is no such owner.
        """
        if not isinstance(cache.owner, ComparableOwner):
            raise OwnerError(
                f"cache {cache.table} has no owner to compare with: declare a SqlOwner or HttpOwner, or add get_many, "
                "digests and bucket_keys to your own"
            )
        self._pool = db
        self._cache = cache
        self._owner: ComparableOwner = cache.owner
        self._grace_seconds = grace_seconds
        self._found = Comparison()

    async def run(self, *, fix: bool = False) -> Comparison:
        """Compare, and with `fix` repair.

        Raises:
            CacheNotFed: no consumer has ever fed the table.
            OwnerError: the owner does not answer, or not as it should.
            OwnerRowInvalid: a row of the owner does not fit.
        """
        merge = await self._cache.prepare(self._pool)
        table = merge.table
        if await REBUILD.parker.fetchval(self._pool, table.oid) is None:
            raise CacheNotFed(f"no consumer has fed the table of cache {self._cache.table} yet: start the consumer")
        self._pages = Pages(self._pool, merge, topic=self._cache.topic, parker=self._cache.table)
        self._merge: Merge = merge
        self._compare = table.compose(SQL.compare)
        await self._choose_columns(table)
        counts = await self._differing_buckets(table)
        self._found.buckets = len(counts)
        for buckets in _parts(counts):
            candidates = await self._differing_keys(table, buckets)
            for start in range(0, len(candidates), _CONFIRMED_AT_ONCE):
                await self._confirm(candidates[start : start + _CONFIRMED_AT_ONCE], fix=fix)
        return self._found

    # ----------------------------------------------------------------------------------------------- digests

    async def _choose_columns(self, table: Table) -> None:
        """Columns that both sides have; an owner without rows has nothing that could be compared but that."""
        sample = (await self._owner.page(None, 1)).rows
        there = sample[0].keys() if sample else {table.key}
        self._found.columns = tuple(name for name in table.columns if name in there)
        self._found.uncompared = tuple(name for name in table.columns if name not in there) if sample else ()

    async def _differing_buckets(self, table: Table) -> dict[int, int]:
        """The buckets that differ, with the number of rows that the larger side has in them."""
        theirs = {
            row["bucket"]: (row["count"], row["digest"])
            for row in (await self._owner.digests(self._found.columns)).rows
        }
        rows = await self._scan(self._composed(table, SQL.digests))
        ours = {row["bucket"]: (row["count"], row["digest"]) for row in rows}
        self._found.rows = sum(count for count, _ in ours.values())
        nothing = (0, "0")
        return {
            bucket: max(ours.get(bucket, nothing)[0], theirs.get(bucket, nothing)[0])
            for bucket in sorted(ours.keys() | theirs.keys())
            if ours.get(bucket) != theirs.get(bucket)
        }

    async def _differing_keys(self, table: Table, buckets: Sequence[int]) -> list[str]:
        """Keys of these buckets that only one side has, or whose rows have other digests."""
        theirs: dict[str, str] = {}
        after, last = "", False
        while not last:
            page = await self._owner.bucket_keys(self._found.columns, buckets, after, limits.OWNER_PAGE_MAX_ROWS)
            theirs.update((row["key"], row["digest"]) for row in page.rows)
            last = page.last or not page.rows
            after = page.rows[-1]["key"] if page.rows else after
        ours: dict[str, str] = {}
        statement = self._composed(table, SQL.bucket_keys)
        while True:
            limit = limits.OWNER_PAGE_MAX_ROWS
            rows = await self._scan(statement, list(buckets), limit, max(ours, default=""))
            ours.update((row["key"], row["digest"]) for row in rows)
            if len(rows) < limit:
                break
        return sorted(key for key in ours.keys() | theirs.keys() if ours.get(key) != theirs.get(key))

    async def _scan(self, statement: Statement, *arguments: object) -> list[Record]:
        """Read with the session's settings that owners use, so that equal values are equal texts."""
        async with postgres.acquire(self._pool) as connection, postgres.look(connection):
            await owners.SQL.session.execute(connection)
            return await statement.fetch(connection, *arguments, timeout=limits.OWNER_SCAN_SECONDS)

    def _composed(self, table: Table, template: Statement) -> Statement:
        def digested(name: str) -> str:
            column = quote(name)
            return f"trim_scale(c.{column}) as {column}" if name in table.numeric else f"c.{column}"

        return table.compose(template, digested=", ".join(map(digested, self._found.columns)))

    # ------------------------------------------------------------------------------------------ confirm, repair

    async def _confirm(self, keys: Sequence[str], *, fix: bool) -> None:
        """Look twice at keys that differ; what stood still and differs has drifted."""
        first: list[tuple[float, dict[str, _Look]]] = []
        for part in questions(keys):
            looks, _ = await self._look(part)
            differing = {key: look for key, look in looks.items() if look.drift is not None}
            self._found.same += len(looks) - len(differing)
            if differing:
                first.append((clock.monotonic(), differing))
        for at, before in first:
            await asyncio.sleep(max(0.0, at + self._grace_seconds - clock.monotonic()))
            looks, page = await self._look(list(before))
            drifts = []
            for key, look in looks.items():
                stood_still = (look.owner_row, look.cache_print) == (before[key].owner_row, before[key].cache_print)
                if look.drift is not None and stood_still and not look.newer:
                    drifts.append(look.drift)
                elif look.drift is not None:
                    self._found.moving += 1
            self._found.drifted += len(drifts)
            self._found.drifts += drifts[: limits.RECONCILE_LISTED - len(self._found.drifts)]
            if fix and drifts:
                await self._repair(page, [drift.key for drift in drifts])

    async def _look(self, keys: Sequence[str]) -> tuple[dict[str, _Look], OwnerPage]:
        try:
            page = await self._owner.get_many([self._merge.table.key_type(key) for key in keys])
        except ValueError as error:
            remedy = f"let the owner's query return {self._merge.table.key} as this cache has it"
            raise OwnerPageInvalid(None, self._merge.table.key, f"is no key of this cache ({error})", remedy) from error
        theirs = {str(row.get(self._merge.table.key)): row for row in page.rows}
        rows = await self._compare.fetch(
            self._pool,
            self._merge.rows(self._pages.validated(page)),
            list(keys),
            page.log,
            page.snapshot,
            list(self._found.columns),
            self._merge.table.oid,
            self._cache.table,
            self._cache.topic,
        )
        looks = {}
        for row in rows:
            mine = theirs.get(row["key"])
            text = None if mine is None else json.dumps(mine, sort_keys=True, default=str)
            looks[row["key"]] = _Look(text, row["print"], _drift(row), row["newer"])
        return looks, page

    async def _repair(self, page: OwnerPage, keys: Sequence[str]) -> None:
        """Merge the owner's rows of the drifted keys alone."""
        wanted = set(keys)
        rows = [row for row in page.rows if str(row.get(self._merge.table.key)) in wanted]
        try:
            merged = await self._pages.merge_keys(page.model_copy(update={"rows": rows}), keys)
        except PageRefused:  # forgotten meanwhile, or generations were swapped: the next run finds the keys again
            self._found.moving += len(keys)
            return
        self._found.repaired += merged.written + merged.removed


def _drift(row: Record) -> Drift | None:
    if not row["owned"]:
        return Drift(row["key"], "ghost", (), row["parked"]) if row["cached"] else None
    if not row["cached"]:
        return Drift(row["key"], "missing", (), row["parked"])
    return Drift(row["key"], "different", tuple(row["columns"]), row["parked"]) if row["columns"] else None


def _parts(counts: dict[int, int]) -> Iterator[list[int]]:
    """Buckets in groups that memory, and a URL, can hold."""
    part: list[int] = []
    rows = 0
    for bucket, count in counts.items():
        if part and (rows + count > _ROWS_AT_ONCE or len(part) >= owners.BUCKETS // 2):
            yield part
            part, rows = [], 0
        part.append(bucket)
        rows += count
    if part:
        yield part
