"""A service with one cache, in a process of its own: python -m benchmarks._cache_process DATABASE_URL KAFKA TOPIC.

As a service would run it: a pool, `Consumer`, and the garbage collector told once that what is there by then stays.
BENCH_PROFILE names a file for a profile of the whole run.
"""

import asyncio
import cProfile
import gc
import logging
import os
import signal
import sys

import asyncpg

from benchmarks import cached
from outbox import Consumer


async def main(database_url: str, servers: str, topic: str) -> None:
    """Keep the cache until SIGTERM."""
    async with asyncpg.create_pool(database_url, min_size=2, max_size=8) as pool:
        consumer = Consumer(pool, servers, cached.declare(topic))
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, consumer.stop)
        async with consumer:
            gc.collect()
            gc.freeze()
            await consumer.run()


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING)
    profile = os.environ.get("BENCH_PROFILE")
    if profile:
        with cProfile.Profile() as profiler:
            asyncio.run(main(*sys.argv[1:]))
        profiler.dump_stats(profile)
    else:
        asyncio.run(main(*sys.argv[1:]))
