"""H8: an idle relay is woken by every commit that its last read missed, and nobody notifies one that is not idle.

The relay is real, its safety poll an hour away. Steps of a writer's transaction are put between its steps by the hook
of the crash sites. That a wake-up was lost is shown without waiting for it: notifications arrive in the order of the
commits, so when a later one has arrived and the relay is still asleep, the earlier one will never wake it.
"""

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, Final

import asyncpg
import pytest

from outbox import Connection, Pool, Relay, crash_sites
from outbox.crash_sites import Side
from outbox.relay import wakeup
from outbox.relay.wakeup import CHANNEL, Wakeup
from outbox.settings import Settings
from tests.support.faults import WAIT_TIMEOUT_SECONDS, eventually
from tests.support.kafka_server import create_topic
from tests.support.mutations import break_function, broken_statement
from tests.support.writers import Writers

HOUR: Final = 3_600.0
READ: Final = "outbox.relay.window.read"
GO_IDLE: Final = "outbox.relay.wakeup.go_idle"
STOP_IDLING: Final = "outbox.relay.wakeup.stop_idling"
LOG: Final = "outbox.relay.window.log"
DONE: Final = "outbox.relay.window.done"
RENEW: Final = "outbox.relay.lease.renew"
RELEASE_LOOK: Final = "outbox.relay.release.look"
"""At what people have flagged, about once a second."""
MARKER: Final = "marker"

STEPS: Final = ("before the read", "after the read", "before the lock", "after the lock", "before the last read",
                "after the last read", "asleep")  # fmt: skip
"""Of going idle, in order."""

LOCKED_OUT: Final = STEPS[:3]
"""A writer that has emitted there, and is open, keeps the relay from falling asleep."""

Step = Callable[[], Awaitable[Any]]


@dataclass(slots=True)
class Watched:
    """One relay in this process: what it visits, when it sleeps, and what is to happen between its steps."""

    wakeup: Wakeup | None = None
    visits: Counter[str] = field(default_factory=Counter)
    at: dict[str, list[Step]] = field(default_factory=dict)
    asleep: bool = False
    sleeps: list[float] = field(default_factory=list)
    heard: Counter[str] = field(default_factory=Counter)
    deaf: bool = False
    running: "asyncio.Future[None] | None" = None

    async def visit(self, site: str, side: Side) -> None:
        """The hook."""
        if side == "after":
            self.visits[site] += 1
        last = self.wakeup is not None and self.visits[GO_IDLE] > 0
        name = {
            (READ, "before"): "before the last read" if last else "before the read",
            (READ, "after"): "after the last read" if last else "after the read",
            (GO_IDLE, "before"): "before the lock",
            (GO_IDLE, "after"): "after the lock",
        }.get((site, side))
        if name is not None and self.wakeup is not None:
            await self.reach(name)

    async def reach(self, name: str) -> None:
        for step in self.at.pop(name, []):
            await step()

    def fall_asleep(self, seconds: float) -> None:
        """The relay is about to wait for a notification; what is to happen then begins when it does."""
        self.asleep = True
        self.sleeps.append(seconds)
        steps = self.at.pop("asleep", [])
        if steps:
            self.running = asyncio.ensure_future(one_after_another(steps))

    async def sleeping(self) -> None:
        async def look() -> bool:
            return self.asleep

        await eventually(look, what=f"the relay sleeps {self.visits}")

    async def visited(self, site: str, times: int = 1) -> None:
        async def look() -> bool:
            return self.visits[site] >= times

        await eventually(look, what=f"{times} visits of {site}: {self.visits}")

    async def has_heard(self, payload: str) -> None:
        async def look() -> bool:
            return self.heard[payload] > 0

        await eventually(look, what=f"notification {payload}: {self.heard}")


async def one_after_another(steps: list[Step]) -> None:
    for step in steps:
        await step()


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> Watched:
    """Watches the relay that the test starts."""
    watched = Watched()
    monkeypatch.setattr(crash_sites, "hook", watched.visit)
    listen, wait, hear = Wakeup.listen, Wakeup._wait, Wakeup._on_notification

    async def listening(self: Wakeup) -> None:
        await listen(self)
        watched.wakeup = self

    async def waiting(self: Wakeup, seconds: float) -> None:
        if self.idle:
            watched.fall_asleep(seconds)
        await wait(self, seconds)
        watched.asleep = False

    def hearing(self: Wakeup, connection: object, pid: int, channel: str, payload: object) -> None:
        watched.heard[str(payload)] += 1
        if not watched.deaf:
            hear(self, connection, pid, channel, payload)

    monkeypatch.setattr(Wakeup, "listen", listening)
    monkeypatch.setattr(Wakeup, "_wait", waiting)
    monkeypatch.setattr(Wakeup, "_on_notification", hearing)
    return watched


