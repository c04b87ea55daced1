"""Runs a model of an owner against a real cache, one step after the other, and looks at each step what became of it.

All keys of a run travel together: one key is one history. After each batch and each page every row of the live table
must be the newest state that an event or a page has brought; a table that is being filled must at least never go back;
at the end both must be the owner's. Partitions lag differently, batches are cut anywhere, the consumer dies at its
crash sites or loses a reply, pages of ranges and of single keys are read at one moment and merged later, some twice.
"""

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from random import Random
from typing import Any, Final

from pydantic import BaseModel

from outbox import DELETE, Cache, Delete, Event, Key, Patch, Pool, crash_sites
from outbox.cache.pages import Pages
from outbox.consumer.apply import Engine, Partition
from tests.support.caching import Rec
from tests.support.owner_model import (
    FULL,
    GONE,
    PARTITIONS,
    PATCH_A,
    PATCH_B,
    SHARDS,
    TOPIC,
    Change,
    Owner,
    ReadPage,
    Relay,
    Row,
)

LIVE: Final = "model_rows"
SPARE: Final = "model_rows_spare"
_STEPS: Final = 60


class RowEvent(Event, topic=TOPIC):
    id: Key[int]


class RowWritten(RowEvent, type=FULL):
    a: int
    b: int


class APatched(RowEvent, type=PATCH_A):
    a: int


class BPatched(RowEvent, type=PATCH_B):
    b: int


class RowGone(RowEvent, type=GONE):
    pass


class CachedRow(BaseModel):
    id: int
    a: int
    b: int


def make_cache(owner: Any = None) -> Cache[CachedRow]:
    cache = Cache(CachedRow, table=LIVE, key="id", topic=TOPIC, owner=owner)

    @cache.on
    def written(event: RowWritten) -> CachedRow:
        return CachedRow(id=event.id, a=event.a, b=event.b)

    @cache.on
    def a_patched(event: APatched) -> Patch:
        return Patch(event.id, a=event.a)

    @cache.on
    def b_patched(event: BPatched) -> Patch:
        return Patch(event.id, b=event.b)

    @cache.on
    def gone(event: RowGone) -> Delete:
        return DELETE

    return cache


async def create_table(pool: Pool) -> None:
    await pool.execute(f"create table {LIVE} (id integer primary key, a integer not null, b integer not null)")
    await pool.execute(f"select outbox.prepare_cache('{LIVE}')")


class Violation(AssertionError):
    """A row went back, or is not what the owner ever had; says with which seed it is seen again."""


class _CrashError(Exception):
    """The consumer dies here."""


class Watched:
    """One of the cache's tables, and what is to be seen there.

    The live table had every event from the first on, so each of its rows is the newest state that an event or a page
    has brought. A spare table begins with a gap: its keys are unknown (None) until a page or a full row comes, and
    patches may have to wait; but nothing goes back there either.
    """

    def __init__(self, name: str, pages: Pages, owner: Owner, *, spare: bool) -> None:
        self.name = name
        self.pages = pages
        self.spare = spare
        self.newest: dict[int, int | None] = dict.fromkeys(owner.keys, None if spare else 0)
        self.rows: dict[int, Row] = {}
        self._owner = owner

    def learn(self, key: int, at: int) -> None:
        """An event or a page brought this state of a key."""
        self.newest[key] = max(self.newest[key] or 0, at)

    def compare(self, rows: dict[int, Row], touched: set[int], unsettled: set[int]) -> int | None:
        """A key that shows what it must not, among those that changed or were touched; None if there is none."""
        changed = {key for key, _ in rows.items() ^ self.rows.items()}
        self.rows = rows
        for key in (changed | touched) - unsettled:
            newest, history, row = self.newest[key], self._owner.history[key], rows.get(key)
            if row == (None if newest is None else history[newest]):
                continue
            if not self.spare:
                return key
            try:
                self.newest[key] = history.index(row, newest or 0)
            except ValueError:
                return key
        return None


