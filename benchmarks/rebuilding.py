"""A cache of a million rows filled from its owner, then rebuilt into a new generation, while events go on arriving.

Everything is there that a service has: the owner's table and log, a relay, a consumer, each in a process of its own,
and a writer that changes 1,000 rows a second, ten in a transaction. Owner and cache are in one database here, which
makes it harder: one server reads the pages and merges them.
"""

import asyncio
import time
from typing import Any, Final

from benchmarks import backlog, cached, caching, processes
from benchmarks.plan import Bench
from benchmarks.processes import Child
from benchmarks.servers import Ground

_CONNECTIONS: Final = 4
_EQUAL_SECONDS: Final = 120.0
_LOAD_SECONDS: Final = 300.0
_STOP_SECONDS: Final = 20.0


async def rebuild(bench: Bench) -> None:
    """Once: it takes long, and each of the two rebuilds is its own repetition of much the same."""
    rows = bench.plan.owner_rows
    bench.report.section(f"Rebuild from the owner, {rows:,} rows, while {bench.plan.owner_rate:,} events/s arrive")
    async with bench.servers.fresh() as ground:
        with bench.step(f"filling the owner's table: {rows:,} rows", 1):
            await ground.pool.execute(cached.CREATE_OWNER)
            await ground.pool.execute(cached.FILL_OWNER, rows, timeout=_LOAD_SECONDS)
            await ground.pool.execute("vacuum analyze agents", timeout=_LOAD_SECONDS)
            await caching.empty(ground)
        arguments = [ground.database_url, ground.topic, str(bench.plan.owner_rate), str(rows), str(_CONNECTIONS)]
        with (
            processes.relay(ground.database_url, ground.kafka),
            processes.module("_cache_process", ["cache", ground.database_url, ground.kafka, ground.topic]) as consumer,
            processes.module("_owner_writer", arguments) as writer,
        ):
            await caching.claimed(ground, consumer)
            await _rebuilt(bench, ground, "bootstrap", "in-place")
            await _rebuilt(bench, ground, "rebuild", "new-generation")
            consumer.check()
            writer.check()
            await asyncio.to_thread(writer.stop)
            wrote = await writer.result(timeout_seconds=_STOP_SECONDS)
            bench.report.add("rebuild_offered_events_per_second", wrote["n"] / wrote["seconds"], "events/s", wrote["n"])
            await _equal(ground, consumer)


async def _rebuilt(bench: Bench, ground: Ground, name: str, how: str) -> None:
    rows = bench.plan.owner_rows
    with (
        bench.step(f"{name}, {how}: {rows:,} rows", rows) as seen,
        processes.module("_rebuild_process", [how, ground.database_url, ground.topic]) as child,
    ):
        ending = asyncio.create_task(child.result(timeout_seconds=backlog.time_limit(rows)))
        while not ending.done():
            await asyncio.wait([ending], timeout=0.5)
            seen(await ground.pool.fetchval("select coalesce(max(rows), 0) from outbox.rebuilds"))
        figures: dict[str, Any] = await ending
    bench.report.add(f"{name}_rows_per_second", figures["n"] / figures["seconds"], "rows/s", figures["n"])
    bench.report.add(f"{name}_cpu_us_per_row", figures["cpu_seconds"] / figures["n"] * 1e6, "us", figures["n"])


async def _equal(ground: Ground, consumer: Child) -> None:
    """Wait until the cache is equal to the owner, now that nothing is written.

    Raises:
        TimeoutError: it never is.
    """
    deadline = time.perf_counter() + _EQUAL_SECONDS
    while different := await ground.pool.fetchval(cached.DIFFERENT, timeout=_LOAD_SECONDS):
        consumer.check()
        if time.perf_counter() > deadline:
            raise TimeoutError(f"{different} rows of the cache differ from the owner's:\n{consumer.tail()}")
        await asyncio.sleep(0.2)