@asynccontextmanager
async def relaying(pool: Pool, broker: str, **settings: Any) -> AsyncIterator[None]:
    """A relay whose safety poll is an hour away, if not said otherwise; its second watermark, a day."""
    chosen = {"safety_poll_seconds": HOUR, "watermark_seconds": 24 * HOUR, "idle_after_seconds": 0.02,
              "lease_seconds": 4.0, **settings}  # fmt: skip
    async with Relay(pool, broker, settings=Settings(**chosen)) as relay:
        yield
        relay.stop()
        async with asyncio.timeout(WAIT_TIMEOUT_SECONDS):
            await relay.run()


class Writer:
    """One transaction, a step at a time, on a connection of its own."""

    def __init__(self, connection: Connection, topic: str) -> None:
        self.connection = connection
        self.topic = topic

    async def begin(self) -> None:
        await self.connection.execute("begin")

    async def emit(self) -> None:
        await self.connection.execute("select outbox.emit('t', $1, 'key', '{}')", self.topic)

    async def savepoint(self) -> None:
        await self.connection.execute("savepoint s")

    async def roll_back_to_savepoint(self) -> None:
        await self.connection.execute("rollback to savepoint s")

    async def commit(self) -> None:
        await self.connection.execute("commit")


@pytest.fixture
async def writer(log_pool: Pool, database: str, broker: str, topic: str) -> AsyncIterator[Writer]:
    assert log_pool is not None, "the database is migrated"
    await create_topic(broker, topic)
    connection = await asyncpg.connect(database)
    yield Writer(connection, topic)
    await connection.close()


async def mark(pool: Pool, watched: Watched) -> None:
    """A notification after all that were sent before; once it has arrived, those have, or never will."""
    await pool.execute("select pg_notify($1, $2)", CHANNEL, MARKER)
    await watched.has_heard(MARKER)


# ------------------------------------------------------------------------------- a commit between any two steps


@pytest.mark.parametrize(
    ("emitted", "committed"),
    [
        (first, second)
        for n, first in enumerate(STEPS)
        for second in STEPS[n:]
        if (first in LOCKED_OUT, second) != (True, "asleep")
    ],
)
async def test_a_commit_anywhere_in_going_idle_is_read(
    log_pool: Pool, broker: str, writer: Writer, watched: Watched, emitted: str, committed: str
) -> None:
    """H8, first half: whatever the step at which a writer emits, and the later one at which it commits."""
    watched.at = {emitted: [writer.begin, writer.emit]}
    watched.at.setdefault(committed, []).append(writer.commit)
    async with relaying(log_pool, broker):
        await watched.visited(LOG)
    assert not watched.at, "every step happened"


