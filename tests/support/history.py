"""Reads what a run left behind, for `tests.support.checker`: the whole topic, the business table, the cache.

The topic is read with a plain consumer, not through the product's own reader: a checker that shares code with what it
checks shares its errors.
"""

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any, Final

from aiokafka import AIOKafkaConsumer, ConsumerRecord, TopicPartition
from aiokafka.partitioner import murmur2

from outbox import Pool
from outbox.wire import Envelope, envelope_of
from tests.support.checker import Change, Row, Sample, TopicRecord

READ_TIMEOUT_SECONDS: Final = 60.0

Identify = Callable[[Envelope, bytes], str]
"""The identity of a record (see `Change.identity`), from its headers and its value."""


class TruncatedTopicError(RuntimeError):
    """The topic no longer starts at offset 0, so nobody can say what was on it."""


def kafka_hash(key: str) -> int:
    """What every Kafka client makes of a key; modulo the number of partitions it is the key's partition."""
    return int(murmur2(key.encode())) & 0x7FFFFFFF


@asynccontextmanager
async def topic_reader(servers: str, topic: str) -> AsyncIterator["TopicReader"]:
    """A reader of one topic, outside any consumer group."""
    consumer = AIOKafkaConsumer(
        topic, bootstrap_servers=servers, enable_auto_commit=False, auto_offset_reset="earliest"
    )
    await consumer.start()
    try:
        yield TopicReader(consumer, sorted(consumer.assignment()))
    finally:
        await consumer.stop()


class TopicReader:
    """One topic, whole."""

    def __init__(self, consumer: AIOKafkaConsumer, partitions: Sequence[TopicPartition]) -> None:
        """For `topic_reader`."""
        self._consumer = consumer
        self._partitions = partitions

    def partition_of(self, key: str) -> int:
        """The partition that every Kafka client computes for a key."""
        return kafka_hash(key) % len(self._partitions)

    async def count(self) -> int:
        """How many records have arrived so far, duplicates included.

        They are read, because end offsets tell less: the embedded broker takes the first offset of the last batch for
        its last one.
        """
        await self._consumer.getmany(timeout_ms=0)
        return sum([await self._consumer.position(partition) for partition in self._partitions])

    async def records(self, identify: Identify) -> list[TopicRecord]:
        """Every record from offset 0 to the present end.

        Raises:
            TruncatedTopicError: retention has removed records.
            TimeoutError: the broker did not hand them out in time.
        """
        starts = await self._consumer.beginning_offsets(self._partitions)
        if any(starts.values()):
            raise TruncatedTopicError(f"the topic starts at {starts}: raise its retention for the run")
        ends = await self._consumer.end_offsets(self._partitions)  # see count; batches are handed out whole
        await self._consumer.seek_to_beginning(*self._partitions)
        found: list[ConsumerRecord] = []
        async with asyncio.timeout(READ_TIMEOUT_SECONDS):
            while any([await self._consumer.position(partition) < end for partition, end in ends.items()]):
                for batch in (await self._consumer.getmany(timeout_ms=200)).values():
                    found += batch
        return [_record(raw, identify) for raw in found]


def _record(raw: ConsumerRecord, identify: Identify) -> TopicRecord:
    envelope = envelope_of(raw.headers)
    return TopicRecord(
        partition=raw.partition,
        offset=raw.offset,
        key=(raw.key or b"").decode(errors="replace"),
        event_id=envelope.event_id,
        identity=identify(envelope, raw.value or b""),
        position=envelope.position,
    )


async def read_changes(db: Pool, query: str) -> list[Change]:
    """The truth, from a query for key, version, identity and row (jsonb, null where a cache keeps nothing)."""
    found = await db.fetch(query)
    return [Change(str(row["key"]), row["version"], row["identity"], _decoded(row["row"])) for row in found]


async def read_rows(db: Pool, query: str, *parameters: Any) -> dict[str, Row]:
    """Rows by key, from a query for key and row (jsonb)."""
    return {str(row["key"]): json.loads(row["row"]) for row in await db.fetch(query, *parameters)}


async def read_samples(db: Pool, query: str, keys: Sequence[Any]) -> list[Sample]:
    """What a query for key and row `where key = any($1)` shows of these keys at this moment."""
    rows = await read_rows(db, query, keys)
    return [Sample(str(key), rows.get(str(key))) for key in keys]


def _decoded(row: str | None) -> Row | None:
    return None if row is None else json.loads(row)
