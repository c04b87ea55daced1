"""Cancel racing completion, many times, with two workers; judged by what happened outside."""

import asyncio
import random
from typing import Any

import pytest

from outbox import Pool
from saga import Failed, NotWaiting
from tests.support.faults import eventually
from tests.support.saga_worker import Order, packed, working

SAGAS = 60
UNDOES = {"reserve": "release", "charge": "refund", "pack": "unpack"}


async def violations(pool: Pool, ends: dict[str, str], names: list[str]) -> list[str]:
    """What is not as it must be: a completed saga did all of `names` and undid nothing, any other undid what it did."""
    found = []
    for sku, end in ends.items():
        rows = await pool.fetch("select name from effects where sku = $1 order by no", sku)
        told = [row["name"] for row in rows]
        done = [name for name in told if name in UNDOES]
        undone = [name for name in told if name not in UNDOES]
        expected = [] if end == "completed" else [UNDOES[name] for name in reversed(done)]
        if undone != expected or (end == "completed" and done != names):
            found.append(f"{sku} has {end}: {told}")
    states = await pool.fetch(
        "select i.id from saga.workflow_instances i where i.state not in ('completed', 'failed', 'cancelled')"
        " or exists (select from saga.saga_compensations c where c.instance_id = i.id and c.status <> 'completed')"
    )
    return [*found, *(f"{row['id']} is left" for row in states)]


async def end_of(handle: Any) -> str:
    try:
        await handle.result(timeout=30)
    except Failed:
        return "undone"
    return "completed"


@pytest.mark.parametrize("seed", range(3))
async def test_a_cancel_that_races_the_end(saga_pool: Pool, seed: int) -> None:
    chance = random.Random(seed)
    async with working(saga_pool, packed) as service, working(saga_pool, packed, deps=service):
        handles = {str(n): await packed.start(saga_pool, Order(sku=str(n))) for n in range(SAGAS)}
        after = {sku: chance.choice(("reserve", "charge", "pack")) for sku in handles}

        too_late: set[str] = set()

        async def cancel(sku: str) -> None:
            there = "select exists (select from effects where sku = $1 and name = $2)"
            await eventually(lambda: saga_pool.fetchval(there, sku, after[sku]), what=f"{sku} is at {after[sku]}")
            try:
                await handles[sku].cancel("changed my mind")
            except NotWaiting:
                too_late.add(sku)

        await asyncio.gather(*map(cancel, handles))
        ends = dict(zip(handles, await asyncio.gather(*map(end_of, handles.values())), strict=True))
    assert await violations(saga_pool, ends, ["reserve", "charge", "pack"]) == []
    assert {sku for sku, end in ends.items() if end == "completed"} == too_late
    assert "undone" in ends.values()
