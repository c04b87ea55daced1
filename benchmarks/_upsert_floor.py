"""The floor: the rows of the topic upserted by one statement a batch, ready-made, and nothing else.

    python -m benchmarks._upsert_floor DATABASE_URL EVENTS KEYS

No Kafka, no decoding, no handlers, no positions, no tombstones: arrays of values that asyncpg
encodes, on one connection.
"""

import asyncio
import gc
import json
import sys
import time
from typing import Any, Final
from uuid import UUID

import asyncpg

from benchmarks import cached, workload
from outbox import limits

UPSERT: Final = f"""
insert into {cached.TABLE} as c (agent_id, agent_name, instructions, version, model)
select * from unnest($1::uuid[], $2::text[], $3::text[], $4::int[], $5::text[]) x(agent_id) order by x.agent_id
on conflict (agent_id) do update
   set agent_name = excluded.agent_name, instructions = excluded.instructions, version = excluded.version,
       model = excluded.model, last_synced_at = now()
"""  # noqa: S608 - a constant


def batches(count: int, keys: int) -> list[list[list[Any]]]:
    """The columns of each batch; a batch has distinct keys."""
    size = min(limits.CONSUMER_MAX_RECORDS, keys)
    made = []
    for first in range(0, count, size):
        events = [workload.renamed(number, keys) for number in range(first, min(first + size, count))]
        rows = [(UUID(e.agent_id), e.agent_name, e.instructions, e.version, e.model) for e in events]
        made.append([list(column) for column in zip(*rows, strict=True)])
    return made


async def main(database_url: str, count: int, keys: int) -> None:
    """Upsert, then tell."""
    made = batches(count, keys)
    connection = await asyncpg.connect(database_url)
    try:
        upsert = await connection.prepare(UPSERT)
        gc.collect()
        gc.freeze()
        started, cpu = time.perf_counter(), time.process_time()
        for columns in made:
            await upsert.fetch(*columns, timeout=60)
        seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - cpu
    finally:
        await connection.close()
    sys.stdout.write(json.dumps({"n": count, "seconds": seconds, "cpu_seconds": cpu_seconds}) + "\n")


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3])))
