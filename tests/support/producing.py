"""Records into Kafka as a relay writes them, without one."""

from collections.abc import Iterable, Sequence

import aiokafka

from outbox import Event
from outbox.codec import uuid7
from outbox.event import key_text, kind_of
from outbox.kafka import partition_hash
from outbox.wire import Header

LOG = "18c2a3b4d5e-ab12"


def headers_of(event: Event, window: int, ordinal: int) -> list[Header]:
    """As of the relay."""
    position = window * 100_000 + ordinal
    return [
        ("ce_specversion", b"1.0"),
        ("ce_type", kind_of(type(event)).type.encode()),
        ("ce_id", str(uuid7()).encode()),
        ("ob-pos", f"{LOG}/0/{window}/{ordinal}/{position}/{position}".encode()),
    ]


async def produce(servers: str, topic: str, events: Iterable[Event], *, window: int, partitions: int) -> None:
    """One window of events, each on its key's partition."""
    producer = aiokafka.AIOKafkaProducer(bootstrap_servers=servers, max_batch_size=900_000)
    await producer.start()
    try:
        builders = {number: producer.create_batch() for number in range(partitions)}
        for ordinal, event in enumerate(events, start=1):
            key = key_text(getattr(event, kind_of(type(event)).key_field))
            added = builders[partition_hash(key) % partitions].append(
                timestamp=1_750_000_000_000,
                key=key.encode(),
                value=event.model_dump_json().encode(),
                headers=headers_of(event, window, ordinal),
            )
            assert added is not None, "more than a batch holds"
        for number, builder in builders.items():
            if builder.record_count():
                await (await producer.send_batch(builder, topic, partition=number))
    finally:
        await producer.stop()


async def produce_raw(
    servers: str, topic: str, records: Sequence[tuple[bytes | None, bytes | None, Sequence[tuple[str, bytes | None]]]]
) -> None:
    """Records as given, on partition 0."""
    producer = aiokafka.AIOKafkaProducer(bootstrap_servers=servers)
    await producer.start()
    try:
        for key, value, headers in records:
            await producer.send_and_wait(topic, value, key=key, headers=list(headers), partition=0)
    finally:
        await producer.stop()
