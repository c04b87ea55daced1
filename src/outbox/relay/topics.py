"""Pinned partition counts: a key stays in its partition although its topic grows."""

import asyncio
from typing import Final

from outbox import clock, kafka, postgres
from outbox.postgres import Pool

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
        limit = await kafka.max_message_bytes(self._servers, topic)
        await SQL.pin.execute(self._pool, topic, count, limit)
        await self.load()
        self._missing_since.pop(topic, None)
        return self._counts[topic]

    def missing_seconds(self, topic: str) -> float:
        """For how long a topic has been looked for in vain."""
        return clock.monotonic() - self._missing_since.get(topic, clock.monotonic())
