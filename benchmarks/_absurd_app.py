"""Absurd: clients that spawn tasks, and workers that run them. URL, tasks of a worker at a time, workers, count.

A worker has one connection, for all of its tasks, hence several workers in the process. Nobody asks for results: the
clock stops when all tasks are said to be completed, which is looked for by one statement each 20 ms.
"""

import asyncio
import sys
from typing import Any

import absurdctl
import psycopg
from absurd_sdk import AsyncAbsurd

from benchmarks._peer_clock import STEPS, Clock

CLIENTS = 4
LOOK_SECONDS = 0.02
POLL_SECONDS = 0.01

clock = Clock()


async def three(order: str, ctx: Any) -> str:
    """A task of three steps."""
    result = ""
    for number in range(1, STEPS + 1):

        async def work(number: int = number) -> str:
            return clock.work(order, number)

        result = await ctx.step(f"work {number}", work)
    return result


async def main(url: str, concurrent: int, workers: int, count: int) -> None:
    """Spawn so many, and wait until all have ended."""
    looking = psycopg.connect(url, autocommit=True)
    looking.execute(absurdctl.BUNDLED_SCHEMA_SQL)
    clients = [AsyncAbsurd(url) for _ in range(CLIENTS)]
    await clients[0].create_queue("default")

    async def spawn(orders: list[str]) -> None:
        waiting = iter(orders)

        async def client(absurd: Any) -> None:
            for order in waiting:
                await absurd.spawn("three", order, queue="default")

        await asyncio.gather(*(client(absurd) for absurd in clients))

    async def all_completed(wanted: int) -> None:
        query = "select count(*) from absurd.t_default where state = 'completed'"
        while looking.execute(query).fetchone()[0] < wanted:  # noqa: ASYNC110 - the database's state
            await asyncio.sleep(LOOK_SECONDS)

    serving = [AsyncAbsurd(url) for _ in range(workers)]
    tasks = []
    for number, absurd in enumerate(serving):
        absurd.register_task("three")(three)
        settings = {"worker_id": str(number), "concurrency": concurrent, "poll_interval": POLL_SECONDS}
        tasks.append(asyncio.create_task(absurd.start_worker(**settings)))
    warm_up = 2 * concurrent
    await spawn([f"warm-up {number}" for number in range(warm_up)])
    await all_completed(warm_up)
    clock.begin()
    await spawn([str(number) for number in range(count)])
    await all_completed(warm_up + count)
    clock.end()
    for absurd in serving:
        absurd.stop_worker()
    await asyncio.gather(*tasks)


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])))
