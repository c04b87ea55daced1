"""FastStream under a consumer: one batch subscriber, raw records, manual acknowledgement, our own rebalance rules.

FastStream polls, and hands batches over one after another; everything that decides anything is in `lanes`. What is set
here, and why:

* `AckPolicy.MANUAL`: no offset is committed for us. `auto_offset_reset=earliest` is never relied on: lanes seek.
* A parser and a decoder of our own, because FastStream's fail on headers without a value and lose tombstones.
* The rebalance timeout is shorter than the request timeout, or the coordinator would be given up while it waits for
  other members; the session is short, because it is how long a killed process keeps its partitions (ADR 0014).
* Fetches are small, so that a poll takes what is there of one or two partitions and the next poll turns to others:
  batches of several partitions are then in flight, and PostgreSQL applies one while another is decoded.
* `read_committed`, so that a transactional relay's aborted batches are never seen.
"""

import asyncio
from collections.abc import Iterable, Sequence
from typing import Any, Final

from faststream import AckPolicy
from faststream.kafka import KafkaBroker
from faststream.kafka.message import KafkaAckableMessage

from outbox import garbage, kafka, limits
from outbox.consumer.apply import Engine
from outbox.consumer.lanes import Lanes
from outbox.consumer.record import Record
from outbox.kafka import TopicPartition
from outbox.settings import Settings

_POLL_MILLISECONDS: Final = 20
_METADATA_MAX_AGE_MILLISECONDS: Final = 5_000
"""How long a topic that is created, or grows, may go unnoticed."""
_HEARTBEAT_MAX_SECONDS: Final = 3.0
_LAST_READS: Final = 4
"""Connections for looking at the last applied record, at a time."""


class _Listener(kafka.RebalanceListener):  # type: ignore[misc] # aiokafka ships no types
    """Passes on what the group decides."""

    def __init__(self, membership: "Membership") -> None:
        self._membership = membership

    async def on_partitions_assigned(self, assigned: Iterable[TopicPartition]) -> None:
        """Pause, begin to claim, return."""
        self._membership.lanes.assigned(assigned)

    async def on_partitions_revoked(self, revoked: Iterable[TopicPartition]) -> None:
        """Finish what is open."""
        await self._membership.lanes.revoked(revoked)


class Membership:
    """This process as a member of a consumer group, from `start` to `stop`."""

    def __init__(self, engine: Engine, servers: str, group: str, topics: Sequence[str], settings: Settings) -> None:
        """Reading `topics` for the consumer group `group`.

        While partitions are taken away no heartbeat may be sent, so open batches get half of the session.
        """
        session_seconds = settings.session_timeout_seconds
        self._servers = servers
        self._reading = asyncio.Semaphore(_LAST_READS)
        self._broker = KafkaBroker(
            servers,
            client_id=f"sagabox-{group}",
            consumer_only=True,
            allow_auto_create_topics=False,
            metadata_max_age_ms=_METADATA_MAX_AGE_MILLISECONDS,
            graceful_timeout=session_seconds / 2,
            apply_types=False,
            logger=None,
        )
        self._subscriber = self._broker.subscriber(
            *topics,
            group_id=group,
            batch=True,
            max_records=limits.CONSUMER_MAX_RECORDS,
            batch_timeout_ms=_POLL_MILLISECONDS,
            ack_policy=AckPolicy.MANUAL,
            parser=_parse,
            decoder=_decode,
            listener=_Listener(self),
            auto_offset_reset="earliest",
            isolation_level="read_committed",
            max_partition_fetch_bytes=limits.FETCH_PARTITION_BYTES,
            fetch_max_wait_ms=int(settings.fetch_wait_seconds * 1000),
            session_timeout_ms=int(session_seconds * 1000),
            heartbeat_interval_ms=int(min(session_seconds / 3, _HEARTBEAT_MAX_SECONDS) * 1000),
            rebalance_timeout_ms=int(limits.REBALANCE_TIMEOUT_SECONDS * 1000),
            max_poll_interval_ms=300_000,
        )
        self._subscriber(self._handle)
        self.lanes = Lanes(engine, _Source(self._subscriber), self._read_one, revoke_seconds=session_seconds / 2)

    async def start(self) -> None:
        """Join the group.

        Raises:
            KafkaError, OSError, TimeoutError: the brokers cannot be reached now; make another membership.
        """
        try:
            await self._broker.start()
        except BaseException:
            await self._broker.stop()
            raise
        consumer: Any = self._subscriber.consumer
        consumer.getmany = garbage.held_in_steps(consumer.getmany)  # FastStream's loop calls it; it makes the records

    async def stop(self) -> None:
        """Finish open batches, tell Kafka how far we are, leave the group."""
        try:
            await self.lanes.commit()
            await self.lanes.close()
        finally:
            await self._broker.stop()

    async def _handle(self, records: Any) -> None:
        await self.lanes.take(records)

    async def _read_one(self, at: TopicPartition, offset: int) -> Record | None:
        async with self._reading, kafka.Tail(self._servers) as tail:
            async for record in tail.read(at.topic, {at.partition: (offset, offset + 1)}):
                if record.offset == offset:
                    found: Record = record
                    return found
        return None


class _Source:
    """The subscriber's aiokafka consumer, which exists from its start on."""

    def __init__(self, subscriber: Any) -> None:
        self._subscriber = subscriber

    def __getattr__(self, name: str) -> Any:
        return getattr(self._subscriber.consumer, name)


async def _parse(records: Any) -> KafkaAckableMessage:
    """The batch as it came, without a look at headers or values."""
    return KafkaAckableMessage(raw_message=records, body=b"", consumer=None)


async def _decode(message: KafkaAckableMessage) -> Any:
    return message.raw_message
