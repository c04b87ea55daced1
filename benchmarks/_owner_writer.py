"""Changes rows of the owner and emits the events, ten in a transaction, at an even pace until SIGTERM.

    python -m benchmarks._owner_writer DATABASE_URL TOPIC EVENTS_PER_SECOND ROWS CONNECTIONS

Says afterwards how many it wrote and how long that took, as JSON. Changes and events are one statement.
"""

import asyncio
import json
import random
import signal
import sys
import time

import asyncpg

from benchmarks import cached

_TOGETHER = 10
"""Rows changed by one transaction."""


async def main(database_url: str, topic: str, rate: float, rows: int, connections: int) -> None:
    """Write, then tell."""
    stopping = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stopping.set)
    written = 0
    async with asyncpg.create_pool(database_url, min_size=connections, max_size=connections) as pool:
        started = time.monotonic()

        async def write(first: int) -> None:
            nonlocal written
            number = first
            async with pool.acquire() as connection:
                change = await connection.prepare(cached.CHANGE)
                while not stopping.is_set():
                    await asyncio.sleep(started + number * _TOGETHER / rate - time.monotonic())
                    await change.fetch(random.sample(range(rows), _TOGETHER), number, topic, timeout=60)
                    written += _TOGETHER
                    number += connections

        await asyncio.gather(*(write(first) for first in range(connections)))
        seconds = time.monotonic() - started
    sys.stdout.write(json.dumps({"n": written, "seconds": seconds}) + "\n")


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], sys.argv[2], float(sys.argv[3]), int(sys.argv[4]), int(sys.argv[5])))
