"""Plays a plan against a copy of a cache's table, through the engine that consumers use, and looks after each step.

The copy has a name and a consumer of its own, so that neither the service's table nor what is known of it is touched,
and tests may run beside each other. It is dropped at the end, whatever happened; a process that is killed leaves it,
and its name says whose it was.
"""

import uuid
from collections import Counter
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Final, TypeAlias
from uuid import UUID

from pydantic import BaseModel

from outbox import crash_sites, postgres
from outbox.cache import DELETE, Cache, Patch, handlers
from outbox.cache.fold import ROW_MISSING, patched
from outbox.cache.merge import Merge
from outbox.cache.pages import Pages
from outbox.consumer.apply import Engine, Outcome, Partition
from outbox.event import Event, key_text, kind_of
from outbox.postgres import Pool
from outbox.testing.plan import Again, Batch, Fate, PageRead, Plan

SQL: Final = postgres.Statements("outbox", "testing/scratch.sql")

Shown: TypeAlias = dict[str, Any] | None
"""A row by column, as PostgreSQL returns it."""

_LOG: Final = "1-0000"
_FIRST_ID: Final = 1000
_SITES: Final = {Fate.DIED_EARLY: "outbox.consumer.apply.advance", Fate.DIED_LATE: "outbox.cache.merge.merge"}


REMEDY: Final = (
    "\n  Let a key's first event bring a full row. If the owner has the rows already, declare the cache with owner=... "
    "and give some of them to converges as existing=[...]"
)


class Diverged(Exception):
    """A plan after which the table is wrong; the text says which row."""


class _DiedError(Exception):
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


class Life:
    """One key: the rows that it has after each of its events."""

    def __init__(self, row: BaseModel | None) -> None:
        """Before the first event."""
        self.rows: list[BaseModel | None] = [row]
        self.shown: list[Shown] = []
        """The same, as PostgreSQL returns them."""

    def add(self, effect: object) -> None:
        """What its next event does; a patch of no row does nothing."""
        row = self.rows[-1]
        if isinstance(effect, Patch):
            row = None if row is None else patched(row, effect.columns)
        else:
            row = effect if isinstance(effect, BaseModel) else None
        self.rows.append(row)


class Stream:
    """The events of a test, what each does, and what is to be expected."""

    def __init__(self, cache: Cache[Any], events: Sequence[Event], existing: Iterable[BaseModel]) -> None:
        """Calls the handlers.

        Raises:
            AssertionError: a handler answers differently the second time.
        """
        self.events = events
        self.existing = {key_text(getattr(row, cache.key)): row for row in existing}
        self.lives = {key: Life(row) for key, row in self.existing.items()}
        self.keys: list[str] = []
        self.is_whole: list[bool] = []
        """By event: whether it says all there is to say of its key."""
        for event in events:
            kind = kind_of(type(event))
            key = key_text(getattr(event, kind.key_field))
            life = self.lives.setdefault(key, Life(None))
            self.keys.append(key)
            handler = cache.handlers.get(kind.type)
            if handler is None:
                life.rows.append(life.rows[-1])
                self.is_whole.append(False)
                continue
            effects = [handlers.call(handler, cache.shape, event, key) for _ in range(2)]
            if effects[0] != effects[1]:
                raise AssertionError(
                    f"{cache.table}: the handler of {kind.type} is no function of its event. Called twice with "
                    f"{event!r}, it answered first {effects[0]!r}, then {effects[1]!r}. Consumers call handlers again "
                    "after every crash: let it look at the event and nothing else"
                )
            life.add(effects[0])
            self.is_whole.append(effects[0] is DELETE or isinstance(effects[0], BaseModel))

    def named(self, number: int) -> str:
        """An event, for people."""
        event = self.events[number]
        kind = kind_of(type(event))
        payload = ", ".join(f"{name}={_value(value)}" for name, value in event if name != kind.key_field)
        return f"{kind.type} of {self.keys[number]}" + (f": {payload}" if payload else "")


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
        self._pages = Pages(pool, cache.row, merge, topic=cache.topic, parker=self._parker)
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

    async def play(self, plan: Plan) -> str | None:
        """Play a plan, and tell its story if the table is wrong at any step; None if it never is."""
        await self.empty()
        run = _Run(self, plan)
        try:
            await run.play()
        except Diverged as problem:
            return f"{run.story()}\n\n{problem}"
        return None

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
            _DiedError: by fate.
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


