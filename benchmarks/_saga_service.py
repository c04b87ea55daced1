"""Clients and a worker in a process of their own: URL, sagas at a time, count. Says when it began and when it ended."""

import asyncio
import json
import sys

import asyncpg

from benchmarks.saga_ground import Ground
from benchmarks.sagas import THREE, run
from outbox.embedded import Databases


async def main(url: str, concurrent: int, count: int) -> None:
    """As `benchmarks.sagas` does it."""
    async with asyncpg.create_pool(url, min_size=1, max_size=16) as pool:
        found = await run(Ground(databases=Databases(url), url=url, pool=pool), THREE, count, concurrent)
    print(json.dumps({"began": found.began, "ended": found.ended}), flush=True)


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3])))
