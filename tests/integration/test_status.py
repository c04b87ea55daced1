"""Lag is what the relay has left to do, counted at the price of the backlog."""

import json
from collections.abc import AsyncIterator
from typing import Any

import asyncpg
import pytest

from outbox.upkeep import migrate, status

Connection = asyncpg.Connection


@pytest.fixture
async def db(any_database: str) -> AsyncIterator[Connection]:
    connection = await asyncpg.connect(any_database)
    await migrate.up(connection)
    yield connection
    await connection.close()


@pytest.fixture
async def writer(db: Connection, any_database: str) -> AsyncIterator[Connection]:
    assert not db.is_closed(), "the database is migrated"
    connection = await asyncpg.connect(any_database)
    yield connection
    await connection.close()


async def emit(db: Connection, count: int = 1) -> None:
    await db.fetch("select outbox.emit('t', 'topic', 'k' || i, '{}') from generate_series(1, $1) i", count)


async def cursor(db: Connection) -> Any:
    return await db.fetchval(
        """select coalesce((select w.s2 from outbox.windows w order by w.window_no desc limit 1), s.start_snapshot)
             from outbox.shards s where s.shard = 0"""
    )


async def log(db: Connection, number: int, *, through: int | None = None, after: int = 0, s2: Any = None) -> Any:
    """What a relay does with the next window, short of publishing it."""
    s1 = (
        await cursor(db)
        if not after
        else await db.fetchval("select s1 from outbox.windows where window_no = $1", number - 1)
    )
    s2 = s2 or await db.fetchval("select pg_current_snapshot()")
    await db.execute(
        "select outbox.log_window(0::smallint, 0, 0, '{}', $1, $2, $3, $4, $5)", number, s1, s2, after, through
    )
    return s2


async def done(db: Connection, number: int) -> None:
    await db.execute("select outbox.log_done(0::smallint, 0, $1, '{}')", number)


async def lag(db: Connection) -> int:
    return (await status.read(db)).lag_events


async def test_a_new_log_is_idle(db: Connection) -> None:
    found = await status.read(db)
    (shard,) = found.shards
    assert (shard.lag_events, shard.lag_seconds, shard.windows_in_flight, shard.owner) == (0, 0.0, 0, None)
    assert (found.lives_here, found.parked, found.problems()) == (True, (), [])


async def test_lag_is_what_no_done_window_holds(db: Connection) -> None:
    await emit(db, 5)
    assert await lag(db) == 5
    await log(db, 1)
    (shard,) = (await status.read(db)).shards
    assert (shard.lag_events, shard.windows_logged, shard.windows_done, shard.windows_in_flight) == (5, 1, 0, 1)
    await done(db, 1)
    assert await lag(db) == 0
    await emit(db, 2)
    (shard,) = (await status.read(db)).shards
    assert shard.lag_events == 2
    assert shard.lag_exact
    assert 0 < shard.lag_seconds < 60


async def test_a_late_committer_counts_from_its_commit(db: Connection, writer: Connection) -> None:
    transaction = writer.transaction()
    await transaction.start()
    await emit(writer)
    await emit(db)
    await log(db, 1)
    await done(db, 1)
    assert await lag(db) == 0, "not visible yet"
    await transaction.commit()
    assert await lag(db) == 1, "in progress when the window was read, so not of that window"
    await log(db, 2)
    await done(db, 2)
    assert await lag(db) == 0


async def test_pages_of_a_backlog_count_down(db: Connection) -> None:
    await emit(db, 10)
    s2 = await log(db, 1, through=4)
    await done(db, 1)
    assert await lag(db) == 6
    await emit(db, 3)
    assert await lag(db) == 9
    await log(db, 2, after=4, through=8, s2=s2)
    await done(db, 2)
    assert await lag(db) == 5
    await log(db, 3, after=8, s2=s2)
    await done(db, 3)
    assert await lag(db) == 3


async def test_counting_stops_at_its_bound(db: Connection) -> None:
    await emit(db, 50)
    (shard,) = (await status.read(db, lag_max_events=20)).shards
    assert (shard.lag_events, shard.lag_exact) == (20, False)
    (shard,) = (await status.read(db, lag_max_events=51)).shards
    assert (shard.lag_events, shard.lag_exact) == (50, True)


async def test_a_lease_counts_while_it_runs(db: Connection) -> None:
    await emit(db)
    assert "no relay" in (await status.read(db)).problems()[0]
    await db.execute(
        "update outbox.shards set lease_owner = gen_random_uuid(), lease_until = clock_timestamp() + interval '1 min'"
    )
    found = await status.read(db)
    assert found.problems() == []
    assert 50 < (found.shards[0].lease_seconds or 0) <= 60
    assert "lags by" in found.problems(max_lag_seconds=0)[0]
    await db.execute("update outbox.shards set lease_until = clock_timestamp() - interval '1 min'")
    assert (await status.read(db)).shards[0].lease_seconds is None


async def test_a_release_that_no_relay_finishes_is_a_problem(db: Connection) -> None:
    """Its events are parked no more and not in the log's backlog, so nothing else would tell of them."""
    await emit(db)
    await log(db, 1)
    await db.execute("select outbox.park(0::smallint, 0, 'topic', 'k1', 1, 1, 'TooLarge', 'said so')")
    await done(db, 1)
    await db.execute("update outbox.parked_keys set retry_at = now()")
    assert await db.fetchval("select outbox.log_release(0::smallint, 0, 1, '{}', 2, 10, 1000)") == 1
    found = await status.read(db)
    assert (found.parked, found.lag_events, found.shards[0].windows_in_flight) == ((), 0, 1)
    assert "no relay" in found.problems()[0]
    await done(db, 2)
    assert (await status.read(db)).problems() == []


