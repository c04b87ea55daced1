"""What a saga costs, counted on the wire: one round trip and one commit a step, shared under load; no open transaction
while a step is under way.
"""  # noqa: D205 - one thought

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import asyncpg
import pytest

from outbox import Pool
from saga import Run, StepContext, runner, saga, step
from saga.outcome import perform
from saga.worker import Worker
from tests.support.saga_worker import HOUR, QUICK, Order, reaches
from tests.support.wire import Said, wire

BACKGROUND = ("saga.claim(", "saga.beat(", "saga.take_over(", "saga.let_timers_go_off(", "min(wake_at)", "saga.sweep(")
BACKGROUND += ("advisory_lock", "advisory_unlock", "set_config('lock_timeout'", "listen saga")
"""What a worker says whatever its sagas do, and what connections are told when they change hands."""
OPEN = """
select count(*) from pg_stat_activity
 where datname = current_database() and application_name = 'worker' and state like 'idle in transaction%'"""


@dataclass
class Outside:
    """What steps call: it looks how the worker's connections stand meanwhile."""

    pool: Pool
    calls: int = 0
    open_transactions: int = 0


@step
async def call(ctx: StepContext[Outside], order: Order) -> int:
    found = await ctx.deps.pool.fetchval(OPEN)
    ctx.deps.calls += 1
    ctx.deps.open_transactions += found
    return int(found)


@saga("serial", deadline=HOUR)
async def serial(run: Run, order: Order) -> int:
    return sum([await run(call(order)) for _ in range(int(order.sku))])


@asynccontextmanager
async def observed(url: str, pool: Pool) -> AsyncIterator[tuple[Pool, Outside, Said]]:
    """A worker whose connections all go through the proxy, with every statement prepared already."""
    outside = Outside(pool)
    async with (
        wire(url) as (through, said),
        asyncpg.create_pool(through, min_size=8, max_size=8, server_settings={"application_name": "worker"}) as own,
        Worker(own, "", serial, deps=outside, settings=QUICK),
    ):
        for _ in range(16):  # each connection gets to know each statement
            await (await serial.start(own, Order(sku="1"))).result(timeout=20)
        said.clear()
        outside.calls = outside.open_transactions = 0
        yield own, outside, said


@pytest.mark.parametrize("steps", [1, 3, 10])
async def test_a_step_costs_one_round_trip_and_one_commit(saga_pool: Pool, database: str, steps: int) -> None:
    """Start, and a checkpoint for each step: nothing else is said, and each is a transaction by itself."""
    async with observed(database, saga_pool) as (own, outside, said):
        handle = await serial.start(own, Order(sku=str(steps)))
        await reaches(saga_pool, handle.id, "completed")
        about_it = [text for text in said.executed if not any(other in text for other in BACKGROUND)]
        assert (said.count("saga.start("), said.count("saga.checkpoint(")) == (1, steps)
        assert [text for text in about_it if "saga.start(" not in text and "saga.checkpoint(" not in text] == []
        assert outside.calls == steps
        assert said.round_trips <= len(said.executed) + said.prepared


async def test_under_load_commits_are_shared(saga_pool: Pool, database: str) -> None:
    async with observed(database, saga_pool) as (own, outside, said):
        handles = await asyncio.gather(*(serial.start(own, Order(sku="3")) for _ in range(200)))
        await asyncio.gather(*(handle.result(timeout=60) for handle in handles))
        assert outside.calls == 600
        assert said.count("saga.checkpoint(") + said.count("saga.start(") < 600 / 3


@pytest.mark.parametrize("rule", ["kept", "removed"])
async def test_a_step_is_called_outside_of_any_transaction(
    saga_pool: Pool, database: str, monkeypatch: pytest.MonkeyPatch, rule: str
) -> None:
    """Red where a call is made while a transaction is open on one of the worker's connections."""
    async with observed(database, saga_pool) as (own, outside, _):
        if rule == "removed":

            async def inside(*given: Any) -> Any:
                async with own.acquire() as connection, connection.transaction():
                    await connection.execute("select 1")
                    return await perform(*given)

            monkeypatch.setattr(runner, "perform", inside)
        handles = await asyncio.gather(*(serial.start(own, Order(sku="3")) for _ in range(20)))
        await asyncio.gather(*(handle.result(timeout=20) for handle in handles))
        assert outside.calls == 60
        assert (outside.open_transactions == 0) == (rule == "kept")
