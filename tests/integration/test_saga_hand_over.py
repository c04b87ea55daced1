"""A worker that stops has given everything back within a second, whatever its sagas are doing."""

import asyncio
import time
from typing import Any

from outbox import Pool
from saga import Run, StepContext, saga, step
from tests.support.faults import eventually
from tests.support.saga_worker import HOUR, SOON, Order, Service, charge, reserve, working

_SAGAS = 500


@saga("moving", deadline=HOUR)
async def moving(run: Run, order: Order) -> str:
    for _ in range(5):
        await run(reserve(order))
    return await run(charge(order))


@step(retry=SOON, settle=0)
async def stubborn(ctx: StepContext[Service], order: Order) -> str:
    ctx.deps.counts["stubborn"] += 1
    released = ctx.deps.gates["stubborn"]
    while not released.is_set():
        try:
            await released.wait()
        except asyncio.CancelledError:
            ctx.deps.counts["cut off"] += 1
    return "at last"


@saga("immovable", deadline=HOUR)
async def immovable(run: Run, order: Order) -> str:
    return await run(stubborn(order))


async def held(pool: Pool) -> int:
    return int(await pool.fetchval("select count(*) from saga.workflow_instances where lease_owner is not null"))


async def test_under_load_a_worker_hands_over_within_a_second_and_nothing_is_lost(saga_pool: Pool) -> None:
    """Red where nothing is handed over."""
    async with working(saga_pool, moving) as service:
        handles = await asyncio.gather(*(moving.start(saga_pool, Order(sku=str(n))) for n in range(_SAGAS)))

        async def has_begun() -> bool:
            return service.counts["reserve"] > _SAGAS

        await eventually(has_begun, what="sagas are in their second step")
        began = time.monotonic()
    took = time.monotonic() - began
    assert await held(saga_pool) == 0
    ended = await saga_pool.fetchval("select count(*) from saga.workflow_instances where state = 'completed'")
    assert ended < _SAGAS, "the worker had something to hand over"
    assert took < 1, took
    async with working(saga_pool, moving):
        for handle in handles:
            assert await handle.result(timeout=60) == "paid"
    keys: Any = await saga_pool.fetchval("select count(distinct key) from effects")
    assert keys == 6 * _SAGAS


async def test_a_call_that_does_not_let_itself_be_cut_off_holds_up_nobody(saga_pool: Pool) -> None:
    """Red where the worker waits until it has ended (no timeout in `_cut_off`)."""
    async with working(saga_pool, immovable) as service:
        service.gates = {"stubborn": asyncio.Event()}
        await immovable.start(saga_pool, Order())

        async def has_begun() -> bool:
            return service.counts["stubborn"] == 1

        await eventually(has_begun, what="the call is under way")
        began = time.monotonic()
    took = time.monotonic() - began
    service.gates["stubborn"].set()
    assert service.counts["cut off"] > 0
    assert await held(saga_pool) == 0
    assert took < 1, took
