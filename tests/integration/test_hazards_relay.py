"""Hazards of the relay's protocol with PostgreSQL, each with the version that lacks the rule and fails.

H5, H6, H13, H14, H37 and H38; the others of the relay stand in test_relay_restore, test_wakeup and test_visibility.
"""

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any, Final
from uuid import uuid4

import asyncpg
import pytest

from outbox import Pool, Relay, kafka, postgres
from outbox.embedded import Postgres
from outbox.relay import publish, window
from outbox.relay.lease import Lease
from outbox.relay.window import Bounds, Origin, Progress, Span
from outbox.settings import Settings
from outbox.upkeep import migrate
from tests.support.faults import eventually
from tests.support.history import topic_reader
from tests.support.kafka_server import create_topic
from tests.support.mutations import break_function, broken_statement
from tests.support.relay_process import QUICK
from tests.support.writers import Writers, identify

RULE: Final = pytest.mark.parametrize("rule", ["kept", "removed"])
ALL: Final = Bounds(max_events=1000, max_bytes=1_000_000)
NOTHING_DONE: Final = Progress(0, {})
LOCK_WAIT: Final = (
    "select exists (select from pg_stat_activity where wait_event_type = 'Lock' and datname = current_database())"
)


@pytest.fixture
def cluster() -> Iterator[Postgres]:
    """A cluster of the test's own, whose WAL reaches the disk only when a commit asks for it."""
    with Postgres(settings={"wal_writer_delay": "10s", "autovacuum": "off"}) as server:
        yield server


@asynccontextmanager
async def leased(pool: Pool, *, seconds: float = 60.0) -> AsyncIterator[tuple[postgres.Connection, Lease]]:
    """A connection with the lease of shard 0, as a relay has it."""
    async with pool.acquire() as connection:
        await pool.execute("update outbox.shards set lease_until = null")
        lease = await Lease.take(connection, 0, uuid4(), seconds)
        assert lease is not None
        await window.SQL.prepare_session.execute(connection)
        yield connection, lease


async def next_window(connection: postgres.Connection, lease: Lease) -> tuple[Span, list[postgres.Record]]:
    resume = await window.load(connection, lease.shard)
    found = await window.read(connection, lease.shard, resume.cursor, ALL)
    assert isinstance(found, tuple), f"one window was expected, not {found}"
    return found


async def emit(pool: Pool, *keys: str) -> None:
    for key in keys:
        await pool.execute("select outbox.emit('t', 'letters', $1, '{}')", key)


# ------------------------------------------------------------------------------------------------ H5, H6


@RULE
@pytest.mark.crash
async def test_h5_an_empty_read_moves_nothing_because_transaction_ids_may_be_issued_again(
    cluster: Postgres, rule: str
) -> None:
    """PostgreSQL forgets transactions that were never flushed, and gives their ids to others after a crash.

    Seen red: a reader that advances s1 in memory on an empty read never sees the event with the re-issued id.
    """
    url = cluster.create_database("shop")
    async with asyncpg.create_pool(url, min_size=1, max_size=4) as pool:
        await migrate.up(pool)
        await emit(pool, "first")
        async with leased(pool) as (connection, lease):
            span, _ = await next_window(connection, lease)
            await window.log(connection, lease, 1, span, NOTHING_DONE)
        cursor = span.s2
        await pool.execute("create table spent (n integer)")
        async with pool.acquire() as connection:
            await connection.execute("set synchronous_commit = off")
            for n in range(300):
                await connection.execute("insert into spent values ($1)", n)
            assert await window.read(connection, 0, cursor, ALL) is None
            if rule == "removed":
                cursor = await connection.fetchval("select pg_current_snapshot()")
        spent_up_to = await pool.fetchval("select pg_snapshot_xmax(pg_current_snapshot())::text::bigint")
        cluster.kill()
    cluster.restart()
    async with asyncpg.create_pool(url, min_size=1, max_size=4) as pool:
        await emit(pool, "second")
        reissued = await pool.fetchval("select transaction_id::text::bigint from outbox.events where key = 'second'")
        assert reissued < spent_up_to, "the crash was to forget transactions"
        async with pool.acquire() as connection:
            found = await window.read(connection, 0, cursor, ALL)
    if rule == "kept":
        assert isinstance(found, tuple)
        assert [row["key"] for row in found[1]] == ["second"]
    else:
        assert found is None


