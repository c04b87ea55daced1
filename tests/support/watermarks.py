"""Reads what relays said about how far they got."""

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from aiokafka import AIOKafkaConsumer, TopicPartition

from tests.support.faults import eventually


@dataclass(frozen=True, slots=True)
class Said:
    """One watermark, as it stands in Kafka."""

    key: str
    as_of: datetime
    oldest_xid: int
    shard: int
    shard_count: int
    next_offsets: dict[str, dict[int, int]]
    parked: list[int]


@dataclass(slots=True)
class Heard:
    """All watermarks of one topic so far."""

    consumer: AIOKafkaConsumer
    said: list[Said] = field(default_factory=list)

    async def listen(self) -> list[Said]:
        """Read on to the end."""
        for batch in (await self.consumer.getmany(timeout_ms=20)).values():
            self.said += [_said(record) for record in batch]
        return self.said

    async def first(self) -> Said:
        """Wait for the first one."""

        async def look() -> bool:
            return bool(await self.listen())

        await eventually(look, what="a watermark")
        return self.said[0]

    async def more(self, count: int = 1) -> Said:
        """Wait for so many further ones; the last of them."""
        wanted = len(await self.listen()) + count

        async def look() -> bool:
            return len(await self.listen()) >= wanted

        await eventually(look, what=f"{count} further watermarks")
        return self.said[-1]


def _said(record: Any) -> Said:
    body = json.loads(record.value)
    offsets = {t: {int(p): n for p, n in by.items()} for t, by in body["next_offsets"].items()}
    return Said(
        key=record.key.decode(),
        as_of=datetime.fromisoformat(body["as_of"]),
        oldest_xid=body["oldest_xid"],
        shard=body["shard"],
        shard_count=body["shard_count"],
        next_offsets=offsets,
        parked=body["parked"],
    )


@asynccontextmanager
async def heard(servers: str, topic: str) -> AsyncIterator[Heard]:
    """A reader of a watermark topic, which need not exist yet."""
    consumer = AIOKafkaConsumer(
        bootstrap_servers=servers,
        enable_auto_commit=False,
        auto_offset_reset="earliest",
        fetch_max_wait_ms=20,
        metadata_max_age_ms=100,
    )
    await consumer.start()
    try:

        async def exists() -> bool:
            return topic in await consumer.topics()

        await eventually(exists, what=f"topic {topic}")
        consumer.assign([TopicPartition(topic, 0)])
        yield Heard(consumer)
    finally:
        await consumer.stop()
