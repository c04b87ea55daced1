"""The relay on a backlog: rate, CPU, memory, duplicates, next to its two limits on the same rows.

Two shapes. *At once*: the relay is up and idle, then one transaction commits all events; the clock runs from the
return of COMMIT. *Singly*: one transaction an event, all committed before; the relay is up but the lease is another's,
and the clock runs from the moment when it has taken the lease over. CPU is that of the relay's process between the
same two moments, so imports and connecting are left out of the first shape, and imports of the second. Both end when
Kafka's end offsets say so.
"""

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import aiokafka

from benchmarks import processes, workload
from benchmarks.plan import Bench
from benchmarks.processes import Child
from benchmarks.servers import Ground

_SLOWEST_EVENTS_PER_SECOND: Final = 1_000
_READY_SECONDS: Final = 60.0
_QUIET_SECONDS: Final = 1.2
_HOLD_LEASE: Final = """
update outbox.shards set lease_owner = outbox.uuid7(), lease_epoch = lease_epoch + 1,
       lease_until = clock_timestamp() + interval '1 day' where shard = 0 returning lease_epoch
"""
_FREE_LEASE: Final = "update outbox.shards set lease_owner = null, lease_until = null where shard = 0"
_EPOCH: Final = "select lease_epoch from outbox.shards where shard = 0"
_DEAD_TUPLES: Final = """
select coalesce(sum(n_tup_upd + n_tup_del + case when n_dead_tup > n_tup_upd + n_tup_del
                                                 then n_dead_tup - n_tup_upd - n_tup_del else 0 end), 0)::bigint
  from pg_stat_user_tables where schemaname = $1 and relname ~ $2
"""


@dataclass(slots=True)
class Watch:
    """What looking at Kafka and at the relay's process has brought."""

    ended: float
    cpu_seconds: float
    rss_mib: float
    half: tuple[float, int]
    """When the look was that found at least half, and how much it found."""
    count: int


@dataclass(slots=True)
class Run:
    """One backlog relayed."""

    events: int
    seconds: float
    cpu_seconds: float
    second_half_rate: float
    rss_mib: float
    rss_growth_mib: float
    surplus: int = 0
    wal_bytes: int = 0

    @classmethod
    def of(cls, events: int, started: float, cpu_before: float, rss_before: float, watch: Watch) -> "Run":
        """Both ends of a run."""
        seconds = watch.ended - started
        at, found = watch.half
        rate = (watch.count - found) / (watch.ended - at) if watch.ended > at else events / seconds
        growth = watch.rss_mib - rss_before
        return cls(events, seconds, watch.cpu_seconds - cpu_before, rate, watch.rss_mib, growth)

    @property
    def rate(self) -> float:
        """Events a second."""
        return self.events / self.seconds

    @property
    def cpu_us(self) -> float:
        """Microseconds of CPU an event."""
        return self.cpu_seconds / self.events * 1e6


def time_limit(events: int) -> float:
    """When a run of so many events counts as stuck."""
    return _READY_SECONDS + events / _SLOWEST_EVENTS_PER_SECOND


async def at_once(bench: Bench, ground: Ground, child: Child, events: int) -> Run:
    """An idle relay, and all events visible in one moment."""
    warm_up = bench.plan.warm_up_events
    await ground.load(1, warm_up)
    await ground.ends.reach(warm_up, timeout_seconds=_READY_SECONDS)
    await ground.until_idle()
    rss_before = child.rss_mib()
    cpu_before: list[float] = []
    with bench.step(f"loading {events:,} events in one transaction", events):
        started = await ground.load(
            warm_up + 1, warm_up + events, before_commit=lambda: cpu_before.append(child.cpu_seconds())
        )
    wal_before = await ground.wal_position()
    with bench.step(f"relaying {events:,} events", warm_up + events) as seen:
        watched = await watch(ground, child, warm_up + events, seen)
    run = Run.of(events, started, cpu_before[0], rss_before, watched)
    return await _settled(run, ground, child, warm_up + events, wal_before)


