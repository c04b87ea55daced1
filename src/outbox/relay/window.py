"""Windows: what became visible between two snapshots, ordered by position, logged before it is published.

A window (s1, s2] holds the events visible in s2 that were not visible in s1. Nothing can fall between two windows,
however long a writer stays open, and within one key the order is causal, because the insert happens under the row's
lock. A window that does not fit in `window_max_events` is read through a cursor in one snapshot (backlog mode), a
window a page.

The row in `outbox.windows` is written before the first record reaches Kafka. A crash after it replays the same rows
with the same ordinals, a crash before it reads the window again: nothing was published yet. An empty read moves
nothing: were s1 advanced in memory only, a server crash could hand out transaction ids below it again.
"""

import asyncio
import enum
import json
from collections.abc import AsyncGenerator, AsyncIterator, Collection, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from typing import Final, TypeVar

from outbox import limits, postgres
from outbox.postgres import Connection, Pool, Record, Snapshot
from outbox.relay.lease import Lease

SQL: Final = postgres.Statements("outbox", "relay/window.sql")

_FIRST_PAGE_EVENTS: Final = 250
_SAMPLE_EVERY: Final = 16

T = TypeVar("T")
Offsets = dict[str, dict[int, int]]
"""Topic to partition to the next offset."""


@dataclass(frozen=True, slots=True)
class Span:
    """What a window covers; with the log it fixes the window's content for ever."""

    s1: Snapshot
    s2: Snapshot
    after: int = 0
    through: int | None = None