@RULE
@pytest.mark.crash
async def test_h6_a_window_is_durable_before_it_is_published(cluster: Postgres, rule: str) -> None:
    """Where `synchronous_commit` is off, a crash would take a published window back; its numbers would be used again.

    Seen red: `set_config('synchronous_commit', 'on')` out of outbox.log_window.
    """
    url = cluster.create_database("shop")
    async with asyncpg.create_pool(url, min_size=1, max_size=4) as pool:
        await migrate.up(pool)
        if rule == "removed":
            await break_function(pool, "log_window", "perform set_config('synchronous_commit', 'on', true);")
        await emit(pool, "a")
        async with leased(pool) as (connection, lease):
            span, _ = await next_window(connection, lease)
            await connection.execute("set synchronous_commit = off")
            await window.log(connection, lease, 1, span, NOTHING_DONE)
        cluster.kill()
    cluster.restart()
    async with asyncpg.create_pool(url, min_size=1, max_size=2) as pool:
        logged = await pool.fetchval("select count(*) from outbox.windows")
    assert logged == (1 if rule == "kept" else 0)


# ----------------------------------------------------------------------------------------------------- H13


@RULE
async def test_h13_a_zombie_cannot_log_a_window_that_its_successor_has_not(log_pool: Pool, rule: str) -> None:
    """The epoch is compared on the locked shard row, in the transaction that logs.

    Seen red: the comparison out of outbox.lock_shard; the zombie's window and the successor's both exist.
    """
    if rule == "removed":
        await break_function(log_pool, "lock_shard", "if s.lease_epoch <> p_epoch then", "if false then")
    await emit(log_pool, "a", "b")
    async with leased(log_pool) as (old_connection, zombie):
        span, _ = await next_window(old_connection, zombie)
        async with leased(log_pool) as (connection, successor):
            assert successor.epoch == zombie.epoch + 1
            await window.log(connection, successor, 1, span, NOTHING_DONE)
            if rule == "removed":
                await window.log(old_connection, zombie, 2, span, NOTHING_DONE)
                assert await log_pool.fetchval("select count(distinct epoch) from outbox.windows") == 2
                return
            with pytest.raises(postgres.PostgresError) as refused:
                await window.log(old_connection, zombie, 2, span, NOTHING_DONE)
            assert postgres.sqlstate(refused.value) == postgres.FENCED
            with pytest.raises(postgres.PostgresError, match="belongs to epoch"):
                await window.log_done(old_connection, zombie, Progress(1, {}))
            with pytest.raises(postgres.PostgresError, match="belongs to epoch"):
                await window.park(old_connection, zombie, Origin(1, 1, "letters", "a"), ValueError("x"))
            with pytest.raises(postgres.PostgresError, match="windows_pkey"):
                await window.log(connection, successor, 1, span, NOTHING_DONE)


# ----------------------------------------------------------------------------------------------------- H14


