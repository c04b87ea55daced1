"""Absurd: clients that spawn tasks, and workers that run them.

A worker has one connection, for all of its tasks, hence several workers in the process. Nobody asks for results: the
clock stops when all tasks are said to be completed, which is looked for by one statement each 20 ms.
"""

import asyncio
from typing import Any

import absurdctl
import psycopg
from absurd_sdk import AsyncAbsurd

from benchmarks._peer_clock import STEPS, Clock, Order

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


async def main(order: Order) -> None:
    """Spawn so many, and wait until all have ended."""
    looking = psycopg.connect(order.url, autocommit=True)
    clients = [AsyncAbsurd(order.url) for _ in range(CLIENTS)]
    if order.number == 1:
        looking.execute(absurdctl.BUNDLED_SCHEMA_SQL)
        await clients[0].create_queue("default")

    async def spawn(orders: list[str]) -> None:
        waiting = iter(orders)

        async def client(absurd: Any) -> None:
            for one in waiting:
                await absurd.spawn("three", one, queue="default")

        await asyncio.gather(*(client(absurd) for absurd in clients))

    async def all_completed(wanted: int) -> None:
        query = "select count(*) from absurd.t_default where state = 'completed'"
        while looking.execute(query).fetchone()[0] < wanted:  # noqa: ASYNC110 - the database's state
            await asyncio.sleep(LOOK_SECONDS)

    serving = [AsyncAbsurd(order.url) for _ in range(order.connections)]
    tasks = []
    for number, absurd in enumerate(serving):
        name = f"{order.number}/{number}"
        absurd.register_task("three")(three)
        settings = {"worker_id": name, "concurrency": order.concurrent, "poll_interval": POLL_SECONDS}
        tasks.append(asyncio.create_task(absurd.start_worker(**settings)))
    warm_up = 2 * order.concurrent
    await spawn([f"warm-up {order.number}/{number}" for number in range(warm_up)])
    await all_completed(order.number * warm_up)
    clock.begin(order.go)
    await spawn([f"{order.number}/{number}" for number in range(order.count)])
    await all_completed(order.processes * (warm_up + order.count))  # processes share the queue
    clock.end()
    for absurd in serving:
        absurd.stop_worker()
    await asyncio.gather(*tasks)


if __name__ == "__main__":
    asyncio.run(main(Order.read()))
