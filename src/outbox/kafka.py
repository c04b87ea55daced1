"""The one door to Kafka: a producer that can be thrown away, and reads of topics; `kafka_admin` is its side door.

aiokafka is used through its batch interface: the relay fills a batch per partition, sends it and waits for its one
acknowledgement. Each call is a crash site (see `crash_sites`). Errors are sorted into three kinds, because each has
another answer: a record that cannot be published (park it), a producer that is finished (make another), and
everything else (wait).
"""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Final, Protocol, Self, TypeAlias

import aiokafka
from aiokafka import errors
from aiokafka.partitioner import murmur2
from aiokafka.producer.message_accumulator import BatchBuilder

from outbox import crash_sites
from outbox.settings import Settings
from outbox.wire import Header

log = logging.getLogger(__name__)

KafkaError = errors.KafkaError
UnknownTopicOrPartitionError = errors.UnknownTopicOrPartitionError
TopicAuthorizationFailedError = errors.TopicAuthorizationFailedError
TopicPartition: TypeAlias = aiokafka.TopicPartition
RebalanceListener: TypeAlias = aiokafka.ConsumerRebalanceListener
ConsumerRecord: TypeAlias = aiokafka.ConsumerRecord

UNPUBLISHABLE: Final = (
    errors.MessageSizeTooLargeError,
    errors.RecordListTooLargeError,
    errors.InvalidMessageError,
    errors.InvalidTopicError,
    errors.PolicyViolationError,
)
"""Refused because of what a batch contains; sending it again would be refused again."""

_SITES: Final = {
    name: crash_sites.register(f"kafka.{name}")
    for name in ("start", "send", "partitions", "counts", "stop", "ends", "tail")
}
_POLL: Final = crash_sites.register("consumer.kafka.poll")
_START_TIMEOUT_SECONDS: Final = 20.0
_NOT_COMPRESSED: Final = 0
_ABORT_TIMEOUT_SECONDS: Final = 2.0


@lru_cache(maxsize=131_072)
def partition_hash(key: str) -> int:
    """Kafka's murmur2 of a key; modulo a partition count it is the partition that every Kafka client computes."""
    return int(murmur2(key.encode())) & 0x7FFFFFFF


class Batch(Protocol):
    """What the relay needs of aiokafka's batch builder."""

    def append(
        self, *, timestamp: int | None, key: bytes | None, value: bytes | None, headers: Sequence[Header]
    ) -> object | None:
        """Add a record; None when the batch is full."""

    def record_count(self) -> int:
        """Records so far."""


