"""The rules that live in the database: fencing, parking against logging, ordinals, wake-up, shards."""

import asyncio
from typing import Final

import asyncpg
import pytest

import outbox
from outbox import Connection, Pool
from outbox.relay import window
from outbox.upkeep import migrate
from tests.support.faults import eventually
from tests.support.mutations import break_function
from tests.support.writers import Writers, changed_event

LOG: Final = "select outbox.log_window(0::smallint, $1, 0, '{}', $2, $3, $4, 0, null)"
PARK: Final = "select outbox.park(0::smallint, $1, 't', $2, $3, $4, 'Poison', 'by a test')"
BOTH: Final = pytest.mark.parametrize("rule", ["kept", "removed"])


async def emit(db: Pool | Connection, *keys: str) -> None:
    event = changed_event("t")
    async with outbox.transaction(db) as tx:
        tx.emit(*(event(key=key, identity=f"{key}{n}") for n, key in enumerate(keys)))


async def log_next(db: Pool | Connection, epoch: int = 0) -> list[int]:
    """Log all that is there and not yet logged as one window; positions of parked keys come back."""
    row = await db.fetchrow(
        """select coalesce(w.window_no, 0) + 1 as number, coalesce(w.s2, s.start_snapshot) as s1
             from outbox.shards s
             left join lateral (select * from outbox.windows order by window_no desc limit 1) w on true"""
    )
    assert row is not None
    s2 = await db.fetchval("select pg_current_snapshot()")
    diverted: list[int] = await db.fetchval(LOG, epoch, row["number"], row["s1"], s2)
    return diverted


async def replayed(db: Pool, window_no: int) -> list[tuple[int, str]]:
    """Ordinals and keys that a replay of the window would publish."""
    w = await db.fetchrow("select * from outbox.windows where window_no = $1", window_no)
    assert w is not None
    rows = await window.SQL.replay.fetch(db, 0, window_no, w["s1"], w["s2"], w["after_position"], w["through_position"])
    return [(row["ordinal"], row["key"]) for row in rows]


# ------------------------------------------------------------------------------------------------- fencing


@BOTH
async def test_h13_zombie_cannot_log_a_window_that_its_successor_has_not(log_pool: Pool, rule: str) -> None:
    """Logging, parking and `done` compare the epoch on the locked shard row: the former owner is fenced.

    Seen red: the comparison out of `outbox.lock_shard` (the broken variant): the zombie's window is accepted.
    """
    if rule == "removed":
        await break_function(log_pool, "lock_shard", "s.lease_epoch <> p_epoch", "false")
    await emit(log_pool, "a")
    await log_pool.execute("update outbox.shards set lease_epoch = 7")
    calls = (
        lambda: log_next(log_pool, 6),
        lambda: log_pool.fetchval(PARK, 6, "a", 1, 1),
        lambda: log_pool.fetchval("select outbox.log_done(0::smallint, 6, 1, '{}')"),
    )
    for call in calls:
        if rule == "removed":
            await call()
            continue
        with pytest.raises(asyncpg.PostgresError, match="belongs to epoch 7, not 6") as fenced:
            await call()
        assert fenced.value.sqlstate == "OB001"


async def test_h13_window_numbers_are_unique(log_pool: Pool) -> None:
    """Two windows under one number are impossible, whatever the epochs; the primary key is the rule.

    Seen red: without the primary key the second insert went through.
    """
    await emit(log_pool, "a")
    await log_next(log_pool)
    snapshot = await log_pool.fetchval("select pg_current_snapshot()")
    with pytest.raises(asyncpg.UniqueViolationError):
        await log_pool.fetchval(LOG, 0, 1, snapshot, snapshot)


# ------------------------------------------------------------------------------------------------- parking


@BOTH
async def test_h37_parking_and_logging_at_the_same_moment(log_pool: Pool, rule: str) -> None:
    """Either the window diverts the key, or the parking takes over its rows of that window: both lock the shard first.

    Seen red: the lock `for share` instead of `for no key update` (the broken variant): the window that is logged while
    the key is being parked keeps its rows, which overtake the parked ones.
    """
    if rule == "removed":
        await break_function(log_pool, "lock_shard", "for no key update", "for share")
        await break_function(log_pool, "mark_done", "p_done_through > s.done_through or", "false and")
    await emit(log_pool, "a", "a", "b")
    await log_next(log_pool)
    await emit(log_pool, "b", "a")
    async with log_pool.acquire() as parking, log_pool.acquire() as logging:
        transaction = parking.transaction()
        await transaction.start()
        assert await parking.fetchval(PARK, 0, "a", 1, 1) == 2
        logged = asyncio.create_task(log_next(logging))
        blocked = "select exists (select from pg_locks where not granted and pid = $1)"

        async def settled() -> bool:
            return logged.done() or await log_pool.fetchval(blocked, logging.get_server_pid())

        await eventually(settled, what="the window waits, or went through")
        assert logged.done() is (rule == "removed"), "the window was to wait for the parking"
        await transaction.commit()
        diverted = await logged
    assert len(diverted) == (1 if rule == "kept" else 0)
    taken = await log_pool.fetchval("select count(*) from outbox.parked_events where key = 'a'")
    assert taken == (3 if rule == "kept" else 2)


