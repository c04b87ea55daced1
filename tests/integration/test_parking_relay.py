"""The relay's parking, from retry to discard: H9 and H36, and what H37 and H38 say of releases.

Each hazard stands here with the version that lacks the rule and fails.
"""

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, Final
from uuid import uuid4

import pytest

from outbox import Pool, Relay, crash_sites, limits, parking, postgres
from outbox.parking import ParkedKey
from outbox.relay import release, restore, window
from outbox.relay.lease import Lease
from outbox.relay.window import Bounds, Origin, Progress, Span
from outbox.settings import Settings
from tests.support.faults import eventually, refuse_keys
from tests.support.history import topic_reader
from tests.support.kafka_server import create_topic
from tests.support.mutations import break_function, broken_statement
from tests.support.relay_process import QUICK
from tests.support.writers import CHANGE, Writers, identify

RULE: Final = pytest.mark.parametrize("rule", ["kept", "removed"])
ALL: Final = Bounds(max_events=1000, max_bytes=1_000_000)
NOTHING_DONE: Final = Progress(0, {})
TOPIC: Final = "letters"
LOCK_WAIT: Final = (
    "select exists (select from pg_stat_activity where wait_event_type = 'Lock' and datname = current_database())"
)


@asynccontextmanager
async def leased(pool: Pool) -> AsyncIterator["Log"]:
    """A relay's session with the lease of shard 0."""
    async with pool.acquire() as connection:
        await pool.execute("update outbox.shards set lease_until = null")
        lease = await Lease.take(connection, 0, uuid4(), 60.0)
        assert lease is not None
        await window.SQL.prepare_session.execute(connection)
        yield Log(pool, connection, lease)


class Log:
    """What a relay does with the log, step by step."""

    def __init__(self, pool: Pool, connection: postgres.Connection, lease: Lease) -> None:
        self.pool, self.connection, self.lease = pool, connection, lease

    async def next_number(self) -> int:
        return (await window.load(self.connection, 0)).last_window + 1

    async def read(self) -> tuple[Span, list[postgres.Record]]:
        found = await window.read(self.connection, 0, (await window.load(self.connection, 0)).cursor, ALL)
        assert isinstance(found, tuple), f"one window was expected, not {found}"
        return found

    async def log(self, *keys: str) -> list[int]:
        """Emit, read, log; the positions to be published."""
        await emit(self.pool, *keys)
        span, rows = await self.read()
        diverted = await window.log(self.connection, self.lease, await self.next_number(), span, NOTHING_DONE)
        return [row["position"] for row in rows if row["position"] not in diverted]

    async def park(self, window_no: int, ordinal: int, key: str = "k") -> int:
        return await window.park(
            self.connection, self.lease, Origin(window_no, ordinal, TOPIC, key), ValueError("refused")
        )

    async def release(self, bounds: Bounds = ALL) -> int:
        return await release.log_window(self.connection, self.lease, await self.next_number(), bounds, NOTHING_DONE)

    async def replayed(self, done_through: int = 0) -> dict[int, list[tuple[int, str, int]]]:
        """By window: ordinal, key and position of what a crash would have published again."""
        return {
            found.number: [(ordinal, row["key"], row["position"]) for ordinal, row in found.entries]
            async for found in window.unfinished(self.connection, 0, done_through)
        }


async def emit(pool: Pool, *keys: str) -> None:
    for key in keys:
        await pool.execute("select outbox.emit('t', $1, $2, '{}')", TOPIC, key)


async def places(pool: Pool, key: str = "k") -> list[ParkedKey]:
    return await parking.find(pool, key)


async def waiting(pool: Pool) -> list[int]:
    return [
        row["position"]
        for row in await pool.fetch("select position from outbox.parked_events where state = 'parked' order by 1")
    ]


async def counted(pool: Pool) -> int:
    count: int = await pool.fetchval("select parked_events from outbox.shards")
    return count


# ------------------------------------------------------------------------------------------- what a release holds