async def test_listening_after_the_last_read_loses_the_wake_up(
    log_pool: Pool, broker: str, writer: Writer, watched: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Negative control: lock, read, writer notifies and commits, LISTEN."""
    listen, wait = Wakeup.listen, Wakeup._wait
    listening = False

    async def not_yet(self: Wakeup) -> None:
        watched.wakeup = self

    async def listen_and_wait(self: Wakeup, seconds: float) -> None:
        nonlocal listening
        if self.idle and not listening:
            listening = True
            await listen(self)
        await wait(self, seconds)

    monkeypatch.setattr(Wakeup, "listen", not_yet)
    monkeypatch.setattr(Wakeup, "_wait", listen_and_wait)
    watched.at = {"after the last read": [writer.begin, writer.emit, writer.commit]}
    async with relaying(log_pool, broker):
        await watched.sleeping()
        await mark(log_pool, watched)
        assert (watched.asleep, watched.visits[LOG], watched.heard["0"]) == (True, 0, 0), "lost"


async def test_not_reading_once_more_loses_the_wake_up(
    log_pool: Pool, broker: str, writer: Writer, watched: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Negative control: read, writer commits without a reason to notify, lock, wait."""
    found_nothing = Wakeup.found_nothing

    async def found_nothing_and_wait(self: Wakeup, at_most_seconds: float) -> None:
        was_idle = self.idle
        await found_nothing(self, at_most_seconds)
        if self.idle and not was_idle:
            await found_nothing(self, at_most_seconds)

    monkeypatch.setattr(Wakeup, "found_nothing", found_nothing_and_wait)
    watched.at = {"before the lock": [writer.begin, writer.emit, writer.commit]}
    async with relaying(log_pool, broker):
        await watched.sleeping()
        await mark(log_pool, watched)
        assert (watched.asleep, watched.visits[LOG], watched.heard["0"]) == (True, 0, 0), "lost"


async def test_idling_without_the_lock_loses_the_wake_up(
    log_pool: Pool, broker: str, writer: Writer, watched: Watched
) -> None:
    """Negative control: nothing tells the writers that the relay is idle."""
    watched.at = {"asleep": [writer.begin, writer.emit, writer.commit]}
    with (
        broken_statement(wakeup.SQL, "go_idle", "pg_try_advisory_lock(1868724273, $1)", "$1::integer is not null"),
        broken_statement(wakeup.SQL, "stop_idling", "pg_advisory_unlock(1868724273, $1)", "$1::integer is not null"),
    ):
        async with relaying(log_pool, broker):
            await watched.sleeping()
            assert watched.running is not None
            await watched.running
            await mark(log_pool, watched)
            assert (watched.asleep, watched.visits[LOG], watched.heard["0"]) == (True, 0, 0), "lost"


# ------------------------------------------------------------------------------------------------------ savepoints


@pytest.mark.parametrize("idle_first", [True, False], ids=["the NOTIFY is dropped", "the lock is dropped"])
@pytest.mark.parametrize("kept", [True, False], ids=["rule kept", "rule removed"])
async def test_every_emit_tries_again_because_a_savepoint_takes_lock_and_notification_with_it(
    log_pool: Pool,
    broker: str,
    writer: Writer,
    watched: Watched,
    idle_first: bool,  # noqa: FBT001 - a parameter of the test
    kept: bool,  # noqa: FBT001 - likewise
) -> None:
    """H8, second half: a try that is remembered across ROLLBACK TO wakes nobody."""
    if not kept:
        await log_pool.execute("create sequence public.tried")
        await break_function(
            log_pool,
            "wake",
            "pg_try_advisory_xact_lock_shared(1868724273, p_shard)",
            "(select is_called from public.tried)"
            " or (nextval('public.tried') > 0 and pg_try_advisory_xact_lock_shared(1868724273, p_shard))",
        )
    tried = [writer.begin, writer.savepoint, writer.emit, writer.roll_back_to_savepoint]
    watched.at = {"asleep": [*tried, writer.emit, writer.commit]}
    if not idle_first:
        watched.at = {"before the lock": tried, "asleep": [writer.emit, writer.commit]}
    async with relaying(log_pool, broker):
        if kept:
            await watched.visited(LOG)
            return
        await watched.sleeping()
        assert watched.running is not None
        await watched.running
        await mark(log_pool, watched)
        assert (watched.asleep, watched.visits[LOG], watched.heard["0"]) == (True, 0, 0), "lost"


# -------------------------------------------------------------------------------------------- who notifies, and when


@asynccontextmanager
async def notifications(database: str) -> AsyncIterator[Callable[[], Awaitable[int]]]:
    """Counts notifications for relays."""
    connection = await asyncpg.connect(database)
    heard: Counter[str] = Counter()
    await connection.add_listener(CHANNEL, lambda *arguments: heard.update([arguments[3]]))

    async def count() -> int:
        """Of all that has committed until now."""
        heard.pop(MARKER, None)
        await connection.execute("select pg_notify($1, $2)", CHANNEL, MARKER)

        async def look() -> bool:
            return heard[MARKER] > 0

        await eventually(look, what="the marker arrives")
        return heard.total() - heard[MARKER]

    try:
        yield count
    finally:
        await connection.close()


@pytest.mark.parametrize("relay", ["busy", "none"])
async def test_under_load_nobody_notifies(
    log_pool: Pool, database: str, broker: str, topic: str, watched: Watched, relay: str
) -> None:
    """A busy relay polls; without a relay there is nobody to wake."""
    await create_topic(broker, topic)
    writers = Writers(log_pool, topic)
    await writers.set_up()
    async with notifications(database) as count, contextlib.AsyncExitStack() as stack:
        if relay == "busy":
            await stack.enter_async_context(relaying(log_pool, broker, idle_after_seconds=HOUR))
            await watched.visited(READ)
        await writers.run(writers=4, transactions=25)
        if relay == "busy":
            await watched.visited(LOG)
        assert sum(writers.happened.values()) == 100
        assert await count() == 0
        assert watched.visits[GO_IDLE] == 0


async def test_a_commit_that_finds_the_relay_idle_sends_one_notification(
    log_pool: Pool, database: str, broker: str, writer: Writer, watched: Watched
) -> None:
    """Positive control of the counting."""
    async with notifications(database) as count, relaying(log_pool, broker):
        await watched.sleeping()
        assert await count() == 0
        await writer.emit()
        await watched.visited(STOP_IDLING)
        assert watched.visits[LOG] <= 1
        assert await count() == 1


# -------------------------------------------------------------------------------------------------- other ways to run


async def test_polling_needs_no_listen(log_pool: Pool, broker: str, writer: Writer, watched: Watched) -> None:
    """`wakeup="poll"`, for a relay behind a transaction pooler: no LISTEN, no session lock, and events are read."""
    async with relaying(log_pool, broker, wakeup="poll"):
        await watched.visited(READ, 10)
        await writer.emit()
        await watched.visited(LOG)
        reads = watched.visits[READ]
        await watched.visited(READ, reads + 10)
        await log_pool.execute("select pg_notify($1, $2)", CHANNEL, "0")
        await watched.visited(READ, reads + 20)
    assert (watched.visits[GO_IDLE], watched.heard.total()) == (0, 0)


async def test_an_idle_relay_asks_for_nothing_but_its_lease(
    log_pool: Pool, broker: str, writer: Writer, watched: Watched
) -> None:
    """Five renewals long no other statement; the server says the same of the connection that reads."""
    async with relaying(log_pool, broker, lease_seconds=1.0):
        await writer.emit()
        await watched.visited(DONE)  # a second after the last event; then there is nothing left to persist
        await watched.sleeping()
        assert watched.sleeps[-1] == HOUR
        before = Counter(watched.visits)
        busy_before = await reading_connection(log_pool)
        await watched.visited(RENEW, before[RENEW] + 5)
        assert set(watched.visits - before) == {RENEW}
        assert await reading_connection(log_pool) == busy_before


async def test_an_idle_relay_looks_once_in_a_safety_poll(log_pool: Pool, broker: str, watched: Watched) -> None:
    """One read a safety poll, and it goes on idling."""
    async with relaying(log_pool, broker, lease_seconds=1.0, safety_poll_seconds=0.05):
        await watched.sleeping()
        before, slept = Counter(watched.visits), len(watched.sleeps)
        await watched.visited(READ, before[READ] + 10)
        since = watched.visits - before
        assert set(since) <= {READ, RENEW, RELEASE_LOOK}
        assert since[READ] <= len(watched.sleeps) - slept + 1, "a whole safety poll between two reads"
        assert set(watched.sleeps) == {0.05}


async def reading_connection(pool: Pool) -> tuple[Any, ...]:
    """When the connection that holds the idle lock was last given something to do."""
    row = await pool.fetchrow(
        "select a.pid, a.query_start, a.state_change from pg_stat_activity a join pg_locks l on l.pid = a.pid"
        " where l.locktype = 'advisory' and l.classid = 1868724273 and l.mode = 'ExclusiveLock'"
        "   and l.database = (select oid from pg_database where datname = current_database())"
    )
    assert row is not None, "a relay idles"
    return tuple(row)


async def test_the_safety_poll_finds_what_a_lost_notification_announced(
    log_pool: Pool, broker: str, writer: Writer, watched: Watched
) -> None:
    """A half-open connection: the notification is sent, and never arrives."""
    async with relaying(log_pool, broker, safety_poll_seconds=0.2):
        await watched.sleeping()
        watched.deaf = True
        await writer.emit()
        await watched.visited(LOG)
        assert watched.heard["0"] <= 1


async def test_stopping_wakes_an_idle_relay(log_pool: Pool, broker: str, watched: Watched) -> None:
    """SIGTERM is not to wait for a safety poll; `relaying` bounds the stop."""
    async with relaying(log_pool, broker):
        await watched.sleeping()
