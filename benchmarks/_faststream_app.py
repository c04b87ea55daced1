"""faststream-outbox relaying to Kafka, as its documentation describes, in a process of its own.

    python -m benchmarks._faststream_app SQLALCHEMY_URL KAFKA TOPIC IDEMPOTENT(0|1)

Like our relay it acknowledges a row only after all in-sync replicas have the record, compresses with zstd and carries
key and headers over. Its own settings for a high rate (batched terminal deletes, large claims, many workers) come from
a sweep on two cores; BENCH_FASTSTREAM_WORKERS, _FETCH and _FLUSH repeat it.
"""

import asyncio
import gc
import logging
import os
import sys

from faststream import FastStream
from faststream.kafka import KafkaBroker, KafkaResponse
from faststream_outbox import OutboxBroker, make_outbox_table
from faststream_outbox.annotations import OutboxMessage
from sqlalchemy import MetaData
from sqlalchemy.ext.asyncio import create_async_engine

QUEUE = "events"
MAX_WORKERS = int(os.environ.get("BENCH_FASTSTREAM_WORKERS", "50"))
FETCH_BATCH_SIZE = int(os.environ.get("BENCH_FASTSTREAM_FETCH", "5000"))
FLUSH_BATCH_SIZE = int(os.environ.get("BENCH_FASTSTREAM_FLUSH", "500"))


def app(url: str, kafka: str, topic: str, *, idempotent: bool) -> FastStream:
    """The relay of their guide, with keys."""
    engine = create_async_engine(url, pool_size=MAX_WORKERS + 2)
    outbox = OutboxBroker(engine, outbox_table=make_outbox_table(MetaData(), table_name="outbox"), logger=None)
    bus = KafkaBroker(
        kafka, acks="all", compression_type="zstd", enable_idempotence=idempotent, max_batch_size=262_144, logger=None
    )
    publisher = bus.publisher(topic)

    @publisher
    @outbox.subscriber(
        QUEUE,
        max_workers=MAX_WORKERS,
        fetch_batch_size=FETCH_BATCH_SIZE,
        terminal_flush_batch_size=FLUSH_BATCH_SIZE,
        min_fetch_interval=0.01,
        max_fetch_interval=1.0,
    )
    async def relay(message: OutboxMessage) -> KafkaResponse:
        headers = dict(message.headers)
        return KafkaResponse(message.body, key=headers.pop("key").encode(), headers=headers)

    return FastStream(outbox, on_startup=[bus.connect], after_startup=[_freeze], logger=None)


async def _freeze() -> None:
    gc.collect()
    gc.freeze()


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING)
    asyncio.run(app(*sys.argv[1:4], idempotent=sys.argv[4] == "1").run())
