"""Edda as its guide has it: activities called by a workflow. URL, workflows at a time, connections, count.

`start` runs the whole workflow in the caller's hands. Edda installs uvloop itself.
"""

import asyncio
import sys
from typing import Any

from edda import EddaApp, activity, workflow

from benchmarks._peer_clock import STEPS, Clock

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


async def main(url: str, concurrent: int, connections: int, count: int) -> None:
    """Run so many, so many at a time."""
    database = url.replace("postgresql://", "postgresql+asyncpg://", 1)
    app = EddaApp(service_name="bench", db_url=database, pool_size=connections, max_overflow=2 * connections)
    await app.initialize()
    started = workflow(three)

    async def run(orders: list[str]) -> None:
        waiting = iter(orders)

        async def client() -> None:
            for order in waiting:
                await started.start(order=order)

        await asyncio.gather(*(client() for _ in range(concurrent)))

    await started.start(order="first")  # it writes the definition, which fails where several do it at once
    await run([f"warm-up {number}" for number in range(2 * concurrent)])
    clock.begin()
    await run([str(number) for number in range(count)])
    clock.end()
    await app.shutdown()


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])))