async def singly(bench: Bench, ground: Ground, events: int) -> Run:
    """A relay that waits for its lease, and events committed one by one before."""
    with bench.step(f"loading {events:,} events, one a transaction", events):
        await ground.load_singly(1, events)
    held = await ground.pool.fetchval(_HOLD_LEASE)
    with processes.relay(ground.database_url, ground.kafka) as child:
        await child.until_quiet()
        rss_before, wal_before = child.rss_mib(), await ground.wal_position()
        with bench.step(f"relaying {events:,} events of one transaction each", events) as seen:
            await ground.pool.execute(_FREE_LEASE)
            while await ground.pool.fetchval(_EPOCH) == held:
                child.check()
                await asyncio.sleep(0.005)
            started, cpu_before = time.perf_counter(), child.cpu_seconds()
            watched = await watch(ground, child, events, seen)
        run = Run.of(events, started, cpu_before, rss_before, watched)
        return await _settled(run, ground, child, events, wal_before)


async def watch(ground: Ground, child: Child, count: int, seen: Callable[[float], None]) -> Watch:
    """Until Kafka has so many records; CPU time is what was used up to the look that found the last of them."""
    cpu, rss, half = [child.cpu_seconds()], [child.rss_mib()], (time.perf_counter(), 0)

    def look(total: int) -> None:
        nonlocal half
        cpu.append(child.cpu_seconds())
        if half[1] < count / 2:
            half = time.perf_counter(), total
        seen(total)

    def check() -> None:
        child.check()
        rss.append(child.rss_mib())

    ended = await ground.ends.reach(count, timeout_seconds=time_limit(count), seen=look, check=check)
    return Watch(ended, cpu[-1], max(rss), half, count)


async def _settled(run: Run, ground: Ground, child: Child, expected: int, wal_before: int) -> Run:
    """Add records beyond the expected ones, once a late one would have come; and the WAL written up to then."""
    await asyncio.sleep(_QUIET_SECONDS)
    child.check()
    run.surplus = await ground.ends.total() - expected
    run.wal_bytes = await ground.wal_position() - wal_before
    return run


async def warm_up_broker(bench: Bench) -> None:
    """One backlog that is not reported: a Java machine compiles while it works."""
    async with bench.servers.fresh() as ground:
        with processes.relay(ground.database_url, ground.kafka) as child:
            await at_once(bench, ground, child, bench.plan.events)


async def history(bench: Bench, ground: Ground, events: int) -> tuple[int, int, int]:
    """Read the topic back: (lost, duplicates, records out of order within their key)."""
    consumer: Any = aiokafka.AIOKafkaConsumer(
        bootstrap_servers=ground.kafka, enable_auto_commit=False, fetch_max_wait_ms=20, auto_offset_reset="earliest"
    )
    partitions = [aiokafka.TopicPartition(ground.topic, number) for number in range(workload.PARTITIONS)]
    ids: set[bytes] = set()
    positions: dict[bytes, int] = {}
    read = disorder = 0
    total = await ground.ends.total()
    await consumer.start()
    try:
        consumer.assign(partitions)
        with bench.step("reading the topic back", total) as seen:
            async with asyncio.timeout(time_limit(total)):
                while read < total:
                    for records in (await consumer.getmany(timeout_ms=1_000)).values():
                        for record in records:
                            headers = dict(record.headers)
                            position = int(headers["ob-pos"].split(b"/")[4])
                            ids.add(headers["ce_id"])
                            disorder += position < positions.get(record.key, 0)
                            positions[record.key] = position
                        read += len(records)
                    seen(read)
    finally:
        await consumer.stop()
    return events - len(ids), read - len(ids), disorder


async def dead_tuples(ground: Ground, schema: str, tables: str) -> int:
    """Row versions that updates, deletes and aborted inserts have left behind in tables whose names match."""
    return int(await ground.pool.fetchval(_DEAD_TUPLES, schema, tables))


