"""Copies the owner's rows into the cache, as `outbox cache rebuild` does; says how long it took as JSON.

python -m benchmarks._rebuild_process in-place|new-generation DATABASE_URL TOPIC
"""

import asyncio
import json
import logging
import sys
import time

import asyncpg

from benchmarks import cached
from outbox import SqlOwner
from outbox.cache import generations
from outbox.cache.rebuild import Rebuild


async def main(how: str, database_url: str, topic: str) -> None:
    """Rebuild, then tell."""
    async with (
        asyncpg.create_pool(database_url, min_size=2, max_size=4) as owners,
        asyncpg.create_pool(database_url, min_size=2, max_size=4) as pool,
    ):
        cache = cached.declare(topic, SqlOwner(owners, cached.OWNER_QUERY))
        started, cpu = time.perf_counter(), time.process_time()
        if how == "in-place":
            progress = await Rebuild(pool, cache).run()
        else:
            progress = await generations.renew(pool, cache)
        seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - cpu
    sys.stdout.write(json.dumps({"n": progress.rows, "seconds": seconds, "cpu_seconds": cpu_seconds}) + "\n")


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING)
    asyncio.run(main(*sys.argv[1:]))
