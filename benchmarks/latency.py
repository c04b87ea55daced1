"""The relay at a steady 2,000 events a second: latency, its CPU, a kill -9, and what it costs and takes when idle.

*commit-to-Kafka* runs from the moment when COMMIT has returned to the writer to the moment when a consumer has the
record, three processes and one clock. *emit-to-Kafka* starts just before the statement leaves the writer and so is an
upper bound that no scheduling of the writer can flatter. *echo* is what broker and consumer take by themselves: twenty
times a second a plain producer sends a record to the same topic, which the same consumer sees among the relay's.
"""

import asyncio
import itertools
import time
from dataclasses import dataclass
from typing import Any, Final

import aiokafka

from benchmarks import processes, workload
from benchmarks.plan import Bench
from benchmarks.processes import Child
from benchmarks.report import percentile
from benchmarks.servers import Ground
from outbox import limits

_CONNECTIONS: Final = 16
_DRAIN_SECONDS: Final = 1.5
_READY_SECONDS: Final = 30.0
_LATE_NS: Final = 100_000_000
_TENTH_NS: Final = 100_000_000
_ECHO_PAUSE_SECONDS: Final = 0.05
_IDLE_PAUSE_SECONDS: Final = 0.3
_FIRST_NUMBER: Final = 1_000_000_000
"""On a topic that is not empty: the embedded broker shows a watcher the end of what was there before, too."""


@dataclass(slots=True)
class Load:
    """What writer and watcher wrote down; nanoseconds of one clock, by the event's number."""

    sent: list[int]
    committed: list[int]
    seen: list[tuple[int, int]]
    """(when, number) of every arrival, repeated ones included."""

    def first_seen(self) -> dict[int, int]:
        """When each event was seen first."""
        first: dict[int, int] = {}
        for at, number in self.seen:
            first.setdefault(number, at)
        return first

    def milliseconds(self, since: list[int], skip: int) -> list[float]:
        """From `since` until first seen, without the first `skip` events."""
        first = self.first_seen()
        return [(first[number] - since[number]) / 1e6 for number in range(skip, len(since)) if number in first]


def watcher(ground: Ground) -> Child:
    """A consumer; the embedded broker looks for new records as often as a fetch may wait, Kafka tells at once."""
    wait_ms = 500 if ground.real_kafka else 5
    return processes.module("_watcher", [ground.kafka, ground.topic, str(wait_ms)])


def writer(ground: Ground, rate: int, seconds: float) -> Child:
    """A writer at an even pace."""
    arguments = [ground.database_url, ground.topic, str(rate), str(seconds), str(_CONNECTIONS)]
    return processes.module("_writer", arguments)


async def steady(bench: Bench) -> None:
    """Latency under load, the relay's CPU at that rate, and an echo beside it."""
    plan = bench.plan
    seconds = plan.warm_up_seconds + plan.load_seconds
    sent: dict[int, int] = {}
    async with bench.servers.fresh() as ground:
        with processes.relay(ground.database_url, ground.kafka) as relay, watcher(ground) as watching:
            await watching.says("ready", timeout_seconds=_READY_SECONDS)
            await ground.until_idle()
            with writer(ground, plan.rate, seconds) as writing:
                echoing = asyncio.create_task(_echo(ground, sent))
                cpu, share = await _cpu_while(bench, relay, f"{plan.rate:,} events/s for {seconds:.0f} s", seconds)
                written = await writing.result(timeout_seconds=60 + seconds)
                echoing.cancel()
                await asyncio.wait({echoing})
            await asyncio.sleep(_DRAIN_SECONDS)
            watching.stop()
            seen = await watching.result(timeout_seconds=_READY_SECONDS)
    load = Load(written["sent"], written["committed"], [(at, number) for at, number in seen if number < _FIRST_NUMBER])
    skip = int(plan.rate * plan.warm_up_seconds)
    since = load.committed[skip]
    echoes = [(at - sent[number]) / 1e6 for at, number in seen if number in sent and sent[number] > since]
    report_latency(bench, load, echoes, skip)
    bench.report.add("steady_relay_cpu_percent", share, "%", int(seconds))
    bench.report.add("steady_relay_cpu_us_per_event", cpu / (plan.rate * seconds) * 1e6, "us", len(load.sent))


def report_latency(bench: Bench, load: Load, echoes: list[float], skip: int) -> None:
    """Percentiles over what came after the warm-up."""
    report = bench.report
    after_commit, after_emit = load.milliseconds(load.committed, skip), load.milliseconds(load.sent, skip)
    n = len(load.committed) - skip
    pace = n / ((load.committed[-1] - load.committed[skip]) / 1e9)
    report.section(f"Latency at {bench.plan.rate:,} events/s, one a transaction")
    report.add("offered_events_per_second", pace, "events/s", n)
    if pace < 0.95 * bench.plan.rate:
        bench.console.print(f"[yellow]The writer offered {pace:,.0f} events/s only: the machine was too busy.[/]")
    for name, values in (("commit_to_kafka", after_commit), ("emit_to_kafka", after_emit), ("echo", echoes)):
        report.add(f"{name}_p50_ms", percentile(values, 0.5), "ms", len(values))
        report.add(f"{name}_p99_ms", percentile(values, 0.99), "ms", len(values))
    report.add("commit_to_kafka_max_ms", max(after_commit), "ms", n)
    report.add("steady_lost", len(load.committed) - len(load.first_seen()), "events", len(load.committed))
    report.add("steady_duplicates", len(load.seen) - len(load.first_seen()), "records", len(load.committed))


