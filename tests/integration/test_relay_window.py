"""What a window holds: everything that became visible, in causal order, whatever writers and servers do."""

import asyncio
from collections import defaultdict
from collections.abc import AsyncIterator, Callable
from typing import Final
from uuid import uuid4

import asyncpg
import pytest
import pytest_asyncio

import outbox
from outbox import Connection, Pool
from outbox.embedded import Databases, Postgres
from outbox.postgres import Snapshot
from outbox.relay import window
from outbox.relay.lease import Lease
from outbox.upkeep import migrate
from tests.support.faults import eventually
from tests.support.mutations import break_function
from tests.support.writers import Writers, changed_event

BOUNDS: Final = window.Bounds(100_000, 1 << 30)
LOG: Final = "select outbox.log_window(0::smallint, $1, 0, '{}', $2, $3, $4, 0, null)"
PARK: Final = "select outbox.park(0::smallint, $1, 't', $2, $3, $4, 'poison', 'by a test')"


@pytest_asyncio.fixture
async def any_pool(any_database: str) -> AsyncIterator[Pool]:
    async with asyncpg.create_pool(any_database, min_size=1, max_size=20) as pool:
        await migrate.up(pool)
        yield pool


class Windows:
    """Reads as the relay does, without logging; s1 moves only with what was found."""

    def __init__(self, s1: Snapshot) -> None:
        self.s1 = s1

    @classmethod
    async def from_start(cls, db: Pool) -> "Windows":
        return cls(await db.fetchval("select start_snapshot from outbox.shards"))

    async def __call__(self, connection: Connection) -> list[int]:
        found = await window.read(connection, 0, self.s1, BOUNDS)
        if found is None:
            return []
        assert not isinstance(found, window.TooLarge)
        span, rows = found
        self.s1 = span.s2
        return [row["position"] for row in rows]


class ByPosition:
    """A recipe that many outboxes use: `id > last`."""

    last = 0

    async def __call__(self, connection: Connection) -> list[int]:
        rows = await connection.fetch(
            "select position from outbox.events where position > $1 order by position", self.last
        )
        self.last = rows[-1]["position"] if rows else self.last
        return [row["position"] for row in rows]


class ByHorizon:
    """Another one: transactions below the oldest in progress, by transaction id."""

    last = (0, 0)

    async def __call__(self, connection: Connection) -> list[int]:
        rows = await connection.fetch(
            """select transaction_id::text::bigint as tx, position from outbox.events
                where transaction_id < pg_snapshot_xmin(pg_current_snapshot())
                  and (transaction_id::text::bigint, position) > ($1, $2) order by 1, 2""",
            *self.last,
        )
        self.last = tuple(rows[-1].values()) if rows else self.last
        return [row["position"] for row in rows]


Recipe = Callable[[Connection], "asyncio.Future[list[int]]"]


async def deliver(pool: Pool, read: Recipe, delivered: list[int], ended: asyncio.Event) -> None:
    """Poll until the writers have ended and nothing more is found."""
    async with pool.acquire() as connection:
        while True:
            last_round = ended.is_set()
            found = await read(connection)
            delivered += found
            if last_round and not found:
                return
            await asyncio.sleep(0)


async def lost_and_inverted(pool: Pool, delivered: list[int]) -> tuple[int, int]:
    rows = await pool.fetch(
        """select e.position, c.key, c.version from outbox.events e
             join changes c on c.identity = convert_from(e.payload, 'UTF8')::jsonb ->> 'identity'"""
    )
    truth = {row["position"]: (row["key"], row["version"]) for row in rows}
    assert len(truth) == await pool.fetchval("select count(*) from changes"), "every change has its event"
    newest: dict[str, int] = defaultdict(int)
    inverted = 0
    for key, version in (truth[position] for position in delivered):
        inverted += version < newest[key]
        newest[key] = max(newest[key], version)
    return len(truth.keys() - set(delivered)), inverted


async def test_commit_inversion(any_pool: Pool) -> None:
    """Windows lose and invert nothing where `id > last` loses and `tx < xmin order by tx, id` inverts, on one history.

    Writers take transaction ids early, wait for each other's rows, roll back savepoints and prepare transactions.
    The two recipes are the broken variants; the load goes on until both have failed.
    """
    modes = {"plain": 4, "early": 6, "savepoint": 2, "several": 2, "prepared": 1, "rolled_back": 1}
    writers = Writers(any_pool, "t", keys=("a", "b", "c"), modes=modes)
    await writers.set_up()
    readers = {"ours": await Windows.from_start(any_pool), "id > last": ByPosition(), "xmin": ByHorizon()}
    delivered: dict[str, list[int]] = {name: [] for name in readers}
    for round_number in range(20):
        ended = asyncio.Event()
        writers.seed = round_number
        async with asyncio.TaskGroup() as polls:
            for name, read in readers.items():
                polls.create_task(deliver(any_pool, read, delivered[name], ended))
            await writers.run(writers=8, transactions=20)
            ended.set()
        outcome = {name: await lost_and_inverted(any_pool, found) for name, found in delivered.items()}
        assert outcome["ours"] == (0, 0)
        assert len(delivered["ours"]) == len(set(delivered["ours"]))
        if outcome["id > last"][0] and outcome["xmin"][1]:
            break
    assert outcome["id > last"][0], "the recipe `id > last` was to lose something"
    assert outcome["xmin"][1], "the recipe of the horizon was to invert something"
    assert writers.happened["prepared"]
    assert writers.happened["rolled_back"]