class Run:
    """One random interleaving, decided by its seed."""

    def __init__(self, pool: Pool, seed: int, keys: int, *, loss: bool = False) -> None:
        self.pool = pool
        self.seed = seed
        self.rng = Random(seed)
        self.owner = Owner(self.rng, keys)
        self.relay = Relay(self.owner)
        self.cache = make_cache(owner=self.owner if loss else None)  # the model itself reads and merges its pages
        self.loss = loss
        self.engine = Engine(pool, "model", "test", [self.cache])
        self.tables: list[Watched] = []
        self.claimed: list[Partition] = []
        self.held: list[tuple[Watched, ReadPage]] = []
        self.unread: list[tuple[Watched, int | None, int | None]] = []
        """Ranges that make a table complete and are not read yet."""
        self.unsettled: set[int] = set()
        self.delivered: set[Change] = set()
        self.trace: list[tuple[str, list[Change] | ReadPage]] = []

    async def play(self) -> None:
        """All of it.

        Raises:
            Violation: the cache is wrong.
        """
        await self._begin()
        ways: list[tuple[Callable[[], Any], int]] = [
            (self._work, 10),
            (self._publish, 12),
            (self._batch, 22),
            (self._read_page, 8),
            (self._merge_held, 8),
            (self.relay.zombie, 3),
        ]
        moments: dict[int, Callable[[], Any]] = {}
        if self.loss or self.rng.random() < 0.3:
            moments[self.rng.randrange(10, _STEPS)] = self._adopt
        if self.rng.random() < 0.3:
            moments[self.rng.randrange(10, _STEPS)] = self._grow_spare
        for step in range(_STEPS):
            way = moments.get(step) or self.rng.choices([way for way, _ in ways], [weight for _, weight in ways])[0]
            done = way()
            if done is not None:
                await done
        await self._finish()

    async def _begin(self) -> None:
        await self.pool.execute(
            f"drop table if exists {SPARE}; truncate {LIVE}, outbox.caches, outbox.pages, outbox.tombstones,"
            " outbox.positions, outbox.parked_keys, outbox.parked_events cascade"
        )
        await self.engine.prepare()
        merge = await self.cache.prepare(self.pool)
        pages = Pages(self.pool, merge, topic=TOPIC, parker=LIVE)
        self.tables.append(Watched(LIVE, pages, self.owner, spare=False))
        self.claimed = [await self.engine.claim(TOPIC, number, 0) for number in range(PARTITIONS)]

    # ------------------------------------------------------------------------------------------------- steps

    def _work(self) -> None:
        self.owner.work(self.rng.choice((20, 200, 800)) * len(self.owner.keys) // 1000 + 1)

    def _publish(self) -> None:
        self.relay.publish(self.rng.randrange(SHARDS))

    async def _batch(self) -> None:
        waiting = [number for number in range(PARTITIONS) if self._pending(number)]
        if waiting:
            await self._deliver(self.rng.choice(waiting), self.rng.choice((1, 5, 80, 100_000)))

    def _pending(self, number: int) -> list[Rec]:
        return self.relay.partitions[number][self.claimed[number].next_offset :]

    async def _deliver(self, number: int, size: int) -> None:
        records = self._pending(number)[:size]
        changes = [self.relay.changes[record.headers[1][1] or b""] for record in records]
        self.trace.append(("batch", changes))
        fate = self.rng.random()
        applied = False
        try:
            async with crashing(self.rng.randint(1, 4) if fate < 0.04 else 0):
                parked = (await self.engine.apply(self.claimed[number], records)).parked
                applied = True
            if parked:
                await self._nothing_is_parked()
        except _CrashError:
            self.trace.append(("crashed", []))
        if fate < 0.08:  # a crash, or a reply that is lost: the next owner sends the same records, as far as it knows
            self.claimed[number] = await self.engine.claim(TOPIC, number, 0)
            if applied:
                await self.engine.apply(self.claimed[number], records)
        if applied:
            self._learn(changes)
        await self._look({change.key for change in changes} if applied else set())

    def _learn(self, changes: list[Change]) -> None:
        for change in changes:
            if change in self.delivered:
                continue
            self.delivered.add(change)
            for table in self.tables:
                if not table.spare or change.type in {FULL, GONE}:
                    table.learn(change.key, change.at)

    def _read_page(self) -> None:
        keys, rng = self.owner.keys, self.rng
        table = rng.choice(self.tables)
        if self.unread and rng.random() < 0.5:
            table, after, through = self.unread.pop(rng.randrange(len(self.unread)))
            page = self.owner.read_range(after, through)
        elif rng.random() < 0.4:
            page = self.owner.read_keys(rng.sample(keys, rng.randint(1, len(keys) // 5 + 1)))
        else:
            ends = self._ends()
            first = rng.randrange(3)
            page = self.owner.read_range(ends[first], ends[rng.randrange(first + 1, 4)])
        self.held += [(table, page)] * rng.choice((1, 1, 2))

    def _ends(self) -> list[int | None]:
        return [None, *sorted(self.rng.sample(self.owner.keys, 2)), None]

    def _read_all(self, table: Watched) -> None:
        ends = self._ends()
        self.unread += [(table, ends[part], ends[part + 1]) for part in range(3)]

    async def _merge_held(self) -> None:
        if self.held:
            await self._merge(*self.held.pop(self.rng.randrange(len(self.held))))

    async def _merge(self, table: Watched, page: ReadPage) -> None:
        self.trace.append((f"page into {table.name}", page))
        if page.keys is None:
            await table.pages.merge(page, after=page.after, through=page.through)
        else:
            await table.pages.merge_keys(page, page.keys)
        for key, at in page.speaks_for.items():
            table.learn(key, at)
        await self._look(set(page.speaks_for))

    def _adopt(self) -> None:
        self.unsettled |= self.owner.adopt(lost_commits=self.rng.randint(1, 5) if self.loss else 0)
        self.trace.append((f"adopted as {self.owner.log_id}", []))
        if self.loss:
            for table in self.tables:
                self._read_all(table)

    async def _grow_spare(self) -> None:
        """A new generation: a table that is fed from now on, filled by pages that are read from now on."""
        await self.pool.execute(f"create table {SPARE} (like {LIVE} including all)")
        await self.pool.execute(
            "insert into outbox.caches (cache, name, role, consumer, topic)"
            f" values ('{SPARE}', '{LIVE}', 'spare', 'model', '{TOPIC}')"
        )
        oid = await self.pool.fetchval(f"select '{SPARE}'::regclass::oid")
        pages = Pages(self.pool, await self.cache.prepare(self.pool, oid), topic=TOPIC, parker=SPARE)
        self.tables.append(Watched(SPARE, pages, self.owner, spare=True))
        self.trace.append(("a spare table", []))
        self._read_all(self.tables[1])

    async def _finish(self) -> None:
        """Everything is delivered, and every page that was read is merged; then the tables are the owner's."""
        self.owner.end_all()
        while self.unread or self.held or self.owner.unlogged or any(map(self._pending, range(PARTITIONS))):
            for shard in range(SHARDS):
                self.relay.publish(shard)
            await self._batch()
            if self.unread:
                table, after, through = self.unread.pop()
                self.held.append((table, self.owner.read_range(after, through)))
            await self._merge_held()
        for table in self.tables:
            await self._ask_for_parked(table)
            wrong = table.rows.items() ^ self.owner.table.items()
            for key, _ in wrong:
                raise Violation(self._story(table, key, f"is not the owner's {self.owner.table.get(key)} at the end"))

    async def _nothing_is_parked(self) -> None:
        """Of a table that had every event; but where the owner was restored, patches wait for pages of its new log."""
        found = await self.pool.fetch("select key from outbox.parked_keys where parker = $1", LIVE)
        keys = {int(row["key"]) for row in found} - self.unsettled
        if self.loss and self.owner.logs > 1:
            self.unsettled |= keys
            return
        for key in keys:
            raise Violation(self._story(self.tables[0], key, "is parked"))

    async def _ask_for_parked(self, table: Watched) -> None:
        """Patches that came before the owner's row wait for it."""
        found = await self.pool.fetch("select key from outbox.parked_keys where parker = $1", table.name)
        if found:
            await self._merge(table, self.owner.read_keys(int(row["key"]) for row in found))

    # ------------------------------------------------------------------------------------------------ looking

    async def _look(self, touched: set[int]) -> None:
        for table in self.tables:
            found = await self.pool.fetch(f"select id, a, b from {table.name}")
            rows = {row["id"]: (row["a"], row["b"]) for row in found}
            key = table.compare(rows, touched, self.unsettled)
            if key is not None:
                raise Violation(self._story(table, key, "went back, or is what it never was"))

    def _story(self, table: Watched, key: int, problem: str) -> str:
        """What one key went through."""
        lines = [
            f"seed {self.seed}: key {key} of {table.name} {problem}: {table.rows.get(key)}",
            f"  owner's history: {self.owner.history[key]}; the newest that came: number {table.newest[key]}",
        ]
        for what, found in self.trace:
            if isinstance(found, ReadPage):
                if key in found.speaks_for:
                    at = found.speaks_for[key]
                    lines.append(f"  {what}: log {found.log}, snapshot {found.snapshot}, state {at}")
            elif found:
                lines += [f"  {what}: {change}" for change in found if change.key == key]
            else:
                lines.append(f"  {what}")
        return "\n".join(lines)


@asynccontextmanager
async def crashing(visits: int) -> AsyncIterator[None]:
    """The process dies at this visit of a crash site."""
    left = visits

    async def die(_site: str, _side: str) -> None:
        nonlocal left
        left -= 1
        if left == 0:
            raise _CrashError

    crash_sites.hook = die
    try:
        yield
    finally:
        crash_sites.hook = None
