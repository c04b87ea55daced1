"""What relays say about how far they got: H18 and H40 on the relay's side. Publishing never waits for it."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, Final

import pytest

from outbox import Connection, Pool, Relay, crash_sites, kafka, kafka_admin
from outbox.crash_sites import Side
from outbox.relay import watermark, window
from outbox.relay.publish import Publisher
from outbox.settings import Settings
from tests.support.faults import eventually
from tests.support.history import kafka_hash
from tests.support.kafka_server import create_topic
from tests.support.mutations import broken_statement
from tests.support.relay_process import QUICK
from tests.support.watermarks import heard

RULE: Final = pytest.mark.parametrize("rule", ["kept", "removed"])
READ: Final = "outbox.relay.window.read"
MOMENT: Final = "outbox.relay.watermark.moment"
PARKED: Final = "outbox.relay.watermark.parked"
HOUR: Final = 3_600.0


def settings_for(topic: str, **more: Any) -> Settings:
    """A relay that speaks often, on a topic of the test's own."""
    return Settings(**{**QUICK, "watermark_topic": f"marks-{topic}", "watermark_seconds": 0.02, **more})


async def emit(db: Pool | Connection, topic: str, *keys: str) -> None:
    for key in keys:
        await db.execute("select outbox.emit('t', $1, $2, '{}')", topic, key)


class Steps:
    """A hook that runs one step at the next visit of a site."""

    def __init__(self, site: str, side: Side, step: Callable[[], Awaitable[None]]) -> None:
        self._wanted, self._step = (site, side), step
        self.happened = asyncio.Event()

    async def __call__(self, site: str, side: Side) -> None:
        if (site, side) == self._wanted and not self.happened.is_set():
            self.happened.set()
            await self._step()


async def test_an_idle_relay_goes_on_speaking(log_pool: Pool, broker: str, topic: str) -> None:
    """It sleeps until a watermark is due, and is idle for writers all the while."""
    settings = settings_for(topic, watermark_seconds=0.2, safety_poll_seconds=HOUR)
    async with Relay(log_pool, broker, settings=settings) as relay, heard(broker, settings.watermark_topic) as marks:
        first = await marks.more()
        last = await marks.more(3)
        assert (first.shard, first.shard_count, first.next_offsets, first.parked) == (0, 1, {}, [])
        assert first.key == f"{await log_pool.fetchval('select log_id from outbox.logs')}/0"
        assert last.as_of > first.as_of
        assert last.oldest_xid >= first.oldest_xid
        relay.stop()
        await relay.run()


async def test_offsets_of_what_was_published_come_with_it(log_pool: Pool, broker: str, topic: str) -> None:
    settings = settings_for(topic)
    await create_topic(broker, topic, partitions=2)
    keys = [f"key-{n}" for n in range(10)]
    async with Relay(log_pool, broker, settings=settings), heard(broker, settings.watermark_topic) as marks:
        await emit(log_pool, topic, *keys)
        committed = await log_pool.fetchval("select clock_timestamp()")

        async def includes() -> bool:
            return (await marks.more()).as_of >= committed

        await eventually(includes, what="a watermark after the commit")
        expected = {p: sum(kafka_hash(key) % 2 == p for key in keys) for p in range(2)}
        assert marks.said[-1].next_offsets == {topic: expected}


