"""A consumer that fills a cache from Kafka, next to the upsert alone and to a handler of one upsert an event; an inbox.

The topic is filled first. A consumer is a process of its own; the clock and its CPU run from the look that finds that
it has claimed a partition to the look that finds all positions at the end. Between runs of one topic its database is
emptied: a run begins with an empty cache, and ends with as many rows as there are keys.
"""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Final

from benchmarks import backlog, cached, processes
from benchmarks.backlog import Run
from benchmarks.plan import Bench
from benchmarks.processes import Child
from benchmarks.servers import Ground

_LOOK_SECONDS: Final = 0.02
_START_SECONDS: Final = 60.0
_CLAIMED: Final = "select exists (select from outbox.positions)"
_APPLIED: Final = "select sum(next_offset)::bigint from outbox.positions"
_WRONG: Final = f"""
select count(*) filter (where version >= $2) from {cached.TABLE}
having count(*) <> $1 or count(*) filter (where version >= $2) <> $1
"""  # noqa: S608 - a constant
_EMPTY: Final = f"""
drop table if exists {cached.TABLE}, {cached.TABLE}_spare, notes;
truncate outbox.positions, outbox.applied, outbox.tombstones, outbox.parked_keys, outbox.inbox_messages cascade
"""


@asynccontextmanager
async def filled(bench: Bench, events: int, keys: int) -> AsyncIterator[Ground]:
    """A ground whose topic holds so many events of so many keys."""
    async with bench.servers.fresh() as ground:
        with bench.step(f"filling a topic: {events:,} events, {keys:,} keys", 1):
            arguments = [ground.kafka, ground.topic, str(events), str(keys)]
            with processes.module("_topic_loader", arguments) as child:
                await child.result(timeout_seconds=backlog.time_limit(events))
        yield ground


async def empty(ground: Ground) -> None:
    """An empty cache, a consumer that has read nothing, and no checkpoint in the way."""
    await ground.pool.execute(_EMPTY)
    await ground.pool.execute(cached.CREATE_TABLE)
    await ground.pool.execute(cached.PREPARE)
    await ground.pool.execute(cached.CREATE_NOTES)
    await ground.pool.execute("checkpoint")


async def consumed(bench: Bench, ground: Ground, kind: str, events: int) -> Run:
    """One run of a consumer with a cache, or with an inbox."""
    await empty(ground)
    before = await ground.wal_position()
    limit_seconds = backlog.time_limit(events)
    with (
        processes.module("_cache_process", [kind, ground.database_url, ground.kafka, ground.topic]) as child,
        bench.step(f"{kind}: {events:,} events", events) as seen,
    ):
        started, cpu_before = await claimed(ground, child)
        rss = child.rss_mib()
        while True:
            await asyncio.sleep(_LOOK_SECONDS)
            child.check()
            done = await ground.pool.fetchval(_APPLIED)
            ended, cpu, rss = time.perf_counter(), child.cpu_seconds(), max(rss, child.rss_mib())
            seen(done)
            if done >= events:
                break
            if ended > started + limit_seconds:
                raise TimeoutError(f"{done} of {events} events applied in {limit_seconds:.0f} s:\n{child.tail()}")
    run = Run(events, ended - started, cpu - cpu_before, 0.0, rss, 0.0)
    run.wal_bytes = await ground.wal_position() - before
    return run


async def _check_cache(ground: Ground, events: int, keys: int) -> None:
    """The last event of every key is there.

    Raises:
        AssertionError: it is not.
    """
    wrong = await ground.pool.fetchval(_WRONG, min(keys, events), events - keys)
    assert wrong is None, f"the cache has {wrong} rows with the last event of a key, there are {keys} keys"


async def claimed(ground: Ground, child: Child) -> tuple[float, float]:
    """Wait until a consumer has claimed its first partition; the time and its CPU so far."""
    deadline = time.perf_counter() + _START_SECONDS
    while not await ground.pool.fetchval(_CLAIMED):
        child.check()
        if time.perf_counter() > deadline:
            raise TimeoutError(f"no partition was claimed in {_START_SECONDS:.0f} s:\n{child.tail()}")
        await asyncio.sleep(_LOOK_SECONDS / 4)
    return time.perf_counter(), child.cpu_seconds()


async def throughput(bench: Bench) -> None:
    """The consumer with few and with many keys, each next to the floor on the same rows, in turn."""
    report, plan = bench.report, bench.plan
    for name, keys in (("cache", plan.keys_few), ("cache_many_keys", plan.keys_many)):
        async with filled(bench, plan.events, keys) as ground:
            for _ in range(plan.repeat):
                report.section(f"Consumer: Kafka to the cache, {keys:,} keys")
                run = await consumed(bench, ground, "cache", plan.events)
                await _check_cache(ground, plan.events, keys)
                backlog.add(bench, name, run)
                report.add(f"{name}_wal_bytes_per_event", run.wal_bytes / run.events, "bytes", run.events)
                report.add(f"{name}_rss_peak_mib", run.rss_mib, "MiB", run.events)
                if keys == plan.keys_many:
                    await _floor(bench, ground, keys)


async def _floor(bench: Bench, ground: Ground, keys: int) -> None:
    await empty(ground)
    bench.report.section("Floor: the upsert alone, on the same rows")
    with bench.step("the upsert alone", 1):
        arguments = [ground.database_url, str(bench.plan.events), str(keys)]
        with processes.module("_upsert_floor", arguments) as child:
            row = await child.result(timeout_seconds=backlog.time_limit(bench.plan.events))
    bench.report.add("upsert_floor_rows_per_second", row["n"] / row["seconds"], "rows/s", row["n"])
    bench.report.add("upsert_floor_cpu_us_per_row", row["cpu_seconds"] / row["n"] * 1e6, "us", row["n"])


async def inbox(bench: Bench) -> None:
    """An inbox whose handler writes one row an event."""
    events = bench.plan.inbox_events
    async with filled(bench, events, bench.plan.keys_few) as ground:
        for _ in range(bench.plan.repeat):
            bench.report.section("Inbox: a handler that inserts a row")
            run = await consumed(bench, ground, "inbox", events)
            backlog.add(bench, "inbox", run)
            written = await ground.pool.fetchval("select count(*) from notes")
            assert written == events, f"{written} effects of {events} events"


async def plain(bench: Bench) -> None:
    """FastStream's own handler, one upsert an event, on fewer events: it is slower."""
    events = bench.plan.plain_events
    async with filled(bench, events, bench.plan.keys_few) as ground:
        for _ in range(bench.plan.repeat):
            bench.report.section("A plain FastStream handler, one upsert an event")
            await empty(ground)
            with bench.step(f"a plain handler, {events:,} events", 1):
                arguments = [ground.database_url, ground.kafka, ground.topic, str(events)]
                with processes.module("_plain_handler", arguments) as child:
                    row = await child.result(timeout_seconds=backlog.time_limit(events))
            bench.report.add("plain_handler_events_per_second", row["n"] / row["seconds"], "events/s", row["n"])
            bench.report.add("plain_handler_cpu_us_per_event", row["cpu_seconds"] / row["n"] * 1e6, "us", row["n"])
