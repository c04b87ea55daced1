"""The two limits of the relay, each in a process of its own: reading without sending, sending without reading.

python -m benchmarks._limits window DATABASE_URL
python -m benchmarks._limits send DATABASE_URL KAFKA TOPIC
"""

import asyncio
import gc
import json
import sys
import time
from collections.abc import Sequence
from typing import Any

import asyncpg

from outbox import kafka, limits, postgres, wire
from outbox.relay import window
from outbox.settings import Settings

Row = tuple[int, bytes, bytes, list[wire.Header]]
"""Time stamp, key, value and headers of one record, ready to be appended."""


async def read(pool: postgres.Pool, rows: list[postgres.Record] | None = None) -> int:
    """The whole log through the relay's own cursor, page by page; kept only if asked for."""
    start = await pool.fetchval("select start_snapshot from outbox.shards where shard = 0")
    count = 0
    async with window.backlog(pool, 0, start, None) as backlog:
        async for _, page in backlog.pages(window.Bounds(limits.WINDOW_MAX_EVENTS, limits.WINDOW_MAX_BYTES)):
            count += len(page)
            if rows is not None:
                rows.extend(page)
    return count


def records(rows: Sequence[postgres.Record], partitions: int) -> list[list[Row]]:
    """The records that the relay makes of rows, by partition."""
    fixed = wire.type_headers("bench", "agent.renamed", 1)
    prefix = wire.position_prefix("19a00000000-abcd", 0, 1)
    dealt: list[list[Row]] = [[] for _ in range(partitions)]
    for ordinal, row in enumerate(rows, 1):
        position = b"%b%d/%d/%d" % (prefix, ordinal, row["position"], row["transaction_id"])
        headers = [*fixed, ("ce_id", row["event_id"].encode()), (wire.POSITION_HEADER, position)]
        key: str = row["key"]
        dealt[kafka.partition_hash(key) % partitions].append(
            (int(row["created_at"]), key.encode(), row["payload"], headers)
        )
    return dealt


async def send(producer: kafka.Producer, topic: str, partition: int, rows: Sequence[Row]) -> None:
    """One unacknowledged batch at a time, as a lane of the relay does."""
    at = 0
    while at < len(rows):
        batch = producer.batch()
        append = batch.append
        while at < len(rows):
            timestamp, key, value, headers = rows[at]
            if append(timestamp=timestamp, key=key, value=value, headers=headers) is None:
                break
            at += 1
        await producer.send(batch, topic, partition)


async def measure_window(database_url: str) -> dict[str, Any]:
    """Rows read and thrown away."""
    async with asyncpg.create_pool(database_url, min_size=1, max_size=2) as pool:
        gc.collect()
        gc.freeze()
        started, cpu = time.perf_counter(), time.process_time()
        count = await read(pool)
        return {"n": count, "seconds": time.perf_counter() - started, "cpu_seconds": time.process_time() - cpu}


async def measure_send(database_url: str, servers: str, topic: str) -> dict[str, Any]:
    """The same rows as ready-made records, sent by the relay's own producer."""
    rows: list[postgres.Record] = []
    async with asyncpg.create_pool(database_url, min_size=1, max_size=2) as pool:
        count = await read(pool, rows)
    producer = kafka.Producer(servers, Settings())
    await producer.start()
    try:
        dealt = records(rows, await producer.partitions(topic) or 1)
        del rows
        gc.collect()
        gc.freeze()
        started, cpu = time.perf_counter(), time.process_time()
        await asyncio.gather(*(send(producer, topic, number, part) for number, part in enumerate(dealt)))
        return {"n": count, "seconds": time.perf_counter() - started, "cpu_seconds": time.process_time() - cpu}
    finally:
        await producer.stop()


if __name__ == "__main__":
    measurement = measure_window(*sys.argv[2:]) if sys.argv[1] == "window" else measure_send(*sys.argv[2:])
    sys.stdout.write(json.dumps(asyncio.run(measurement)) + "\n")
