"""Cancel racing completion, many times, with two workers; judged by what happened outside."""

import asyncio
import random
from collections import defaultdict

import pytest

from outbox import Pool
from saga import NotWaiting, StepContext
from tests.support.saga_worker import Order, Service, end_of, packed, violations, working

SAGAS = 60


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