@RULE
async def test_h18_an_event_committed_after_the_snapshot_is_not_vouched_for(
    log_pool: Pool, broker: str, topic: str, rule: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An event commits when the read has its snapshot and the watermark is not sent yet.

    Seen red: the moment taken after the read, as `clock_timestamp()` beside its rows would be.
    """
    await create_topic(broker, topic)
    settings = settings_for(topic, watermark_seconds=HOUR)
    committed: list[Any] = []

    async def commit() -> None:
        await emit(log_pool, topic, "late")
        committed.append(await log_pool.fetchval("select clock_timestamp()"))

    steps = Steps(READ, "after", commit)
    if rule == "removed":
        _moment_after_the_read(monkeypatch, steps)
    monkeypatch.setattr(crash_sites, "hook", steps)
    async with Relay(log_pool, broker, settings=settings), heard(broker, settings.watermark_topic) as marks:
        said = await marks.first()
    covers = said.as_of >= committed[0] and said.next_offsets.get(topic, {}).get(0, 0) == 0
    assert covers == (rule == "removed")


def _moment_after_the_read(monkeypatch: pytest.MonkeyPatch, steps: Steps) -> None:
    moment, read = watermark.Watermarks.moment, window.read
    held: list[Any] = []

    async def later(self: watermark.Watermarks, *args: Any) -> None:
        held[:] = [self, args]

    async def read_first(*args: Any) -> Any:
        found = await read(*args)
        if held:
            await moment(held[0], *held[1])
        return found

    monkeypatch.setattr(watermark.Watermarks, "moment", later)
    monkeypatch.setattr(window, "read", read_first)


@RULE
async def test_h18_nothing_is_said_before_kafka_has_what_was_found(
    log_pool: Pool, broker: str, topic: str, rule: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kafka does not take the window in which an event lies: watermarks stop at the last one before.

    Seen red: a watermark sent although its window is not done.
    """
    await create_topic(broker, topic)
    settings = settings_for(topic)
    held, go_on = asyncio.Event(), asyncio.Event()
    send = kafka.Producer.send

    async def hold(self: kafka.Producer, batch: kafka.Batch, to: str, partition: int) -> int:
        if to == topic:
            held.set()
            await go_on.wait()
        return await send(self, batch, to, partition)

    monkeypatch.setattr(kafka.Producer, "send", hold)
    if rule == "removed":
        monkeypatch.setattr(Publisher, "done_through", property(lambda self: self._last))
    async with Relay(log_pool, broker, settings=settings), heard(broker, settings.watermark_topic) as marks:
        await marks.more()
        await emit(log_pool, topic, "key")
        committed = await log_pool.fetchval("select clock_timestamp()")
        await held.wait()
        reads = 0

        async def count(site: str, side: Side) -> None:
            nonlocal reads
            reads += site == READ

        monkeypatch.setattr(crash_sites, "hook", count)

        async def looked_again() -> bool:
            said = (await marks.listen())[-1]
            return said.as_of >= committed if rule == "removed" else reads > 40

        await eventually(looked_again, what="the relay reads on")
        assert (marks.said[-1].as_of >= committed) == (rule == "removed")
        go_on.set()

        async def includes() -> bool:
            return (await marks.more()).as_of >= committed

        await eventually(includes, what="a watermark after the commit")
        assert marks.said[-1].next_offsets == {topic: {0: 1}}


async def test_h18_a_backlog_is_vouched_for_when_its_last_page_is_done(
    log_pool: Pool, broker: str, topic: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A read that finds more than a window covers the moment only with the whole backlog."""
    await create_topic(broker, topic)
    settings = settings_for(topic, window_max_events=10)
    await emit(log_pool, topic, *(f"key-{n}" for n in range(95)))
    committed = await log_pool.fetchval("select clock_timestamp()")
    async with Relay(log_pool, broker, settings=settings), heard(broker, settings.watermark_topic) as marks:
        first = await marks.first()
    assert first.as_of >= committed
    assert first.next_offsets == {topic: {0: 95}}


@RULE
async def test_h40_a_successor_lists_the_partitions_of_its_predecessor(
    log_pool: Pool, broker: str, topic: str, rule: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The successor publishes nothing itself, and a consumer may not have read what its predecessor published.

    Seen red: offsets that begin with nothing at every tenure.
    """
    await create_topic(broker, topic)
    settings = settings_for(topic)
    async with Relay(log_pool, broker, settings=settings), heard(broker, settings.watermark_topic) as marks:
        await emit(log_pool, topic, "one", "two")

        async def published() -> bool:
            return (await marks.more()).next_offsets == {topic: {0: 2}}

        await eventually(published, what="both published")
    if rule == "removed":
        monkeypatch.setattr(Publisher, "begin", lambda self, done, _offsets: setattr(self, "_last", done))
        monkeypatch.setattr(Publisher, "found", lambda _self, _ends: None)
    async with Relay(log_pool, broker, settings=settings), heard(broker, settings.watermark_topic) as marks:
        await marks.listen()
        said = await marks.more()
    assert said.next_offsets == ({topic: {0: 2}} if rule == "kept" else {})


async def test_parked_keys_are_named_up_to_a_bound(
    log_pool: Pool, broker: str, topic: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Above the bound nothing is said, so caches stay as fresh as they are."""
    monkeypatch.setattr("outbox.limits.WATERMARK_MAX_PARKED", 2)
    settings = settings_for(topic)
    park = (
        "insert into outbox.parked_keys (parker, topic, key, shard, reason, detail)"
        " values ($1, 'agents', $2, $3, '-', '-')"
    )
    for parker, key, number in (("relay", "a", 0), ("relay", "b", 0), ("relay", "elsewhere", 1), ("cache", "c", None)):
        await log_pool.execute(park, parker, key, number)
    async with Relay(log_pool, broker, settings=settings), heard(broker, settings.watermark_topic) as marks:
        said = await marks.more()
        hashes = await log_pool.fetch("select outbox.key_hash('agents', k) as hash from unnest('{a,b}'::text[]) k")
        assert sorted(said.parked) == sorted(row["hash"] for row in hashes)
        await log_pool.execute(park, "relay", "c", 0)
        parked_at = await log_pool.fetchval("select clock_timestamp()")
        looks = asyncio.Semaphore(0)

        async def count(site: str, side: Side) -> None:
            if (site, side) == (PARKED, "after"):
                looks.release()

        monkeypatch.setattr(crash_sites, "hook", count)
        for _ in range(5):
            await looks.acquire()
        assert (await marks.listen())[-1].as_of < parked_at
        await log_pool.execute("delete from outbox.parked_keys where key = 'a'")
        assert (await marks.more()).as_of > parked_at


@RULE
async def test_h18_a_released_key_holds_the_watermark_back(
    log_pool: Pool, broker: str, topic: str, rule: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last release window un-parks its key when it is logged: until it is done, the key's events are nowhere else.

    Seen red: without the look for release windows in the statement `parked`.
    """
    await create_topic(broker, topic)
    settings = settings_for(topic, watermark_seconds=HOUR)
    window_row = (
        "insert into outbox.windows (shard, window_no, kind, log_id, s1, s2, epoch, horizon)"
        " select 0, 1, 'release', log_id, pg_current_snapshot(), pg_current_snapshot(), 1, 0 from outbox.logs"
    )

    async def release() -> None:
        await log_pool.execute(window_row)

    steps = Steps(PARKED, "before", release)
    monkeypatch.setattr(crash_sites, "hook", steps)
    without = "" if rule == "kept" else " and false"
    spoken = asyncio.Event()
    monkeypatch.setattr(watermark.Watermarks, "_send", lambda *_args: _set(spoken))
    with broken_statement(watermark.SQL, "parked", "w.kind = 'release'", f"w.kind = 'release'{without}"):  # type: ignore[arg-type]
        async with Relay(log_pool, broker, settings=settings):
            await steps.happened.wait()
            reads = asyncio.Semaphore(0)

            async def count(site: str, side: Side) -> None:
                if (site, side) == (READ, "after"):
                    reads.release()

            monkeypatch.setattr(crash_sites, "hook", count)
            if rule == "removed":
                await asyncio.wait_for(spoken.wait(), 10)
                return
            for _ in range(3):
                await reads.acquire()
            assert not spoken.is_set()


async def _set(event: asyncio.Event) -> None:
    event.set()


async def _note(said: list[object], args: object) -> None:
    said.append(args)


async def test_publishing_goes_on_where_watermarks_cannot_be_written(
    log_pool: Pool, broker: str, topic: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Nobody may create the topic, or write to it: that is said once, and events are published all the same."""
    await create_topic(broker, topic)

    async def refuse(*_args: object) -> None:
        raise kafka.TopicAuthorizationFailedError

    monkeypatch.setattr(kafka_admin, "create_compacted", refuse)
    async with Relay(log_pool, broker, settings=settings_for(topic)):

        async def published() -> bool:
            await emit(log_pool, topic, "key")
            return bool(await log_pool.fetchval("select done_through > 3 from outbox.shards"))

        await eventually(published, what="windows done")
    assert caplog.text.count("watermarks cannot be written") == 1


async def test_a_relay_that_lost_its_shard_says_nothing(
    log_pool: Pool, broker: str, topic: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its successor raised the epoch; the moment is asked under the epoch."""
    settings = settings_for(topic, watermark_seconds=HOUR)
    said: list[object] = []
    monkeypatch.setattr(watermark.Watermarks, "_send", lambda _self, *args: _note(said, args))

    async def take_over() -> None:
        await log_pool.execute("update outbox.shards set lease_epoch = lease_epoch + 1")

    steps = Steps(MOMENT, "before", take_over)
    monkeypatch.setattr(crash_sites, "hook", steps)
    async with Relay(log_pool, broker, settings=settings):
        await steps.happened.wait()
        reads = asyncio.Event()

        async def read_on(site: str, side: Side) -> None:
            if (site, side) == (READ, "after"):
                reads.set()

        monkeypatch.setattr(crash_sites, "hook", read_on)
        await reads.wait()
    assert not said