class _Run:
    """One plan at work."""

    def __init__(self, scratch: Scratch, plan: Plan) -> None:
        self._scratch = scratch
        self._stream = scratch.stream
        self._plan = plan
        self._kafka: list[Record] = []
        self._numbers: list[int] = []
        """By offset: the event's place in the plan's order."""
        self._published = 0
        self._read = 0
        """How many events the owner's latest page has."""
        self._at = 0
        self._consumer = 0
        self._told: list[str] = []
        begins_empty = not self._stream.existing
        self._newest: dict[str, int | None] = dict.fromkeys(self._stream.lives, 0 if begins_empty else None)
        """How many of a key's events its row has to show; None while nothing but patches of an unknown row came."""
        seen: Counter[str] = Counter()
        self._counts: list[int] = []
        """By place: which one of its key's events it is."""
        for number in plan.order:
            seen[self._stream.keys[number]] += 1
            self._counts.append(seen[self._stream.keys[number]])

    async def play(self) -> None:
        self._partition = await self._scratch.claim(0)
        for step in self._plan.steps:
            if isinstance(step, Batch):
                await self._batch(step.size, step.fate)
            elif isinstance(step, Again):
                self._again(step.first)
            else:
                await self._page(step)
        left = len(self._plan.order) - self._published + len(self._kafka) - self._at
        if left:
            await self._batch(left, Fate.APPLIED)
        if self._stream.existing:
            await self._page(PageRead(len(self._plan.order), None))
            await self._check_parked()
            await self._check()

    def story(self) -> str:
        """What happened so far, to the events that had a part in it."""
        seen = max(self._published, self._read)
        events = [
            f"  {place}  {self._stream.named(number)}" for place, number in enumerate(self._plan.order[:seen], start=1)
        ]
        told = [f"  - {line}" for line in self._told]
        return "\n".join(["the events, in the order that they were published in:", *events, "what happened:", *told])

    # ------------------------------------------------------------------------------------------------- steps

    def _publish(self, place: int) -> None:
        number = self._plan.order[place]
        event = self._stream.events[number]
        kind = kind_of(type(event))
        where = f"{_LOG}/0/{place + 1}/1/{place + 1}/{_FIRST_ID + self._plan.ids[place]}"
        headers: list[tuple[str, bytes | None]] = [
            ("ce_id", str(uuid.UUID(int=place)).encode()),
            ("ce_type", kind.type.encode()),
            ("ob-pos", where.encode()),
        ]
        if kind.schema_version != 1:
            headers.append(("ob-schema-version", b"%d" % kind.schema_version))
        key = self._stream.keys[number].encode()
        self._kafka.append(Record(len(self._kafka), key, event.model_dump_json().encode(), headers))
        self._numbers.append(place)

    def _again(self, first: int) -> None:
        places = range(min(first, self._published), self._published)
        for place in places:
            self._publish(place)
        if places:
            self._told.append(f"{_events(places)} published once more")

    async def _batch(self, size: int, fate: Fate) -> None:
        while len(self._kafka) < self._at + size and self._published < len(self._plan.order):
            self._publish(self._published)
            self._published += 1
        records = self._kafka[self._at : self._at + size]
        if not records:
            return
        places = self._numbers[self._at : self._at + size]
        self._told.append(f"{_events(places)} in one batch" + (f": {fate.value}" if fate.value else ""))
        outcome = await self._applied(records, fate)
        self._at += len(records)
        if outcome.parked and not self._stream.existing:
            await self._check_parked()
        for place in places:
            number = self._plan.order[place]
            if not self._stream.existing or self._stream.is_whole[number]:
                self._learn(self._stream.keys[number], self._counts[place])
        await self._check()

    async def _applied(self, records: Sequence[Record], fate: Fate) -> Outcome:
        if fate is Fate.TAKEN_OVER:
            former, self._consumer = self._consumer, 1 - self._consumer
            taken = await self._scratch.claim(self._consumer)
            if not (await self._scratch.apply(former, self._partition, records, Fate.APPLIED)).fenced:
                raise Diverged("a batch of the former consumer was applied after another one had claimed the partition")
            self._partition = taken
        elif fate is not Fate.APPLIED:
            try:
                outcome = await self._scratch.apply(self._consumer, self._partition, records, fate)
            except _DiedError:
                outcome = None
            self._consumer = 1 - self._consumer
            self._partition = await self._scratch.claim(self._consumer)
            if outcome is not None:
                await self._scratch.apply(self._consumer, self._partition, records, Fate.APPLIED)
                return outcome
        return await self._scratch.apply(self._consumer, self._partition, records, Fate.APPLIED)

    async def _page(self, step: PageRead) -> None:
        names = list(self._stream.lives)
        self._read = max(self._read, step.after)
        keys = None if step.keys is None else [names[number] for number in step.keys]
        had: Counter[str] = Counter(self._stream.keys[number] for number in self._plan.order[: step.after])
        rows = [self._stream.lives[key].rows[had[key]] for key in keys or names]
        page = Page(_LOG, self._snapshot(step.after), [row.model_dump() for row in rows if row is not None])
        when = f"after event {step.after}" if step.after else "before event 1"
        self._told.append(f"the owner's rows of {'all keys' if keys is None else ', '.join(keys)}, read {when}, merged")
        await self._scratch.merge_page(page, keys)
        for key in keys or names:
            self._learn(key, had[key])
        await self._check()

    def _snapshot(self, committed: int) -> str:
        seen = {_FIRST_ID + number for number in self._plan.ids[:committed]}
        xmax = max(seen, default=_FIRST_ID - 1) + 1
        in_progress = sorted(set(range(_FIRST_ID, xmax)) - seen)
        return f"{in_progress[0] if in_progress else xmax}:{xmax}:{','.join(map(str, in_progress))}"

    # ------------------------------------------------------------------------------------------------ looking

    def _learn(self, key: str, count: int) -> None:
        self._newest[key] = max(self._newest[key] or 0, count)

    async def _check(self) -> None:
        rows = await self._scratch.rows()
        for key, life in self._stream.lives.items():
            newest, found = self._newest[key], rows.get(key)
            if found == (None if newest is None else life.shown[newest]):
                continue
            if self._stream.existing and found in life.shown[newest or 0 :]:
                self._newest[key] = life.shown.index(found, newest or 0)
                continue
            expected = None if newest is None else life.shown[newest]
            raise Diverged(f"row {key}\n  expected: {_row(expected)}\n  found:    {_row(found)}")
        for key in rows.keys() - self._stream.lives.keys():
            raise Diverged(f"row {key}\n  expected: {_row(None)}\n  found:    {_row(rows[key])}")

    async def _check_parked(self) -> None:
        for key, why in (await self._scratch.parked()).items():
            remedy = REMEDY if why.startswith(ROW_MISSING.reason) else ""
            raise Diverged(f"key {key} was parked\n  {why}{remedy}")


def _events(places: Sequence[int]) -> str:
    numbers = [place + 1 for place in places]
    if len(numbers) == 1:
        return f"event {numbers[0]}"
    if list(range(numbers[0], numbers[-1] + 1)) == numbers:
        return f"events {numbers[0]} to {numbers[-1]}"
    return f"events {', '.join(map(str, numbers))}"


def _row(shown: Shown) -> str:
    return "no row" if shown is None else ", ".join(f"{name}={_value(value)}" for name, value in shown.items())


def _value(value: object) -> str:
    return str(value) if isinstance(value, UUID) else repr(value)


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
        raise _DiedError
    if _former is not None:
        await _former(site, side)
