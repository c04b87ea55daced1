"""A service with one cache, or with one inbox, in a process of its own.

    python -m benchmarks._cache_process cache|inbox DATABASE_URL KAFKA TOPIC

As a service would run it: a pool and a `Consumer`. BENCH_PROFILE names a file for a profile of the whole run.
"""

import asyncio
import cProfile
import logging
import os
import signal
import sys

import asyncpg

from benchmarks import cached
from outbox import Consumer


async def main(kind: str, database_url: str, servers: str, topic: str) -> None:
    """Consume until SIGTERM."""
    target = cached.declare(topic) if kind == "cache" else cached.declare_inbox(topic)
    async with asyncpg.create_pool(database_url, min_size=2, max_size=8) as pool:
        consumer = Consumer(pool, servers, target)
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, consumer.stop)
        async with consumer:
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