async def test_a_release_window_holds_the_events_in_order_and_frees_the_key(log_pool: Pool) -> None:
    async with leased(log_pool) as log:
        assert await log.log("a", "k", "b", "k") == [1, 2, 3, 4]
        assert await log.park(1, 2) == 1
        assert await log.log("k", "c") == [6]
        assert await log.release() == 0, "nobody has asked"
        assert await parking.retry(log_pool, await places(log_pool)) == 1
        assert await log.release() == 3
        assert await places(log_pool) == []
        assert await log.log("k") == [7]
        assert await log.replayed() == {
            1: [(1, "a", 1), (3, "b", 3)],
            2: [(2, "c", 6)],
            3: [(1, "k", 2), (2, "k", 4), (3, "k", 5)],
            4: [(1, "k", 7)],
        }
    assert await counted(log_pool) == 0


async def test_a_long_queue_is_released_in_several_windows_and_the_last_frees_the_key(log_pool: Pool) -> None:
    """Bounded by events and by bytes; a single event over the bytes goes alone. Keys come as they were flagged."""
    async with leased(log_pool) as log:
        await log.log("k", "k", "k", "k", "other")
        await log.park(1, 1)
        await log.park(1, 5, "other")
        await parking.retry_all(log_pool)
        assert await log.release(Bounds(3, 1_000)) == 3
        assert [place.events for place in await places(log_pool)] == [1]
        assert await log.log("k") == [], "the key is not free yet"
        assert await log.release(Bounds(1_000, 2)) == 1, "two bytes are one event"
        assert await log.release(Bounds(1_000, 1)) == 1
        assert await places(log_pool) == []
        assert await log.release(Bounds(1, 1)) == 1
        assert await places(log_pool, "other") == []
        assert await log.release() == 0
        released = await log_pool.fetch(
            "select release_window_no, release_ordinal, position from outbox.parked_events order by 1, 2"
        )
        assert [tuple(row) for row in released] == [
            (2, 1, 1), (2, 2, 2), (2, 3, 3), (4, 1, 4), (5, 1, 6), (6, 1, 5),
        ]  # fmt: skip


async def test_what_is_refused_again_is_parked_again_in_its_place(log_pool: Pool) -> None:
    """The record, the rest of its window, the rest of the queue and the key's later events: each once, by position."""
    async with leased(log_pool) as log:
        await log.log("k", "k", "k", "k")
        await log.park(1, 1)
        await parking.retry(log_pool, await places(log_pool))
        assert await log.release(Bounds(3, 1_000)) == 3
        assert await log.park(2, 2) == 2
        (place,) = await places(log_pool)
        assert (place.events, place.attempts, place.retry_at) == (3, 1, None)
        assert [event.position for event in await parking.events(log_pool, place)] == [2, 3, 4]
        assert await counted(log_pool) == 3
        assert await log.release() == 0, "a person has to ask again"
        assert await log.replayed() == {1: [], 2: [(1, "k", 1)]}

        await parking.retry(log_pool, [place])
        assert await log.release() == 3
        assert await log.log("k") == [5]
        assert await log.park(3, 3) == 4, "the last of the release, and what was logged behind it"
        assert await waiting(log_pool) == [4, 5]
        await parking.retry(log_pool, [place])
        assert await log.release() == 2
        replayed = await log.replayed()
        assert [position for number in sorted(replayed) for _, _, position in replayed[number]] == [1, 2, 3, 4, 5]


async def test_the_events_of_a_retired_log_carry_a_transaction_that_every_page_sees(log_pool: Pool) -> None:
    """Their own ids mean nothing in the new log; with them a page of the owner would be overwritten by older events."""
    async with leased(log_pool) as log:
        await log.log("k")
        await log.park(1, 1)
        await log_pool.execute("update outbox.logs set is_current = false")
        await log_pool.execute("select outbox.open_log(1::smallint, 9999999999999)")
        await parking.retry(log_pool, await places(log_pool))
        assert await log.release() == 1
        (unfinished,) = [found async for found in window.unfinished(log.connection, 0, 1)]
        assert unfinished.log_id.startswith("9184e729fff-")
        assert [row["transaction_id"] for _, row in unfinished.entries] == [3]