class Producer:
    """A producer that is rebuilt when it is finished, idempotent where the broker can."""

    def __init__(self, servers: str, settings: Settings, *, idempotent: bool = True) -> None:
        """A producer for `servers`; connects on first use. Idempotent where that is wanted and the broker can."""
        self._servers = servers
        self._settings = settings
        self._idempotent: bool | None = None if idempotent else False
        self._producer: aiokafka.AIOKafkaProducer | None = None
        self.generation = 0
        """Counts producers, so that only its own failure throws one away."""
        self._starting = asyncio.Lock()

    async def start(self) -> None:
        """Connect, unless connected; finds out once whether the broker supports idempotence.

        Raises:
            KafkaError, OSError, TimeoutError: the broker cannot be reached now.
        """
        async with self._starting:
            if self._producer is not None:
                return
            await crash_sites.visit(_SITES["start"], "before")
            if self._idempotent is not False:
                try:
                    with _quiet_refusal():
                        self._producer = await self._connect(idempotent=True)
                    self._idempotent = True
                except errors.KafkaConnectionError:
                    raise
                except (
                    errors.UnsupportedVersionError,
                    errors.UnknownError,
                    errors.IncompatibleBrokerVersion,
                ) as error:
                    if self._idempotent:
                        raise
                    log.warning("the broker refuses idempotent producers (%r): going on without", error)
                    self._idempotent = False
            if self._producer is None:
                self._producer = await self._connect(idempotent=False)
            self.generation += 1
            await crash_sites.visit(_SITES["start"], "after")

    async def _connect(self, *, idempotent: bool) -> aiokafka.AIOKafkaProducer:
        compression = None if self._settings.compression == "none" else self._settings.compression
        producer = aiokafka.AIOKafkaProducer(
            bootstrap_servers=self._servers,
            acks="all",
            enable_idempotence=idempotent,
            compression_type=compression,
            max_batch_size=self._settings.batch_max_bytes,
            max_request_size=8 * self._settings.batch_max_bytes,
            request_timeout_ms=int(self._settings.publish_timeout_seconds * 1000),
            linger_ms=0,
        )
        try:
            async with asyncio.timeout(_START_TIMEOUT_SECONDS):
                await producer.start()
        except BaseException:
            await _abort(producer)
            raise
        return producer

    def batch(self, *, is_compressed: bool = True) -> Batch:
        """An empty batch of the present producer; a few records are quicker sent than compressed."""
        if self._producer is None:
            raise errors.ProducerClosed
        builder: Batch
        if is_compressed:
            builder = self._producer.create_batch()
        else:
            builder = BatchBuilder(self._settings.batch_max_bytes, _NOT_COMPRESSED)
        return builder

    async def send(self, batch: Batch, topic: str, partition: int) -> int:
        """Send one batch and wait until Kafka has it; the offset of its first record comes back.

        Raises:
            KafkaError, TimeoutError: not known to be published. After anything but `UNPUBLISHABLE` call `discard`.
        """
        producer = self._producer
        if producer is None:
            raise errors.ProducerClosed
        await crash_sites.visit(_SITES["send"], "before")
        next_sequence = _sequence(producer, TopicPartition(topic, partition))
        try:
            acknowledged = await producer.send_batch(batch, topic, partition=partition)
        except AssertionError as error:  # how aiokafka says that the topic has fewer partitions than were pinned
            raise UnknownTopicOrPartitionError(f"{topic}/{partition}") from error
        with _sequence_kept(producer, TopicPartition(topic, partition), next_sequence):
            async with asyncio.timeout(self._settings.publish_timeout_seconds):
                metadata = await acknowledged
        await crash_sites.visit(_SITES["send"], "after")
        return int(metadata.offset)

    async def partitions(self, topic: str) -> int | None:
        """How many partitions a topic has now; None while it does not exist."""
        if self._producer is None:
            raise errors.ProducerClosed
        await crash_sites.visit(_SITES["partitions"], "before")
        try:
            found = await self._producer.partitions_for(topic)
        except errors.UnknownTopicOrPartitionError:
            return None
        await crash_sites.visit(_SITES["partitions"], "after")
        return len(found) if found else None

    async def discard(self, generation: int) -> None:
        """Throw the producer of that generation away, without sending what it still holds."""
        async with self._starting:
            if self._producer is None or self.generation != generation:
                return
            producer, self._producer = self._producer, None
            await _abort(producer)

    async def stop(self) -> None:
        """Close; what is in flight may or may not have been published."""
        async with self._starting:
            if self._producer is None:
                return
            producer, self._producer = self._producer, None
            await crash_sites.visit(_SITES["stop"], "before")
            await _abort(producer)
            await crash_sites.visit(_SITES["stop"], "after")


@contextlib.contextmanager
def _quiet_refusal() -> Iterator[None]:
    """Without aiokafka's own report of a refused InitProducerId: `start` says it once, and what follows from it."""
    reports = logging.getLogger("aiokafka.producer.sender")

    def others(record: logging.LogRecord) -> bool:
        return "InitProducerIdRequest" not in str(record.msg)

    reports.addFilter(others)
    try:
        yield
    finally:
        reports.removeFilter(others)


def _sequence(producer: aiokafka.AIOKafkaProducer, at: TopicPartition) -> int:
    """The number of the next record of a partition; 0 of a producer that is not idempotent."""
    numbers = producer._txn_manager  # noqa: SLF001 - see _sequence_kept
    return int(numbers.sequence_number(at)) if numbers is not None else 0


@contextlib.contextmanager
def _sequence_kept(producer: aiokafka.AIOKafkaProducer, at: TopicPartition, next_sequence: int) -> Iterator[None]:
    """Number the next batch as the refused one was, as Java's producer does; aiokafka goes on behind it.

    The broker has not counted what it refused. To it the next batch would be out of sequence, and the producer be
    thrown away with what it has in flight to other partitions. There is one unacknowledged batch a partition, so
    nothing has been numbered since.
    """
    try:
        yield
    except UNPUBLISHABLE:
        numbers = producer._txn_manager  # noqa: SLF001 - no public way
        if numbers is not None:
            numbers.increment_sequence_number(at, next_sequence - numbers.sequence_number(at))
        raise


def _drop(_batch: object) -> None:
    """Instead of putting a batch back into the queue; whoever waits for the sender's end need not wait for more."""
    raise errors.ProducerClosed