@dataclass(frozen=True, slots=True)
class Bounds:
    """How large a window may be."""

    max_events: int
    max_bytes: int

    def page_events(self, sample: Sequence[Record]) -> int:
        """Events of the next page, if they are like those of the last one."""
        mean_bytes = sum(len(row["payload"]) for row in sample) // len(sample) + 1
        return max(1, min(self.max_events, self.max_bytes // mean_bytes))


class TooLarge(enum.Enum):
    """More became visible than one window takes."""

    PAGE_IT = enum.auto()


@dataclass(frozen=True, slots=True)
class Window:
    """A logged window and the rows to publish, each with its ordinal."""

    number: int
    log_id: str
    entries: Sequence[tuple[int, Record]]


@dataclass(frozen=True, slots=True)
class Progress:
    """What Kafka has acknowledged since it was last persisted."""

    done_through: int
    next_offsets: Offsets


@dataclass(frozen=True, slots=True)
class Origin:
    """One record's place: window and ordinal, and the key that it belongs to."""

    window_no: int
    ordinal: int
    topic: str
    key: str


@dataclass(frozen=True, slots=True)
class Resume:
    """Where a relay goes on."""

    log_id: str
    log_ordinal: int
    source: str
    done_through: int
    last_window: int
    next_offsets: Offsets
    cursor: Snapshot
    """s1 of the next window."""
    rest: Span | None
    """The rest of a backlog that was being paged when its relay stopped."""


async def load(connection: Connection, shard: int) -> Resume:
    """Where this shard stands."""
    row = await SQL.load.fetchrow(connection, shard)
    assert row is not None, "the shard's row exists: its lease was just taken"
    through = row["through_position"]
    rest = None if through is None else Span(row["s1"], row["s2"], after=through)
    return Resume(
        log_id=row["log_id"],
        log_ordinal=row["log_ordinal"],
        source=row["source"],
        done_through=row["done_through"],
        last_window=row["last_window_no"],
        next_offsets=_offsets_in(row["next_offsets"]),
        cursor=row["s2"] or row["start_snapshot"],
        rest=rest,
    )


async def read(
    connection: Connection, shard: int, s1: Snapshot, bounds: Bounds
) -> tuple[Span, list[Record]] | TooLarge | None:
    """The next window; None when nothing became visible, `TooLarge` when it has to be paged."""
    rows = await SQL.read.fetch(connection, shard, s1[1], s1[2], bounds.max_events + 1, bounds.max_bytes)
    if not rows:
        return None
    s2 = rows[0]["s2"]
    return TooLarge.PAGE_IT if s2 is None else (Span(s1, s2), rows)


@asynccontextmanager
async def backlog(pool: Pool, shard: int, s1: Snapshot, rest: Span | None) -> AsyncIterator["Backlog"]:
    """A snapshot to page through, on a connection of its own."""
    async with postgres.acquire(pool) as connection:
        await SQL.prepare_session.execute(connection)
        async with postgres.transact(connection, isolation="repeatable_read", readonly=True):
            row = await SQL.begin_backlog.fetchrow(connection)
            assert row is not None
            span = rest or Span(s1, row["s2"])
            yield Backlog(connection, shard, span)


@dataclass(frozen=True, slots=True)
class Backlog:
    """All of one span, in pages that become windows."""

    connection: Connection
    shard: int
    span: Span

    async def pages(self, bounds: Bounds) -> AsyncGenerator[tuple[Span, Sequence[Record]]]:
        """Pages in order. Only the last one's span has no end, which moves the cursor to s2."""
        s1, s2, after = self.span.s1, self.span.s2, self.span.after
        held: Sequence[Record] = ()
        async with aclosing(ahead(self._fetched(bounds))) as fetched:
            async for rows in fetched:
                if held:
                    through = held[-1]["position"]
                    yield Span(s1, s2, after, through), held
                    after = through
                held = rows
        yield Span(s1, s2, after), held

    async def _fetched(self, bounds: Bounds) -> AsyncGenerator[Sequence[Record]]:
        """Rows as the cursor gives them; how many follows from how large the last ones were."""
        s1, s2, after = self.span.s1, self.span.s2, self.span.after
        cursor = await SQL.read_backlog.cursor(self.connection, self.shard, s1[1], s1[2], s2, after)
        size = min(bounds.max_events, _FIRST_PAGE_EVENTS)
        while rows := await cursor.fetch(size):
            size = bounds.page_events(rows[::_SAMPLE_EVERY])
            yield rows


async def ahead(pages: AsyncGenerator[T]) -> AsyncGenerator[T]:
    """The same pages, each fetched while its predecessor is in use."""
    following = asyncio.ensure_future(anext(pages, None))
    try:
        while (page := await following) is not None:
            following = asyncio.ensure_future(anext(pages, None))
            yield page
    finally:
        following.cancel()
        await asyncio.gather(following, return_exceptions=True)
        await pages.aclose()


async def unfinished(connection: Connection, shard: int, done_through: int) -> AsyncIterator[Window]:
    """The windows logged and not done, each with what it published or was about to publish."""
    for row in await SQL.unfinished.fetch(connection, shard, done_through):
        number = row["window_no"]
        if row["kind"] == "release":
            yield Window(number, row["log_id"], await released(connection, shard, number))
            continue
        rows = await SQL.replay.fetch(
            connection, shard, number, row["s1"], row["s2"], row["after_position"], row["through_position"]
        )
        yield Window(number, row["log_id"], [(entry["ordinal"], entry) for entry in rows])


async def released(connection: Connection, shard: int, number: int) -> list[tuple[int, Record]]:
    """What a window of kind release publishes, each row with its ordinal."""
    return [(row["ordinal"], row) for row in await SQL.released.fetch(connection, shard, number)]


async def log(connection: Connection, lease: Lease, number: int, span: Span, progress: Progress) -> Collection[int]:
    """Log a window, and on the way what is done; the positions not to publish, of parked keys, come back."""
    diverted: list[int] = await SQL.log.fetchval(
        connection, lease.shard, lease.epoch, progress.done_through, offsets_out(progress.next_offsets),
        number, span.s1, span.s2, span.after, span.through, limits.RELAY_PARKED_MAX_EVENTS,
    )  # fmt: skip
    return frozenset(diverted)


async def log_done(connection: Connection, lease: Lease, progress: Progress) -> None:
    """Persist what is done."""
    await SQL.done.execute(
        connection, lease.shard, lease.epoch, progress.done_through, offsets_out(progress.next_offsets)
    )


async def forget(connection: Connection, shard: int) -> None:
    """Delete done windows that nobody needs."""
    await SQL.forget.execute(connection, shard, limits.WINDOWS_KEPT)


async def park(connection: Connection, lease: Lease, origin: Origin, error: BaseException) -> int:
    """Park a key from one record of a logged window on.

    Returns the last window logged by then: up to there parking has the key's events, and later windows are logged
    without those that wait.
    """
    last_window: int = await SQL.park.fetchval(
        connection, lease.shard, lease.epoch, origin.topic, origin.key, origin.window_no, origin.ordinal,
        type(error).__name__, str(error)[: limits.PARKED_DETAIL_MAX_CHARACTERS], limits.RELAY_PARKED_MAX_EVENTS,
    )  # fmt: skip
    return last_window


def _offsets_in(text: str) -> Offsets:
    return {
        topic: {int(p): offset for p, offset in by_partition.items()}
        for topic, by_partition in json.loads(text).items()
    }


def offsets_out(offsets: Mapping[str, Mapping[int, int]]) -> str:
    """As outbox.mark_done takes them."""
    return json.dumps(offsets)