async def test_h38_parked_row_still_counts_in_the_ordinals_and_replay_leaves_it_out(log_pool: Pool) -> None:
    """Ordinals are ranks among all rows of the window; parked rows keep window and ordinal as their origin.

    Seen red: `window_rows` joined against parked_events before `row_number()`: the rows behind got other ordinals.
    """
    await emit(log_pool, "a", "b", "a", "c", "a")
    await log_next(log_pool)
    assert await log_pool.fetchval(PARK, 0, "a", 1, 3) == 2
    assert await replayed(log_pool, 1) == [(1, "a"), (2, "b"), (4, "c")]
    await emit(log_pool, "c", "a", "b")
    assert len(await log_next(log_pool)) == 1
    assert await replayed(log_pool, 2) == [(1, "c"), (3, "b")]
    origins = await log_pool.fetch("select window_no, ordinal, state from outbox.parked_events order by id")
    assert [tuple(row) for row in origins] == [(1, 3, "parked"), (1, 5, "parked"), (2, 2, "parked")]
    # Parking the same key again, as a replay does that meets the record again, adds nothing.
    assert await log_pool.fetchval(PARK, 0, "a", 1, 3) == 0
    # Released and discarded rows keep their origin, and stay out.
    await log_pool.execute("update outbox.parked_events set state = 'released'")
    assert await replayed(log_pool, 1) == [(1, "a"), (2, "b"), (4, "c")]


# ------------------------------------------------------------------------------------------------- wake-up


@BOTH
async def test_h8_savepoint_rollback_drops_the_advisory_try_and_the_next_emit_wakes_again(
    log_pool: Pool, rule: str
) -> None:
    """Every emit statement tries the lock: one that was taken in a savepoint goes with it.

    A relay that goes idle between must be woken by the later emit. Seen red: the try remembered for the transaction
    (the broken variant, in something that outlives the savepoint): no notification.
    """
    if rule == "removed":
        await log_pool.execute(REMEMBERING_WAKE)
    heard: asyncio.Queue[object] = asyncio.Queue()
    async with log_pool.acquire() as relay, log_pool.acquire() as writer:

        def hear(*notification: object) -> None:
            heard.put_nowait(notification)

        await relay.add_listener("outbox_wake", hear)
        transaction = writer.transaction()
        await transaction.start()
        savepoint = writer.transaction()
        await savepoint.start()
        await writer.execute(SQL_EMIT)
        assert not await relay.fetchval("select pg_try_advisory_lock(1868724273, 0)"), "a writer is about to commit"
        await savepoint.rollback()
        assert await relay.fetchval("select pg_try_advisory_lock(1868724273, 0)"), "nobody is any more"
        await writer.execute(SQL_EMIT)
        await transaction.commit()
        await relay.fetchval("select 1")
        assert heard.empty() is (rule == "removed")
        await relay.remove_listener("outbox_wake", hear)


SQL_EMIT: Final = "select outbox.emit('changed', 't', 'k', '{}')"
REMEMBERING_WAKE: Final = """
create sequence tried;
create or replace function outbox.wake(p_shard smallint) returns boolean language plpgsql as $$
begin
    if (select is_called from tried) then return false; end if;
    perform nextval('tried');
    if pg_try_advisory_xact_lock_shared(1868724273, p_shard) then return false; end if;
    perform pg_notify('outbox_wake', p_shard::text);
    return true;
end $$
"""


# --------------------------------------------------------------------------------------- order and shards


@pytest.mark.parametrize("emit_by", ["buffer", "sql"])
async def test_h17_raw_emit_before_the_row_lock_inverts_and_buffered_emit_does_not(
    log_pool: Pool, emit_by: str
) -> None:
    """SQL emit takes its position at once: called before the write that it reports, it precedes whoever wrote first.

    The order 2, 1 of the raw variant is documented in docs/guarantees.md; it is the negative control of the buffer,
    which flushes last, under the row's lock.
    """
    event = changed_event("t")
    change = "update accounts set version = version + 1 where key = 'k'"
    await Writers(log_pool, "t", keys=("k",)).set_up()

    async def report(tx: outbox.Transaction, identity: str) -> None:
        if emit_by == "buffer":
            tx.emit(event(key="k", identity=identity))
        else:
            await tx.execute("select outbox.emit('c', 't', 'k', jsonb_build_object('identity', $1::text))", identity)

    async with outbox.transaction(log_pool) as second:
        await report(second, "second")  # too early: the row is not locked yet
        async with outbox.transaction(log_pool) as first:
            await first.execute(change)
            await report(first, "first")
        await second.execute(change)
    rows = await log_pool.fetch(
        "select convert_from(payload, 'UTF8')::jsonb ->> 'identity' from outbox.events order by position"
    )
    order = [row[0] for row in rows]
    assert order == (["first", "second"] if emit_by == "buffer" else ["second", "first"])


@BOTH
async def test_h22_writers_cannot_disagree_on_the_shard_count(any_database: str, rule: str) -> None:
    """The insert itself computes the shard from `outbox.logs`; no writer has an opinion of its own.

    Seen red: the shard handed in by the client, as in the broken variant: two deployments put one key into two shards.
    """
    async with asyncpg.create_pool(any_database, min_size=2, max_size=4) as pool:
        await migrate.up(pool)
        await pool.execute("update outbox.logs set shard_count = 16")
        keys = [f"key-{n}" for n in range(50)]
        await emit(pool, *keys)
        for key in keys:
            await pool.execute("select outbox.emit('changed', 't', $1, '{}')", key)
        if rule == "removed":
            insert = "insert into outbox.events (shard, topic, key, event_id, event_type, payload)"
            await pool.execute(f"{insert} select 17 % 3, 't', 'key-1', gen_random_uuid(), 'changed', ''")
        split = await pool.fetchval(
            "select count(*) from (select key from outbox.events group by key having count(distinct shard) > 1) k"
        )
        assert split == (0 if rule == "kept" else 1)
        assert await pool.fetchval("select count(distinct shard) from outbox.events") > 8
        assert await pool.fetchval("select outbox.shard_of('key-1', 16)") == 8, "stable across versions"