@RULE
async def test_h14_one_partition_down_while_others_go_on_loses_nothing(
    log_pool: Pool, broker: str, topic: str, rule: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`done_through` counts windows without a gap: a window is done when its slowest partition is.

    Seen red: with `done_through` = the newest submitted window, the records of the silent partition are never sent.
    """
    if rule == "removed":
        monkeypatch.setattr(publish.Publisher, "done_through", property(lambda self: self._last))
    await create_topic(broker, topic, partitions=2)
    writers = Writers(log_pool, topic, keys=tuple(f"key-{n}" for n in range(6)))
    await writers.set_up()
    real_send: Any = kafka.Producer.send
    silent = asyncio.Event()
    sent_by_the_other: list[int] = []

    async def send(self: kafka.Producer, batch: Any, name: str, partition: int) -> int:
        if partition == 0:
            silent.set()
            await asyncio.Event().wait()
        offset: int = await real_send(self, batch, name, partition)
        sent_by_the_other.append(batch.record_count())
        return offset

    settings = Settings(**QUICK, window_max_events=6, windows_in_flight=2)
    monkeypatch.setattr(kafka.Producer, "send", send)
    async with Relay(log_pool, broker, settings=settings.model_copy(update={"drain_timeout_seconds": 0.5})):
        for _ in range(5):
            await writers.burst(6)
        await silent.wait()

        async def two_windows() -> bool:
            return len(sent_by_the_other) >= 2

        await eventually(two_windows, what="the other partition goes on, up to two windows")
        assert await log_pool.fetchval("select count(*) from outbox.windows") == 2, "windows in flight are bounded"
    monkeypatch.setattr(kafka.Producer, "send", real_send)
    done = await log_pool.fetchval("select done_through from outbox.shards")
    async with Relay(log_pool, broker, settings=settings):
        if rule == "kept":
            assert done == 0
            verdict = await writers.judge(broker, duplicates_max=2 * 6)
            assert verdict.valid, verdict.explain()
            return
        assert done > 0
        async with topic_reader(broker, topic) as reader:
            wanted = await log_pool.fetchval("select count(*) from changes where version > 2")

            async def rest_published() -> bool:
                return await reader.count() >= wanted

            await eventually(rest_published, what="what was not logged before is published")
            verdict = await writers.compare(await reader.records(identify), reader, duplicates_max=12)
            assert not verdict.valid


# ----------------------------------------------------------------------------------------------- H37, H38


@RULE
async def test_h37_parking_and_logging_at_the_same_moment_take_turns(log_pool: Pool, rule: str) -> None:
    """Both lock the shard row exclusively, so the window that is logged second knows the key that was parked first.

    Seen red: with `for share`, and no count of parked events on the same row, both go on, and the key's later event is
    published before its parked one.
    """
    if rule == "removed":
        await break_function(log_pool, "lock_shard", "for no key update", "for share")
        await break_function(log_pool, "count_parked", "p_change <> 0", "false")
    await emit(log_pool, "poison", "other")
    async with leased(log_pool) as (connection, lease), log_pool.acquire() as parking:
        span, rows = await next_window(connection, lease)
        await window.log(connection, lease, 1, span, NOTHING_DONE)
        await emit(log_pool, "poison", "other")
        following, later = await next_window(connection, lease)
        transaction = parking.transaction()
        await transaction.start()
        assert await window.park(parking, lease, Origin(1, 1, "letters", "poison"), ValueError("refused")) == 1
        logging = asyncio.ensure_future(window.log(connection, lease, 2, following, NOTHING_DONE))
        if rule == "kept":
            await eventually(lambda: log_pool.fetchval(LOCK_WAIT), what="logging waits for parking")
            await transaction.commit()
            assert await logging == {later[0]["position"]}
            parked = await log_pool.fetch("select window_no, ordinal, key from outbox.parked_events order by id")
            assert [tuple(row) for row in parked] == [(1, 1, "poison"), (2, 1, "poison")]
        else:
            assert await logging == frozenset(), "the later event of the parked key would be published"
            await transaction.commit()
    assert len(rows) == 2


@RULE
async def test_h38_parked_events_count_in_the_ordinals_and_keep_their_origin(log_pool: Pool, rule: str) -> None:
    """A replay gives every record the ordinal of its first delivery, although some rows are parked by now.

    Seen red: ordinals counted over what is left; the third event returns as the second and is taken for a duplicate.
    """
    await emit(log_pool, "a", "poison", "c", "poison", "e")
    async with leased(log_pool) as (connection, lease):
        span, rows = await next_window(connection, lease)
        await window.log(connection, lease, 1, span, NOTHING_DONE)
        first = {row["key"]: ordinal for ordinal, row in enumerate(rows, 1) if row["key"] != "poison"}
        await window.park(connection, lease, Origin(1, 2, "letters", "poison"), ValueError("refused"))
        recount = ("r.ordinal\n", "row_number() over (order by r.ordinal) as ordinal\n")
        if rule == "removed":
            with broken_statement(window.SQL, "replay", *recount):
                (again,) = [found async for found in window.unfinished(connection, 0, 0)]
            assert {row["key"]: ordinal for ordinal, row in again.entries} != first
            return
        (again,) = [found async for found in window.unfinished(connection, 0, 0)]
        assert {row["key"]: ordinal for ordinal, row in again.entries} == first == {"a": 1, "c": 3, "e": 5}
        origins = await connection.fetch("select window_no, ordinal, position from outbox.parked_events order by id")
        assert [tuple(row) for row in origins] == [(1, 2, 2), (1, 4, 4)]

        await emit(log_pool, "poison", "f")
        following, _ = await next_window(connection, lease)
        assert await window.log(connection, lease, 2, following, NOTHING_DONE) == {6}
        replayed = [found async for found in window.unfinished(connection, 0, 1)]
        assert [[(ordinal, row["key"]) for ordinal, row in found.entries] for found in replayed] == [[(2, "f")]]


async def test_next_offsets_are_merged_by_topic_and_partition(log_pool: Pool) -> None:
    """A later window's offsets add to those of earlier ones; `done_through` never goes back."""
    async with leased(log_pool) as (connection, lease):
        await window.log_done(connection, lease, Progress(3, {"a": {0: 5, 1: 7}}))
        await window.log_done(connection, lease, Progress(2, {"a": {1: 9}, "b": {0: 1}}))
    row = await log_pool.fetchrow("select done_through, next_offsets from outbox.shards")
    assert row is not None
    assert row["done_through"] == 3
    assert json.loads(row["next_offsets"]) == {"a": {"0": 5, "1": 9}, "b": {"0": 1}}
