"""Sagas of steps that do nothing, by the thousand."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Final
from uuid import uuid4

from pydantic import BaseModel

from benchmarks.report import Report, percentile
from benchmarks.saga_ground import Ground, Plan, counters
from outbox import Pool
from saga import Failed, Rejected, Run, Saga, Settings, StepContext, Unknown, Worker, saga, step

_RESULT_SECONDS: Final = 300.0
_HOUR: Final = timedelta(hours=1)


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
    for concurrent in (1, *plan.concurrent):
        count = plan.count(plan.sagas, concurrent)
        found = await run(ground, THREE, count, concurrent)
        add(report, "saga", "", concurrent, found)
        report.add(f"commits_per_step_c{concurrent}", found.commits / count / 3, "commits", count)
        if concurrent in (1, 200):
            suffix = "" if concurrent == 200 else "_c1"
            report.add(f"step_p50_ms{suffix}", percentile(found.gaps, 0.5) * 1_000, "ms", len(found.gaps))
            report.add(f"step_p99_ms{suffix}", percentile(found.gaps, 0.99) * 1_000, "ms", len(found.gaps))
            report.add(f"cpu_ms_per_saga_c{concurrent}", found.cpu_seconds / count * 1_000, "ms", count)
            if found.server_cpu_seconds is not None:
                server_cpu = found.server_cpu_seconds / count * 1_000
                report.add(f"server_cpu_ms_per_saga_c{concurrent}", server_cpu, "ms", count)


async def long(ground: Ground, plan: Plan, report: Report) -> None:
    """Ten steps."""
    report.section("Happy path, 10 steps")
    for concurrent in (1, *plan.concurrent):
        found = await run(ground, TEN, plan.count(plan.long, concurrent), concurrent)
        add(report, "saga10", "saga10_", concurrent, found)


async def compensating(ground: Ground, plan: Plan, report: Report) -> None:
    """The last step rejects, so that all others are undone."""
    for one, name in ((THREE, "compensated"), (TEN, "compensated10")):
        report.section(f"Compensating, {3 if one is THREE else 10} steps")
        for concurrent in (1, *plan.concurrent):
            found = await run(ground, one, plan.count(plan.long, concurrent), concurrent, rejected=True)
            add(report, name, f"{name}_", concurrent, found)


def add(report: Report, name: str, prefix: str, concurrent: int, found: "Measured") -> None:
    """What is said of every kind of saga."""
    count = found.count
    report.add(f"{name}_per_second_c{concurrent}", found.per_second, "sagas/s", count)
    report.add(f"{prefix}commits_per_saga_c{concurrent}", found.commits / count, "commits", count)
    report.add(f"{prefix}wal_bytes_per_saga_c{concurrent}", found.wal_bytes / count, "bytes", count)


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What one run took."""

    count: int
    began: float
    ended: float
    commits: int
    wal_bytes: int
    cpu_seconds: float
    server_cpu_seconds: float | None
    gaps: list[float]

    @property
    def per_second(self) -> float:
        """Sagas."""
        return self.count / (self.ended - self.began)


async def _at_once() -> None:
    """Nobody is waited for."""


async def run(
    ground: Ground,
    one: Saga[Order, str],
    count: int,
    concurrent: int,
    *,
    rejected: bool = False,
    ready: Callable[[], Awaitable[None]] = _at_once,
) -> Measured:
    """Clients that start a saga, wait for its result, and start the next one, in one process with the worker.

    Args:
        ground: where.
        one: of which kind.
        count: sagas.
        concurrent: at a time.
        rejected: whether the last step rejects.
        ready: called between warming up and the start of the clock.
    """
    clock = Clock()
    async with Worker(ground.pool, "", one, deps=clock, settings=Settings()):
        return await measured(ground, one, count, concurrent, clock, rejected=rejected, ready=ready)


async def measured(
    ground: Ground,
    one: Saga[Order, str],
    count: int,
    concurrent: int,
    clock: Clock | None = None,
    *,
    rejected: bool = False,
    ready: Callable[[], Awaitable[None]] = _at_once,
) -> Measured:
    """The same beside a worker that is there already; `clock` is the one that it has, if it is in this process."""
    await _clients(ground.pool, one, 50 + concurrent, concurrent, rejected=rejected)  # connections, plans, tables
    await ready()
    gaps = clock.gaps if clock is not None else []
    gaps.clear()
    before, server_cpu = await counters(ground.pool), ground.server_cpu_seconds()
    cpu, began = time.process_time(), time.perf_counter()
    await _clients(ground.pool, one, count, concurrent, rejected=rejected)
    ended, cpu = time.perf_counter(), time.process_time() - cpu
    after, server_cpu_after = await counters(ground.pool), ground.server_cpu_seconds()
    return Measured(
        count=count,
        began=began,
        ended=ended,
        commits=after.commits - before.commits,
        wal_bytes=after.wal_bytes - before.wal_bytes,
        cpu_seconds=cpu,
        server_cpu_seconds=server_cpu_after - server_cpu if server_cpu_after and server_cpu else None,
        gaps=gaps or [0.0],
    )


async def _clients(pool: Pool, one: Saga[Order, str], count: int, concurrent: int, *, rejected: bool) -> None:
    numbers = iter(range(count))

    async def client() -> None:
        for _ in numbers:
            order = Order(order=uuid4().hex, rejected=rejected)
            handle = await one.start(pool, order, key=order.order)
            try:
                await handle.result(timeout=_RESULT_SECONDS)
            except Failed:
                assert rejected

    await asyncio.gather(*(client() for _ in range(concurrent)))
