"""Sagas of steps that do nothing, by the thousand."""

import asyncio
import sys
import time
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any, Final

from pydantic import BaseModel

from benchmarks.processes import Child
from benchmarks.report import Report, percentile
from outbox import Pool
from saga import Failed, Rejected, Run, Saga, Settings, StepContext, Unknown, Worker, saga, step

_RESULT_SECONDS: Final = 300.0
_LOOK_SECONDS: Final = 0.05
_HOUR: Final = timedelta(hours=1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Sizes; `quick` is enough to see that everything works and for nothing else."""

    sagas: int = 10_000
    serial: int = 500
    long: int = 3_000
    in_flight: int = 10_000
    repeat: int = 3
    concurrent: tuple[int, ...] = (20, 200, 1_000)

    def quick(self) -> "Plan":
        """Everything at a size that takes seconds."""
        return replace(self, sagas=400, serial=20, long=200, in_flight=200, repeat=1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Ground:
    """A migrated database with nothing in it."""

    url: str
    pool: Pool


@dataclass(slots=True)
class Clock:
    """When steps begin and end: the time between two of one saga is what a checkpoint costs it."""

    ended: dict[str, float] = field(default_factory=dict)
    gaps: list[float] = field(default_factory=list)


class Order(BaseModel):
    """A request."""

    order: str
    rejected: bool = False


def _saga(name: str, steps: int) -> Saga[Order, str]:
    """A saga of so many steps; the last one rejects where the request says so."""

    @step
    async def work(ctx: StepContext[Clock], order: Order, number: int) -> str:
        now = time.perf_counter()
        if (ended := ctx.deps.ended.pop(order.order, None)) is not None:
            ctx.deps.gaps.append(now - ended)
        if order.rejected and number == steps:
            raise Rejected("measured")
        if number < steps:
            ctx.deps.ended[order.order] = now
        return f"done {number}"

    @work.compensation
    async def undo(ctx: StepContext[Clock], done: str | Unknown, order: Order, number: int) -> None:
        """Nothing to undo."""

    async def body(run: Run, order: Order) -> str:
        result = ""
        for number in range(1, steps + 1):
            result = await run(work(order, number))
        return result

    return saga(name, deadline=_HOUR)(body)


THREE: Final = _saga("three", 3)
TEN: Final = _saga("ten", 10)


async def happy(ground: Ground, plan: Plan, report: Report) -> None:
    """Three steps, one at a time and many at a time."""
    report.section("Happy path, 3 steps")
    await _run(ground, THREE, 100, 50)  # connections, plans, tables
    for concurrent in (1, *plan.concurrent):
        count = plan.serial if concurrent == 1 else plan.sagas
        found = await _run(ground, THREE, count, concurrent)
        report.add(f"saga_per_second_c{concurrent}", found.per_second, "sagas/s", count)
        report.add(f"commits_per_step_c{concurrent}", found.commits / count / 3, "commits", count)
        if concurrent in (1, 200):
            suffix = "" if concurrent == 200 else "_c1"
            report.add(f"step_p50_ms{suffix}", percentile(found.gaps, 0.5) * 1_000, "ms", len(found.gaps))
            report.add(f"step_p99_ms{suffix}", percentile(found.gaps, 0.99) * 1_000, "ms", len(found.gaps))
        if concurrent == 200:
            report.add("wal_bytes_per_saga_c200", found.wal_bytes / count, "bytes", count)
            report.add("cpu_ms_per_saga_c200", found.cpu_seconds / count * 1_000, "ms", count)


async def long(ground: Ground, plan: Plan, report: Report) -> None:
    """Ten steps."""
    report.section("Happy path, 10 steps")
    found = await _run(ground, TEN, plan.long, 200)
    report.add("saga10_per_second_c200", found.per_second, "sagas/s", plan.long)


async def compensating(ground: Ground, plan: Plan, report: Report) -> None:
    """Three steps of which the last one rejects, so that two are undone."""
    report.section("Compensating, 3 steps")
    found = await _run(ground, THREE, plan.long, 200, rejected=True)
    report.add("compensated_per_second_c200", found.per_second, "sagas/s", plan.long)


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What one run took."""

    per_second: float
    commits: int
    wal_bytes: int
    cpu_seconds: float
    gaps: list[float]


async def _run(
    ground: Ground, one: Saga[Order, str], count: int, concurrent: int, *, rejected: bool = False
) -> Measured:
    """Clients that start a saga, wait for its result, and start the next one."""
    clock = Clock()
    pool, numbers = ground.pool, iter(range(count))
    run = time.perf_counter_ns()

    async def client() -> None:
        for number in numbers:
            order = Order(order=f"{run}/{number}", rejected=rejected)
            handle = await one.start(pool, order, key=order.order)
            try:
                await handle.result(timeout=_RESULT_SECONDS)
            except Failed:
                assert rejected

    async with Worker(pool, "", one, deps=clock, settings=Settings()):
        before, cpu, began = await _counters(pool), time.process_time(), time.perf_counter()
        await asyncio.gather(*(client() for _ in range(concurrent)))
        took, after = time.perf_counter() - began, await _counters(pool)
    return Measured(
        per_second=count / took,
        commits=after[0] - before[0],
        wal_bytes=after[1] - before[1],
        cpu_seconds=time.process_time() - cpu,
        gaps=clock.gaps or [0.0],
    )


async def _counters(pool: Pool) -> tuple[int, int]:
    """Transactions that wrote something, and bytes of the write-ahead log."""
    row = await pool.fetchrow(
        "select pg_current_xact_id()::text::bigint as xid, (pg_current_wal_insert_lsn() - '0/0')::bigint as wal"
    )
    assert row is not None
    return int(row["xid"]), int(row["wal"])


async def takeover(ground: Ground, plan: Plan, report: Report) -> None:
    """Kill -9 of a worker with many sagas in flight: until another one has finished them all."""
    report.section("Takeover")
    await _start_many(ground.pool, plan.in_flight)
    command = [sys.executable, "-m", "benchmarks._saga_worker", ground.url, str(plan.in_flight)]
    with Child("first", command, {"SAGA_STEP": "hang"}) as first:
        await _until(ground.pool, "lease_owner is not null and checkpoint_no > 0", plan.in_flight)
        with Child("second", command):
            await _until_alive(ground.pool, 2)
            first.kill()
            began = time.perf_counter()
            await _until(ground.pool, "lease_epoch > 2", plan.in_flight)
            report.add("takeover_10k_seconds", time.perf_counter() - began, "s", plan.in_flight)
            await _until(ground.pool, "state = 'completed'", plan.in_flight)
            report.add("recovery_10k_seconds", time.perf_counter() - began, "s", plan.in_flight)
    twice = await ground.pool.fetchval(
        "select count(*) from (select from saga.tasks group by instance_id, path having count(*) > 1) t"
    )
    assert not twice, f"{twice} steps are journalled twice"


async def _start_many(pool: Pool, count: int) -> None:
    await asyncio.gather(*(THREE.start(pool, Order(order=str(number)), key=str(number)) for number in range(count)))


async def _until(pool: Pool, condition: str, count: int) -> None:
    query = f"select count(*) from saga.workflow_instances where {condition}"  # noqa: S608 - a condition of ours
    async with asyncio.timeout(_RESULT_SECONDS):
        while await pool.fetchval(query) < count:  # noqa: ASYNC110 - another process's state
            await asyncio.sleep(_LOOK_SECONDS)


async def _until_alive(pool: Pool, count: int) -> None:
    query = "select count(*) from saga.workers where alive_until > clock_timestamp()"
    async with asyncio.timeout(_RESULT_SECONDS):
        while await pool.fetchval(query) < count:  # noqa: ASYNC110 - another process's state
            await asyncio.sleep(_LOOK_SECONDS)


def hanging() -> Any:
    """The same saga, whose second step never ends: for a worker that is to be killed."""

    @step
    async def work(ctx: StepContext[Clock], order: Order, number: int) -> str:  # noqa: ARG001 - as in `THREE`
        if number == 2:
            await asyncio.Event().wait()
        return f"done {number}"

    async def body(run: Run, order: Order) -> str:
        result = ""
        for number in (1, 2, 3):
            result = await run(work(order, number))
        return result

    return saga("three", deadline=_HOUR)(body)
