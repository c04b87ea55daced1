"""Clients and a worker in a process of their own: URL, sagas at a time, count, a file.

The clock starts when the file is there. Says when it began and when it ended.
"""

import asyncio
import json
import sys
from pathlib import Path
from typing import Final

import asyncpg

from benchmarks.saga_ground import Ground
from benchmarks.sagas import THREE, run
from outbox.embedded import Databases

_LOOK_SECONDS: Final = 0.002


async def main(url: str, concurrent: int, count: int, go: Path) -> None:
    """As `benchmarks.sagas` does it."""

    async def ready() -> None:
        print("ready", flush=True)
        while not go.exists():  # noqa: ASYNC110, ASYNC240 - another process makes it
            await asyncio.sleep(_LOOK_SECONDS)

    async with asyncpg.create_pool(url, min_size=1, max_size=16) as pool:
        ground = Ground(databases=Databases(url), url=url, pool=pool)
        found = await run(ground, THREE, count, concurrent, ready=ready)
    print(json.dumps({"began": found.began, "ended": found.ended}), flush=True)


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4])))
