"""Commits one event a transaction at an even pace, and writes down when: as JSON, at its end.

    python -m benchmarks._writer DATABASE_URL TOPIC EVENTS_PER_SECOND SECONDS CONNECTIONS

`sent` is the time just before the statement left, `committed` just after its COMMIT returned, both on the machine's
monotonic clock. The statement is `outbox.emit`, a transaction by itself: one round trip, so that 2,000 a second leave
the machine to the relay.
"""

import asyncio
import gc
import json
import sys
import time

import asyncpg

from benchmarks import workload

_EMIT = "select outbox.emit('agent.renamed', $1, $2, $3::jsonb)"
_LEAD_SECONDS = 0.2


async def main(database_url: str, topic: str, rate: float, seconds: float, connections: int) -> None:
    """Write, then tell."""
    count = int(rate * seconds)
    sent, committed = [0] * count, [0] * count
    events = [workload.renamed(number) for number in range(count)]
    rows = [(event.agent_id, event.model_dump_json()) for event in events]
    async with asyncpg.create_pool(database_url, min_size=connections, max_size=connections) as pool:
        start = time.monotonic() + _LEAD_SECONDS

        async def write(first: int) -> None:
            async with pool.acquire() as connection:
                emit = await connection.prepare(_EMIT)
                for number in range(first, count, connections):
                    key, payload = rows[number]
                    await asyncio.sleep(start + number / rate - time.monotonic())
                    sent[number] = time.monotonic_ns()
                    await emit.fetchval(topic, key, payload, timeout=30)
                    committed[number] = time.monotonic_ns()

        gc.collect()
        gc.freeze()
        await asyncio.gather(*(write(first) for first in range(connections)))
    sys.stdout.write(json.dumps({"sent": sent, "committed": committed}) + "\n")


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], sys.argv[2], float(sys.argv[3]), float(sys.argv[4]), int(sys.argv[5])))