async def test_what_is_over_is_forgotten_when_both_its_windows_are_done(log_pool: Pool) -> None:
    """H38. Seen red: with `done_through` compared with the origin alone."""
    async with leased(log_pool) as log:
        await log.log("k", "gone")
        await log.park(1, 1)
        await log.park(1, 2, "gone")
        await parking.retry(log_pool, await places(log_pool))
        assert await log.release() == 1
        assert await parking.discard(log_pool, (await places(log_pool, "gone"))[0]) == 1
        for done_through, left in ((0, {"k", "gone"}), (1, {"k"}), (2, set())):
            await window.log_done(log.connection, log.lease, Progress(done_through, {}))
            await release.SQL.forget.execute(log.connection, 0, 10)
            rows = await log_pool.fetch("select key from outbox.parked_events")
            assert {row["key"] for row in rows} == left
            assert "k" in left or done_through == 2
            assert not any("k" in str(found) for found in (await log.replayed(done_through)).get(1, []))


# ----------------------------------------------------------------------------------------------------- hazards

REINSERT: Final = """
create or replace function outbox.log_release(
    p_shard smallint, p_epoch bigint, p_done_through bigint, p_next_offsets jsonb,
    p_window_no bigint, p_max_events integer, p_max_bytes bigint
) returns integer language plpgsql volatile as $$
begin
    insert into outbox.events (shard, topic, key, event_id, event_type, payload)
    select shard, topic, key, event_id, event_type, payload from outbox.parked_events order by position;
    delete from outbox.parked_events;
    delete from outbox.parked_keys;
    return 0;
end $$
"""


@RULE
async def test_h9_released_before_what_a_writer_has_not_committed_yet(log_pool: Pool, rule: str) -> None:
    """A key's events 1 to 3 are parked and retried while a writer has emitted 4 and not committed: 1, 2, 3, 4.

    Seen red: with a release that puts them back into the log, where they get positions behind the writer's: 4, 1, 2, 3.
    """
    if rule == "removed":
        await log_pool.execute(REINSERT)
    async with leased(log_pool) as log:
        await log.log("k", "k", "k")
        await log.park(1, 1)
        ids = [event.event_id for event in await parking.events(log_pool, (await places(log_pool))[0])]
        async with log_pool.acquire() as writer, writer.transaction():
            await writer.execute("select outbox.emit('t', $1, 'k', '{}')", TOPIC)
            await parking.retry_all(log_pool)
            assert await log.release() == (3 if rule == "kept" else 0)
        assert len(await log.log()) == (1 if rule == "kept" else 4)
        replayed = [found async for found in window.unfinished(log.connection, 0, 1)]
    order = [row["event_id"] for found in replayed for _, row in found.entries if row["event_id"] in ids]
    last = [row["event_id"] for found in replayed for _, row in found.entries][-1]
    assert order == ids
    assert (last not in ids) == (rule == "kept"), "the writer's event is the last"


async def test_h9_on_the_topic(log_pool: Pool, broker: str, topic: str) -> None:
    """The same with a relay that runs: what a consumer reads is 1, 2, 3, 4."""
    await create_topic(broker, topic, partitions=1)
    writers = Writers(log_pool, topic, keys=("poison-1", "other"))
    await writers.set_up()
    await _park_one(log_pool, broker, writers, events=3)
    async with Relay(log_pool, broker, settings=Settings(**QUICK)):
        async with log_pool.acquire() as writer, writer.transaction():
            await writer.execute(CHANGE, "poison-1", "the fourth")
            await writer.execute(
                "select outbox.emit('account.changed', $1, 'poison-1', '{\"identity\": \"the fourth\"}')", topic
            )
            await parking.retry_all(log_pool)
            await eventually(
                lambda: _sees(log_pool, "not exists (select from outbox.parked_keys)"), what="the key is free"
            )
        verdict = await writers.judge(broker)
    assert verdict.valid, verdict.explain()
    assert (verdict.committed, verdict.records) == (4, 4)