async def test_parked_keys_and_a_foreign_timeline_need_a_person(db: Connection) -> None:
    await emit(db, 3)
    await log(db, 1)
    await db.execute("select outbox.park(0::smallint, 0, 'topic', 'k1', 1, 1, 'TooLarge', 'said so')")
    await db.execute("update outbox.logs set timeline = 'FFFFFFFF'")
    found = await status.read(db)
    (parked,) = found.parked
    assert (parked.parker, parked.keys, parked.events) == ("relay", 1, 1)
    assert found.lives_here is False
    restored, _, by_relay = found.problems()
    assert "outbox adopt" in restored
    assert "outbox parked list --parker relay" in by_relay


async def test_consumers_positions_are_listed(db: Connection) -> None:
    await db.execute(
        """insert into outbox.positions (consumer, topic, partition, next_offset, owner)
           select 'agents', 'topic', p, p * 10, 'host/1' from generate_series(0, 1) p"""
    )
    assert [(p.partition, p.next_offset, p.owner) for p in (await status.read(db)).positions] == [
        (0, 0, "host/1"),
        (1, 10, "host/1"),
    ]
    await migrate.down(db, to=1)
    assert (await status.read(db)).positions == (), "a database without the consumer's tables is fine"


async def test_partitions_that_stand_still_are_a_problem_and_come_first(db: Connection) -> None:
    """Red without the look at `state` in `problems`."""
    states = {0: "running", 1: "needs_rebuild", 2: "recreated", 3: "restarting"}
    await db.executemany(
        "insert into outbox.positions (consumer, topic, partition, next_offset, owner, state)"
        " values ('agents', 'topic', $1, 5, 'host/1', $2)",
        list(states.items()),
    )
    found = await status.read(db)
    assert [(p.partition, p.state) for p in found.positions] == [*list(states.items())[1:], (0, "running")]
    lost, other, free = found.problems()
    assert lost.startswith("agents stands still in partition 1 of topic, needs_rebuild: Kafka deleted records")
    assert "outbox cache rebuild" in lost
    assert "the topic is another one" in other
    assert "goes on as soon as its consumer runs" in free
    await db.execute("update outbox.positions set state = 'running'")
    assert (await status.read(db)).problems() == []


async def test_reading_leaves_the_session_as_it_was(db: Connection) -> None:
    async with db.transaction():
        await emit(db)
        assert await lag(db) == 1, "as the caller's transaction sees it"
        assert await db.fetchval("show enable_seqscan") == "on"
    assert await lag(db) == 1


# --------------------------------------------------------------------------------------------- plans


async def touched(db: Connection, statement: str, *args: object) -> dict[str, int]:
    """Rows that the plan's scans read, by table, discarded ones included."""
    async with db.transaction():
        await status.SQL.prepare.execute(db)
        plan = json.loads(await db.fetchval(f"explain (analyze, format json) {statement}", *args))[0]["Plan"]
    rows: dict[str, int] = {}
    nodes = [plan]
    while nodes:
        node = nodes.pop()
        nodes += node.get("Plans", [])
        if "Relation Name" not in node:
            continue
        assert node["Node Type"] != "Seq Scan", node
        read = node["Actual Rows"] + sum(value for name, value in node.items() if name.startswith("Rows Removed"))
        table = node["Relation Name"].split("_slot_")[0]
        rows[table] = rows.get(table, 0) + int(read * node["Actual Loops"])
    return rows


@pytest.mark.parametrize("analyzed", [True, False])
async def test_rows_touched_are_the_backlog_not_the_log(db: Connection, writer: Connection, *, analyzed: bool) -> None:
    await db.execute("alter table outbox.events_slot_0 set (autovacuum_enabled = off)")
    if not analyzed:
        await db.execute("analyze outbox.events")  # statistics of an empty table
    transaction = writer.transaction()
    await transaction.start()
    await emit(writer, 7)
    await emit(db, 50_000)
    s2 = await log(db, 1)
    await done(db, 1)
    await transaction.commit()
    await emit(db, 100)
    if analyzed:
        await db.execute("analyze outbox.events")
    rows = await touched(db, status.SQL.backlog.text, 0, s2[1], s2[2], None, None, 1_000_000)
    assert rows == {"events": 107}
    rows = await touched(db, status.SQL.backlog.text, 0, s2[1], s2[2], None, None, 10)
    assert rows["events"] <= 17, "and at most the bound, once for each of the two ranges"


async def test_the_cursor_is_found_without_reading_the_windows(db: Connection) -> None:
    await db.execute(
        """insert into outbox.windows (shard, window_no, log_id, s1, s2, epoch, horizon)
           select 0, n, l.log_id, pg_current_snapshot(), pg_current_snapshot(), 0, 0
             from outbox.logs l, generate_series(1, 10000) n"""
    )
    await db.execute("update outbox.shards set done_through = 9990")
    rows = await touched(db, status.SQL.shards.text)
    assert rows["windows"] <= 5
    (shard,) = (await status.read(db)).shards
    assert (shard.windows_logged, shard.windows_in_flight) == (10_000, 10)
