"""A worker in a process of its own: URL, instances in flight; SAGA_STEP=hang for one that never gets beyond step 2."""

import asyncio
import os
import signal
import sys

import asyncpg

from benchmarks.saga_takeover import hanging
from benchmarks.sagas import THREE, Clock
from saga import Settings, Worker


async def main(url: str, in_flight: int) -> None:
    """Serve until SIGTERM."""
    served = hanging() if os.environ.get("SAGA_STEP") == "hang" else THREE
    settings = Settings(instances_in_flight=in_flight)
    async with (
        asyncpg.create_pool(url, min_size=1, max_size=16) as pool,
        Worker(pool, "", served, deps=Clock(), settings=settings) as worker,
    ):
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, worker.stop)
        await worker.run()


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], int(sys.argv[2])))
