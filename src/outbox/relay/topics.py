"""Pinned partition counts: a key stays in its partition although its topic grows (H15).

A key's partition is its hash modulo the count that was found when the topic was first published to. Were it Kafka's
present count, half of the keys would move when a topic grows from 4 to 8 partitions, and consumers could see their
newer events before the older ones. So a grown topic is used as before, its new partitions stay empty, and the log says
so.
"""

import asyncio
import logging
from typing import Final

from outbox import clock, kafka, kafka_admin, limits, postgres
from outbox.postgres import Pool

log = logging.getLogger(__name__)

SQL: Final = postgres.Statements("outbox", "relay/topics.sql")
_LOOKUP_TIMEOUT_SECONDS: Final = 2.0


class Topics:
    """Partition counts by topic, pinned in `outbox.topics` when a topic is first published to."""

    def __init__(self, pool: Pool, servers: str, producer: kafka.Producer) -> None:
        """Counts are read on first need."""
        self._pool = pool
        self._servers = servers
        self._producer = producer
        self._counts: dict[str, int] = {}
        self._missing_since: dict[str, float] = {}
        self._alarmed: dict[str, int] = {}

    @property
    def counts(self) -> dict[str, int]:
        """The counts known so far."""
        return self._counts

    async def load(self) -> None:
        """Read what is pinned."""
        rows = await SQL.known.fetch(self._pool)
        self._counts = {row["topic"]: row["partition_count"] for row in rows}

    async def pin(self, topic: str) -> int | None:
        """The pinned count of a topic; None while Kafka does not have the topic."""
        if topic in self._counts:
            return self._counts[topic]
        try:
            async with asyncio.timeout(_LOOKUP_TIMEOUT_SECONDS):
                count = await self._producer.partitions(topic)
        except (TimeoutError, kafka.TopicAuthorizationFailedError):
            count = None  # to us a topic that we may not write to does not exist
        if count is None:
            self._missing_since.setdefault(topic, clock.monotonic())
            return None
        limit = await kafka_admin.max_message_bytes(self._servers, topic)
        await SQL.pin.execute(self._pool, topic, count, limit)
        await self.load()
        self._missing_since.pop(topic, None)
        return self._counts[topic]

    async def keep_comparing(self) -> None:
        """Look now and about once a minute whether Kafka has the pinned counts, until cancelled; an alarm if not."""
        while True:
            if self._counts:
                try:
                    async with kafka.Tail(self._servers) as tail:
                        self._compare(await tail.counts())
                except (kafka.KafkaError, OSError, TimeoutError) as error:
                    log.info("the partition counts of topics could not be read: %r", error)
            await asyncio.sleep(limits.TOPICS_LOOK_SECONDS)

    def _compare(self, present: dict[str, int]) -> None:
        for topic, pinned in self._counts.items():
            count = present.get(topic, pinned)
            if count != pinned and self._alarmed.get(topic) != count:
                log.error(
                    "topic %s has %d partitions and %d are pinned: keys keep the partitions that they have among the "
                    "first %d; see «A topic that grew» in docs/operations.md",
                    topic, count, pinned, pinned,
                )  # fmt: skip
            self._alarmed[topic] = count

    def missing_seconds(self, topic: str) -> float:
        """For how long a topic has been looked for in vain."""
        return clock.monotonic() - self._missing_since.get(topic, clock.monotonic())
