"""Fills a topic as the relay would, with its own producer.

python -m benchmarks._topic_loader KAFKA TOPIC EVENTS KEYS
"""

import asyncio
import json
import sys

from benchmarks import _limits, cached
from outbox import kafka
from outbox.settings import Settings


async def main(servers: str, topic: str, count: int, keys: int) -> None:
    """Load."""
    producer = kafka.Producer(servers, Settings())
    await producer.start()
    try:
        for window in cached.dealt(count, keys):
            await asyncio.gather(*(_limits.send(producer, topic, at, rows) for at, rows in enumerate(window)))
    finally:
        await producer.stop()
    sys.stdout.write(json.dumps({"n": count}) + "\n")


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])))
