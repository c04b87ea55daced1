"""faststream-outbox on the same events, the same servers, in the same run.

Its rows are inserted as its `publish` writes them (payload, headers, queue), in one transaction, before it starts; the
clock and its CPU run from the first record in Kafka to the last, so its start is left out.
"""

import time
from typing import Final

from faststream_outbox import make_outbox_table, outbox_autovacuum_ddl
from sqlalchemy import MetaData
from sqlalchemy.ext.asyncio import create_async_engine

from benchmarks import backlog, processes
from benchmarks._faststream_app import QUEUE
from benchmarks.backlog import Run
from benchmarks.plan import Bench
from benchmarks.processes import Child
from benchmarks.servers import Ground

_LOAD: Final = """
insert into outbox (queue, payload, headers)
select $1, convert_to(bench.payload(i), 'UTF8'),
       jsonb_build_object('content-type', 'application/json', 'correlation_id', gen_random_uuid()::text,
                          'key', bench.key(i), 'ce_specversion', '1.0', 'ce_type', 'agent.renamed',
                          'ce_source', 'bench', 'ce_id', gen_random_uuid()::text)
  from generate_series(1, $2::bigint) i
"""
_TIME_LIMIT_SECONDS: Final = 300.0


async def relay(bench: Bench) -> None:
    """As many repetitions as of the relay, with fewer events: it is slower."""
    report, events = bench.report, bench.plan.peer_events
    report.section("faststream-outbox, the same events on the same servers")
    for _ in range(bench.plan.repeat):
        async with bench.servers.fresh() as ground:
            url = ground.database_url.replace("postgresql://", "postgresql+asyncpg://", 1)
            await _prepare(ground, url, events)
            before = await ground.wal_position()
            idempotent = "1" if ground.real_kafka else "0"
            with processes.module("_faststream_app", [url, ground.kafka, ground.topic, idempotent]) as child:
                run = await _watch(bench, ground, child, events)
            written = await ground.wal_position() - before
            dead = await backlog.dead_tuples(ground, "public", "^outbox$")
        backlog.add(bench, "faststream_outbox", run)
        report.add("faststream_outbox_wal_bytes_per_event", written / events, "bytes", events)
        report.add("faststream_outbox_dead_tuples_per_event", dead / events, "row versions", events)
    if "relay_events_per_second" in report:
        factor = report["relay_events_per_second"] / report["faststream_outbox_events_per_second"]
        report.add("relay_to_faststream_outbox", factor, "ratio", events)


async def _prepare(ground: Ground, url: str, events: int) -> None:
    engine = create_async_engine(url)
    metadata = MetaData()
    make_outbox_table(metadata, table_name="outbox")
    async with engine.begin() as connection:
        await connection.run_sync(metadata.create_all)
    await engine.dispose()
    await ground.pool.execute(outbox_autovacuum_ddl("outbox"))
    await ground.pool.execute(_LOAD, QUEUE, events, timeout=_TIME_LIMIT_SECONDS)
    await ground.pool.execute("analyze outbox")


async def _watch(bench: Bench, ground: Ground, child: Child, events: int) -> Run:
    first: list[tuple[float, float, int]] = []
    last: list[float] = []

    def look(total: int) -> None:
        now = time.perf_counter(), child.cpu_seconds(), total
        last[:] = [now[1]]
        if not first:
            first.append(now)
        seen(total)

    with bench.step(f"faststream-outbox relaying {events:,} events", events) as seen:
        ended = await ground.ends.reach(events, timeout_seconds=_TIME_LIMIT_SECONDS, seen=look, check=child.check)
    started, cpu, already = first[0]
    rss = child.rss_mib()
    return Run(events - already, ended - started, last[0] - cpu, 0.0, rss, 0.0)