async def throughput(bench: Bench) -> None:
    """Both shapes and both limits, in turn, as often as asked for; then growth with the size of the backlog."""
    report, plan = bench.report, bench.plan
    for repetition in range(plan.repeat):
        async with bench.servers.fresh() as ground:
            report.section("Relay: backlog committed at once")
            with processes.relay(ground.database_url, ground.kafka) as child:
                run = await at_once(bench, ground, child, plan.events)
            add(bench, "relay", run)
            report.add("relay_wal_bytes_per_event", run.wal_bytes / run.events, "bytes", run.events)
            report.add("duplicates", run.surplus, "records", run.events)
            if repetition == 0:
                lost, _, disorder = await history(bench, ground, plan.warm_up_events + plan.events)
                report.add("lost", lost, "events", run.events)
                report.add("out_of_order", disorder, "records", run.events)
                dead = await dead_tuples(ground, "outbox", "^events")
                report.add("dead_tuples_per_event", dead / run.events, "row versions", run.events)
            await _limits(bench, ground)
        async with bench.servers.fresh() as ground:
            report.section("Relay: backlog committed singly, before it started")
            run = await singly(bench, ground, plan.events)
            add(bench, "relay_singly", run)
            report.add("duplicates_singly", run.surplus, "records", run.events)
    report.section("Limits, measured on the same rows")
    for part in ("window_query_rows", "send_batch_events"):
        share = report["relay_events_per_second"] / report[f"{part}_per_second"]
        report.add(f"relay_share_of_{part.rpartition('_')[0]}", share, "ratio", plan.events)


def add(bench: Bench, name: str, run: Run) -> None:
    """The figures that every relay has."""
    bench.report.add(f"{name}_events_per_second", run.rate, "events/s", run.events)
    bench.report.add(f"{name}_cpu_us_per_event", run.cpu_us, "us", run.events)


async def _limits(bench: Bench, ground: Ground) -> None:
    events = bench.plan.warm_up_events + bench.plan.events
    bench.report.section("Limits, measured on the same rows")
    with bench.step("window query alone", 1):
        arguments = ["window", ground.database_url]
        with processes.module("_limits", arguments) as child:
            row = await child.result(timeout_seconds=time_limit(events))
    assert row["n"] == events, f"the window query read {row['n']} of {events} rows"
    bench.report.add("window_query_rows_per_second", row["n"] / row["seconds"], "rows/s", row["n"])
    bench.report.add("window_query_cpu_us_per_row", row["cpu_seconds"] / row["n"] * 1e6, "us", row["n"])
    with bench.step("send_batch alone", 1):
        arguments = ["send", ground.database_url, ground.kafka, ground.topic]
        with processes.module("_limits", arguments) as child:
            row = await child.result(timeout_seconds=2 * time_limit(events))
    bench.report.add("send_batch_events_per_second", row["n"] / row["seconds"], "events/s", row["n"])
    bench.report.add("send_batch_cpu_us_per_event", row["cpu_seconds"] / row["n"] * 1e6, "us", row["n"])


async def growth(bench: Bench) -> None:
    """A small and a large backlog in turn: does the rate hold, does the memory?"""
    report, plan = bench.report, bench.plan
    report.section("Relay: from a small to a large backlog")
    rates: dict[int, list[float]] = {plan.backlog_small: [], plan.backlog_large: []}
    for _ in range(plan.repeat):
        for events in (plan.backlog_small, plan.backlog_large):
            async with bench.servers.fresh() as ground:
                with processes.relay(ground.database_url, ground.kafka) as child:
                    run = await at_once(bench, ground, child, events)
            rates[events].append(run.rate)
            size = "small" if events == plan.backlog_small else "large"
            report.add(f"relay_{size}_backlog_events_per_second", run.rate, "events/s", events)
            report.add(f"relay_{size}_backlog_cpu_us_per_event", run.cpu_us, "us", events)
            if size == "large":
                report.add("relay_rss_growth_mib", run.rss_growth_mib, "MiB", events)
                report.add("relay_rss_peak_mib", run.rss_mib, "MiB", events)
    ratio = report["relay_large_backlog_events_per_second"] / report["relay_small_backlog_events_per_second"]
    report.add("backlog_rate_ratio_1m_to_100k", ratio, "ratio", plan.backlog_large)
