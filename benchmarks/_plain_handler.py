"""What one would write without a library: a FastStream handler with a typed body, and one upsert an event.

    python -m benchmarks._plain_handler DATABASE_URL KAFKA TOPIC EVENTS

FastStream's defaults, but for reading from the first record: it acknowledges a record before it is handled, so a crash
loses events; it applies duplicates and late events again. Ends after so many events; the clock runs from the first.
"""

import asyncio
import gc
import json
import sys
import time
from typing import Final
from uuid import uuid4

import asyncpg
from faststream.kafka import KafkaBroker

from benchmarks import cached

UPSERT: Final = f"""
insert into {cached.TABLE} (agent_id, agent_name, instructions, version, model) values ($1, $2, $3, $4, $5)
on conflict (agent_id) do update
   set agent_name = excluded.agent_name, instructions = excluded.instructions, version = excluded.version,
       model = excluded.model, last_synced_at = now()
"""  # noqa: S608 - a constant


async def main(database_url: str, servers: str, topic: str, count: int) -> None:
    """Handle, then tell."""
    event_class = cached.declare(topic).handlers[cached.EVENT_TYPE].event_class
    seen = 0
    started: list[tuple[float, float]] = []
    done = asyncio.Event()
    broker = KafkaBroker(servers, logger=None)

    async with asyncpg.create_pool(database_url, min_size=2, max_size=4) as pool:

        async def handle(event: cached.CachedAgent) -> None:
            nonlocal seen
            if not started:
                started.append((time.perf_counter(), time.process_time()))
            seen += 1
            if seen <= count:
                await pool.execute(
                    UPSERT, event.agent_id, event.agent_name, event.instructions, event.version, event.model
                )
            if seen == count:
                done.set()

        handle.__annotations__["event"] = event_class
        broker.subscriber(topic, group_id=f"plain-{uuid4()}", auto_offset_reset="earliest")(handle)
        async with broker:
            await broker.start()
            gc.collect()
            gc.freeze()
            await done.wait()
            at, cpu = started[0]
            result = {"n": count, "seconds": time.perf_counter() - at, "cpu_seconds": time.process_time() - cpu}
    sys.stdout.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4])))
