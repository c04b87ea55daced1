"""Kill -9 of a worker with thousands of sagas in flight."""

import asyncio
import sys
import time
from datetime import timedelta
from typing import Final

from benchmarks.processes import Child
from benchmarks.report import Report
from benchmarks.saga_ground import Ground, Plan
from benchmarks.sagas import THREE, Clock, Order
from outbox import Pool
from saga import Run, Saga, StepContext, saga, step

_RESULT_SECONDS: Final = 300.0
_LOOK_SECONDS: Final = 0.05
_HOUR: Final = timedelta(hours=1)


async def takeover(ground: Ground, plan: Plan, report: Report) -> None:
    """Kill -9 of a worker with many sagas in flight: until another one has finished them all."""
    report.section("Takeover")
    await _start_many(ground.pool, plan.in_flight)
    command = [sys.executable, "-m", "benchmarks._saga_worker", ground.url, str(plan.in_flight)]
    with Child("first", command, {"SAGA_STEP": "hang"}) as first:
        await _until(ground.pool, "lease_owner is not null and checkpoint_no > 0", plan.in_flight)
        with Child("second", command):
            await until_alive(ground.pool, 2)
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


async def until_alive(pool: Pool, count: int) -> None:
    """Wait for so many workers."""
    query = "select count(*) from saga.workers where alive_until > clock_timestamp()"
    async with asyncio.timeout(_RESULT_SECONDS):
        while await pool.fetchval(query) < count:  # noqa: ASYNC110 - another process's state
            await asyncio.sleep(_LOOK_SECONDS)


def hanging() -> Saga[Order, str]:
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