async def _cpu_while(bench: Bench, child: Child, title: str, seconds: float) -> tuple[float, float]:
    """CPU seconds of a process over some time, and as a percentage of one core."""
    started, cpu = time.perf_counter(), child.cpu_seconds()
    with bench.step(title, seconds) as seen:
        while (elapsed := time.perf_counter() - started) < seconds:
            child.check()
            seen(elapsed)
            await asyncio.sleep(min(0.25, seconds - elapsed))
    used = child.cpu_seconds() - cpu
    return used, used / (time.perf_counter() - started) * 100


async def kill(bench: Bench) -> None:
    """The relay killed (-9) under that load, a successor at once: when is all caught up, and how much arrived twice?"""
    plan, report = bench.plan, bench.report
    seconds = plan.warm_up_seconds + plan.after_kill_seconds
    async with bench.servers.fresh() as ground:
        with watcher(ground) as watching, processes.relay(ground.database_url, ground.kafka) as relay:
            await watching.says("ready", timeout_seconds=_READY_SECONDS)
            await ground.until_idle()
            with writer(ground, plan.rate, seconds) as writing:
                await _cpu_while(bench, relay, "load before kill -9", plan.warm_up_seconds)
                relay.kill()
                killed = time.monotonic_ns()
                with processes.relay(ground.database_url, ground.kafka) as successor:
                    await _cpu_while(bench, successor, "load after kill -9", plan.after_kill_seconds)
                    written = await writing.result(timeout_seconds=60 + seconds)
                    await asyncio.sleep(_DRAIN_SECONDS)
                    watching.stop()
                    seen = await watching.result(timeout_seconds=_READY_SECONDS)
    load = Load(written["sent"], written["committed"], seen)
    first = load.first_seen()
    n = len(load.committed)
    report.section("kill -9 of the relay under that load, restarted at once")
    report.add("relay_takeover_seconds", (min(at for at in first.values() if at > killed) - killed) / 1e9, "s", n)
    report.add("relay_recovery_seconds", recovered_after(load, killed), "s", n)
    report.add("duplicates_after_kill", len(load.seen) - len(first), "records", n)
    report.add("duplicates_bound", limits.WINDOWS_IN_FLIGHT * limits.WINDOW_MAX_EVENTS, "records", n)
    report.add("lost_after_kill", n - len(first), "events", n)


def recovered_after(load: Load, killed: int) -> float:
    """Seconds from the kill to the end of the first tenth of a second whose commits were all seen as fast as before it.

    As fast as before: within twice the 99th percentile of the second before the kill, or 100 ms if that is more. The
    last tenth of a second of the load counts if none was that fast.
    """
    first = load.first_seen()
    before = [
        first[number] - at
        for number, at in enumerate(load.committed)
        if killed - 2_000_000_000 < at < killed - 1_000_000_000 and number in first
    ]
    allowed = max(_LATE_NS, 2 * percentile(before, 0.99) if before else 0)
    slowest: dict[int, float] = {}
    for number, at in enumerate(load.committed):
        if at > killed:
            tenth = (at - killed) // _TENTH_NS
            slowest[tenth] = max(slowest.get(tenth, 0), first.get(number, 2**63) - at)
    return min((tenth for tenth, taken in slowest.items() if taken <= allowed), default=max(slowest)) / 10 + 0.1


async def idle(bench: Bench) -> None:
    """Next to nothing to do: CPU, and how soon the first event after silence arrives."""
    plan, report = bench.plan, bench.report
    async with bench.servers.fresh() as ground:
        with processes.relay(ground.database_url, ground.kafka) as relay:
            await ground.load(1, plan.warm_up_events)
            await ground.ends.reach(plan.warm_up_events, timeout_seconds=_READY_SECONDS)
            await ground.until_idle()
            _, share = await _cpu_while(bench, relay, f"idle for {plan.idle_seconds:.0f} s", plan.idle_seconds)
            with bench.step("first events after silence", plan.first_events) as done, watcher(ground) as watching:
                await watching.says("ready", timeout_seconds=_READY_SECONDS)
                committed: dict[int, int] = {}
                for number in range(_FIRST_NUMBER, _FIRST_NUMBER + plan.first_events):
                    await asyncio.sleep(_IDLE_PAUSE_SECONDS)
                    await ground.until_idle()
                    committed[number] = await _emit(ground, number)
                    done(len(committed))
                await asyncio.sleep(_IDLE_PAUSE_SECONDS)
                watching.stop()
                seen = await watching.result(timeout_seconds=_READY_SECONDS)
    taken = [(at - committed[number]) / 1e6 for at, number in seen if number in committed]
    report.section("Idle")
    report.add("relay_idle_cpu_percent", share, "%", int(plan.idle_seconds))
    report.add("idle_first_event_ms", percentile(taken, 0.5), "ms", len(taken))
    report.add("idle_first_event_p99_ms", percentile(taken, 0.99), "ms", len(taken))


async def _emit(ground: Ground, number: int) -> int:
    event = workload.renamed(number)
    await ground.pool.execute(
        "select outbox.emit('agent.renamed', $1, $2, $3::jsonb)", ground.topic, event.agent_id, event.model_dump_json()
    )
    return time.monotonic_ns()


async def _echo(ground: Ground, sent: dict[int, int]) -> None:
    """A plain producer beside the relay, until cancelled; notes when each of its records left."""
    producer: Any = aiokafka.AIOKafkaProducer(bootstrap_servers=ground.kafka, acks="all", linger_ms=0)
    await producer.start()
    try:
        for number in itertools.count(_FIRST_NUMBER):
            await asyncio.sleep(_ECHO_PAUSE_SECONDS)
            value = workload.renamed(number).model_dump_json().encode()
            sent[number] = time.monotonic_ns()
            await producer.send_and_wait(ground.topic, value, partition=number % workload.PARTITIONS)
    finally:
        await producer.stop()
