"""Cancel racing completion, many times, with two workers; judged by what happened outside."""

import asyncio
import random
from collections import defaultdict
from typing import Any

import pytest

from outbox import Pool
from saga import Failed, NotWaiting, StepContext
from tests.support.saga_worker import Order, Service, packed, working

SAGAS = 60
UNDOES = {"reserve": "release", "charge": "refund", "pack": "unpack"}


async def violations(pool: Pool, ends: dict[str, str], names: list[str]) -> list[str]:
    """What is not as it must be: a completed saga did all of `names` and undid nothing, any other undid what it did."""
    found = []
    for sku, end in ends.items():
        rows = await pool.fetch("select name from effects where sku = $1 order by no", sku)
        told = list(dict.fromkeys(row["name"] for row in rows))  # a service sees a key twice where a lease ran out
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


class Noted(Service):
    """A service that tells when a step of an order begins."""

    begun: dict[tuple[str, str], asyncio.Event]

    async def act(self, name: str, order: Order, ctx: StepContext[Service]) -> None:
        self.begun[order.sku, name].set()
        await super().act(name, order, ctx)


@pytest.mark.parametrize("seed", range(3))
async def test_a_cancel_that_races_the_end(saga_pool: Pool, seed: int) -> None:
    """A cancel that was accepted is followed by compensations, one that was too late by none of them."""
    chance = random.Random(seed)
    service = Noted(saga_pool)
    service.begun = defaultdict(asyncio.Event)
    too_late: set[str] = set()

    async def race(sku: str) -> str:
        handle = await packed.start(saga_pool, Order(sku=sku))
        await service.begun[sku, chance.choice(("reserve", "charge", "pack"))].wait()
        try:
            await handle.cancel("changed my mind")
        except NotWaiting:
            too_late.add(sku)
        return await end_of(handle)

    async with working(saga_pool, packed, deps=service), working(saga_pool, packed, deps=service):
        names = [str(n) for n in range(SAGAS)]
        ends = dict(zip(names, await asyncio.gather(*map(race, names)), strict=True))
    assert await violations(saga_pool, ends, ["reserve", "charge", "pack"]) == []
    assert {sku for sku, end in ends.items() if end == "completed"} == too_late
    assert "undone" in ends.values()