async def test_a_long_writer_elsewhere_stalls_nothing(postgres: Databases, log_pool: Pool) -> None:
    """An open writer of another database, and one that idles in a transaction of this one, leave windows alone.

    The recipe of the horizon is the broken variant: it sees nothing while either is open.
    """
    event = changed_event("t")
    elsewhere = await asyncpg.connect(postgres.dsn())
    idle = await log_pool.acquire()
    try:
        ours, horizon = await Windows.from_start(log_pool), ByHorizon()
        for connection in (elsewhere, idle):
            transaction = connection.transaction()
            await transaction.start()
            await connection.execute("select pg_current_xact_id()")
            async with outbox.transaction(log_pool) as tx:
                tx.emit(event(key="k", identity="i"))
            async with log_pool.acquire() as reader:
                assert await horizon(reader) == []
                assert len(await ours(reader)) == 1
            if connection is elsewhere:
                await transaction.rollback()
                async with log_pool.acquire() as reader:
                    assert len(await horizon(reader)) == 1
        async with outbox.transaction(idle) as tx:  # its own event, with its old transaction id, is not lost
            tx.emit(event(key="k", identity="late"))
        await idle.execute("commit")
        async with log_pool.acquire() as reader:
            assert len(await ours(reader)) == 1
    finally:
        await elsewhere.close()
        await log_pool.release(idle)


# -------------------------------------------------------------------------------------- crashes of PostgreSQL


async def emit_one(pool: Pool, identity: str, key: str = "k") -> None:
    async with outbox.transaction(pool) as tx:
        tx.emit(changed_event("t")(key=key, identity=identity))


@pytest.mark.crash
@pytest.mark.parametrize("rule", ["kept", "removed"])
async def test_h5_event_is_read_after_a_crash_that_issues_transaction_ids_again(rule: str) -> None:
    """An empty read moves nothing: s1 stays what was logged last.

    Transactions that leave no durable trace raise xmax; after a crash of the server their ids are issued again, to an
    event. Seen red: s1 moved to the snapshot of the empty read (the broken variant here): the event is never read.
    """
    with Postgres(settings={"wal_writer_delay": "10s", "autovacuum": "off"}) as server:
        url = server.create_database("shop")
        async with asyncpg.create_pool(url, min_size=1, max_size=4) as pool:
            await migrate.up(pool)
            await emit_one(pool, "before")
            reader = await Windows.from_start(pool)
            async with pool.acquire() as connection:
                assert len(await reader(connection)) == 1
                await connection.execute("checkpoint")
                await connection.execute("set synchronous_commit = off")
                for _ in range(50):
                    await connection.execute("select pg_current_xact_id()")
                assert await reader(connection) == []
                before = await connection.fetchval("select pg_snapshot_xmax(pg_current_snapshot())::text::bigint")
                if rule == "removed":
                    reader.s1 = await connection.fetchval("select pg_current_snapshot()")
            server.crash_restart()
            pool.terminate()
        async with asyncpg.create_pool(url, min_size=1, max_size=4) as pool:
            await emit_one(pool, "after")
            again = await pool.fetchval("select max(transaction_id::text::bigint) from outbox.events")
            assert again < before, "the server was to issue transaction ids again"
            async with pool.acquire() as connection:
                assert len(await reader(connection)) == (1 if rule == "kept" else 0)


@pytest.mark.crash
@pytest.mark.parametrize("rule", ["kept", "removed"])
async def test_h6_published_implies_durable(rule: str) -> None:
    """`log_window` commits synchronously whatever the session says, and with itself every event that it covers.

    Seen red: `synchronous_commit` out of `outbox.log_window` (the broken variant here): after the crash the window and
    its events are gone, although the relay would have published them.
    """
    with Postgres(settings={"wal_writer_delay": "10s", "synchronous_commit": "off", "autovacuum": "off"}) as server:
        url = server.create_database("shop")
        async with asyncpg.create_pool(url, min_size=1, max_size=4) as pool:
            await migrate.up(pool)
            if rule == "removed":
                await break_function(pool, "log_window", "perform set_config('synchronous_commit', 'on', true);")
            await pool.execute("checkpoint")
            await emit_one(pool, "first")
            s1 = await pool.fetchval("select start_snapshot from outbox.shards")
            s2 = await pool.fetchval("select pg_current_snapshot()")
            await pool.fetchval(LOG, 0, 1, s1, s2)
            server.crash_restart()
            pool.terminate()
        async with asyncpg.create_pool(url, min_size=1, max_size=4) as pool:
            left = await pool.fetchrow(
                "select (select count(*) from outbox.windows), (select count(*) from outbox.events)"
            )
            assert left == ((1, 1) if rule == "kept" else (0, 0))


@pytest.mark.crash
async def test_a_granted_lease_survives_a_crash() -> None:
    """An epoch is never granted twice: taking the lease commits synchronously whatever the session says.

    Seen red: the lease taken as the database's `synchronous_commit = off` has it; after a crash the successor got the
    same epoch, and the predecessor could go on parking and renewing under it.
    """
    with Postgres(settings={"wal_writer_delay": "10s", "synchronous_commit": "off", "autovacuum": "off"}) as server:
        url = server.create_database("shop")
        async with asyncpg.create_pool(url, min_size=1, max_size=2) as pool:
            await migrate.up(pool)
            await pool.execute("checkpoint")
            async with pool.acquire() as connection:
                first = await Lease.take(connection, 0, uuid4(), 1.0)
            server.crash_restart()
            pool.terminate()
        async with asyncpg.create_pool(url, min_size=1, max_size=2) as pool, pool.acquire() as connection:
            second = await eventually(lambda: Lease.take(connection, 0, uuid4(), 1.0), what="the lease ran out")
            assert first is not None
            assert second.epoch > first.epoch