@RULE
async def test_h36_a_release_in_the_middle_of_a_backlog_is_no_cursor(
    log_pool: Pool, broker: str, topic: str, monkeypatch: pytest.MonkeyPatch, rule: str
) -> None:
    """The relay loses its connection right after it has logged a release between two pages, and reads on where it was.

    Seen red: with the last window of any kind for the cursor, the rest of the backlog is lost.
    """
    await create_topic(broker, topic, partitions=1)
    writers = Writers(log_pool, topic, keys=("poison-1", "other"))
    await writers.set_up()
    await _park_one(log_pool, broker, writers)
    await writers.burst(60)
    seen: Counter[str] = Counter()

    async def hook(site: str, side: str) -> None:
        seen[f"{side} {site}"] += 1
        if site == "outbox.relay.window.log" and side == "after" and seen[f"{side} {site}"] == 4:
            await parking.retry_all(log_pool)
        if site == "outbox.relay.release.log" and side == "after" and seen[f"{side} {site}"] == 1:
            raise ConnectionResetError("injected")

    monkeypatch.setattr(crash_sites, "hook", hook)
    with broken_statement(window.SQL, "load", "w.kind = 'log' and ") if rule == "removed" else contextlib.nullcontext():
        async with Relay(log_pool, broker, settings=Settings(**QUICK, window_max_events=5)):
            await eventually(lambda: _sees(log_pool, _RESUMED), what="a second tenure has done all that it logged")
            async with topic_reader(broker, topic) as reader:
                if rule == "kept":
                    await writers.published(reader)
                verdict = await writers.compare(await reader.records(identify), reader, duplicates_max=10)
    kinds = [row["kind"] for row in await log_pool.fetch("select kind from outbox.windows order by window_no")]
    assert "release" in kinds[3:-1] or rule == "removed", kinds
    assert verdict.valid == (rule == "kept"), verdict.explain()


@RULE
async def test_h37_discarding_and_logging_at_the_same_moment_take_turns(log_pool: Pool, rule: str) -> None:
    """Both lock the shard row, so the window that is logged second finds the key free.

    Seen red: with `for share`, and no count on the same row, the key's next event is parked behind a key that is gone.
    """
    if rule == "removed":
        await break_function(log_pool, "discard_parked", "for no key update", "for share")
        await break_function(log_pool, "lock_shard", "for no key update", "for share")
        await break_function(log_pool, "count_parked", "p_change <> 0", "false")
    async with leased(log_pool) as log, log_pool.acquire() as other:
        await log.log("k")
        await log.park(1, 1)
        transaction = other.transaction()
        await transaction.start()
        assert await parking.discard(other, (await places(log_pool))[0]) == 1
        await emit(log_pool, "k")
        span, _ = await log.read()
        logging = asyncio.ensure_future(window.log(log.connection, log.lease, 2, span, NOTHING_DONE))
        if rule == "kept":
            await eventually(lambda: log_pool.fetchval(LOCK_WAIT), what="logging waits for the discard")
            await transaction.commit()
            assert await logging == frozenset(), "the key is free: its next event is published"
        else:
            assert await logging == {2}
            await transaction.commit()
            assert (await waiting(log_pool), await places(log_pool)) == ([2], []), "stranded"


@RULE
async def test_h37_releasing_and_logging_at_the_same_moment_take_turns(log_pool: Pool, rule: str) -> None:
    """A zombie's release and its successor's window: fenced where they meet; one lock where they are one relay's.

    Seen red: with `for share`, and no count on the same row, the event that is logged meanwhile is stranded.
    """
    if rule == "removed":
        await break_function(log_pool, "lock_shard", "for no key update", "for share")
        await break_function(log_pool, "count_parked", "p_change <> 0", "false")
    async with leased(log_pool) as log, log_pool.acquire() as other:
        await log.log("k")
        await log.park(1, 1)
        await parking.retry_all(log_pool)
        transaction = other.transaction()
        await transaction.start()
        assert await release.log_window(other, log.lease, 2, ALL, NOTHING_DONE) == 1
        await emit(log_pool, "k")
        span, _ = await log.read()
        logging = asyncio.ensure_future(window.log(log.connection, log.lease, 3, span, NOTHING_DONE))
        if rule == "kept":
            await eventually(lambda: log_pool.fetchval(LOCK_WAIT), what="logging waits for the release")
            await transaction.commit()
            assert await logging == frozenset()
        else:
            assert await logging == {2}
            await transaction.commit()
            assert (await waiting(log_pool), await places(log_pool)) == ([2], []), "stranded"