async def _abort(producer: aiokafka.AIOKafkaProducer) -> None:
    """Close the connections first: a sender that is merely stopped would still deliver, late, what it holds."""
    with contextlib.suppress(KafkaError, OSError, TimeoutError, RuntimeError, AttributeError):
        async with asyncio.timeout(_ABORT_TIMEOUT_SECONDS):
            await producer.client.close()
    with contextlib.suppress(KafkaError, OSError, TimeoutError, RuntimeError, asyncio.InvalidStateError):
        async with asyncio.timeout(_ABORT_TIMEOUT_SECONDS):
            pending = producer._message_accumulator  # noqa: SLF001 - no public way to drop batches
            pending.reenqueue = _drop  # or a request in flight puts back what fail_all removes: a KeyError from close()
            pending.fail_all(errors.ProducerClosed())
            await producer._sender.close()  # noqa: SLF001 - stop() would flush, against a broker that may be gone
    with contextlib.suppress(KafkaError, OSError, TimeoutError, RuntimeError, AttributeError):
        async with asyncio.timeout(_ABORT_TIMEOUT_SECONDS):
            await producer.client.close()  # again: the sender may have been opening a connection all the while
    producer._closed = True  # noqa: SLF001 - or its finaliser warns


class Tail:
    """Reads topics without a consumer group: from an offset to their present end, or on and on."""

    def __init__(self, servers: str, *, wait_seconds: float = 0.05) -> None:
        """For `servers`, which hold a fetch for `wait_seconds` while there is nothing new."""
        self._consumer = aiokafka.AIOKafkaConsumer(
            bootstrap_servers=servers,
            enable_auto_commit=False,
            auto_offset_reset="earliest",
            fetch_max_wait_ms=int(wait_seconds * 1000),
        )

    async def __aenter__(self) -> Self:
        """Connect."""
        try:
            async with asyncio.timeout(_START_TIMEOUT_SECONDS):
                await self._consumer.start()
        except BaseException:
            await self._consumer.stop()
            raise
        return self

    async def __aexit__(self, *exc: object) -> None:
        """Disconnect."""
        await self._consumer.stop()

    async def ends(self, topic: str, partition_count: int) -> dict[int, tuple[int, int]]:
        """The first and the next offset of each partition that exists; none of a topic that does not."""
        await crash_sites.visit(_SITES["ends"], "before")
        existing = (await self._partitions()).get(topic, set())
        partitions = [TopicPartition(topic, number) for number in sorted(existing) if number < partition_count]
        if not partitions:
            return {}
        first = await self._consumer.beginning_offsets(partitions)
        end = await self._consumer.end_offsets(partitions)
        await crash_sites.visit(_SITES["ends"], "after")
        return {p.partition: (first[p], end[p]) for p in partitions}

    def go_to(self, topic: str, partition: int, offset: int) -> None:
        """Let `poll` go on there."""
        self._consumer.assign([TopicPartition(topic, partition)])
        self._consumer.seek(TopicPartition(topic, partition), offset)

    async def poll(self, wait_seconds: float) -> list[ConsumerRecord]:
        """The next records, as soon as there are any; none after `wait_seconds`."""
        await crash_sites.visit(_POLL, "before")
        found = await self._consumer.getmany(timeout_ms=int(wait_seconds * 1000))
        await crash_sites.visit(_POLL, "after")
        return [record for records in found.values() for record in records]

    async def counts(self) -> dict[str, int]:
        """How many partitions each topic has at this moment, as far as we may see it."""
        await crash_sites.visit(_SITES["counts"], "before")
        found = await self._partitions()
        await crash_sites.visit(_SITES["counts"], "after")
        return {topic: len(partitions) for topic, partitions in found.items() if partitions}

    async def _partitions(self) -> dict[str, set[int]]:
        """The partitions of every topic, asked now.

        The consumer's own metadata is of the topics that it reads, so before it reads any Apache Kafka has told it of
        none. (The embedded broker tells of all.)
        """
        cluster = await self._consumer._client.fetch_all_metadata()  # noqa: SLF001 - topics() keeps the names only
        return {topic: set(cluster.partitions_for_topic(topic) or ()) for topic in cluster.topics()}

    async def read(self, topic: str, ranges: Mapping[int, tuple[int, int]]) -> AsyncIterator[ConsumerRecord]:
        """Every record of the given partitions from the first offset to before the second."""
        open_ends = {TopicPartition(topic, n): end for n, (start, end) in ranges.items() if start < end}
        if not open_ends:
            return
        self._consumer.assign(list(open_ends))
        for partition in open_ends:
            self._consumer.seek(partition, ranges[partition.partition][0])
        while open_ends:
            await crash_sites.visit(_SITES["tail"], "before")
            found = await self._consumer.getmany(*open_ends, timeout_ms=500)
            await crash_sites.visit(_SITES["tail"], "after")
            for partition, records in found.items():
                for record in records:
                    if record.offset < open_ends[partition]:
                        yield record
            # Transaction markers and compaction leave offsets without a record: only the position tells.
            for partition in list(open_ends):
                if await self._consumer.position(partition) >= open_ends[partition]:
                    del open_ends[partition]
                    self._consumer.pause(partition)
