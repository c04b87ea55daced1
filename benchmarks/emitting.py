"""What a service pays: WAL an event, through `outbox.transaction`, one event or a hundred a transaction.

Nothing else writes meanwhile. A checkpoint and some events go before, so that the first touches of pages, which log
whole pages, are not what is measured.
"""

import asyncio
import time
from collections.abc import Callable
from typing import Final

import outbox
from benchmarks import workload
from benchmarks.plan import Bench
from benchmarks.servers import Ground

_TIME_LIMIT_SECONDS: Final = 120.0


async def wal(bench: Bench) -> None:
    """WAL an event, and how many events one connection emits a second."""
    report, emits = bench.report, bench.plan.emits
    report.section("Emit, through outbox.transaction on one connection")
    for size, suffix in ((1, ""), (100, "_100_a_transaction")):
        async with bench.servers.fresh() as ground:
            await _emit(ground, 0, emits // 4, size, lambda _done: None)
            await ground.pool.execute("checkpoint")
            await _emit(ground, emits, emits // 4, size, lambda _done: None)
            before, started = await ground.wal_position(), time.perf_counter()
            with bench.step(f"emitting {emits:,} events, {size} a transaction", emits) as done:
                await _emit(ground, 2 * emits, emits, size, done)
            seconds, written = time.perf_counter() - started, await ground.wal_position() - before
        report.add(f"wal_bytes_per_event{suffix}", written / emits, "bytes", emits)
        report.add(f"emits_per_second{suffix}", emits / seconds, "events/s", emits)


async def _emit(ground: Ground, first: int, count: int, size: int, done: Callable[[float], None]) -> None:
    async with asyncio.timeout(_TIME_LIMIT_SECONDS), ground.pool.acquire() as connection:
        for start in range(first, first + count, size):
            async with outbox.transaction(connection) as tx:
                tx.emit(*(workload.renamed(number) for number in range(start, min(start + size, first + count))))
            done(start - first + size)