@RULE
async def test_h38_a_replay_of_the_first_window_leaves_out_what_was_released(log_pool: Pool, rule: str) -> None:
    """Its other records were not acknowledged, so the window is replayed; the released event comes with its release.

    Seen red: with the origin erased at the release, both windows publish their event before the release does.
    """
    if rule == "removed":
        await break_function(
            log_pool, "log_release", "set state = 'released',", "set state = 'released', window_no = null,"
        )
    async with leased(log_pool) as log:
        await log.log("k", "slow")
        await log.park(1, 1)
        await log.log("k")
        await parking.retry_all(log_pool)
        await log.release()
        positions = [at for entries in (await log.replayed()).values() for _, key, at in entries if key == "k"]
    assert positions == ([1, 3] if rule == "kept" else [1, 3, 1, 3])


# ------------------------------------------------------------------------------------------------ bound, discard


async def test_past_its_bound_a_shard_parks_nothing_more_and_stands_still(
    log_pool: Pool, broker: str, topic: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Nothing is lost: what was to be parked stays in its window, and goes on when there is room."""
    monkeypatch.setattr(limits, "RELAY_PARKED_MAX_EVENTS", 2)
    await create_topic(broker, topic, partitions=1)
    writers = Writers(log_pool, topic, keys=("poison-1", "other"))
    await writers.set_up()
    await _park_one(log_pool, broker, writers, events=2)
    async with Relay(log_pool, broker, settings=Settings(**QUICK)):
        await writers.burst(1, "poison-1")

        async def complained() -> bool:
            return any("the shard stands still" in record.getMessage() for record in caplog.records)

        await eventually(complained, what="the relay complains")
        assert await counted(log_pool) == 2
        await writers.burst(2, "other")
        await parking.retry_all(log_pool)
        assert (await writers.judge(broker)).valid
    assert await counted(log_pool) == 0


async def test_a_discard_frees_the_key_and_keeps_the_origin(log_pool: Pool) -> None:
    async with leased(log_pool) as log:
        await log.log("k", "other")
        await log.park(1, 1)
        (place,) = await places(log_pool)
        assert await parking.discard(log_pool, place) == 1
        assert await parking.discard(log_pool, place) is None
        assert await places(log_pool) == []
        assert await log.replayed() == {1: [(2, "other", 2)]}
        assert await log.log("k") == [3]
    assert await counted(log_pool) == 0


async def test_a_person_mends_the_cause_and_everything_comes_in_order(log_pool: Pool, broker: str, topic: str) -> None:
    """Poison, then retries that fail and one that does not, under writers that go on: the checker finds nothing."""
    await create_topic(broker, topic, partitions=2)
    writers = Writers(log_pool, topic, keys=("poison-1", "poison-2", "a", "b"))
    await writers.set_up()
    accept = refuse_keys("poison")
    try:
        async with Relay(log_pool, broker, settings=Settings(**QUICK, window_max_events=7)):
            load = asyncio.create_task(writers.run(writers=3, transactions=40))
            await eventually(lambda: _sees(log_pool, "count(*) = 2 from outbox.parked_keys"), what="both are parked")
            for _ in range(2):
                releases = await log_pool.fetchval(_RELEASES)
                await parking.retry_all(log_pool)

                async def released_again(before: int = releases) -> bool:
                    return bool(await log_pool.fetchval(_RELEASES) > before)

                await eventually(released_again, what="another release")
                await eventually(
                    lambda: _sees(log_pool, "count(*) = 2 from outbox.parked_keys where retry_at is null"),
                    what="both are parked again",
                )
            accept()
            await parking.retry_all(log_pool)
            await load
            await eventually(
                lambda: _sees(log_pool, "not exists (select from outbox.parked_keys)"), what="both keys are free"
            )
            verdict = await writers.judge(broker)
            await eventually(
                lambda: _sees(log_pool, "not exists (select from outbox.parked_events)"), what="all is forgotten"
            )
    finally:
        accept()
    assert verdict.valid, verdict.explain()
    assert await counted(log_pool) == 0


async def test_a_retry_wakes_an_idle_relay(log_pool: Pool, broker: str, topic: str) -> None:
    """Nothing else would, for an hour. Seen red: without `pg_notify` in the statement that sets the flag."""
    await create_topic(broker, topic, partitions=1)
    writers = Writers(log_pool, topic, keys=("poison-1", "other"))
    await writers.set_up()
    await _park_one(log_pool, broker, writers)
    settings = Settings(**QUICK, safety_poll_seconds=3_600.0, watermark_seconds=3_600.0)
    async with Relay(log_pool, broker, settings=settings):
        await eventually(lambda: _sees(log_pool, f"{_IDLE} from outbox.shards s"), what="the relay idles")
        assert await parking.retry(log_pool, await places(log_pool, "poison-1")) == 1
        assert (await writers.judge(broker)).valid


async def test_adoption_leaves_out_what_was_released_after_the_copy_was_made(
    log_pool: Pool, broker: str, topic: str
) -> None:
    """A database that was put back to before a release does not release the same events once more.

    Seen red: without `leave_out_parked` the event is published a second time, behind its successors.
    """
    await create_topic(broker, topic, partitions=1)
    writers = Writers(log_pool, topic, keys=("poison-1", "other"))
    await writers.set_up()
    await _park_one(log_pool, broker, writers)
    await log_pool.execute(
        "create table before_parked as select * from outbox.parked_events;"
        "create table before_keys as select * from outbox.parked_keys"
    )
    await parking.retry_all(log_pool)
    async with Relay(log_pool, broker, settings=Settings(**QUICK)):
        assert (await writers.judge(broker)).valid
    await log_pool.execute(
        "delete from outbox.parked_events; delete from outbox.windows where kind = 'release';"
        "insert into outbox.parked_events overriding system value select * from before_parked;"
        "insert into outbox.parked_keys select * from before_keys;"
        "update outbox.shards set parked_events = 1, next_offsets = '{}',"
        "       done_through = (select max(window_no) from outbox.windows)"
    )
    await restore.adopt(log_pool, broker)
    assert await places(log_pool, "poison-1") == []
    assert await counted(log_pool) == 0
    await parking.retry_all(log_pool)
    async with Relay(log_pool, broker, settings=Settings(**QUICK)):
        await writers.burst(1, "poison-1")
        verdict = await writers.judge(broker)
    assert verdict.valid, verdict.explain()
    assert verdict.records == 2


_RELEASES: Final = "select count(*) from outbox.windows where kind = 'release'"
_IDLE: Final = """s.done_through = (select max(window_no) from outbox.windows)
   and exists (select from pg_locks where locktype = 'advisory' and classid = 1868724273 and mode = 'ExclusiveLock'
                  and database = (select oid from pg_database where datname = current_database()))"""
_RESUMED: Final = f"s.lease_epoch >= 3 and {_IDLE} from outbox.shards s"


async def _sees(pool: Pool, what: str) -> bool:
    return bool(await pool.fetchval(f"select {what}"))


async def _count(reader: Any, wanted: int) -> bool:
    return bool(await reader.count() >= wanted)


async def _park_one(pool: Pool, servers: str, writers: Writers, events: int = 1) -> None:
    """A relay that comes and goes parks a key."""
    accept = refuse_keys("poison")
    try:
        async with Relay(pool, servers, settings=Settings(**QUICK)):
            await writers.burst(events, "poison-1")
            await eventually(
                lambda: _sees(pool, f"count(*) = {events} from outbox.parked_events"), what="the key is parked"
            )
    finally:
        accept()
