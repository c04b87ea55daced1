"""Edda as its guide has it: activities called by a workflow.

`start` runs the whole workflow in the caller's hands. Edda installs uvloop itself.
"""

import asyncio
from typing import Any

from edda import EddaApp, activity, workflow

from benchmarks._peer_clock import STEPS, Clock, Order

clock = Clock()


async def work(ctx: Any, order: str, number: int) -> str:  # noqa: ARG001 - as Edda calls it
    """A step."""
    return clock.work(order, number)


step = activity(work)


async def three(ctx: Any, order: str) -> str:
    """A workflow of three steps."""
    result = ""
    for number in range(1, STEPS + 1):
        result = await step(ctx, order, number)
    return result


async def main(order: Order) -> None:
    """Run so many, so many at a time."""
    database = order.url.replace("postgresql://", "postgresql+asyncpg://", 1)
    pool = {"pool_size": order.connections, "max_overflow": 2 * order.connections}
    app = EddaApp(service_name="bench", db_url=database, **pool)
    await app.initialize()
    started = workflow(three)

    async def run(orders: list[str]) -> None:
        waiting = iter(orders)

        async def client() -> None:
            for one in waiting:
                await started.start(order=one)

        await asyncio.gather(*(client() for _ in range(order.concurrent)))

    await started.start(order="first")  # it writes the definition, which fails where several do it at once
    await run([f"warm-up {number}" for number in range(2 * order.concurrent)])
    clock.begin(order.go)
    await run([str(number) for number in range(order.count)])
    clock.end()
    await app.shutdown()


if __name__ == "__main__":
    asyncio.run(main(Order.read()))
