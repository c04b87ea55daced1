"""Reads a topic from its present end on and writes down when each event was seen: as JSON, after SIGTERM.

    python -m benchmarks._watcher KAFKA TOPIC FETCH_MAX_WAIT_MS

Says `ready` once it waits for records. An event's number is the `version` in its payload.
"""

import asyncio
import gc
import json
import signal
import sys
import time
from typing import Any

import aiokafka

from benchmarks import workload


async def main(servers: str, topic: str, fetch_max_wait_ms: int) -> None:
    """Watch, then tell."""
    stopping = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stopping.set)
    consumer: Any = aiokafka.AIOKafkaConsumer(
        bootstrap_servers=servers,
        enable_auto_commit=False,
        auto_offset_reset="latest",
        fetch_max_wait_ms=fetch_max_wait_ms,
        fetch_min_bytes=1,
    )
    await consumer.start()
    seen: list[tuple[int, bytes]] = []
    try:
        partitions = [aiokafka.TopicPartition(topic, number) for number in range(workload.PARTITIONS)]
        consumer.assign(partitions)
        for partition in partitions:
            await consumer.position(partition)
        gc.collect()
        gc.freeze()
        sys.stdout.write("ready\n")
        sys.stdout.flush()
        while not stopping.is_set():
            found = await consumer.getmany(timeout_ms=200)
            now = time.monotonic_ns()
            seen += [(now, record.value) for records in found.values() for record in records]
    finally:
        await consumer.stop()
    sys.stdout.write(json.dumps([(at, json.loads(value)["version"]) for at, value in seen]) + "\n")


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], sys.argv[2], int(sys.argv[3])))
